"""benchmarks/worker_quality_torch.py with a small network: marks, weights, and images as quality.py scores them."""

import json
import time

import numpy as np
import peers
import pytest
from helpers import load_script
from peers import diffusers, torch
from PIL import Image

pytestmark = peers.MARKS


@pytest.fixture(scope="module")
def worker():
    return load_script("benchmarks/worker_quality_torch.py")


def small_network():
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


def test_a_peer_is_trained_to_its_mark_and_drawn_from(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "make_diffusers", small_network)
    images, folder = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    folder.mkdir()
    for number in range(40):
        Image.new("L", (32, 32), 5 * number).save(images / f"{number}.png")
    worker.main("train", "diffusers", str(folder), str(images), str(time.time()), "0.01", "0.02")
    facts = [json.loads((folder / f"{label}.json").read_text()) for label in ("0.01", "0.02")]
    assert all(fact["images"] == 16 * fact["steps"] and fact["steps"] > 0 for fact in facts)
    assert 0.6 <= facts[0]["seconds"] <= facts[1]["seconds"]
    assert facts[0]["parameters"] == sum(p.numel() for p in small_network().parameters())
    worker.main("draw", "diffusers", str(folder), "3", "2", "3x2", "0.01", "0.02")
    for label in ("0.01", "0.02"):
        with np.load(folder / f"{label}-3x2.npz") as arrays:
            assert arrays["images"].shape == (3, 28, 28, 1) and arrays["images"].dtype == np.uint8
    assert len(list(folder.glob("*.npz"))) == 2


def test_drawn_images_are_rounded_and_cut(worker, tmp_path):
    images = torch.rand(2, 1, 32, 32, generator=torch.manual_seed(1)) * 1.2 - 0.1
    worker.draw_all(lambda weights, steps: lambda count: images[:count], tmp_path, 2, 5, "2x5", [1.0])
    with np.load(tmp_path / "1-2x5.npz") as arrays:
        expected = np.clip(np.rint(images.numpy() * np.float32(255)), 0, 255)[:, 0, 2:30, 2:30]
        np.testing.assert_array_equal(arrays["images"][..., 0], expected)
