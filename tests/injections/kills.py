"""Programs that are killed or asked to stop: at random instants, and at those where they write."""

import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from injections.bench import (
    BATCH,
    EVERY,
    NUM_IMAGES,
    NUM_SHARDS,
    STEPS,
    Bench,
    contents,
    different,
    different_runs,
    finish,
    last_step,
    newest,
)
from injections.table import Fault, Outcome, require
from runs import LIMIT, Missed, Running

SEED = 6  # of the instants
STARTUP = 4.0  # seconds, about those from a program's start to its first step
STOPPED = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # statuses after SIGTERM; the last one while Python is starting


@dataclass(frozen=True)
class Subject:
    """A program that is to be disturbed."""

    start: Callable[[Path], Running]
    """Starts it, or goes on, with what it writes at the path."""
    progress: str
    """What stands in each line by which it tells how far it is."""
    lines: int
    """How many such lines it writes if nothing disturbs it."""
    compare: Callable[[Path], list[str]]
    """What differs at the path from what an undisturbed program has written."""
    saved: Callable[[Path], int] = lambda _: 0
    """Steps that are saved at the path."""
    inspect: Callable[[Path, str, int], int] = lambda *_: 0
    """Steps that the signal has lost, given the path, what the program has written to stderr, and the steps that were saved
    when it was started."""


def campaign(subject: Subject, folder: Path, kills: int, terms: int) -> Outcome:
    """Send the signals at random instants to a program that is started again and again until it has done its work.

    Once it has, it is compared, and begun anew in another folder while signals are left. A third of the instants lie within
    the start of the program, the others shortly after a random one of its lines of progress.
    """
    randomly = random.Random(SEED)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    randomly.shuffle(signals)
    runs, lost, path = 1, 0, folder / "run1" / "out"
    while signals:
        saved, running = subject.saved(path), subject.start(path)
        sent = send_at(running, signals[-1], subject, randomly)
        status = running.wait(LIMIT)
        if not sent or (status == 0 and signals[-1] == signal.SIGKILL):  # it had ended a moment before
            complete(subject, running, path)
            runs, path = runs + 1, folder / f"run{runs + 1}" / "out"
            continue
        number = signals.pop()
        require(status == -number or (number == signal.SIGTERM and status in STOPPED), f"status {status} after {number}")
        require("Traceback" not in running.errors, running.errors)
        lost = max(lost, subject.inspect(path, running.errors, saved))
    complete(subject, subject.start(path), path)
    what = f"started again until done {runs} times, with {kills} kills and {terms} SIGTERM on the way; bit-equal each time"
    return Outcome(what, f"at most {lost} steps" if lost else "nothing that was finished")


