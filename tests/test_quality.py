"""benchmarks/quality.py without PyTorch: marks on the clock, what is done again and what isn't, scores, table and plot."""

import functools
import json
import time

import matplotlib.figure
import numpy as np
import pytest
from helpers import ROOT, load_script
from PIL import Image

from ddpm_jax.config import load_config, override
from ddpm_jax.data import ImageSet
from ddpm_jax.evaluation import samples
from ddpm_jax.evaluation.distance import frechet_distance
from ddpm_jax.evaluation.kernel_distance import kernel_distance
from ddpm_jax.evaluation.networks import FeatureNetwork

marks, scores, quality = (load_script(f"benchmarks/{name}.py") for name in ("marks", "quality_scores", "quality"))


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def run_marks(folder, minutes, step_seconds, num_steps, save_seconds=100.0):
    """Steps of equal length on a process that was started 2 s before the first of them: what step() returned, and saved."""
    clock, saved = Clock(1000.0), []

    def save(label):
        saved.append(label)
        clock.now += save_seconds

    made = marks.Marks(folder, minutes, 998.0, 16, {"parameters": 5}, save, clock)
    returned = []
    for _ in range(num_steps):
        clock.now += step_seconds
        returned.append(made.step())
    return returned, saved


def test_weights_are_saved_after_the_step_under_way_at_a_mark_and_saving_takes_no_time(tmp_path):
    # Steps end at 9, 16, 23, 30, 37 s; marks stand at 15 and 36 s.
    returned, saved = run_marks(tmp_path, [0.25, 0.6], 7.0, 5)
    assert returned == [False, False, False, False, True]
    assert saved == ["0.25", "0.6"]
    facts = [json.loads((tmp_path / f"{label}.json").read_text()) for label in saved]
    assert facts[0] == {"minutes": 0.25, "seconds": 16.0, "start_seconds": 9.0, "steps": 2, "images": 32, "parameters": 5}
    assert facts[1] == {"minutes": 0.6, "seconds": 37.0, "start_seconds": 9.0, "steps": 5, "images": 80, "parameters": 5}
    assert not list(tmp_path.glob(".*"))


def test_a_step_that_is_longer_than_a_mark_counts_for_all_that_it_passes(tmp_path):
    returned, saved = run_marks(tmp_path, [0.1, 0.2, 2.0], 60.0, 2)
    assert returned == [False, True]
    assert saved == ["0.1", "0.2", "2"]
    assert [json.loads((tmp_path / f"{label}.json").read_text())["steps"] for label in saved] == [1, 1, 2]


def test_steps_that_fit_into_a_mark():
    assert quality.fit_steps(300.0, 20.0, 30.0) == int(0.98 * 280 * 30)
    assert quality.fit_steps(10.0, 20.0, 30.0) == quality.FEWEST_STEPS


def test_a_mean_speed_is_images_over_seconds():
    # 50 steps at 100 images/s and 150 at 50 take 0.5 and 3 times as many seconds as a step has images.
    assert quality.mean_speed([50, 200], [100.0, 50.0]) == pytest.approx(200 / 3.5)
    with pytest.raises(quality.Unable, match="no time"):
        quality.mean_speed([], [])


@pytest.mark.parametrize("num_steps", [None, 1234])
def test_our_run_is_the_default_config_but_for_its_number_of_steps(num_steps, tmp_path, monkeypatch):
    train, runs = load_script("train.py"), []
    monkeypatch.setattr(train, "train", lambda config, workdir: runs.append((config, workdir)))
    train.main(quality.train_options(tmp_path, num_steps))
    config = load_config(ROOT / "configs/fashion_mnist.py")
    steps = config.train.num_steps if num_steps is None else num_steps
    expected = override(config, {"train.preview_every_steps": None, "train.num_steps": steps})
    assert runs == [(expected, tmp_path)]


def test_a_process_is_asked_to_end_at_its_mark_and_a_failure_is_told(tmp_path):
    began = time.monotonic()
    command = ["sh", "-c", "trap 'kill $!; exit 0' TERM; sleep 60 & wait"]
    seconds = quality.run_process(command, tmp_path / "log", minutes=0.5 / 60)
    assert 0.5 <= seconds <= time.monotonic() - began < 30
    assert quality.run_process(["sh", "-c", "test $MODE = quick"], tmp_path / "log", minutes=1.0, MODE="quick") < 30
    with pytest.raises(quality.Unable, match=r"no torch \(.*log\)"):
        quality.run_process(["sh", "-c", "echo no torch >&2; exit 1"], tmp_path / "deep" / "log")


