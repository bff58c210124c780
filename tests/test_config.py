"""Configs: files, overrides, JSON, and a line for everything that doesn't fit."""

import dataclasses
import json
import math

import hypothesis.strategies as st
import jaxtyping
import pytest
from helpers import ROOT, field_types, one_line_error, other_value, replace_fields
from hypothesis import given

from ddpm_jax import Config, DataConfig, InputError, ModelConfig, OptimConfig, TrainConfig, load_config
from ddpm_jax.config import differences, flatten, from_json, override, to_json
from ddpm_jax.validation import config_schedule

FASHION = ROOT / "configs" / "fashion_mnist.py"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
FIELDS = field_types()
CAN_BE_NONE = {
    "data.image_shape",
    "model.cos_first",
    "model.frequency_shift",
    "model.head_channels",
    "model.norm_eps",
    "model.num_classes",
    "model.pad_all_sides",
    "model.scale_and_shift",
    "optim.clip_norm",
    "train.keep_every_steps",
    "train.preview_every_steps",
    "train.evaluate_every_steps",
    "train.snapshot_every_steps",
    "sample.num_steps",
    "sample.guidance_interval",
}

# Any choice of one value for each name is a valid config.
VALID = {
    "data.source": ["fashion_mnist", "a b.npz", "/x/ü.npy"],
    "data.image_shape": [None, (28, 28, 1), (64, 32, 3)],
    "data.flip": [True, False],
    "data.split": ["train", "test[:10%]"],
    "data.framing": ["center", "random", "pad"],
    "data.sampling": ["natural", "balanced"],
    "data.class_names": [(), ("a", "b c", "ü")],
    "data.device_megabytes": [0, 512],
    "diffusion.schedule": ["linear", "scaled_linear", "cosine", "sigmoid"],
    "diffusion.num_steps": [100, 1000, 4000],
    "diffusion.beta_start": [1e-4, 0.00085],
    "diffusion.beta_end": [0.012, 0.02],
    "diffusion.prediction": ["eps", "x0", "v"],
    "diffusion.variance": ["fixed_small", "fixed_large"],
    "diffusion.timesteps": ["uniform", "stratified", "importance"],
    "diffusion.loss_weight": ["constant", "min_snr", "truncated_snr"],
    "diffusion.min_snr_gamma": [0.5, 5.0],
    "diffusion.label_dropout": [0.0, 0.1],
    "model.channels": [4, 128],
    "model.multipliers": [(1,), (1, 2, 2, 2)],
    "model.attention_resolutions": [(), (16,), (7, 14)],
    "model.num_heads": [1, 4],
    "model.dropout": [0.0, 0.1],
    "model.num_classes": [None, 10],
    "model.style": ["ddpm", "improved"],
    "model.middle_attention": [True, False],
    "model.cos_first": [None, True, False],
    "model.frequency_shift": [None, 0, 1],
    "model.scale_and_shift": [None, True, False],
    "model.pad_all_sides": [None, True, False],
    "model.norm_eps": [None, 1e-5],
    "model.remat": [True, False],
    "model.dtype": ["float32", "bfloat16"],
    "optim.optimizer": ["adam", "adamw"],
    "optim.learning_rate": [2e-5, 1.0],
    "optim.warmup_steps": [0, 5000],
    "optim.decay": ["constant", "cosine"],
    "optim.clip_norm": [None, 1.0],
    "optim.accumulate_steps": [1, 2, 4],
    "optim.ema_decay": [0.0, 0.9999],
    "optim.ema_decays": [(), (0.999,), (0.0, 0.99)],
    "optim.ema_lengths": [(), (0.05, 0.1)],
    "train.batch_size": [4, 128],
    "train.num_steps": [1, 800_000],
    "train.keep_every_steps": [None, 10],
    "sample.sampler": ["ddpm", "ddim", "dpmpp_2m"],
    "sample.num_steps": [None, 1, 100],
    "sample.threshold": ["static", "dynamic", "none"],
    "sample.guidance_interval": [None, (0.0, 0.5), (0.28, 2.9)],
    "sample.guidance_rescale": [0.0, 0.7, 1.0],
    "sample.spacing": ["uniform", "trailing", "quadratic", "logsnr", "karras"],
    "seed": [0, 2**32 - 1],
}
overrides = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALID.items()})


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def write_config(folder, text):
    path = folder / "run.py"
    path.write_text("from ddpm_jax import *\nfrom ddpm_jax import ModelConfig, OptimConfig, TrainConfig\n" + text)
    return path


