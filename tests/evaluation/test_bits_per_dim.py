"""Bits/dim of a data set: that parts add up to the whole, whatever was done before, and on any number of devices."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.networks import PixelNet

import ddpm_jax as ddpm
from ddpm_jax import inference
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig
from ddpm_jax.data import ImageSet, StoredImages
from ddpm_jax.errors import InputError
from ddpm_jax.evaluation import bits_per_dim as evaluation
from ddpm_jax.evaluation.bits_per_dim import SCORING, Scoring, evaluate_bits_per_dim
from ddpm_jax.inference import Model
from ddpm_jax.parallel import make_mesh, put, replicated
from ddpm_jax.validation import config_schedule

CONFIG = Config(
    data=DataConfig(image_shape=(4, 4, 1)),
    diffusion=DiffusionConfig(schedule="cosine", num_steps=12, prediction="v"),
    model=ModelConfig(channels=8, num_classes=3),
    sample=SampleConfig(sampler="ddim", num_steps=5, batch_size=8),
)
NETWORK = PixelNet(out_channels=1, num_classes=3)
LEVELS = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
IMAGES = ImageSet(LEVELS, np.random.default_rng(1).integers(0, 3, 30, dtype=np.int32))
SCORINGS = [Scoring("bpd", seed=5), Scoring("bpd_ode", seed=5, ode_probes=2)]


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(evaluation, "make_network", lambda config: NETWORK)


@pytest.fixture(scope="module")
def params():
    return NETWORK.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))["params"]


def model_on(params, count, config=CONFIG):
    mesh = make_mesh(jax.devices()[:count])
    return Model(config, put(params, replicated(mesh)), config_schedule(config), 7, "ema", mesh)


@pytest.fixture(scope="module")
def model(params):
    return model_on(params, 1)


@pytest.fixture
def scored(monkeypatch):
    """The ranges that are computed, as they are asked for."""
    ranges, score = [], evaluation._score

    def spy(model, image_set, scoring, todo, size):
        ranges.extend(todo)
        return score(model, image_set, scoring, todo, size)

    monkeypatch.setattr(evaluation, "_score", spy)
    return ranges


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda scoring: scoring.metric)
def test_the_mean_of_what_the_library_says_of_each_image(params, model, scoring, tmp_path):
    """Image i alone, with the key fold_in(fold_in(key(seed), SCORING), i) and its own label, by the public functions."""
    result = evaluate_bits_per_dim(model, IMAGES, tmp_path / "file", scoring)
    schedule = ddpm.make_schedule("cosine", 12)

    @jax.jit
    def score(key, x0, label):
        denoiser = ddpm.make_denoiser(
            schedule, lambda xt, t: NETWORK.apply({"params": params}, xt, t, label), "v", clip=scoring.metric == "bpd"
        )
        if scoring.metric == "bpd_ode":
            return ddpm.ode_bits_per_dim(key, schedule, denoiser, x0, num_probes=2)[:, None]
        bound = ddpm.bits_per_dim(key, schedule, denoiser, x0)
        return jnp.concatenate([bound.prior[:, None], bound.terms], axis=1)

    root = jax.random.fold_in(jax.random.key(5), SCORING)
    rows = []
    for i in range(30):
        x0 = jnp.asarray(LEVELS[i : i + 1].astype(np.float64) / 127.5 - 1, jnp.float32)
        rows.append(score(jax.random.fold_in(root, i)[None], x0, jnp.asarray(IMAGES.labels[i : i + 1])))
    each = np.concatenate(rows).astype(np.float64)
    totals = each.sum(axis=1)
    # Float32 programs of other batch sizes.
    assert result["bits_per_dim"] == pytest.approx(totals.mean(), rel=1e-5)
    assert result["standard_error"] == pytest.approx(totals.std() / np.sqrt(29), rel=1e-4)
    if scoring.metric == "bpd":
        assert result.keys() == {"bits_per_dim", "standard_error", "L_T", "L_0", "L_t"}
        parts = [result["L_T"], result["L_0"], *result["L_t"]]
        np.testing.assert_allclose(parts, each.mean(axis=0), rtol=1e-4, atol=1e-6)
        assert result["bits_per_dim"] == pytest.approx(sum(parts))
    else:
        assert result.keys() == {"bits_per_dim", "standard_error"}


class Decoded(StoredImages):
    """LEVELS, read when they are asked for."""

    def read(self, indices, draws=None):
        assert draws is None  # what is scored is never cropped at random
        return LEVELS[indices]


def test_images_that_are_decoded_score_as_an_array(model, scored, tmp_path):
    """And are known again as what was scored already."""
    expected = evaluate_bits_per_dim(model, IMAGES, tmp_path / "array", SCORINGS[0])
    decoded = ImageSet(Decoded(30, (4, 4, 1)), IMAGES.labels)
    assert evaluate_bits_per_dim(model, decoded, tmp_path / "decoded", SCORINGS[0]) == expected
    scored.clear()
    assert evaluate_bits_per_dim(model, decoded, tmp_path / "array", SCORINGS[0]) == expected
    assert scored == []


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda scoring: scoring.metric)
def test_two_halves_are_one(model, scoring, scored, tmp_path):
    """In either order, and with batches that don't divide the halves; nothing is computed twice."""
    whole = evaluate_bits_per_dim(model, IMAGES, tmp_path / "whole", scoring)
    scored.clear()
    for first in ((0, 15), (15, 0)):
        path = tmp_path / f"from{first[0]}"
        halves = [evaluate_bits_per_dim(model, IMAGES, path, scoring, start, 15) for start in first]
        assert sorted(scored) == [(0, 8), (8, 15), (15, 23), (23, 30)]
        scored.clear()
        together = evaluate_bits_per_dim(model, IMAGES, path, scoring)
        assert scored == []
        for name in ("bits_per_dim", "standard_error"):
            assert together[name] == pytest.approx(whole[name], rel=1e-9)
        assert together["bits_per_dim"] == pytest.approx(np.mean([half["bits_per_dim"] for half in halves]), rel=1e-12)
        if scoring.metric == "bpd":
            np.testing.assert_allclose(together["L_t"], whole["L_t"], rtol=1e-9)