def test_our_runs_are_made_once_and_fitted_to_the_speed_of_the_configured_one(tmp_path, monkeypatch):
    runs = []

    def train_run(workdir, minutes, num_steps):
        runs.append((workdir.name, minutes, num_steps))
        return {"start_seconds": 10.0, "steps_per_second": 50.0}

    monkeypatch.setattr(quality, "train_run", train_run)
    assert quality.train_ours(tmp_path, [0.5, 5.0]) == ["configured-5", "0.5", "5"]
    assert runs == [("configured-5", 5.0, None), ("0.5", 0.5, int(0.98 * 20 * 50)), ("5", 5.0, int(0.98 * 290 * 50))]
    runs.clear()
    assert quality.train_ours(tmp_path, [0.5, 5.0]) == ["configured-5", "0.5", "5"]
    assert runs == []
    quality.train_ours(tmp_path, [5.0, 20.0])
    assert [name for name, _, _ in runs] == ["configured-20", "20"]


def test_a_peer_trains_until_the_last_mark_that_is_missing(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(quality, "run_process", lambda command, log, **environment: commands.append(command))
    (tmp_path / "1.json").write_text("{}")
    assert quality.train_peer("diffusers", tmp_path, [1.0, 5.0, 20.0], tmp_path / "images", "python") == ["1", "5", "20"]
    assert commands[0][2:6] == ["train", "diffusers", tmp_path, tmp_path / "images"] and commands[0][7:] == ["5.0", "20.0"]
    quality.train_peer("diffusers", tmp_path, [1.0], tmp_path / "images", "python")
    assert len(commands) == 1


def test_peers_draw_what_is_missing(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(quality, "run_process", lambda command, log, **environment: commands.append(command))
    quality.image_file(tmp_path, "1", 30, 10).touch()
    quality.draw("lucidrains", tmp_path, ["1", "5"], 30, 10, "python")
    assert commands[0][2:] == ["draw", "lucidrains", tmp_path, "30", "10", "30x10", "5"]
    quality.draw("lucidrains", tmp_path, ["1"], 30, 10, "python")
    assert len(commands) == 1


def test_padded_images_hold_the_packaged_ones(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    monkeypatch.setattr(quality, "load_images", lambda config: ImageSet(images))
    folder = quality.pad_images(tmp_path / "images")
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    for path, image in zip(sorted(folder.iterdir()), images, strict=True):
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (32, 32)
        np.testing.assert_array_equal(pixels[2:30, 2:30], image[..., 0])
        assert pixels.sum(dtype=int) == image.sum(dtype=int)
    folder.joinpath("000000.png").unlink()
    assert len(list(quality.pad_images(folder).iterdir())) == 2  # which is there stays as it is


class FakeScorer:
    """Scores images by their mean, and counts them."""

    def __init__(self):
        self.scored = []
        self.protocol = {"network": "none", "network_sha256": "0" * 64, "resize": "not at all", "reference": "nothing"}

    def of_images(self, images):
        self.scored.append(len(images))
        return dict.fromkeys(scores.METRICS, float(images.mean()))

    def of_real(self, num_images):
        self.scored.append("real")
        return dict.fromkeys(scores.METRICS, 0.5)


FACTS = {
    "minutes": 5.0, "seconds": 294.0, "start_seconds": 12.4, "steps": 8000, "images": 128_000, "parameters": 652_772,
    "versions": {"jax": "1.2"},
}  # fmt: skip


def put(folder, label, value, num_images=4, facts=FACTS):
    """What training and drawing leave of a mark."""
    folder.mkdir(exist_ok=True)
    (folder / f"{label}.json").write_text(json.dumps(facts))
    np.savez(scores.image_file(folder, label, num_images, 10), images=np.full((num_images, 28, 28, 1), value, np.uint8))


def test_what_is_scored_is_kept(tmp_path):
    put(tmp_path / "ddpm_jax", "5", 3)
    put(tmp_path / "diffusers", "5", 40)
    scorer = FakeScorer()
    first = scores.score_all(tmp_path, {"ddpm_jax": ["5"]}, 4, 10, lambda: scorer)
    assert [row["contestant"] for row in first["rows"]] == ["real images", "ddpm_jax"] and scorer.scored == ["real", 4]
    assert first["rows"][1]["fd_efficientnet_lite0"] == 3.0 and first["rows"][1]["steps"] == 8000
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == first["rows"]
    both = scores.score_all(tmp_path, {"ddpm_jax": ["5"], "diffusers": ["5"]}, 4, 10, lambda: scorer)
    assert scorer.scored == ["real", 4, 4] and both["rows"][:2] == first["rows"]
    again = scores.score_all(tmp_path, {"diffusers": ["5"]}, 4, 10, pytest.fail)
    assert [row["contestant"] for row in again["rows"]] == ["real images", "diffusers"]
    put(tmp_path / "diffusers", "5", 50, num_images=6)
    more = scores.score_all(tmp_path, {"diffusers": ["5"]}, 6, 10, lambda: scorer)
    assert scorer.scored == ["real", 4, 4, "real", 6] and more["rows"][1]["kid_efficientnet_lite0"] == 50.0
    assert len(json.loads((tmp_path / "quality.json").read_text())["rows"]) == 5


@pytest.fixture
def result(tmp_path):
    """Two marks of two contestants, and a run as configured that was stopped."""
    for minutes, value in ((1.0, 30), (5.0, 3)):
        facts = FACTS | {"minutes": minutes, "seconds": 60 * minutes, "planned_steps": 8000}
        put(tmp_path / "ddpm_jax", f"{minutes:g}", value, facts=facts)
        put(tmp_path / "diffusers", f"{minutes:g}", value + 40, facts=facts | {"steps": 7, "planned_steps": 7})
    put(tmp_path / "ddpm_jax", "configured-5", 2, facts=FACTS | {"planned_steps": 9000})
    labels = {"ddpm_jax": ["configured-5", "1", "5"], "diffusers": ["1", "5"]}
    return scores.score_all(tmp_path, labels, 4, 10, functools.cache(FakeScorer))


def test_the_table_has_a_row_for_each_mark(result):
    lines = scores.table(result).splitlines()
    assert lines[2] == "| real images |  |  |  |  |  | 0.500 | 500.000 |"
    assert lines[3] == "| ddpm_jax as configured | 652,772 | 4.90 | 12 | 8,000 of 9000 | 128,000 | 2.000 | 2000.000 |"
    assert lines[4] == "| ddpm_jax | 652,772 | 1.00 | 12 | 8,000 | 128,000 | 30.000 | 30000.000 |"
    assert lines[7] == "| diffusers | 652,772 | 5.00 | 12 | 7 | 128,000 | 43.000 | 43000.000 |"
    assert "4 images of each, DDIM of 10 steps" in lines[9] and "jax 1.2" in lines[-1]
    assert {line.count("|") for line in lines[:8]} == {9}


def test_the_plot_has_a_line_for_each_contestant(result, tmp_path, monkeypatch):
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    scores.plot(result, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
    for axes in figures[0].axes:
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == ["ddpm_jax as configured", "ddpm_jax", "diffusers", "real images"]
        assert lines["ddpm_jax"].get_xydata().tolist() == [[1.0, 30.0], [5.0, 3.0]]
        assert lines["ddpm_jax as configured"].get_xydata().tolist() == [[4.9, 2.0]]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5"]


def rows_and_columns(name, path=None):
    """A network whose features are the means of columns."""
    return FeatureNetwork(name, "not at all", "1" * 64, np.float32(0), lambda _, x: {"pool": x.mean(axis=(1, 3))})


def test_scores_are_the_distances_of_features(monkeypatch):
    generator = np.random.default_rng(0)
    real, drawn = (generator.integers(low, 256, (40, 8, 8, 1), np.uint8) for low in (0, 60))
    monkeypatch.setattr(samples, "load_network", rows_and_columns)
    monkeypatch.setattr(scores, "load_images", lambda config: ImageSet(real))
    scorer = scores.Scorer()
    first, second = (images.astype(np.float32).mean(axis=(1, 3)) for images in (drawn[:25], real))
    found = scorer.of_images(drawn[:25])
    assert found["fd_efficientnet_lite0"] == pytest.approx(frechet_distance(first, second), rel=1e-5)
    assert found["kid_efficientnet_lite0"] == pytest.approx(kernel_distance(first, second).value, rel=1e-4)
    assert scorer.protocol["network_sha256"] == "1" * 64
    # As many real images are nearer than the drawn ones, but not at no distance: they are not compared with themselves.
    floor = scorer.of_real(15)
    assert 0 < floor["fd_efficientnet_lite0"] < scorer.of_images(drawn[:15])["fd_efficientnet_lite0"] / 3
    assert floor["fd_efficientnet_lite0"] > 1.5 * scorer.of_images(real[:15])["fd_efficientnet_lite0"]