def test_load_config_replaces_what_is_named_and_nothing_else():
    plain = load_config(FASHION)
    values = {
        "train.num_steps": 500,
        "model.multipliers": [1, 3],
        "optim.clip_norm": None,
        "data.flip": not plain.data.flip,
        "seed": 9,
    }
    expected = flatten(plain) | values | {"model.multipliers": (1, 3)}
    assert flatten(load_config(FASHION, values)) == expected
    assert flatten(load_config(str(FASHION))) == flatten(plain) != expected


@given(overrides)
def test_overrides_arrive(values):
    assert flatten(load_config(FASHION, values)) == flatten(load_config(FASHION)) | values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_json_round_trip_of_config_files(path):
    config = load_config(path)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@given(overrides)
def test_json_round_trip(values):
    config = override(Config(), values)
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    before, after = flatten(config), flatten(again)
    assert {name: type(value) for name, value in before.items()} == {name: type(value) for name, value in after.items()}


def test_json_of_an_older_version_takes_the_defaults():
    values = to_json(load_config(FASHION))
    del values["sample.eta"]
    assert from_json(values) == load_config(FASHION)
    assert from_json({}) == Config()


@pytest.mark.parametrize("values", [None, [1], "text", 3])
def test_json_that_is_no_object(values):
    one_line_error(from_json, values, fragments=["config"])


@pytest.mark.parametrize(
    ("typo", "name"),
    [("train.num_step", "train.num_steps"), ("modle.channels", "model.channels"), ("sample.sampl", "sample.sampler"),
     ("optim.lerning_rate", "optim.learning_rate"), ("sead", "seed"), ("diffusion.beta_stop", "diffusion.beta_start")],
)  # fmt: skip
def test_unknown_field_names_the_nearest(typo, name):
    one_line_error(load_config, FASHION, {typo: 1}, fragments=[repr(typo), repr(name)])


@pytest.mark.parametrize("name", ["zzzzzz", "", "train", "train.", ".seed", "seed.x", "train.num_steps.x"])
def test_unknown_field_without_a_neighbour(name):
    one_line_error(override, Config(), {name: 1}, fragments=["unknown", repr(name)])


def wrong_values(name, hint):
    """Values of a wrong type for a field, made from the text of its type."""
    text = str(hint)
    if name not in CAN_BE_NONE:
        yield None
    yield {"a": 1}
    yield object()
    if "Literal" in text:
        yield from ("no such choice", "", 1, ["eps"])
    elif "tuple" in text:
        yield from (3, "16", [1.5], [True], [None], [[1]], {1, 2})
        yield [1] if "str" in text else ["1"]
        if "..." not in text:
            yield from ([], [28], [28, 28, 1, 1])
        if "float" in text:
            yield from ([0.5, "1"], [True, 2.0], [0.5, None])
    elif "bool" in text:
        yield from (0, 1, "true", [True], 1.0)
    elif "int" in text:
        yield from ("3", 3.0, 2.5, True, [3])
    elif "float" in text:
        yield from ("0.5", True, [0.5], 1j)
    else:
        assert hint is str
        yield from (3, True, ["a.npy"], ROOT)


@pytest.mark.parametrize(("name", "hint"), FIELDS.items(), ids=list(FIELDS))
def test_wrong_types(name, hint):
    for value in wrong_values(name, hint):
        one_line_error(
            override,
            Config(),
            {name: value},
            fragments=[name],
        )