def test_more_images_less_images_and_another_batch_size(model, scored, tmp_path):
    path, bound = tmp_path / "file", SCORINGS[0]
    one = evaluate_bits_per_dim(model, IMAGES, path, bound, batch_size=30)
    assert scored == [(0, 30)]
    scored.clear()
    part = evaluate_bits_per_dim(model, IMAGES, path, bound, num_images=10)
    assert scored == [(0, 8), (8, 10)]  # the terms of the first ten are not in the file
    scored.clear()
    assert evaluate_bits_per_dim(model, IMAGES, path, bound, batch_size=4) == one
    assert evaluate_bits_per_dim(model, IMAGES, path, bound, num_images=10, batch_size=3) == part
    assert scored == []
    assert evaluate_bits_per_dim(model, IMAGES, path, bound, num_images=1)["standard_error"] is None


def test_the_last_line_of_a_killed_run_is_computed_again(model, scored, tmp_path, caplog):
    path, bound = tmp_path / "file", SCORINGS[0]
    whole = evaluate_bits_per_dim(model, IMAGES, path, bound)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    scored.clear()
    path.write_text("".join(lines[:2]) + lines[2][:40])
    with caplog.at_level(logging.INFO, logger="ddpm_jax"):
        assert evaluate_bits_per_dim(model, IMAGES, path, bound) == whole
    assert "holds 16 of the 30 images already" in caplog.text
    assert scored == [(16, 24), (24, 30)]
    records = [json.loads(line) for line in path.read_text().splitlines() if line != lines[2][:40]]
    assert [(record["start"], record["stop"]) for record in records] == [(0, 8), (8, 16), (16, 24), (24, 30)]


