"""Storage that neither works nor fails."""

import os
import time
from pathlib import Path

from injections.bench import EVERY, Bench, different_runs, finish, newest
from injections.damage import data_file
from injections.endings import error_line
from injections.table import Fault, Outcome, require

TIMEOUT = 4  # train.storage_timeout, seconds
GRACE = 6  # seconds more until the program has ended
CHANGES = {"train.storage-timeout": TIMEOUT}

# Renaming the folder of the second checkpoint, the last act of a save, never returns.
HANGING_RENAME = """
import functools, os, time

def hanging(rename, source, destination, **options):
    if os.path.basename(destination) == "{step}":
        open({entered!r}, "w").close()
        time.sleep(1e6)
    return rename(source, destination, **options)

os.rename = functools.partial(hanging, os.rename)
os.replace = functools.partial(hanging, os.replace)
"""


def while_saving(bench: Bench, folder: Path) -> Outcome:
    workdir, entered, patch = folder / "run", folder / "entered", folder / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(HANGING_RENAME.format(step=2 * EVERY, entered=str(entered)))
    running = bench.train(workdir, CHANGES, PYTHONPATH=str(patch))
    happened = error_line(running, f"{TIMEOUT} s", str(EVERY), statuses=(1, 2))
    require(entered.exists(), "nothing was hung")
    waited = time.time() - entered.stat().st_mtime
    require(waited <= TIMEOUT + GRACE, f"ended after {waited:.0f} s")
    require(newest(workdir) == EVERY, f"newest checkpoint {newest(workdir)}")
    require(f"from step {EVERY}" in finish(bench.train(workdir, CHANGES)), "not resumed from the whole checkpoint")
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(
        f"{happened}, {waited:.0f} s after the hang began; restarted, end bit-equal", "the steps since the last save"
    )


def while_loading(bench: Bench, folder: Path) -> Outcome:
    workdir = folder / "run"
    finish(bench.train(workdir, {"train.num-steps": EVERY}))
    path = data_file(workdir / "checkpoints" / str(EVERY))
    path.rename(folder / "kept")
    os.mkfifo(path)
    running = bench.train(workdir, CHANGES)
    happened = error_line(running, f"{TIMEOUT} s", statuses=(1, 2))
    path.unlink()
    (folder / "kept").rename(path)
    require(f"from step {EVERY}" in finish(bench.train(workdir, CHANGES)), "not resumed from the checkpoint")
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; once the file is there again, end bit-equal", "nothing")


FAULTS = (
    Fault(
        "hang-while-saving",
        f"the rename that ends a save never returns (replaced in the process); --train.storage-timeout {TIMEOUT}",
        f"the run ends within {TIMEOUT + GRACE} s with one line that names the last whole checkpoint",
        while_saving,
    ),
    Fault(
        "hang-while-loading",
        f"a FIFO that nobody writes to in place of a checkpoint's file; --train.storage-timeout {TIMEOUT}",
        "the run ends in time with one line; the checkpoint stays as it is",
        while_loading,
    ),
)