@pytest.mark.parametrize("name", sorted(CAN_BE_NONE))
def test_none_where_it_is_allowed(name):
    assert flatten(override(Config(), {name: None}))[name] is None


def test_whole_numbers_are_floats_and_lists_are_tuples():
    values = flatten(
        override(Config(), {"optim.clip_norm": 2, "data.image_shape": [8, 8, 3], "model.attention_resolutions": []})
    )
    assert values["optim.clip_norm"] == 2.0 and type(values["optim.clip_norm"]) is float
    assert values["data.image_shape"] == (8, 8, 3) and values["model.attention_resolutions"] == ()


BOUNDS = {  # the nearest values outside the range, and those at its ends
    "data.device_megabytes": ([-1], [0]),
    "data.image_shape": ([(0, 0, 1), (28, 28, 0), (28, -28, 1)], [None, (1, 1, 1)]),
    "data.num_workers": ([0, -1], [1]),
    "data.max_unusable": ([-0.1, 1], [0]),
    "diffusion.num_steps": ([0, -3], [1000]),
    "diffusion.min_snr_gamma": ([0, -5], [1e-3]),
    "diffusion.label_dropout": ([-0.1, 1], [0, 0.5]),
    "model.channels": ([3, 0], [4]),
    "model.num_res_blocks": ([0], [1]),
    "model.dropout": ([-1e-9, 1, 1.5], [0]),
    "model.num_groups": ([0], [1]),
    "model.num_heads": ([0, -1], [1]),
    "model.head_channels": ([0, -1], [None, 1]),
    "model.frequency_shift": ([-1, 64], [None, 0, 63]),
    "model.norm_eps": ([0, -1e-5, math.inf], [None, 1e-12]),
    "model.num_classes": ([0], [1]),
    "model.space_to_depth": ([0], [1]),
    "optim.learning_rate": ([0, -1e-4], [1e-9]),
    "optim.b1": ([-0.1, 1], [0]),
    "optim.b2": ([-0.1, 1], [0]),
    "optim.eps": ([0, -1e-8], [1e-12]),
    "optim.weight_decay": ([-1e-9], [0]),
    "optim.warmup_steps": ([-1], [0]),
    "optim.clip_norm": ([0, -1], [1e-9]),
    "optim.accumulate_steps": ([0, -1], [1]),
    "optim.ema_decay": ([-0.1, 1], [0]),
    "train.batch_size": ([0, -128], [1]),
    "train.num_steps": ([0, -1], [1]),
    "train.fsdp": ([0], [1]),
    "train.storage_timeout": ([0], [1]),
    "train.steps_per_dispatch": ([0], [1]),
    "train.log_every_steps": ([0], [1]),
    "train.checkpoint_every_steps": ([0], [1]),
    "train.keep_last": ([0], [1]),
    "train.keep_every_steps": ([0], [1]),
    "train.preview_every_steps": ([0], [1]),
    "train.preview_images": ([0], [1]),
    "train.evaluate_every_steps": ([0], [1]),
    "train.evaluate_images": ([0], [1]),
    "train.evaluate_reference_images": ([0], [1]),
    "train.snapshot_every_steps": ([0], [1]),
    "sample.num_steps": ([0, -1, 1001], [1, 1000]),
    "sample.eta": ([-0.1, 1.1], [0, 1]),
    "sample.batch_size": ([0], [1]),
    "sample.guidance": ([-1, math.inf], [1]),
    "sample.guidance_interval": ([(0.5, 0.5), (-1, 1), (2, 1)], [None, (0, math.inf)]),
    "sample.guidance_rescale": ([-0.1, 1.1], [0, 1]),
    "seed": ([-1, 2**32], [0, 2**32 - 1]),
    "model.multipliers": ([(), (1, 0), (-1,)], [(1,)]),
    "optim.ema_decays": ([(1.0,), (0.9, -0.1), (0.9, 0.9), (math.nan,)], [(), (0.0, 0.9)]),
    "optim.ema_lengths": ([(0.0,), (0.1, 0.289), (0.1, 0.1), (math.nan,)], [(), (0.01, 0.2886)]),
}


