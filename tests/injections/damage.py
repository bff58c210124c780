"""Files that are not as they were written: cut short, a bit flipped, a last line torn."""

import random
from collections.abc import Callable
from pathlib import Path

from injections.bench import EVERY, STEPS, Bench, different_runs, finish, newest
from injections.table import Fault, Outcome, require

SEED = 6  # of places


def data_file(checkpoint: Path) -> Path:
    """The largest file of a checkpoint, which holds arrays."""
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def metadata_file(checkpoint: Path) -> Path:
    """The file in which Orbax describes the arrays of the weights."""
    return checkpoint / "params" / "_METADATA"


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip a random bit of a file."""
    content, randomly = bytearray(path.read_bytes()), random.Random(SEED)
    content[randomly.randrange(len(content))] ^= 1 << randomly.randrange(8)
    path.write_bytes(content)


def half_written(bench: Bench, folder: Path) -> Outcome:
    return _damaged(bench, folder, cut)


def bit_flipped(bench: Bench, folder: Path) -> Outcome:
    return _damaged(bench, folder, flip)


def _damaged(bench: Bench, folder: Path, damage: Callable[[Path], None]) -> Outcome:
    """Damage the newest two of three checkpoints; the one before them must be used."""
    workdir, last = folder / "run", 3 * EVERY
    finish(bench.train(workdir, {"train.num-steps": last}))
    damage(data_file(workdir / "checkpoints" / str(last)))
    damage(metadata_file(workdir / "checkpoints" / str(last - EVERY)))
    errors = finish(bench.train(workdir))
    require(f"from step {EVERY}" in errors, errors)
    for step in (last, last - EVERY):
        require(f"put aside as {step}.damaged" in errors, errors)
        require((workdir / "checkpoints" / f"{step}.damaged").is_dir(), f"{step}.damaged is not there")
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome("both put aside as STEP.damaged, with a line each; end bit-equal", "the steps since the whole checkpoint")


def torn_record(bench: Bench, folder: Path) -> Outcome:
    workdir = folder / "run"
    finish(bench.train(workdir, {"train.num-steps": 2 * EVERY}))
    path = workdir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:20])
    finish(bench.train(workdir))
    require(newest(workdir) == STEPS, f"newest checkpoint {newest(workdir)}")
    require(path.read_bytes().startswith(whole), "records of before have changed")
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    return Outcome("went on; every record can be read, end bit-equal", "nothing")


DAMAGED = "each is noticed, said in one line and put aside, and the one before it is used"
FAULTS = (
    Fault("half-written", "newest checkpoints: largest file, metadata cut to half", DAMAGED, half_written),
    Fault("bit-flipped", "newest checkpoints: a random bit of the largest file, of the metadata", DAMAGED, bit_flipped),
    Fault("torn-record", "half a line at the end of metrics.jsonl", "training goes on, and no record is lost", torn_record),
)
