"""Scores while a run goes on: when they are made, what they are, and that they leave the run's own numbers alone."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import one_line_error

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig, TrainConfig, load, train
from ddpm_jax.evaluation import samples
from ddpm_jax.evaluation.distance import frechet_distance
from ddpm_jax.evaluation.networks import FeatureNetwork


def fake_network(name, path=None):
    def apply(params, images):
        return {"pool": images.mean(axis=(1, 3))}

    return FeatureNetwork(name, "not at all", "0" * 64, np.float32(0), apply)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "load_network", fake_network)
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    return Config(
        data=DataConfig(source=str(path)),
        diffusion=DiffusionConfig(schedule="cosine", num_steps=20),
        model=ModelConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, dropout=0.0),
        train=TrainConfig(
            batch_size=8, num_steps=5, log_every_steps=1, checkpoint_every_steps=5, preview_every_steps=None,
            steps_per_dispatch=3, evaluate_every_steps=2, evaluate_images=16, evaluate_reference_images=32,
        ),
        sample=SampleConfig(num_steps=4, batch_size=8),
        seed=7,
    )  # fmt: skip


def test_scores_of_a_run(config, tmp_path):
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    network, real = fake_network("efficientnet_lite0"), np.load(config.data.source)[:32]
    drawn = load(tmp_path / "run").sample(16, seed=7)
    expected = frechet_distance(network.outputs(drawn)["pool"], network.outputs(real)["pool"])
    np.testing.assert_allclose(lines[-1]["fd_efficientnet_lite0"], expected, rtol=1e-3)  # one grey level of rounding
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 5


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"evaluate_metrics": "pr", "evaluate_images": 3}, ["train.evaluate_images = 3", "pr needs 4"]),
        (
            {"evaluate_metrics": "kid", "evaluate_reference_images": 1},
            ["reference_images", "give 1", "kid needs 2"],
        ),
    ],
)
def test_too_few_images_are_noticed_before_training(config, settings, fragments, tmp_path):
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    one_line_error(train, few, tmp_path / "run", fragments=fragments)


def test_an_unknown_score_is_named_before_training(config, tmp_path):
    unknown = dataclasses.replace(config, train=dataclasses.replace(config.train, evaluate_metrics="fid,fib"))
    one_line_error(train, unknown, tmp_path / "run", fragments=["train.evaluate_metrics", "'fib'", "fid"])