@pytest.mark.parametrize(("name", "outside", "inside"), [(name, *values) for name, values in BOUNDS.items()], ids=list(BOUNDS))
def test_ranges(name, outside, inside):
    for value in inside:
        assert flatten(override(Config(), {name: value}))[name] == value
    for value in outside:
        one_line_error(override, Config(), {name: value}, fragments=[name])


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
@pytest.mark.parametrize("name", ["beta_start", "beta_end"])
@pytest.mark.parametrize("value", [0, -1e-4, 1, 1.5])
def test_betas_outside_the_unit_interval(kind, name, value):
    one_line_error(
        override, Config(), {"diffusion.schedule": kind, f"diffusion.{name}": value}, fragments=["diffusion", "beta"]
    )


def test_too_few_steps_for_the_betas():
    # 1000 / 20 x 0.02 = 1
    one_line_error(override, Config(), {"diffusion.num_steps": 20, "sample.num_steps": 1}, fragments=["beta", "(0, 1)"])
    override(Config(), {"diffusion.num_steps": 21, "sample.num_steps": 1})


@pytest.mark.parametrize("name", [name for name, hint in FIELDS.items() if "float" in str(hint) and "Literal" not in str(hint)])
def test_not_a_number(name):
    one_line_error(override, Config(), {name: math.nan}, fragments=[name.partition(".")[0], "nan"])


@pytest.mark.parametrize("name", ["optim.learning_rate", "optim.eps", "optim.weight_decay", "optim.b1", "sample.eta"])
def test_infinite_numbers(name):
    one_line_error(override, Config(), {name: math.inf, "optim.optimizer": "adamw"}, fragments=[name, "inf"])


def test_adam_has_no_weight_decay():
    one_line_error(override, Config(), {"optim.weight_decay": 0.1}, fragments=["optim.weight_decay = 0.1", "adamw"])
    override(Config(), {"optim.weight_decay": 0.1, "optim.optimizer": "adamw"})


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"variance": "learned_range"}, ["diffusion.loss = simple", "learned_range", "hybrid or vlb"]),
        ({"loss": "hybrid"}, ["diffusion.loss = hybrid", "fixed_large", "simple or vlb"]),
        ({"loss": "hybrid", "variance": "fixed_small"}, ["diffusion.loss = hybrid", "fixed_small"]),
        ({"loss": "vlb", "loss_weight": "min_snr"}, ["diffusion.loss_weight = min_snr", "vlb", "constant"]),
        ({"loss": "vlb", "loss_weight": "truncated_snr"}, ["diffusion.loss_weight = truncated_snr", "vlb", "constant"]),
        ({"zero_terminal_snr": True}, ["diffusion.prediction = eps", "zero_terminal_snr", "v or x0"]),
        ({"zero_terminal_snr": True, "prediction": "v", "loss_weight": "min_snr"}, ["min_snr", "zero_terminal_snr"]),
        ({"zero_terminal_snr": True, "prediction": "v", "num_steps": 1, "schedule": "cosine"}, ["2 steps or more"]),
    ],
)  # fmt: skip
def test_objectives_that_do_not_go_together(values, fragments):
    values = {f"diffusion.{name}": value for name, value in values.items()} | {"sample.num_steps": None}
    one_line_error(override, Config(), values, fragments=fragments)


