"""Two programs that write to one folder, and processes of one run of which one is killed."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from injections.bench import EVERY, STEPS, Bench, contents, different, different_runs, finish, is_whole, newest
from injections.endings import error_line, short
from injections.table import Fault, Outcome, require
from runs import Running, start_together, wait_all

TIMEOUT = 10  # seconds after which a process counts as lost
GRACE = 5  # seconds more until the others have ended


def two_runs(bench: Bench, folder: Path) -> Outcome:
    workdir = folder / "run"
    first = bench.train(workdir)
    first.wait_for(f"step {EVERY}/")
    happened = _refused(first, lambda: newest(workdir) == STEPS, lambda: bench.train(workdir), workdir, "in use")
    finish(first)
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome(f"the second: {happened}; the first: undisturbed, end bit-equal", "nothing")


def two_preparations(bench: Bench, folder: Path) -> Outcome:
    out = folder / "set"
    first = bench.prepare(out)
    first.wait_until(lambda: bool(list(out.glob("shard*"))))
    happened = _refused(first, lambda: is_whole(out), lambda: bench.prepare(out), out, "another process")
    finish(first)
    unlike = different(contents(out), contents(bench.prepared))
    require(not unlike, f"differs: {unlike[:3]}")
    return Outcome(f"the second: {happened}; the first: undisturbed, end bit-equal", "nothing")


def _refused(
    first: Running, done: Callable[[], bool], start_second: Callable[[], Running], written: Path, fragment: str
) -> str:
    """Start the second while the first one is held; require that it says why it ends, and touches nothing."""
    with first.held(done):
        before = contents(written)
        happened = error_line(start_second(), fragment)
        require(not (changed := different(contents(written), before)), f"the second changed {changed[:3]}")
    return happened


def peer_dies(bench: Bench, folder: Path) -> Outcome:
    undisturbed = folder / "undisturbed" / "run"
    _ended(_together(bench, undisturbed))
    workdir = folder / "run"
    survivor, victim = _together(bench, workdir)
    survivor.wait_for(f"step {EVERY + 5}/")
    victim.kill()
    killed = time.monotonic()
    status, seconds = survivor.wait(), time.monotonic() - killed
    require(status not in (0, -signal.SIGSEGV), f"status {status}: {survivor.errors}")
    require(seconds <= TIMEOUT + GRACE, f"the survivor ended after {seconds:.0f} s")
    last = survivor.errors.strip().splitlines()[-1]
    require("the same command" in last and "Traceback" not in survivor.errors, survivor.errors[-3000:])
    _ended(_together(bench, workdir))
    require(not (unlike := different_runs(workdir, undisturbed)), f"differs: {unlike[:3]}")
    happened = f"the other ended after {seconds:.0f} s, status {status}: “{short(last)}”; restarted, end bit-equal"
    return Outcome(happened, "the steps since the last save")


def _together(bench: Bench, workdir: Path) -> list[Running]:
    return start_together(
        "train.py", bench.options(workdir), bench.logs(workdir), count=2, timeout=TIMEOUT, env=bench.environment
    )


def _ended(running: list[Running]) -> None:
    statuses = wait_all(running)
    require(statuses == [0, 0], f"statuses {statuses}: {running[0].errors}")


REFUSED = "the second is refused with one line and status 2, and touches nothing; the first goes on"
FAULTS = (
    Fault("two-runs", "train.py started while another trains in the folder", REFUSED, two_runs),
    Fault("two-preparations", "prepare.py started while another writes the folder", REFUSED, two_preparations),
    Fault(
        "peer-dies",
        "kill -9 of one of two processes that train together",
        f"the other ends within {TIMEOUT + GRACE} s, --processes.timeout {TIMEOUT}, and says that the same command goes on",
        peer_dies,
    ),
)
