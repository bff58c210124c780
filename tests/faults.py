"""Inject every fault that the programs promise to withstand, and print a table of what happened.

    python tests/faults.py                          all of them, in minutes
    python tests/faults.py --only read-only         one
    python tests/faults.py --markdown               the table of docs/reliability.md

Exit status 1 if a promise was not kept. Disks are injected as file systems in memory, which needs root on Linux.
"""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import tyro
from injections import clocks, damage, disks, hangs, kills, losses, rivals
from injections.bench import Bench
from injections.table import Broken, Fault, NotInjected, Outcome
from runs import Missed

MODULES = (kills, disks, damage, hangs, rivals, losses, clocks)
ATTEMPTS = 5
FAULTS = {fault.name: fault for module in MODULES for fault in module.FAULTS}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of tests/faults.py."""

    only: tuple[str, ...] = ()
    """Names of faults; none: all."""
    markdown: bool = False
    """Print the table as Markdown."""
    jobs: int = min(2, os.cpu_count() or 1)
    """Faults injected at once."""


def main(args: Arguments) -> int:
    """Inject and print; the exit status."""
    unknown = set(args.only) - set(FAULTS)
    if unknown:
        print(f"error: no fault {', '.join(sorted(unknown))}: choose of {', '.join(FAULTS)}", file=sys.stderr)
        return 2
    chosen = [FAULTS[name] for name in args.only] or list(FAULTS.values())
    if args.markdown:
        print("| fault | injected how | what happened | what was lost |\n|---|---|---|---|", flush=True)
    kept = True
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        for fault, future in inject(chosen, Path(scratch), args.jobs):
            happened, lost, good = describe(future)
            kept &= good
            if args.markdown:
                print(f"| {fault.name} | {fault.how} | {happened} | {lost} |".replace("\n", " "), flush=True)
            else:
                print(f"{fault.name}: {fault.how}\n  promised: {fault.promise}\n  {happened}\n  lost: {lost}", flush=True)
    return 0 if kept else 1


def inject(faults: Sequence[Fault], scratch: Path, jobs: int) -> Iterator[tuple[Fault, Future[Outcome]]]:
    """Each fault with its outcome, in order, `jobs` of them at once; faults have folders of their own below scratch."""
    bench = Bench(scratch)

    def run(fault: Fault, attempt: int = 1) -> Outcome:
        folder = scratch / fault.name / str(attempt)
        folder.mkdir(parents=True)
        try:
            return fault.inject(bench, folder)
        except Missed:  # its moment; nothing is known of the promise
            if attempt == ATTEMPTS:
                raise
        return run(fault, attempt + 1)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, fault) for fault in faults]
        yield from zip(faults, futures, strict=True)


def describe(future: Future[Outcome]) -> tuple[str, str, bool]:
    """What happened, what was lost, and whether no promise was broken."""
    error = future.exception()
    if error is None:
        return *future.result(), True
    if isinstance(error, NotInjected):
        return f"not injected: {error}", "-", True
    reason = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
    return f"BROKEN: {reason[-1500:]}", "?", False


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