def send_at(running: Running, number: signal.Signals, subject: Subject, randomly: random.Random) -> bool:
    """Send a signal at a random instant; False if the program ended before."""
    lines = max(0, randomly.randint(-subject.lines // 3, subject.lines * 2 // 3))
    delay = randomly.uniform(0, 0.3 if lines else STARTUP)
    try:
        running.wait_until(lambda: running.errors.count(subject.progress) >= lines)
    except Missed:  # fewer were left to write
        return False
    time.sleep(delay)
    if running.process.poll() is not None:
        return False
    running.send(number)
    return True


def complete(subject: Subject, running: Running, path: Path) -> None:
    """Wait for the program's good end, and require that it has written what an undisturbed one has."""
    finish(running)
    require(not (unlike := subject.compare(path)), f"not as undisturbed: {', '.join(unlike[:3])}")


def inspect_training(workdir: Path, errors: str, saved: int) -> int:
    """Steps of training that have to be made again; requires that it had gone on from what was saved, and that a stop is."""
    resumed = re.search(r"resuming \S+ from step (\d+)", errors)
    if resumed or "loss" in errors:
        start = int(resumed[1]) if resumed else 0
        require(start == saved, f"went on from step {start}, though {saved} was saved")
    if stopped := re.search(r"stopped at step (\d+) of \d+ and saved", errors):
        require(newest(workdir) == int(stopped[1]), f"step {stopped[1]} was not saved, but {newest(workdir)}")
    lost = max(0, last_step(workdir) - newest(workdir))
    require(lost <= 2 * EVERY, f"{lost} steps lost")  # a whole interval, and that during which the next is written
    return lost


def training(bench: Bench, folder: Path) -> Outcome:
    subject = Subject(
        bench.train, f"/{STEPS}  loss", STEPS, lambda out: different_runs(out, bench.trained), newest, inspect_training
    )
    return campaign(subject, folder, kills=20, terms=12)


def preparing(bench: Bench, folder: Path) -> Outcome:
    expected = contents(bench.prepared)
    subject = Subject(bench.prepare, " written", NUM_SHARDS, lambda out: different(contents(out), expected))
    return campaign(subject, folder, kills=10, terms=4)


def sampling(bench: Bench, folder: Path) -> Outcome:
    expected = contents(bench.drawn)
    subject = Subject(
        lambda out: bench.sample(out.with_name("samples.npz")),
        f"/{NUM_IMAGES} ",
        NUM_IMAGES // BATCH,
        lambda out: different(contents(out.with_name("samples.npz")), expected),
    )
    return campaign(subject, folder, kills=10, terms=4)


def preempted(bench: Bench, folder: Path) -> Outcome:
    running = bench.train(folder / "run")
    running.wait_for(f"step {EVERY + 5}/")
    sent = time.monotonic()
    running.send(signal.SIGTERM)
    status, seconds = running.wait(), time.monotonic() - sent
    require(status == 0, f"status {status}: {running.errors}")
    stopped = re.search(r"stopped at step (\d+) of \d+ and saved; the same command goes on from there", running.errors)
    require(stopped is not None, running.errors)
    errors = finish(bench.train(folder / "run"))
    require(f"from step {stopped[1]}" in errors, errors)
    require(not (unlike := different_runs(folder / "run", bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(f"saved step {stopped[1]}, status 0 after {seconds:.1f} s; resumed from it, end bit-equal", "nothing")


def within_a_save(bench: Bench, folder: Path) -> Outcome:
    checkpoints = folder / "run" / "checkpoints"
    for due in (EVERY, 2 * EVERY):
        running = bench.train(folder / "run")

        def being_written(due: int = due) -> bool:
            names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
            return any(str(due) in name and not name.isdigit() for name in names)

        running.wait_until(being_written)
        running.kill()
        require(newest(folder / "run") == due - EVERY, f"step {newest(folder / 'run')} counts as saved")
    finish(bench.train(folder / "run"))
    left = [path.name for path in checkpoints.iterdir() if not path.name.isdigit()]
    require(not left, f"left behind: {left}")
    require(not (unlike := different_runs(folder / "run", bench.trained)), f"differs: {unlike[:3]}")
    return Outcome("the part that was written never counted, and was removed; end bit-equal", "the steps since the save before")


CAMPAIGNS = (
    Fault(
        "kills-training",
        "20 kill -9 and 12 SIGTERM at random instants of training",
        "the same command goes on; at most the steps since the last save are made again, the end is that of an undisturbed run",
        training,
    ),
    Fault(
        "kills-preparing",
        "10 kill -9 and 4 SIGTERM at random instants of prepare.py",
        "the same command goes on; the files are those of an undisturbed run",
        preparing,
    ),
    Fault(
        "kills-sampling",
        "10 kill -9 and 4 SIGTERM at random instants of sample.py",
        "the same command goes on; the file is that of an undisturbed run",
        sampling,
    ),
)
FAULTS = (
    Fault(
        "pre-emption",
        "SIGTERM while training",
        "the step is saved and the end is status 0; the same command goes on from that step",
        preempted,
    ),
    *CAMPAIGNS,
    Fault(
        "kill-within-a-save",
        "kill -9 as soon as the folder of a checkpoint being written shows, twice",
        "what was being written never counts as a checkpoint; the same command goes on from the one before",
        within_a_save,
    ),
)