@pytest.mark.parametrize("values", [
    {"variance": "learned_range", "loss": "hybrid", "loss_weight": "min_snr", "timesteps": "importance"},
    {"variance": "learned_range", "loss": "vlb", "timesteps": "importance"},
    {"variance": "fixed_small", "loss": "vlb", "prediction": "x0"},
    {"zero_terminal_snr": True, "prediction": "x0", "loss_weight": "truncated_snr"},
    {"zero_terminal_snr": True, "prediction": "v", "variance": "learned_range", "loss": "hybrid"},
    {"zero_terminal_snr": True, "prediction": "v", "num_steps": 2, "schedule": "cosine"},
])  # fmt: skip
def test_objectives_that_go_together(values):
    values = {f"diffusion.{name}": value for name, value in values.items()} | {"sample.num_steps": None}
    config = override(Config(), values)
    assert bool(config_schedule(config).alpha_bar[-1] == 0) == config.diffusion.zero_terminal_snr


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "unipc"])
def test_eta_is_refused_by_samplers_that_have_none(sampler):
    one_line_error(override, Config(), {"sample.sampler": sampler, "sample.eta": 0.5}, fragments=["sample.eta = 0.5", sampler])
    override(Config(), {"sample.sampler": "ddim", "sample.eta": 0.5})


def test_guidance_needs_classes_and_label_dropout():
    one_line_error(override, Config(), {"sample.guidance": 3}, fragments=["sample.guidance = 3.0", "model.num_classes"])
    values = {"model.num_classes": 10, "sample.guidance": 0}
    assert override(Config(), values).sample.guidance == 0
    values["diffusion.label_dropout"] = 0.0
    one_line_error(override, Config(), values, fragments=["sample.guidance = 0.0", "diffusion.label_dropout"])
    override(Config(), values | {"sample.guidance": 1})


def test_stored_runs_that_are_older_than_label_dropout():
    """With classes they were trained without it, and without classes it makes no difference."""
    for num_classes, rate in ((None, 0.1), (10, 0.0)):
        values = to_json(override(Config(), {"model.num_classes": num_classes}))
        del values["diffusion.label_dropout"]
        assert from_json(values).diffusion.label_dropout == rate


def test_every_number_has_a_lower_bound():
    numeric = {name for name, hint in FIELDS.items() if hint in (int, float, int | None, float | None)}
    betas = {"diffusion.beta_start", "diffusion.beta_end"}
    assert numeric - betas <= set(BOUNDS)


def test_batch_that_accumulation_does_not_divide():
    values = {"train.batch_size": 10, "optim.accumulate_steps": 4}
    one_line_error(override, Config(), values, fragments=["train.batch_size = 10", "optim.accumulate_steps = 4"])


def test_heads_share_the_channels_of_every_level():
    values = {"model.channels": 6, "model.multipliers": (2, 1), "model.num_heads": 4}
    one_line_error(override, Config(), values, fragments=["model.num_heads = 4", "model.channels = 6", "[2, 1]"])
    override(Config(), values | {"model.multipliers": (2, 4)})


def test_heads_are_given_by_their_number_or_by_their_channels():
    values = {"model.head_channels": 8, "model.num_heads": 2}
    one_line_error(override, Config(), values, fragments=["model.num_heads = 2", "model.head_channels = 8"])


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_config_file_that_is_none(tmp_path, name):
    one_line_error(load_config, tmp_path / name, fragments=[str(tmp_path / name), "no config file"])


@pytest.mark.parametrize(
    ("text", "fragment"),
    [("1 / 0", "ZeroDivisionError"), ("import no_such_module", "no_such_module"), ("config = Config(", "SyntaxError"),
     ("config = Config(sead=1)", "sead"), ("", "config"), ("config = None", "config"), ("config = {'seed': 1}", "config"),
     ("config = Config", "config"), ("config = TrainConfig()", "config"), ("config = Config(seed=-1)", "seed = -1"),
     ("config = Config(optim=OptimConfig(b1=2.0))", "optim.b1 = 2.0")],
)  # fmt: skip
def test_config_file_that_is_broken(tmp_path, text, fragment):
    path = write_config(tmp_path, text)
    one_line_error(load_config, path, fragments=[fragment])


def test_config_file_that_raises_in_several_lines(tmp_path):
    one_line_error(load_config, write_config(tmp_path, "raise ValueError('first\\nsecond')"), fragments=["ValueError", "first"])


