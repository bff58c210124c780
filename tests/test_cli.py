"""train.py and sample.py as a user meets them: help, one line and exit status 2 for bad input, and what they write."""

import ast
import errno
import functools
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from helpers import ROOT, field_types, load_script, one_line_error, other_value, replace_fields, run_script, start_script
from PIL import Image

from ddpm_jax import Config, DataConfig, InputError, NonFiniteLossError, cli, load, load_config
from ddpm_jax.config import flatten
from ddpm_jax.data import load_images
from ddpm_jax.images import make_grid
from ddpm_jax.joining import PROCESS_OPTIONS, Processes

train, sample = load_script("train.py"), load_script("sample.py")


@pytest.fixture(autouse=True)
def signals():
    """What SIGTERM does afterwards is what it did before: a command line changes it for good. So with dropped exceptions."""
    before, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    yield
    signal.signal(signal.SIGTERM, before)
    sys.unraisablehook = hook


# What these tests count on, whatever the default config says.
NETWORK = "--model.multipliers 1 1 --model.num-res-blocks 1 --model.attention-resolutions 7 --model.space-to-depth 2".split()  # noqa: SIM905
BASE = [*NETWORK, "--diffusion.schedule", "linear", "--train.batch-size", "32", "--sample.num-steps", "50"]
TINY = [
    *NETWORK,
    *("--model.channels", "8", "--diffusion.schedule", "linear", "--diffusion.prediction", "v", "--optim.decay", "cosine"),
    *("--optim.warmup-steps", "0", "--optim.learning-rate", "0.03", "--train.batch-size", "8", "--train.num-steps", "4"),
    *("--train.preview-images", "4", "--train.preview-every-steps", "4", "--sample.sampler", "ddim", "--sample.num-steps", "2"),
]
NUM_IMAGES = 7


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the folder "run" of a trained run."""
    folder = tmp_path_factory.mktemp("cli")
    errors = run_script("train.py", "--workdir", "run", *TINY, cwd=folder)
    (folder / "train.log").write_text(errors)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return load(run)


def edited(run, target, **values):
    """A copy of a run whose checkpoint's config says something else."""
    shutil.copytree(run, target)
    path = target / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    stored = content["custom_metadata"]
    assert set(values) <= set(stored["config"])
    stored["config"].update(values)
    del stored["crc32"]  # the change is not to pass for damage
    path.write_text(json.dumps(content))
    return target


# Help


