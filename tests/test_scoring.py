"""benchmarks/scoring.py: what is drawn once, what evaluate.py is given, and the table."""

import json

import numpy as np
import pytest
from helpers import load_script

scoring = load_script("benchmarks/scoring.py")

DRAWN = {
    "step": 9000, "weights": "ema", "seed": 0, "sampler": "ddim", "num_steps": 50, "eta": 0.0, "spacing": "uniform",
    "rounding": "rounded", "seconds": 201.4, "data": "some.npy",
}  # fmt: skip
PROTOCOL = {
    "network": "efficientnet_lite0", "network_sha256": "12ab", "resize": "to 112x112", "images": {"num_images": 10000},
    "reference": {"num_images": 60000, "data": "some.npy", "split": "train", "image_shape": [28, 28, 1]},
}  # fmt: skip


def test_evaluate_gets_images_data_and_an_empty_cache(tmp_path, monkeypatch):
    stub = tmp_path / "evaluate.py"
    stub.write_text("import json, os, sys; print(json.dumps([sys.argv[1:], os.listdir(os.environ['XDG_CACHE_HOME'])]))")
    monkeypatch.setattr(scoring, "EVALUATE", stub)
    seconds, (arguments, cached) = scoring.score("drawn.npz", "fashion_mnist")
    metrics = "fd_efficientnet_lite0,kid_efficientnet_lite0"
    assert arguments == ["--images", "drawn.npz", "--data", "fashion_mnist", "--metrics", metrics]
    assert cached == [] and seconds > 0


def test_images_are_drawn_once(tmp_path, monkeypatch):
    (tmp_path / "samples-5.json").write_text(json.dumps(DRAWN))
    monkeypatch.setattr(scoring, "load", pytest.fail)
    assert scoring.draw(tmp_path / "run", 5, tmp_path) == DRAWN | {"file": str(tmp_path / "samples-5.npz")}


def test_the_table_tells_values_times_and_protocol():
    found = {name: {"value": np.pi, "protocol": PROTOCOL} for name in scoring.METRICS}
    text = scoring.table(DRAWN, 123.4, found)
    assert "| fd_efficientnet_lite0 | 3.14159 |\n| kid_efficientnet_lite0 | 3.14159 |" in text
    facts = (
        "scored in 123 s", "drawn in 201 s", "10000 images of the ema weights of step 9000, seed 0", "ddim of 50 steps",
        "60000 images of some.npy (train), 28x28x1", "efficientnet_lite0 (SHA-256 12ab), to 112x112",
    )  # fmt: skip
    assert not [fact for fact in facts if fact not in text], text
