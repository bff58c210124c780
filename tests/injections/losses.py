"""Losses that are not numbers, from images that are none: float images in a file that is mapped while they are overwritten."""

import math
from pathlib import Path

import numpy as np
from injections.bench import EVERY, STEPS, Bench, arrays, different_runs, finish, newest, records
from injections.endings import error_line
from injections.table import Fault, Outcome, require


def _images(bench: Bench, folder: Path) -> Path:
    path = folder / "images.npy"
    np.save(path, np.load(bench.images).astype(np.float32) / 127.5 - 1)
    return path


def _overwrite(path: Path, image: int, value: float | np.ndarray) -> None:
    images = np.load(path, mmap_mode="r+")
    images[image] = value
    images.flush()


def stopped(bench: Bench, folder: Path) -> Outcome:
    path = _images(bench, folder)
    whole = np.load(path)
    changes = {"data.source": path, "data.device-megabytes": 0}
    finish(bench.train(folder / "undisturbed", changes))
    running = bench.train(folder / "run", changes)
    running.wait_for(f"step {EVERY}/")
    _overwrite(path, 0, math.nan)
    happened = error_line(running, "the loss is nan", "the last good checkpoint is", statuses=(1,))
    _overwrite(path, 0, whole[0])
    finish(bench.train(folder / "run", changes))
    require(not (unlike := different_runs(folder / "run", folder / "undisturbed")), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; with the image mended, end bit-equal", "the steps since the last save")


def skipped(bench: Bench, folder: Path) -> Outcome:
    path = _images(bench, folder)
    changes = {"data.source": path, "data.device-megabytes": 0, "train.non-finite": "skip"}
    running = bench.train(folder / "run", changes)
    running.wait_for(f"step {EVERY}/")
    _overwrite(path, 0, math.nan)
    finish(running)
    require(newest(folder / "run") == STEPS, f"newest checkpoint {newest(folder / 'run')}")
    found = records(folder / "run").values()
    counted = sum(record["skipped_steps"] for record in found)
    require(counted > 0, "no step was counted as skipped")
    stored = arrays(folder / "run" / "checkpoints" / str(STEPS))
    broken = [name for name, content in stored.items() if not np.isfinite(np.frombuffer(content, np.float32)).all()]
    require(not broken, f"not finite: {broken[:3]}")
    return Outcome(
        f"went on to the end, status 0; {counted:.0f} of {STEPS} steps counted as skipped; all weights finite", "those steps"
    )


FAULTS = (
    Fault(
        "nan-stop",
        "an image overwritten with NaN under training",
        "status 1 and one line with the step and the last good checkpoint; nothing of it is saved",
        stopped,
    ),
    Fault(
        "nan-skip",
        "the same, with --train.non-finite skip",
        "steps that see it are left out and counted; the state stays finite",
        skipped,
    ),
)
