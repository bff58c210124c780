"""The benchmark of samplers: which sets it draws, that it goes on where it was stopped, and its table."""

import argparse
import statistics

import numpy as np
import pytest
from helpers import load_script

from ddpm_jax.diffusion.process import p_sample
from ddpm_jax.diffusion.samplers import SAMPLERS, Sampler


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/sampler_quality.py")


class FakeModel:
    """Draws nothing, but remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def sample(self, num_images, seed, **settings):
        self.asked.append((settings["sampler"], settings["spacing"], settings["num_steps"], seed))
        return np.full((num_images, 2, 2, 1), seed, np.uint8)


def test_evaluations_are_whole_steps(script, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "twice", Sampler(p_sample, evaluations=2))
    options = argparse.Namespace(samplers=["ddim", "twice"], spacings=["uniform"], evaluations=[5, 20, 60], seeds=[0, 7])
    names = ["_".join(map(str, cell)) for cell in script.find_cells(options, total_steps=50)]
    assert sorted(names) == sorted(
        f"{name}_{seed}"
        for seed in (0, 7)
        for name in ("ddim_uniform_5", "ddim_uniform_20", "twice_uniform_20", "twice_uniform_60")
    )


def test_sets_are_drawn_once(script, monkeypatch, tmp_path):
    monkeypatch.setitem(SAMPLERS, "twice", Sampler(p_sample, evaluations=2))
    model, never = FakeModel(), float("inf")
    cells = [script.Cell("ddim", "trailing", 10, 3), script.Cell("twice", "uniform", 10, 4)]
    script.draw(model, cells[:1], 6, tmp_path, never)
    script.draw(model, cells, 6, tmp_path, never)
    assert model.asked == [("ddim", "trailing", 10, 3), ("twice", "uniform", 5, 4)]
    with np.load(tmp_path / "twice_uniform_10_4.npz") as arrays:
        assert arrays["images"].shape == (6, 2, 2, 1) and (arrays["images"] == 4).all()
    script.draw(model, [script.Cell("ddim", "trailing", 20, 3)], 6, tmp_path, deadline=0.0)
    assert len(model.asked) == 2 and len(list(tmp_path.iterdir())) == 2


def test_table_in_the_order_of_samplers(script, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "a_new_one", Sampler(p_sample))
    distances = {"a_new_one_karras_10": [4.25], "ddpm_uniform_1000": [1.0, 2.0, 6.0], "real": [0.5, 0.75]}
    lines = script.table(distances).splitlines()
    assert lines[0] == "| sampler | spacing | 10 | 1000 |"
    assert lines[2] == f"| ddpm | uniform |  | 3.000 ± {statistics.stdev([1, 2, 6]):.3f} |"
    assert lines[3] == "| a_new_one | karras | 4.250 |  |"
    assert lines[-1] == "real images: 0.625 ± 0.177"
