"""sample.py and evaluate.py as one process and as several: the same bytes, whatever is killed on the way."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from runs import LIMIT, free_port, start, start_together, wait_all
from test_evaluate import images, run  # noqa: F401

from ddpm_jax.drawing import parts_folder
from ddpm_jax.images import save_folder

pytestmark = pytest.mark.scale
TOPOLOGIES = [(1, 1), (1, 4), (2, 2)]  # processes, devices of each


def draw(run, out, *options, count=1, devices=1):  # noqa: F811
    """sample.py of 70 images, 4 at once on each device: more than one batch for any topology here."""
    argv = ["--ckpt", run, "--num-images", 70, "--out", out, *options]
    return start_together("sample.py", argv, out.parent / "logs", count=count, devices=devices)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):  # noqa: F811
    """The .npz file of one process with one device."""
    out = tmp_path_factory.mktemp("one") / "a.npz"
    assert wait_all(draw(run, out)) == [0]
    return out


@pytest.mark.parametrize(("count", "devices"), TOPOLOGIES[1:])
def test_the_same_bytes_in_any_topology(run, drawn, tmp_path, count, devices):  # noqa: F811
    running = draw(run, tmp_path / "a.npz", count=count, devices=devices)
    assert wait_all(running) == [0] * count, [each.errors for each in running]
    assert (tmp_path / "a.npz").read_bytes() == drawn.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "logs"]


def test_a_folder_of_two_processes_killed_and_gone_on_with_by_one(run, drawn, tmp_path):  # noqa: F811
    """kill -9 of both while they draw; of the pictures none is missing, written twice or another."""
    out = tmp_path / "a"
    running = draw(run, out, count=2)
    deadline = time.monotonic() + LIMIT
    while len(list(parts_folder(out).glob("*.part"))) < 3:
        assert time.monotonic() < deadline and all(each.process.poll() is None for each in running)
        time.sleep(0.002)
    for each in running:
        each.send(signal.SIGKILL)
    assert wait_all(running) == [-signal.SIGKILL] * 2
    kept = list(parts_folder(out).glob("*.part"))
    [alone] = draw(run, out)
    assert alone.wait() == 0, alone.errors
    assert re.search(r"holds \d+ of the 70 images already", alone.errors) and len(kept) >= 3
    assert draw_folder_of(drawn) == content(out)
    assert not parts_folder(out).exists()


def draw_folder_of(npz):
    """The PNG files of an .npz file's images."""
    folder = npz.with_suffix("")
    with np.load(npz) as arrays:
        save_folder(folder, arrays["images"])
    return content(folder)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ([["--seed", 1], ["--seed", 2]], "seed: 1 -> 2"),
        ([["--interpolate"], ["--interpolate"]], "--interpolate is drawn by one process"),
    ],
)
def test_what_several_processes_cannot_draw_ends_them_all(run, tmp_path, options, fragment):  # noqa: F811
    port, argv = free_port(), ["--ckpt", run, "--num-images", 70, "--out", tmp_path / "a.npz"]
    running = [
        start("sample.py", [*argv, *options[i]], tmp_path / "logs", index=i, count=2, port=port, timeout=10) for i in range(2)
    ]
    assert wait_all(running) == [2, 2], [each.errors for each in running]
    assert any(fragment in each.errors for each in running)
    assert not any("Traceback" in each.errors for each in running) and not (tmp_path / "a.npz").exists()


def test_scores_of_any_topology(run, tmp_path):  # noqa: F811
    """Of 40 images; the bound to the last bit, the ODE's number to rounding; another topology goes on with what is there."""
    results = []
    for count, devices in (TOPOLOGIES[0], TOPOLOGIES[2]):
        folder = Path(shutil.copytree(run, tmp_path / f"{count}x{devices}"))
        argv = ["--ckpt", folder, "--metrics", "bpd,bpd_ode"]
        running = start_together("evaluate.py", argv, tmp_path / "logs", count=count, devices=devices)
        assert wait_all(running) == [0] * count, [each.errors for each in running]
        results.append(json.loads((folder / "evaluation.json").read_text()))
        assert json.loads(running[0].output)["bpd"]["bits_per_dim"] == results[-1]["bpd"]["bits_per_dim"]
        assert not any(each.output for each in running[1:])
    for other in results[1:]:
        assert other["bpd"] == results[0]["bpd"]
        assert other["bpd_ode"]["bits_per_dim"] == pytest.approx(results[0]["bpd_ode"]["bits_per_dim"], rel=1e-5)
    files = sorted(path.name for path in (tmp_path / "2x2").glob("bits_per_dim*"))
    assert files == ["bits_per_dim.1.jsonl", "bits_per_dim.jsonl"]
    alone = start("evaluate.py", ["--ckpt", tmp_path / "2x2"], tmp_path / "logs")
    assert alone.wait() == 0 and "holds 40 of the 40 images already" in alone.errors
    assert json.loads(alone.output)["bpd"]["bits_per_dim"] == results[0]["bpd"]["bits_per_dim"]


def test_scores_of_drawn_images_in_any_topology(run, tmp_path):  # noqa: F811
    """Features are made by all processes, the scores by the first; another topology goes on with what is there."""
    names = ("fd_efficientnet_lite0", "kid_efficientnet_lite0")
    argv = ["--metrics", ",".join(names), "--num-images", 35]
    results = []
    for count, devices in (TOPOLOGIES[0], TOPOLOGIES[2]):
        folder = Path(shutil.copytree(run, tmp_path / f"{count}x{devices}"))
        cache = {"XDG_CACHE_HOME": str(tmp_path / f"cache {count}x{devices}")}
        line = [*argv, "--ckpt", folder, "--save-stats", folder / "stats.npz"]
        running = start_together("tests/small_parts.py", line, tmp_path / "logs", count=count, devices=devices, env=cache)
        assert wait_all(running) == [0] * count, [each.errors for each in running]
        results.append(json.loads((folder / "evaluation.json").read_text()))
        assert not any(each.output for each in running[1:])
        drawn, real = folder.glob("evaluation/*/*.npz"), (Path(cache["XDG_CACHE_HOME"]) / "ddpm_jax/features").glob("*.npz")
        assert (len(list(drawn)), len(list(real))) == (4, 4) and (folder / "stats.npz").exists()
    for name in names:  # images may differ by a grey level here and there
        assert results[1][name]["value"] == pytest.approx(results[0][name]["value"], rel=1e-3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "2x2/evaluation").rglob("*.npz")}
    alone = start("tests/small_parts.py", [*argv, "--ckpt", tmp_path / "2x2"], tmp_path / "logs", env=cache)
    assert alone.wait() == 0, alone.errors
    again = json.loads(alone.output)
    assert [again[name]["value"] for name in names] == [results[1][name]["value"] for name in names]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "2x2/evaluation").rglob("*.npz")}