def test_config_file_that_exits(tmp_path):
    with pytest.raises(InputError):
        load_config(write_config(tmp_path, "import sys\nsys.exit('stop')"))


@pytest.mark.parametrize(
    ("text", "name"),
    [("train=TrainConfig(batch_size='32')", "train.batch_size"), ("train=TrainConfig(num_steps=10.0)", "train.num_steps"),
     ("model=ModelConfig(multipliers=2)", "model.multipliers"), ("model=ModelConfig(dtype='float16')", "model.dtype"),
     ("seed='1'", "seed"), ("model=ModelConfig(channels=None)", "model.channels")],
)  # fmt: skip
def test_config_file_with_a_value_of_a_wrong_type(tmp_path, text, name):
    one_line_error(load_config, write_config(tmp_path, f"config = Config({text})"), fragments=[name])


def test_a_list_in_a_config_file_is_a_tuple(tmp_path):
    config = load_config(write_config(tmp_path, "config = Config(model=ModelConfig(multipliers=[1, 2]))"))
    assert config.model.multipliers == (1, 2)
    assert hash(config) == hash(override(Config(), {"model.multipliers": (1, 2)}))


# Decides what is written or how it is laid out, not what a run computes.
HARMLESS = {name for name in FIELDS if name.startswith("sample.")} | {
    "data.device_megabytes", "data.num_workers", "data.max_unusable",
    "train.num_steps", "train.fsdp", "train.non_finite", "train.storage_timeout", "train.steps_per_dispatch",
    "train.log_every_steps",
    "train.checkpoint_every_steps", "train.keep_last",
    "train.keep_every_steps", "train.preview_every_steps", "train.preview_images", "train.snapshot_every_steps",
    "train.evaluate_every_steps", "train.evaluate_metrics", "train.evaluate_images", "train.evaluate_reference_images",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_differences_of_one_field(name):
    old = Config()
    value = other_value(FIELDS[name], flatten(old)[name])
    new = replace_fields(old, {name: value})
    if name == "data.class_names":
        old = replace_fields(old, {name: ("c",)})  # those that come to be known change nothing
    texts = differences(old, new)
    if name in HARMLESS:
        assert texts == []
    else:
        assert len(texts) == 1 and len(texts[0].splitlines()) == 1
        assert all(part in texts[0] for part in (name, str(flatten(old)[name]), str(value)))


@pytest.mark.parametrize(("old", "new", "count"), [((), ("a", "b"), 0), (("a", "b"), (), 0), (("a", "b"), ("b", "a"), 1)])
def test_names_of_classes_may_come_but_not_change(old, new, count):
    """Runs that are older than names have none; other names would mean other classes."""
    old, new = (override(Config(), {"data.class_names": names}) for names in (old, new))
    texts = differences(old, new)
    assert len(texts) == count and all(text.startswith("data.class_names: ('a', 'b') -> ('b', 'a')") for text in texts)


def test_no_differences():
    assert differences(load_config(FASHION), load_config(FASHION)) == []


@pytest.mark.parametrize(("decay", "count"), [("constant", 0), ("cosine", 1)])
def test_more_steps_change_a_cosine(decay, count):
    old = Config(optim=OptimConfig(decay=decay), train=TrainConfig(num_steps=100))
    new = dataclasses.replace(old, train=TrainConfig(num_steps=200))
    texts = differences(old, new)
    assert len(texts) == count and all("train.num_steps" in text and "100" in text and "200" in text for text in texts)


def test_several_differences():
    old = Config()
    new = Config(data=DataConfig(flip=True), model=ModelConfig(channels=64), seed=1)
    names = [text.partition(":")[0] for text in differences(old, new)]
    assert sorted(names) == ["data.flip", "model.channels", "seed"]


def test_configs_are_hashable_and_frozen():
    assert len({load_config(FASHION), load_config(FASHION), Config()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
