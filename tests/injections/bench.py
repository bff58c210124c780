"""Tiny runs for faults to be injected into, undisturbed ones to compare with, and what tells one from another."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from runs import Running, start

from ddpm_jax.data.records import MANIFEST

STEPS = 100
EVERY = 25  # steps between checkpoints
NUM_IMAGES, BATCH = 384, 16  # of a drawing
NUM_SHARDS = 200  # of a preparation
OPTIONS = {
    "data.flip": True, "diffusion.num-steps": 50, "model.channels": 8, "model.multipliers": 1, "model.num-res-blocks": 1,
    "model.attention-resolutions": "", "model.dropout": 0.1, "model.num-groups": 4, "model.space-to-depth": 1,
    "optim.warmup-steps": 20, "optim.decay": "constant", "train.batch-size": 4, "train.num-steps": STEPS,
    "train.steps-per-dispatch": 1, "train.log-every-steps": 1, "train.checkpoint-every-steps": EVERY,
    "train.preview-every-steps": "None",
}  # fmt: skip
CLOCKED = ("images_per_second", "data_wait")  # values of a record that no two runs share

T = TypeVar("T")


class Bench:
    """Programs started on tiny inputs, with one cache of compiled programs, below a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.environment = {
            "XDG_CACHE_HOME": str(scratch / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_COMPILATION_CACHE_MAX_SIZE": "-1",  # a kill may leave a cache with a limit unusable
        }
        self._made: dict[str, Any] = {}
        self._lock = threading.RLock()
        randomly = np.random.default_rng(0)
        self.images = scratch / "images.npy"
        np.save(self.images, randomly.integers(0, 256, (22, 8, 8, 1), np.uint8))
        self.many = scratch / "many.npz"
        labels = np.arange(20_000) % 7
        np.savez(self.many, images=randomly.integers(0, 256, (len(labels), 16, 16, 3), np.uint8), labels=labels)

    def train(self, workdir: Path, changes: Mapping[str, Any] | None = None, **environment: str) -> Running:
        """Start training in a run folder; changes replace options."""
        return start("train.py", self.options(workdir, changes), self.logs(workdir), env=self.environment | environment)

    def options(self, workdir: Path, changes: Mapping[str, Any] | None = None) -> list[str]:
        """The command line of training in a run folder."""
        words = ["--workdir", str(workdir)]
        for name, value in ({"data.source": self.images} | OPTIONS | dict(changes or {})).items():
            words += [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
        return words

    def logs(self, path: Path) -> Path:
        """The folder for what programs write to the terminal that write to the path."""
        return self.scratch / "logs" / "-".join(path.relative_to(self.scratch).parts)

    def prepare(self, out: Path) -> Running:
        """Start preparing 20,000 images in NUM_SHARDS files."""
        words = ["--data.source", self.many, "--out", out, "--num-shards", str(NUM_SHARDS)]
        return start("prepare.py", words, self.logs(out), env=self.environment)

    def sample(self, out: Path) -> Running:
        """Start drawing NUM_IMAGES images from the undisturbed run."""
        words = ["--ckpt", self.trained, "--num-images", NUM_IMAGES, "--batch-size", BATCH, "--num-steps", 50, "--out", out]
        return start("sample.py", [str(word) for word in words], self.logs(out), env=self.environment)

    @property
    def trained(self) -> Path:
        """The run folder of training that nothing has disturbed."""
        return self.once("trained", lambda: self._undisturbed(self.train, "run"))

    @property
    def prepared(self) -> Path:
        """The folder of a preparation that nothing has disturbed."""
        return self.once("prepared", lambda: self._undisturbed(self.prepare, "set"))

    @property
    def drawn(self) -> Path:
        """The file of a drawing that nothing has disturbed."""
        return self.once("drawn", lambda: self._undisturbed(self.sample, "samples.npz"))

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What make() returns, called by whoever asks first; the others wait."""
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]

    def _undisturbed(self, begin: Callable[[Path], Running], name: str) -> Path:
        path = self.scratch / "undisturbed" / name
        path.parent.mkdir(exist_ok=True)
        finish(begin(path))
        return path


def finish(running: Running) -> str:
    """What a program has written to stderr, once it has ended well. Raises RuntimeError if it ends otherwise."""
    status = running.wait()
    if status != 0 or "Traceback" in running.errors:
        raise RuntimeError(f"ended with status {status}: {running.errors}")
    return running.errors


def is_whole(out: Path) -> bool:
    """Whether a preparation has written its last file."""
    return (out / MANIFEST).exists()


def newest(workdir: Path) -> int:
    """The step of a run's newest whole checkpoint, 0 if it has none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def last_step(workdir: Path) -> int:
    """The last step that a run has a record of, 0 if there is none."""
    return max(records(workdir), default=0)


def records(workdir: Path) -> dict[int, dict[str, Any]]:
    """The last record of each step, without what depends on the clock; lines that a kill has torn are left out."""
    path, found = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["step"]] = {name: value for name, value in record.items() if name not in CLOCKED}
    return found


def arrays(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every array in a checkpoint, by name, read by Orbax alone."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = {name: tree for name, tree in ocp.checkpointables_metadata(checkpoint).metadata.items() if tree is not None}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(checkpoint, abstract))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file in a folder, by name."""
    if not path.is_dir():
        return {path.name: path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def different(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[str]:
    """The names under which two mappings don't hold the same."""
    return [str(name) for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def different_runs(workdir: Path, other: Path) -> list[str]:
    """What differs between two finished runs: arrays of the newest checkpoints, and records of the metrics by their step."""
    steps = [newest(workdir), newest(other)]
    if steps[0] != steps[1]:
        return [f"newest checkpoint {steps[0]}, not {steps[1]}"]
    found = [arrays(folder / "checkpoints" / str(steps[0])) for folder in (workdir, other)]
    return different(*found) + [f"record of step {step}" for step in different(records(workdir), records(other))]
