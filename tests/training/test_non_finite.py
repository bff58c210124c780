"""A loss that is no number: the run stops, or leaves the update out, says so and goes on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import make_pixel_net

from ddpm_jax import inference
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from ddpm_jax.errors import NonFiniteLossError
from ddpm_jax.parallel import make_mesh
from ddpm_jax.training import loop
from ddpm_jax.training.step import make_train_step, to_float

CONFIG = Config(
    diffusion=DiffusionConfig(num_steps=50, timesteps="importance"),
    model=ModelConfig(dropout=0.2, multipliers=(1,), attention_resolutions=()),
    optim=OptimConfig(warmup_steps=0, learning_rate=1e-2, ema_decays=(0.5,)),
    train=TrainConfig(
        batch_size=4, num_steps=6, log_every_steps=2, checkpoint_every_steps=1000, preview_every_steps=None, non_finite="skip"
    ),
    sample=SampleConfig(num_steps=3),  # the default's 100 are more than T
)


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """One device and a network that compiles in no time, compiled quickly."""
    quick = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(loop, "make_mesh", lambda fsdp: make_mesh(jax.devices()[:1], fsdp))
    monkeypatch.setattr(loop, "make_unet", make_pixel_net)
    monkeypatch.setattr(inference, "make_unet", make_pixel_net)
    monkeypatch.setattr(
        loop, "compile_for", lambda mesh, function, **options: jax.jit(function, compiler_options=quick, **options)
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8))
    return dataclasses.replace(CONFIG, data=DataConfig(source=str(path)))


def spoil(monkeypatch, is_bad, value=jnp.nan):
    """Images of one pixel that is no number, in the steps that are bad, counted from 0."""

    def make_spoilt(*arguments):
        train_step = make_train_step(*arguments)

        def step(state, batch):
            images = to_float(batch.images)
            return train_step(
                state, batch._replace(images=images.at[0, 0, 0, 0].set(jnp.where(is_bad(state.step), value, -1.0)))
            )

        return step

    monkeypatch.setattr(loop, "make_train_step", make_spoilt)


def until(config, num_steps, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=num_steps, **fields))


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_skipped_step_leaves_all_but_its_number_as_it_was(config, tmp_path, monkeypatch, value):
    spoil(monkeypatch, lambda step: step == 3, value)
    before, skipped, after = (loop.train(until(config, count), tmp_path / "run") for count in (3, 4, 6))
    assert [int(state.step) for state in (before, skipped, after)] == [3, 4, 6]
    for old, new in zip(jax.tree.leaves(before._replace(step=0)), jax.tree.leaves(skipped._replace(step=0)), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    for old, new in zip(jax.tree.leaves(skipped.params), jax.tree.leaves(after.params), strict=True):
        assert np.isfinite(new).all() and not np.array_equal(old, new)


def test_skipped_steps_are_counted_and_no_record_holds_what_is_no_number(config, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: (step == 1) | (step >= 4))
    loop.train(config, tmp_path / "run")
    assert [record["skipped_steps"] for record in records(tmp_path / "run")] == [1, 0, 2]
    assert ["loss" in record for record in records(tmp_path / "run")] == [True, True, False]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_run_without_bad_steps_is_the_same_to_the_bit_under_both_policies(config, tmp_path):
    skip = loop.train(config, tmp_path / "skip")
    stop = loop.train(until(config, 6, non_finite="stop"), tmp_path / "stop")
    for one, other in zip(jax.tree.leaves(skip), jax.tree.leaves(stop), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "skipped_steps" in records(tmp_path / "skip")[0] and "skipped_steps" not in records(tmp_path / "stop")[0]


def test_stop_ends_at_the_first_bad_step_and_names_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda step: step == 4)
    wanted = r"the loss is nan, .* at step 5; the last good checkpoint is .*checkpoints/4; try"
    with pytest.raises(NonFiniteLossError, match=wanted):
        loop.train(until(config, 6, non_finite="stop", checkpoint_every_steps=2), tmp_path / "run")


def test_a_run_of_nothing_but_bad_steps_ends(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED", 3)
    spoil(monkeypatch, lambda step: (step == 0) | (step == 1) | (step > 2))
    with pytest.raises(NonFiniteLossError, match="at step 6, the 3th step in a row to be skipped; there is no checkpoint yet"):
        loop.train(until(config, 20), tmp_path / "run")
