"""Networks of diffusers here and ours there: ten at random give the same outputs, and the same bytes on the way back."""

import json

import numpy as np
import peers
import pytest

import ddpm_jax as ddpm

pytestmark = peers.MARKS

SEED = 52  # the ten that follow hold every choice, as a test below makes sure
COUNT = 10
CHOICES = {
    "in_channels": (1, 3),
    "layers_per_block": (1, 2, 3),
    "levels": (1, 2, 3, 4),
    "add_attention": (True, False),
    "attention_head_dim": (None, 4, 8),
    "flip_sin_to_cos": (True, False),
    "freq_shift": (0, 1),
    "downsample_padding": (0, 1),
    "norm_eps": (1e-6, 1e-5, 1e-3),
    "norm_num_groups": (2, 4, 8),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "num_class_embeds": (None, 5),
    "sample_size": (8, 16, (16, 8)),
    "learned variance": (False, True),
}


def draw(number):
    """The settings of one of the random networks, and which of CHOICES they are."""
    rng = np.random.default_rng([SEED, number])
    drawn = {name: options[rng.integers(len(options))] for name, options in CHOICES.items()}
    levels, attended = drawn["levels"], rng.integers(0, 2, drawn["levels"])
    scale_shift, groups = drawn["resnet_time_scale_shift"] == "scale_shift", drawn["norm_num_groups"]
    settings = {name: value for name, value in drawn.items() if name not in ("levels", "learned variance")} | {
        "out_channels": drawn["in_channels"] * (2 if drawn["learned variance"] else 1),
        "block_out_channels": (8 * rng.integers(1, 3) * np.array([1, *rng.integers(1, 4, levels - 1)])).tolist(),
        "down_block_types": tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attended),
        "up_block_types": tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in attended[::-1]),
        "attn_norm_num_groups": groups if scale_shift and drawn["add_attention"] else None,
    }
    return settings, drawn | {"attention": bool(attended.any())}


def test_the_random_networks_hold_every_choice():
    drawn = [draw(number)[1] for number in range(COUNT)]
    for name, options in (CHOICES | {"attention": (True, False)}).items():
        assert {str(each[name]) for each in drawn} == set(map(str, options)), name


@pytest.mark.parametrize("number", range(COUNT))
def test_a_random_network_is_the_same_here_and_there(number, tmp_path):
    """Theirs is read and gives their outputs; written again it has the same bytes, and they read it and get ours."""
    settings, drawn = draw(number)
    variance = "learned_range" if drawn["learned variance"] else "fixed_small"
    theirs = peers.unet(settings, number)
    folder = peers.save_pipeline(tmp_path / "theirs", theirs, variance_type=variance)
    size = settings["sample_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    given = peers.inputs(height, width, settings["in_channels"], settings["num_class_embeds"])
    model = peers.check_here(folder, theirs, given)
    assert model.image_shape == given[0].shape[1:]

    pipeline = peers.check_there(tmp_path / "ours", model, given)
    assert (tmp_path / "ours" / peers.WEIGHTS).read_bytes() == (folder / peers.WEIGHTS).read_bytes()
    assert settings_of(tmp_path / "ours") == settings_of(folder)
    assert pipeline.scheduler.config.variance_type == variance


def settings_of(folder):
    """What a folder says of its network, without versions, and without the size of heads where there are none."""
    settings = json.loads((folder / "unet" / "config.json").read_text())
    heads = settings["add_attention"] or "AttnDownBlock2D" in settings["down_block_types"]
    left_out = {"_diffusers_version", "_name_or_path"} | (set() if heads else {"attention_head_dim"})
    return {name: value for name, value in settings.items() if name not in left_out}


OURS = {
    "Nichol & Dhariwal": {
        "model.style": "improved", "model.num_heads": 4, "diffusion.variance": "learned_range", "diffusion.loss": "hybrid",
        "diffusion.schedule": "cosine",
    },
    "classes and heads": {"model.num_classes": 7, "model.head_channels": 8, "diffusion.prediction": "v",
                          "model.remat": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_network_of_ours_is_the_same_there(name, tmp_path):
    model = peers.our_model(ddpm.config.override(ddpm.Config(), peers.OUR_SMALL | OURS[name]))
    peers.check_there(tmp_path, model, peers.inputs(8, 8, 3, model.config.model.num_classes))
    peers.check_same(ddpm.load(tmp_path).params, model.params)