def docstrings(path):
    """{class: {field: the string below it}}, and {class: {field: annotation}}, read from the source."""
    texts, annotations = {}, {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            pairs = [pair for pair in zip(node.body, [*node.body[1:], None], strict=True) if isinstance(pair[0], ast.AnnAssign)]
            texts[node.name] = {field.target.id: text.value.value for field, text in pairs if isinstance(text, ast.Expr)}
            annotations[node.name] = {field.target.id: ast.unparse(field.annotation) for field, _ in pairs}
    return texts, annotations


def help_text(main, argv, capsys, monkeypatch):
    """What --help prints, without frames and white space."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert not end.value.code
    output = capsys.readouterr()
    assert output.err == ""
    return re.sub(r"[│╭╮╰╯─\s]+", "", output.out)


def assert_explained(text, name, sentence, default):
    assert re.fullmatch(r"[A-Z\"].{8,}\.", sentence, re.DOTALL), f"{name} needs a sentence, not {sentence!r}"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    sentence, shown = ("".join(part.split()) for part in (sentence, shown))
    dashed = "--" + name.replace("_", "-")
    option = rf"{re.escape(dashed)}(,--[a-z.-]*no-[a-z-]+)?(?:(?!--).)*?"
    assert re.search(option + re.escape(f"{sentence}(default:{shown})"), text), f"{name}: no {sentence}(default: {shown})"


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_help_of_train(name, capsys, monkeypatch):
    """Every field of the config, with its sentence, and its value in the config file as the default."""
    path = ROOT / "configs" / f"{name}.py"
    text = help_text(train.main, ["--config", str(path)], capsys, monkeypatch)
    texts, annotations = docstrings(ROOT / "ddpm_jax" / "config" / "fields.py")
    fields = flatten(load_config(path))
    assert len(fields) > 40
    for field, default in fields.items():
        section, _, last = field.rpartition(".")
        sentence = texts[annotations["Config"][section] if section else "Config"][last]
        assert_explained(text, field, sentence, default)
    assert "--configPATH" in text and "--workdirPATH" in text and f"runs/{name})" in text


def test_help_of_sample(capsys, monkeypatch):
    text = help_text(sample.main, [], capsys, monkeypatch)
    texts, annotations = docstrings(ROOT / "sample.py")
    assert len(annotations["Arguments"]) > 10
    for field in set(annotations["Arguments"]) - {"processes"}:
        assert_explained(text, field, texts["Arguments"][field], getattr(sample.Arguments(), field))
    texts, annotations = docstrings(ROOT / "ddpm_jax" / "joining.py")
    for field in annotations["Processes"]:
        assert_explained(text, f"processes.{field}", texts["Processes"][field], getattr(Processes(), field))


# Parsing


def as_options(name, value, hint):
    dashed = name.replace("_", "-")
    if hint is bool:
        section, _, last = dashed.rpartition(".")
        return [f"--{dashed}" if value else f"--{section}.no-{last}"]
    return [f"--{dashed}", *map(str, value if isinstance(value, tuple) else [value])]


def parse(*argv):
    default = train.Arguments(Path("a.py"), Path("runs"), Processes(), Config())
    return cli.parse(train.Arguments, argv, default, {"config", "workdir", *PROCESS_OPTIONS, *flatten(Config())}, "")


def test_every_field_can_be_overridden():
    before, types = flatten(Config()), field_types()
    values = {name: other_value(types[name], value) for name, value in before.items()}
    assert all(values[name] != before[name] for name in before)
    parsed = parse(*(token for name, value in values.items() for token in as_options(name, value, types[name])))
    assert flatten(parsed.run) == values
    assert parsed.run == replace_fields(Config(), values)
    assert parse().run == Config()


def test_spellings_of_options():
    parsed = parse("--train.num_steps=5", "--optim.clip-norm", "None", "--data.source=a=b.npz", "--seed", "1", "--seed", "2")
    values = {"train.num_steps": 5, "optim.clip_norm": None, "data.source": "a=b.npz", "seed": 2}
    assert flatten(parsed.run) == flatten(Config()) | values


def test_errors_on_a_terminal_are_the_same(monkeypatch):
    """With colours in what tyro prints, and in a narrow window."""
    argv = ["--train.num-steps", "x"]
    plain = one_line_error(parse, *argv, fragments=["train.num-steps", "'x'"])
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert one_line_error(parse, *argv, fragments=[]) == plain


@pytest.mark.parametrize(
    ("argv", "value"),
    [("", None), ("--config a.py", "a.py"), ("--config=a.py", "a.py"), ("--seed 1 --config a.py --config b.py", "b.py"),
     ("--config", None), ("--config=", ""), ("--configs a.py", None)],
)  # fmt: skip
def test_option(argv, value):
    assert cli.option(argv.split(), "config") == value


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(None, 0, ""), (InputError("seed = -1: must be\n0 or more"), 2, "error: seed = -1: must be 0 or more\n"),
     (NonFiniteLossError("the loss is nan"), 1, "error: the loss is nan\n"), (KeyboardInterrupt(), 130, ""),
     (cli._Terminated(), 143, ""),
     (OSError(errno.ENOSPC, "No space left on device", "a.png"), 2, "error: [Errno 28] No space left on device: 'a.png'\n")],
)  # fmt: skip
def test_exit_statuses(error, status, line, capsys, monkeypatch):
    def main(argv):
        assert argv == ["--seed", "1"]
        if error is not None:
            raise error

    monkeypatch.setattr(cli, "log_to_terminal", lambda: None)
    monkeypatch.setattr(cli, "end_now", lambda message, status: sys.exit(status))  # it would end the tests, too
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "1"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == status
    assert capsys.readouterr() == ("", line)


def test_sigterm_ends_a_program_that_does_nothing_about_it(monkeypatch):
    monkeypatch.setattr(cli, "log_to_terminal", lambda: None)
    monkeypatch.setattr(cli, "end_now", lambda message, status: sys.exit(status))
    with pytest.raises(SystemExit) as end:
        cli.run(lambda argv: os.kill(os.getpid(), signal.SIGTERM))
    assert end.value.code == 143


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_comes_within_a_callback_is_not_dropped(number, status, capsys, monkeypatch):
    def main(argv):
        gc.callbacks.append(lambda phase, info: gc.callbacks.pop() and signal.raise_signal(number))
        gc.collect()
        time.sleep(60)

    monkeypatch.setattr(cli, "log_to_terminal", lambda: None)
    monkeypatch.setattr(cli, "end_now", lambda message, status: sys.exit(status))
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == status
    assert capsys.readouterr() == ("", "")


def test_device_memory_that_is_too_small(capsys, monkeypatch):
    def main(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating 9 GB\n")

    monkeypatch.setattr(cli, "log_to_terminal", lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1
    assert error.startswith("error: ") and "memory" in error and "batch" in error


@pytest.mark.parametrize("error", [ValueError("a defect"), jax.errors.JaxRuntimeError("INTERNAL: a defect")])
def test_defects_are_not_hidden(monkeypatch, error):
    def main(argv):
        raise error

    monkeypatch.setattr(cli, "log_to_terminal", lambda: None)
    with pytest.raises(type(error), match="a defect"):
        cli.run(main)


# Bad input of train.py. The run folder can't be written, so that a run which should not start doesn't.


def refused(tmp_path, *argv, fragments):
    (tmp_path / "file").touch()
    message = one_line_error(
        train.main, [*BASE, *map(str, argv), "--workdir", str(tmp_path / "file" / "run")], fragments=fragments
    )
    assert "run folder" not in message, message


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ("--trian.num-steps 3", ["trian.num-steps", "'train.num-steps'"]),
        ("--model.chanels=3", ["model.chanels", "'model.channels'"]),
        ("--data.no-flop", ["data.no-flop", "'data.flip'"]),
        ("--wordkir runs/a", ["wordkir", "'workdir'"]),
        ("--zzz 1", ["zzz"]),
        ("stray", ["stray"]),
        ("--train.num-steps x", ["train.num-steps", "'x'"]),
        ("--train.num-steps 1.5", ["train.num-steps", "'1.5'"]),
        ("--train.num-steps", ["train.num-steps"]),
        ("--train.num-steps None", ["train.num-steps", "'None'"]),
        ("--optim.learning-rate fast", ["optim.learning-rate", "fast"]),
        ("--data.flip maybe", ["maybe"]),
        ("--model.multipliers 1 x", ["model.multipliers", "x"]),
        ("--data.image-shape 28 28", ["data.image-shape", "28"]),
        ("--model.dtype float16", ["model.dtype", "float16", "bfloat16"]),
        ("--diffusion.schedule cosin", ["diffusion.schedule", "cosin", "cosine"]),
        ("--config missing.py", ["missing.py"]),
        ("--config=.", ["config"]),
        ("--config", ["config"]),
        ("--seed -1", ["seed = -1"]),
        ("--seed 4294967296", ["seed = 4294967296"]),
        ("--diffusion.num-steps 0", ["diffusion.num_steps = 0"]),
        ("--diffusion.num-steps -5", ["diffusion.num_steps = -5"]),
        ("--diffusion.beta-end 1.5", ["beta", "(0, 1)"]),
        ("--diffusion.beta-end 1", ["beta", "(0, 1)"]),
        ("--diffusion.beta-start 0", ["beta", "(0, 1)"]),
        ("--diffusion.beta-start -1", ["beta", "(0, 1)"]),
        ("--diffusion.num-steps 5 --sample.num-steps 5", ["beta", "(0, 1)"]),
        ("--sample.num-steps 1001", ["sample.num_steps", "1001", "1000"]),
        # 28 = 4 x 7: two halvings, one of which the patches take
        ("--model.multipliers 1 1 1", ["model.multipliers = (1, 1, 1)", "28x28", "multiples of 8"]),
        ("--model.multipliers 1 1 1 1 --model.space-to-depth 1", ["model.multipliers", "28x28", "multiples of 8"]),
        ("--model.space-to-depth 3", ["space_to_depth = 3", "28x28"]),
        ("--data.image-shape 32 32 4", ["fashion_mnist", "(28, 28, 1)", "(32, 32, 4)"]),
        ("--train.batch-size 12", ["train.batch_size = 12", "8 devices", "8 or 16"]),
        ("--train.batch-size 3", ["train.batch_size = 3", "8 devices", "use 8"]),
        ("--train.batch-size 16 --optim.accumulate-steps 4", ["train.batch_size = 16", "8 devices", "4", "use 32"]),
        ("--model.num-classes 9", ["model.num_classes = 9", "label 9"]),
        ("--data.source missing.npz", ["data.source", "missing.npz", "fashion_mnist"]),
    ],
)
def test_bad_input_of_train(tmp_path, argv, fragments):
    refused(tmp_path, *argv.split(), fragments=fragments)


def pixels(value=None, shape=(16, 28, 28, 1), dtype=np.float32):
    images = np.full(shape, -1, np.float32)
    if value is not None:
        images[-1, -1, -1, -1] = value
    return images.astype(dtype)


@pytest.mark.parametrize(
    ("images", "fragments"),
    [
        (pixels(dtype=np.float64), ["float64", "float32", "uint8"]),
        (pixels(shape=(16, 784)), ["(16, 784)", "[N, H, W, C]"]),
        (pixels(shape=(0, 28, 28, 1)), ["no images"]),
        (pixels(np.nan), ["NaN"]),
        (pixels(255), ["[-1, 255]", "[-1, 1]"]),
        (pixels(shape=(16, 30, 28, 1)), ["30x28", "multiples of 4"]),
    ],
    ids=["dtype", "shape", "empty", "NaN", "range", "resolution"],
)
def test_bad_images(tmp_path, images, fragments):
    path = tmp_path / "set.npy"
    np.save(path, images)
    refused(tmp_path, "--data.source", path, fragments=fragments if "multiples of 4" in fragments else [str(path), *fragments])


def test_classes_without_labels(tmp_path):
    np.save(tmp_path / "set.npy", pixels())
    fragments = ["model.num_classes = 10", "no labels"]
    refused(tmp_path, "--data.source", tmp_path / "set.npy", "--model.num-classes", 10, fragments=fragments)


def test_run_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for workdir in (file, file / "run"):
        one_line_error(train.main, ["--workdir", str(workdir), *TINY], fragments=[str(workdir), "--workdir"])
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "change"),
    [(["--model.channels", "16"], "model.channels: 8 -> 16"), (["--seed", "1"], "seed: 0 -> 1"),
     (["--train.num-steps", "8"], "train.num_steps: 4 -> 8")],
)  # fmt: skip
def test_run_folder_of_another_config(run, options, change):
    before = (run / "config.json").read_text()
    argv = ["--workdir", str(run), *TINY, *options]
    one_line_error(train.main, argv, fragments=[str(run), change, "--workdir"])
    assert (run / "config.json").read_text() == before


# Bad input of sample.py


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ("", ["--ckpt"]),
        ("--ckpt", ["--ckpt"]),
        ("--ckpt missing", ["missing", "no checkpoint"]),
        ("--ckpt .", ["no checkpoint"]),
        ("--ckpt notes.txt", ["notes.txt", "no checkpoint"]),
        ("--ckpt 7", ["7", "checkpoint"]),
        ("--ckpt empty", ["empty", "no checkpoint"]),
        ("--ckpt run --num-image 3", ["num-image", "'num-images'"]),
        ("--ckpt run --num-images x", ["num-images", "'x'"]),
        ("--ckpt run --weights best", ["weights", "best", "ema", "raw"]),
        ("--ckpt run --sampler dpm", ["sampler", "dpm", "ddim"]),
        ("--ckpt run --spacing even", ["spacing", "even", "uniform"]),
    ],
)
def test_bad_input_of_sample_before_there_is_a_model(tmp_path, monkeypatch, argv, fragments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "7").mkdir()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    one_line_error(sample.main, argv.split(), fragments=fragments)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ("--out a.jpg", ["a.jpg", "'.jpg'", ".png", ".gif", ".npz"]),
        ("--out notes.txt/a.png", ["notes.txt/a.png"]),
        ("--out notes.txt/a", ["notes.txt/a"]),
        ("--out folder.png", ["folder.png", "folder"]),
        ("--seed -1", ["seed = -1"]),
        ("--seed 4294967296", ["seed = 4294967296"]),
        ("--label 3", ["label", "without classes"]),
        ("--guidance 2", ["guidance = 2.0", "without classes"]),
        ("--guidance 0", ["guidance = 0.0", "without classes"]),
        ("--guidance-interval 2 1", ["guidance_interval", "low < high"]),
        ("--guidance-rescale 2", ["guidance_rescale = 2.0"]),
        ("--num-images 0", ["num_images = 0"]),
        ("--num-images -2", ["num_images = -2"]),
        ("--num-steps 0", ["num_steps", " 0 "]),
        ("--num-steps 1001", ["num_steps", "1001", "1000"]),
        ("--eta 1.5", ["eta = 1.5"]),
        ("--batch-size 0", ["batch_size = 0"]),
    ],
)
def test_bad_input_of_sample(tmp_path, monkeypatch, model, argv, fragments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(sample, "load", lambda path, weights: model)
    one_line_error(sample.main, ["--ckpt", "run", *argv.split()], fragments=fragments)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "run") == ["folder.png", "notes.txt"]


@pytest.mark.parametrize("label", [3, -1, [0, 1, 3], [0, 1], 1.0])
def test_labels_that_the_network_does_not_know(model, label):
    config = replace_fields(model.config, {"model.num_classes": 3})
    conditional = type(model)(config, None, model.schedule, 4, "ema", model.mesh)
    one_line_error(functools.partial(conditional.sample, 3, labels=label), fragments=["labels"])


# Changes to the config that a checkpoint holds, so that it describes another network or none.
FIT = {"model.channels": 16, "model.multipliers": [1, 2], "model.attention_resolutions": [], "model.num_res_blocks": 2,
       "model.num_classes": 10, "model.space_to_depth": 1}  # fmt: skip
NO_NETWORK = {"model.num_groups": "many", "model.dropout": 2.0, "data.image_shape": [27, 27, 1]}
LOADER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import ddpm_jax
for path in sys.argv[2:]:
    try:
        ddpm_jax.load(path)
        print(json.dumps(["loaded", ""]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def failures(run, tmp_path_factory):
    """Processes that are to meet bad input, side by side."""
    folder = tmp_path_factory.mktemp("failures")
    np.save(folder / "nan.npy", pixels(np.nan))
    damaged = edited(run, folder / "damaged")
    (damaged / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text('{"torn')
    (folder / "loader.py").write_text(LOADER)
    others = [edited(run, folder / name, **{name: value}) for name, value in (FIT | NO_NETWORK).items()]
    commands = {
        "unknown field": ["train.py", "--train.num-stepz", 3],
        "wrong type": ["train.py", "--train.batch-size", 2.5],
        "NaN": ["train.py", "--data.source", "nan.npy"],
        "another architecture": ["sample.py", "--ckpt", folder / "model.channels"],
        "damaged checkpoint": ["sample.py", "--ckpt", damaged],
        "loader": [folder / "loader.py", ROOT, *others],
    }
    processes = {name: start_script(*command, cwd=folder) for name, command in commands.items()}
    yield processes
    for process in processes.values():  # where their tests were not chosen
        with process:
            process.kill()


@pytest.fixture(scope="module")
def loaded(failures):
    """What loading each of the changed checkpoints came to."""
    output, errors = failures["loader"].communicate(timeout=300)
    assert failures["loader"].returncode == 0, errors
    return dict(zip([*FIT, *NO_NETWORK], map(json.loads, output.splitlines()), strict=True))


@pytest.mark.parametrize("name", [*FIT, *NO_NETWORK])
def test_checkpoint_of_another_architecture(loaded, name):
    kind, message = loaded[name]
    assert kind == "InputError", message
    assert len(message.splitlines()) == 1
    assert {"model.num_groups": "num_groups", "model.dropout": "dropout", "data.image_shape": "27x27"}.get(
        name, f"{name}/checkpoints/4"
    ) in message


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("unknown field", ["train.num-stepz", "'train.num-steps'"]),
        ("wrong type", ["train.batch-size", "2.5"]),
        ("NaN", ["nan.npy", "NaN"]),
        ("another architecture", ["model.channels/checkpoints/4"]),
        ("damaged checkpoint", ["damaged/checkpoints/4"]),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(failures, name, fragments):
    output, errors = failures[name].communicate(timeout=120)
    assert failures[name].returncode == 2, errors
    assert output == "" and "Traceback" not in errors
    assert len(errors.splitlines()) == 1 and errors.startswith("error: "), errors
    assert all(fragment in errors for fragment in fragments), errors


# What they write


def test_train_writes_the_run_folder(folder, run):
    assert {entry.name.lstrip(".").split(".")[0] for entry in run.iterdir()} == {
        "checkpoints",
        "config",
        "events",
        "lock",
        "loss",
        "metrics",
        "samples",
    }
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["4"]
    config = json.loads((run / "config.json").read_text())
    assert config["model.channels"] == 8 and config["data.image_shape"] == [28, 28, 1] and config["sample.num_steps"] == 2
    with Image.open(run / "samples" / "00000004.png") as picture:
        assert picture.mode == "L" and picture.width == picture.height >= 2 * 64
    log = (folder / "train.log").read_text().splitlines()
    assert "10000 images of 28x28x1" in log[0] and "1 cpu device" in log[0]
    assert "step 4/4" in log[1] and log[-1].endswith("python sample.py --ckpt run")


def read_npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        assert list(arrays) == ["images"]
        return arrays["images"]


def largest_difference(one, other):
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def last_line(lines, path, *parts):
    assert str(path) in lines[-1] and all(part in lines[-1] for part in parts), lines[-1]


@pytest.fixture(scope="module")
def images(folder):
    """What sample.py draws with its defaults, on one device."""
    options = ["--ckpt", "run", "--num-images", NUM_IMAGES]
    processes = [
        start_script("sample.py", *options, "--out", "new/default.npz", cwd=folder),
        start_script("sample.py", *options, "--out", "small.npz", "--batch-size", 3, cwd=folder),
    ]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and output == "", errors
        last_line(errors.splitlines(), ".npz", f"{NUM_IMAGES} images", "ddim", "2 steps", "seed 0", "ema", "step 4")
    return read_npz(folder / "new" / "default.npz")


def test_npz(images):
    assert images.shape == (NUM_IMAGES, 28, 28, 1) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(NUM_IMAGES, -1), axis=0)) == NUM_IMAGES
    assert images.std() > 10


def test_batch_size_has_no_influence(folder, images):
    assert largest_difference(read_npz(folder / "small.npz"), images) <= 1


def draw(run, caplog, out, *options):
    """sample.py in this process, on its eight devices; the last line it logs."""
    caplog.clear()
    with caplog.at_level("INFO", "ddpm_jax"):
        sample.main(["--ckpt", str(run), "--num-images", str(NUM_IMAGES), "--out", str(out), *options])
    last_line(caplog.messages, out, f"{NUM_IMAGES} images")
    return caplog.messages[-1]


def test_outputs(run, images, tmp_path, caplog):
    """A grid, a folder, an animation and arrays hold the same images; other weights or another seed give others."""
    draw(run, caplog, tmp_path / "a.npz")
    same = read_npz(tmp_path / "a.npz")
    assert largest_difference(same, images) <= 1

    draw(run, caplog, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        grid = np.asarray(picture)
    np.testing.assert_array_equal(grid, make_grid(same)[..., 0])

    draw(run, caplog, tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == NUM_IMAGES
    for index, image in enumerate(same):
        with Image.open(tmp_path / "pictures" / f"{index:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), image[..., 0])

    assert "raw" in draw(run, caplog, tmp_path / "raw.npz", "--weights", "raw")
    assert largest_difference(read_npz(tmp_path / "raw.npz"), same) > 5

    assert "seed 1" in draw(run, caplog, tmp_path / "seed.npz", "--seed", "1")
    assert largest_difference(read_npz(tmp_path / "seed.npz"), same) > 10


def test_gif(run, images, tmp_path, caplog):
    """It starts with noise and ends with the images."""
    draw(run, caplog, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.format == "GIF" and picture.n_frames > 1
        frames = []
        for index in range(picture.n_frames):
            picture.seek(index)
            frames.append(np.asarray(picture.convert("L")))
    last = make_grid(images)[..., 0]
    assert frames[-1].shape == last.shape
    assert (np.abs(frames[-1].astype(int) - last) <= 1).mean() > 0.99  # all but what the palette changes
    assert largest_difference(frames[0], last) > 50


def test_options_reach_the_sampler(run, model, tmp_path, caplog, monkeypatch):
    """And the last line tells them."""
    calls = []

    def draw_nothing(self, num_images, seed, **options):
        calls.append({"num_images": num_images, "seed": seed} | options)
        return np.zeros((num_images, 28, 28, 1), np.uint8)

    monkeypatch.setattr(type(model), "sample", draw_nothing)
    argv = (
        "--sampler ddpm --num-steps 3 --eta 0.5 --spacing trailing --batch-size 2 --weights raw --seed 5 --label 1"
        " --guidance 3 --guidance-interval 0.25 4 --guidance-rescale 0.7 --threshold dynamic"
    )
    line = draw(run, caplog, tmp_path / "a.npz", *argv.split())
    assert all(part in line for part in ("ddpm", "3 steps", "raw", "step 4", "seed 5"))
    given = {"num_images": NUM_IMAGES, "seed": 5, "sampler": "ddpm", "num_steps": 3, "eta": 0.5, "spacing": "trailing",
             "batch_size": 2, "labels": 1, "guidance": 3.0, "guidance_interval": (0.25, 4.0),
             "guidance_rescale": 0.7, "threshold": "dynamic"}  # fmt: skip
    assert {name: calls[0][name] for name in given} == given
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("argv", "labels"),
    [
        (["--labels", "ankle boot,Bag"], [9, 8, 9, 8, 9]),
        (["--labels", "sneaker"], 7),
        (["--labels=3"], 3),
        (["--label", "3"], 3),
        (["--label=3"], 3),
        ([], None),
    ],
)
def test_classes_by_name_or_number(run, model, tmp_path, monkeypatch, argv, labels):
    """Also by the option's former name."""
    calls = []
    names = load_images(DataConfig()).class_names
    named = replace(model, config=replace_fields(model.config, {"model.num_classes": 10, "data.class_names": names}))

    def draw_nothing(self, num_images, labels, **options):
        calls.append(labels if labels is None or isinstance(labels, int) else labels.tolist())
        return np.zeros((num_images, 28, 28, 1), np.uint8)

    monkeypatch.setattr(sample, "load", lambda path, weights: named)
    monkeypatch.setattr(type(model), "sample", draw_nothing)
    sample.main(["--ckpt", str(run), "--num-images", "5", "--out", str(tmp_path / "a.npz"), *argv])
    assert calls == [labels]


def test_names_that_no_class_has(tmp_path, monkeypatch, model):
    fields = {"model.num_classes": 2, "data.class_names": ("cat", "dog")}
    named = replace(model, config=replace_fields(model.config, fields))
    monkeypatch.setattr(sample, "load", lambda path, weights: named)
    argv = ["--ckpt", "run", "--out", str(tmp_path / "a.npz"), "--labels"]
    one_line_error(sample.main, [*argv, "dig"], fragments=["'dig'", "did you mean 'dog'"])
    one_line_error(sample.main, [*argv, "cat,2"], fragments=["labels", "0 ... 1"])


@pytest.mark.parametrize("place", [".", "checkpoints"])
def test_grid_lies_in_the_run_folder_by_default(run, model, monkeypatch, place):
    monkeypatch.chdir(run / place)
    monkeypatch.setattr(sample, "load", lambda path, weights: model)
    monkeypatch.setattr(type(model), "sample", lambda self, num_images, **options: np.zeros((num_images, 28, 28, 1), np.uint8))
    for ckpt in (run, run / "checkpoints" / "4", "." if place == "." else "4"):
        sample.main(["--ckpt", str(ckpt), "--num-images", "1"])
        (run / "samples.png").unlink()
