"""Weights of improved-diffusion: networks with its names and layouts give the same outputs here; what isn't one is refused."""

import json

import numpy as np
import peers
import pytest
from helpers import one_line_error
from improved_peer import random_unet
from peers import check_close, check_same, torch

import ddpm_jax as ddpm

pytestmark = peers.MARKS

SMALL = {"width": 32, "multipliers": (1, 2), "blocks": 1, "attended": (1,), "heads": 4, "out": 3}
NETWORKS = {
    "like its CIFAR-10 network": (
        SMALL | {"blocks": 2, "attended": (0, 1), "out": 6},
        {"data.image_shape": [8, 8, 3], "diffusion.schedule": "cosine", "diffusion.num_steps": 4000},
        {"diffusion.variance": "learned_range", "model.attention_resolutions": (8, 4), "model.num_res_blocks": 2,
         "model.multipliers": (1, 2), "model.scale_and_shift": None},
    ),
    "classes, and time added": (
        SMALL | {"classes": 10, "scale_shift": False, "heads": 1, "multipliers": (2, 3)},
        {"data.image_shape": [16, 16, 3], "model.num_heads": 1, "diffusion.variance": "fixed_small"},
        {"model.num_classes": 10, "model.scale_and_shift": False, "model.attention_resolutions": (8,),
         "diffusion.variance": "fixed_small"},
    ),
    "its defaults": (
        SMALL | {"multipliers": (1, 1, 1), "attended": (2,), "blocks": 1},
        None,
        {"data.image_shape": (64, 64, 3), "model.num_heads": 4, "diffusion.schedule": "linear", "diffusion.num_steps": 1000,
         "model.attention_resolutions": (16,), "diffusion.variance": "fixed_large"},
    ),
}  # fmt: skip


def save(folder, state, settings=None, **options):
    path = folder / "ema_0.9999_050000.pt"
    torch.save(state, path, **options)
    if settings is not None:
        path.with_suffix(".json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_the_same_outputs_here(name, tmp_path):
    """Its diffusion program gives it t as a part of 1000 steps, whatever T is; so do we."""
    settings, given, expected = NETWORKS[name]
    theirs = random_unet(**settings)
    model = ddpm.load(save(tmp_path, theirs.state_dict(), given))
    config = ddpm.config.flatten(model.config)
    assert {field: config[field] for field in expected} == expected
    assert (model.weights, model.step) == ("imported", 0)
    xt, t, labels = peers.inputs(*model.image_shape, settings.get("classes"))
    t = t * model.schedule.num_steps // 1000 + np.array([0, 3])
    found = peers.our_outputs(model, xt, t, labels)
    check_close(found, peers.their_outputs(theirs, xt, t * (1000 / model.schedule.num_steps), labels))


@pytest.fixture(scope="module")
def small():
    return random_unet(**SMALL).state_dict()


SIZE = {"data.image_shape": [16, 16, 3]}


def test_the_file_of_an_older_pytorch(small, tmp_path):
    newer, older = tmp_path / "newer", tmp_path / "older"
    for folder, zipped in ((newer, True), (older, False)):
        folder.mkdir()
        save(folder, small, SIZE, _use_new_zipfile_serialization=zipped)
    models = [ddpm.load(folder / "ema_0.9999_050000.pt") for folder in (newer, older)]
    check_same(models[0].params, models[1].params)


def test_a_network_goes_on_to_diffusers(small, tmp_path):
    """Its heads, its time and its padding have settings there; only the middle's norm must be asked for."""
    given = peers.inputs(16, 16, 3)
    pipeline = peers.check_there(tmp_path / "out", ddpm.load(save(tmp_path, small, SIZE)), given)
    check_close(peers.their_outputs(pipeline.unet, *given), peers.their_outputs(random_unet(**SMALL), *given))


def without(state, *starts):
    return {name: tensor for name, tensor in state.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda state: without(state, "input_blocks"), "holds no UNet of improved-diffusion"),
        (lambda state: {"more": torch.zeros(3)}, "holds no UNet of improved-diffusion"),
        (lambda state: without(state, "input_blocks.2"), "holds no UNet of improved-diffusion"),  # pooled, not convolved
        (lambda state: without(state, "output_blocks.3.0.in"), "'output_blocks.3.0.in_layers.0.bias' is missing, and so are"),
        (lambda state: without(state, "output_blocks.1.2"), "'output_blocks.1.2.conv.bias' is missing"),
        (lambda state: dict(state) | {"more": torch.zeros(3)}, "'more' has no place"),
        (lambda state: dict(state) | {"input_blocks.900.0.op.weight": torch.zeros(3)}, "holds no UNet of improved-diffusion"),
        (lambda state: dict(state) | {"input_blocks.x.0.op.weight": torch.zeros(3)}, "holds no UNet of improved-diffusion"),
        (lambda state: dict(state) | {"out.2.bias": torch.zeros(4)}, "'out.2.bias' has the shape (4,)"),
        (lambda state: dict(state) | {"middle_block.1.qkv.weight": torch.zeros(190, 64, 1)}, "'middle_block.1.qkv.weight'"),
        (lambda state: dict(state) | {"input_blocks.0.0.weight": torch.zeros(32)}, "holds no UNet of improved-diffusion"),
    ],
    ids=range(11),
)
def test_other_state_dicts_are_refused(small, tmp_path, alter, reason):
    path = save(tmp_path, alter(small), SIZE)
    one_line_error(ddpm.load, path, fragments=[path.name, reason])


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"data.image_shape": "16"}, ["data.image_shape = '16'"]),
        ({"data.image_shape": [16, 16]}, ["data.image_shape"]),
        ({"data.image_shape": [15, 15, 3]}, ["15x15", "halved"]),
        ({"model.num_heads": 5}, ["model.num_heads = 5", "must divide"]),
        ({"image_size": 16}, ["unknown config field 'image_size'"]),
        ({"diffusion.num_steps": "many"}, ["diffusion.num_steps = 'many'"]),
        ([16, 16, 3], ["can't be read", "list"]),
    ],
    ids=range(7),
)
def test_settings_beside_the_weights_that_make_no_sense(small, tmp_path, settings, fragments):
    one_line_error(ddpm.load, save(tmp_path, small, settings), fragments=["ema_0.9999_050000", *fragments])


def test_a_null_among_the_settings_is_its_default(small, tmp_path):
    assert ddpm.load(save(tmp_path, small, {"data.image_shape": None})).image_shape == (64, 64, 3)