def test_lines_of_no_use_are_skipped(model, scored, tmp_path):
    path, bound = tmp_path / "file", SCORINGS[0]
    evaluate_bits_per_dim(model, IMAGES, path, bound, num_images=8)
    record = json.loads(path.read_text())
    bad = [
        [],
        3,
        {},
        record | {"start": "0"},
        record | {"bits_per_dim": [1.0]},
        record | {"stop": 0},
        record | {"key": "other"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in bad) + "{\n")
    scored.clear()
    evaluate_bits_per_dim(model, IMAGES, path, bound, num_images=8)
    assert scored == [(0, 8)]


def changed_pixel():
    levels = LEVELS.copy()
    levels[3, 0, 0, 0] ^= 1
    return dataclasses.replace(IMAGES, images=levels)


def test_what_decides_a_number_is_in_its_key(params, model, scored, tmp_path):
    """Other weights, noise, process, settings, images or labels are scored anew, next to what the file holds."""
    path, bound, ode = tmp_path / "file", *SCORINGS
    evaluate_bits_per_dim(model, IMAGES, path, bound)
    scored.clear()
    process = dataclasses.replace(CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, variance="fixed_small"))
    moved = jax.tree.map(lambda x: x + np.float32(1e-3), params)
    other_labels = dataclasses.replace(IMAGES, labels=(IMAGES.labels + 1) % 3)
    fresh = [
        (model_on(moved, 1), IMAGES, bound), (model_on(params, 1, process), IMAGES, bound),
        (model, IMAGES, Scoring("bpd", seed=6)), (model, other_labels, bound),
        (model, IMAGES, ode), (model, IMAGES, Scoring("bpd_ode", 5, ode_steps=4, ode_probes=2)),
        (model, IMAGES, Scoring("bpd_ode", 5, ode_probes=1)),
    ]  # fmt: skip
    numbers = []
    for arguments in fresh:
        numbers.append(evaluate_bits_per_dim(*arguments[:2], path, arguments[2])["bits_per_dim"])
        assert len(scored) == 4
        scored.clear()
    # The last may be that of two probes: the network sees pixels one by one, so any probe gives its diagonal Jacobian's trace.
    assert len(set(numbers[:-1])) == len(fresh) - 1
    evaluate_bits_per_dim(model, changed_pixel(), path, bound)
    assert scored == [(0, 8)]
    scored.clear()
    # What the bound doesn't depend on.
    sampling = dataclasses.replace(CONFIG, sample=SampleConfig(sampler="ddpm", num_steps=3, batch_size=8))
    evaluate_bits_per_dim(model_on(params, 1, sampling), IMAGES, path, dataclasses.replace(bound, ode_probes=9))
    assert scored == []


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda scoring: scoring.metric)
def test_one_device_and_eight(params, model, scoring, tmp_path):
    one = evaluate_bits_per_dim(model, IMAGES, tmp_path / "one", scoring)
    eight = evaluate_bits_per_dim(model_on(params, 8), IMAGES, tmp_path / "eight", scoring, batch_size=13)
    for name, value in one.items():
        # Sums in another order, of terms that range from 1e-3 to 10.
        np.testing.assert_allclose(eight[name], value, rtol=1e-4, atol=1e-5)


def test_the_file_of_one_device_serves_eight(params, model, scored, tmp_path):
    evaluate_bits_per_dim(model, IMAGES, tmp_path / "file", SCORINGS[0])
    scored.clear()
    evaluate_bits_per_dim(model_on(params, 8), IMAGES, tmp_path / "file", SCORINGS[0])
    assert scored == []


def test_an_unconditional_model_needs_no_labels(params, scored, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_classes=None))
    monkeypatch.setattr(evaluation, "make_network", lambda config: PixelNet(out_channels=1))
    model = model_on({name: value for name, value in params.items() if name != "Embed_0"}, 1, config)
    one = evaluate_bits_per_dim(model, IMAGES, tmp_path / "file", SCORINGS[0])
    assert len(scored) == 4
    assert evaluate_bits_per_dim(model, ImageSet(LEVELS), tmp_path / "file", SCORINGS[0]) == one
    assert len(scored) == 4


