"""Disks that are full or read-only, and folders that go away."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from injections.bench import EVERY, STEPS, Bench, contents, different, different_runs, finish, is_whole, last_step, newest
from injections.endings import error_line
from injections.table import Fault, NotInjected, Outcome, require

MEGABYTES = 48


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of its own in memory. Raises NotInjected where none can be mounted."""
    path.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", path]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotInjected("a tmpfs can't be mounted, which needs root") from error
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    require(shutil.disk_usage(disk).free == 0, "the disk is not full")
    return ballast


def full_for_checkpoints(bench: Bench, folder: Path) -> Outcome:
    changes = {"train.log-every-steps": STEPS}  # nothing else is written meanwhile
    with small_disk(folder / "disk") as disk:
        workdir = disk / "run"
        running = bench.train(workdir, changes)
        running.wait_until(lambda: newest(workdir) == EVERY)
        with running.held(lambda: newest(workdir) > EVERY):
            ballast = fill(disk)
        happened = error_line(running, "No space left on device")
        require(newest(workdir) == EVERY, f"newest checkpoint {newest(workdir)}")
        ballast.unlink()
        require(f"from step {EVERY}" in finish(bench.train(workdir, changes)), "not resumed from the checkpoint")
        shutil.copy(bench.trained / "metrics.jsonl", workdir)  # not what is compared
        require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; with room again, end bit-equal", "the steps since the last save")


def full_for_metrics(bench: Bench, folder: Path) -> Outcome:
    with small_disk(folder / "disk") as disk:
        workdir = disk / "run"
        finish(bench.train(workdir, {"train.num-steps": EVERY}))
        changes = {"train.checkpoint-every-steps": STEPS}
        running = bench.train(workdir, changes)
        running.wait_for(f"from step {EVERY}")
        with running.held(lambda: last_step(workdir) == STEPS):
            ballast = fill(disk)
        happened = error_line(running, "No space left on device")
        require(newest(workdir) == EVERY, f"newest checkpoint {newest(workdir)}")
        ballast.unlink()
        require(f"from step {EVERY}" in finish(bench.train(workdir, changes)), "not resumed from the checkpoint")
        require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; with room again, end bit-equal, records too", "the steps since the last save")


def full_for_preparing(bench: Bench, folder: Path) -> Outcome:
    expected = contents(bench.prepared)
    with small_disk(folder / "disk") as disk:
        running = bench.prepare(disk / "set")
        running.wait_until(lambda: len(list((disk / "set").glob("shard*"))) >= 3)
        with running.held(lambda: is_whole(disk / "set")):
            ballast = fill(disk)
        happened = error_line(running, "No space left on device")
        ballast.unlink()
        errors = finish(bench.prepare(disk / "set"))
        require("going on in" in errors, errors)
        require(not (unlike := different(contents(disk / "set"), expected)), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; with room again, went on from the finished files, bit-equal", "nothing that was finished")


def full_for_samples(bench: Bench, folder: Path) -> Outcome:
    expected = contents(bench.drawn)
    with small_disk(folder / "disk") as disk:
        out = disk / "samples.npz"
        running = bench.sample(out)
        running.wait_for(" left ")
        with running.held(out.exists):
            ballast = fill(disk)
        happened = error_line(running, "No space left on device")
        require(not out.exists(), "a file that is not whole has the name of the result")
        ballast.unlink()
        finish(bench.sample(out))
        require(not (unlike := different(contents(out), expected)), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; with room again, bit-equal", "nothing that was finished")


def read_only(bench: Bench, folder: Path) -> Outcome:
    with small_disk(folder / "disk") as disk:
        workdir = disk / "run"
        finish(bench.train(workdir, {"train.num-steps": EVERY}))
        before = contents(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        happened = error_line(bench.train(workdir), "Read-only file system")
        another = error_line(bench.train(disk / "another" / "run"), "Read-only file system")
        require(contents(disk) == before, "files have changed")
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        require(not (disk / "another").exists(), another)
        finish(bench.train(workdir))
        require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; once writable, end bit-equal", "nothing")


def removed(bench: Bench, folder: Path) -> Outcome:
    workdir = folder / "run"
    running = bench.train(workdir)
    running.wait_for(f"step {EVERY + 5}/")
    running.wait_until(lambda: newest(workdir) == EVERY)
    workdir.rename(folder / "removed")
    shutil.rmtree(folder / "removed", ignore_errors=True)
    happened = error_line(running)
    require(newest(workdir) == 0, f"a checkpoint of step {newest(workdir)} was written to where nothing else is")
    finish(bench.train(workdir))
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(f"{happened}; the same command begins anew, end bit-equal", "what was removed")


FULL = "one line and status 2; what was written stays, and the same command goes on once there is room"
FAULTS = (
    Fault("disk-full-checkpoints", f"tmpfs of {MEGABYTES} MiB filled after a checkpoint", FULL, full_for_checkpoints),
    Fault("disk-full-metrics", f"tmpfs of {MEGABYTES} MiB filled; no checkpoint due", FULL, full_for_metrics),
    Fault("disk-full-preparing", f"tmpfs of {MEGABYTES} MiB filled while prepare.py writes", FULL, full_for_preparing),
    Fault("disk-full-samples", f"tmpfs of {MEGABYTES} MiB filled while sample.py draws", FULL, full_for_samples),
    Fault("read-only", "tmpfs remounted read-only", "one line and status 2; nothing is touched", read_only),
    Fault(
        "folder-removed",
        "run folder renamed and deleted under training",
        "one line and status 2 when it is next written to, not a run folder of remains",
        removed,
    ),
)