@pytest.mark.parametrize("scoring", SCORINGS, ids=lambda scoring: scoring.metric)
def test_a_network_that_tells_its_variance(scoring, tmp_path, monkeypatch):
    """Its second half of channels counts in the bound's variance, and nowhere in the ODE."""
    network = PixelNet(out_channels=2, num_classes=3)
    monkeypatch.setattr(evaluation, "make_network", lambda config: network)
    diffusion = dataclasses.replace(CONFIG.diffusion, variance="learned_range")
    config = dataclasses.replace(CONFIG, diffusion=diffusion)
    first = jnp.zeros(1, jnp.int32)
    params = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), first, first)["params"]
    wider = jax.tree.map(lambda x: x, params)
    wider["Dense_2"]["bias"] = wider["Dense_2"]["bias"].at[1].add(0.5)
    numbers = [
        evaluate_bits_per_dim(model_on(tree, 1, config), IMAGES, tmp_path / "file", scoring, 0, 8) for tree in (params, wider)
    ]
    same = numbers[0]["bits_per_dim"] == pytest.approx(numbers[1]["bits_per_dim"], rel=1e-6)
    assert same == (scoring.metric == "bpd_ode")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_set": ImageSet(LEVELS / np.float32(127.5) - 1, IMAGES.labels)}, "256 grey levels.* float32"),
        ({"image_set": ImageSet(LEVELS[:, :2], IMAGES.labels)}, r"\(2, 4, 1\).*\(4, 4, 1\)"),
        ({"image_set": ImageSet(LEVELS)}, "3 classes.* label"),
        ({"image_set": ImageSet(LEVELS, IMAGES.labels + 1)}, r"3 classes.* 0 \.\.\. 2"),
        ({"first_image": 20, "num_images": 11}, r"images 20 \.\.\. 30 .*0 \.\.\. 29"),
        ({"first_image": -1}, r"-1 \.\.\. 29"),
        ({"first_image": 30}, r"0 \.\.\. 29"),
        ({"num_images": 0}, r"0 \.\.\. 29"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"scoring": Scoring(seed=-1)}, "seed = -1"),
        ({"scoring": Scoring("bpd_ode", ode_steps=13)}, r"ode_steps = 13: must lie in 2 \.\.\. 12"),
        ({"scoring": Scoring("bpd_ode", ode_steps=1)}, "ode_steps = 1"),
        ({"scoring": Scoring("bpd_ode", ode_probes=0)}, "ode_probes = 0"),
    ],
)
def test_what_cannot_be_scored(model, tmp_path, changes, message):
    arguments = {"image_set": IMAGES, "path": tmp_path / "file", "scoring": SCORINGS[0]} | changes
    with pytest.raises(InputError, match=message) as caught:
        evaluate_bits_per_dim(model, **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "file").exists()


def test_there_is_no_mean_of_a_part_of_the_images(model, tmp_path, monkeypatch):
    """Another program has changed the file, or another process has one of its own."""
    monkeypatch.setattr(evaluation, "_score_missing", lambda *_: {0: {"start": 0, "stop": 2, "bits_per_dim": [1.0, 2.0]}})
    with pytest.raises(InputError, match=r"file was changed by another program: it lacks images 2 \.\.\. 4; the same"):
        evaluate_bits_per_dim(model, IMAGES, tmp_path / "file", SCORINGS[0], 0, 5)


def test_a_network_that_diverged(params, tmp_path):
    """The image is named, and nothing is written of it."""
    broken = model_on(jax.tree.map(lambda x: x * np.float32("nan"), params), 1)
    with pytest.raises(InputError, match="image 0 has nan bits/dim"):
        evaluate_bits_per_dim(broken, IMAGES, tmp_path / "file", SCORINGS[0])
    assert (tmp_path / "file").read_text() == ""


def test_keys_of_scoring_are_not_those_of_sampling():
    assert SCORING != inference.SAMPLING
