"""Write images of any source as shards that training reads without decoding.

    python prepare.py --data.source ~/photos --out data/photos64 --resolution 64
    python prepare.py --data.source tfds:cifar10 --out data/cifar10
    python prepare.py --verify data/photos64                                           compare every byte with the checksums

Train from it with --data.source data/photos64. The same command goes on where it was stopped.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ddpm_jax import cli
from ddpm_jax.config import Config, override
from ddpm_jax.data.preparation import prepare
from ddpm_jax.data.records import verify_records
from ddpm_jax.errors import InputError
from ddpm_jax.joining import PROCESS_OPTIONS, Processes
from ddpm_jax.processes import is_first


@dataclasses.dataclass(frozen=True)
class Source:
    """The images to prepare, as in train.py."""

    source: str | None = None
    """Packaged set, path of an .npy or .npz file or of a folder, "tfds:NAME" or "hf:NAME". Required."""
    split: str = "train"
    """Which part of a set of TensorFlow Datasets or Hugging Face."""
    framing: Literal["center", "pad"] = "center"
    """The largest square from the middle, or the whole image on a white background."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; taken from the data where not given."""
    max_unusable: float = 0.01
    """Share of files in a folder that may be unusable, and are skipped."""
    num_workers: int = os.cpu_count() or 2
    """Threads that read, decode and write; the result is the same for any number."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of prepare.py."""

    data: Source = Source()
    out: Path | None = None
    """Folder to write: new, empty, or one where the same command was stopped. Required."""
    resolution: int | None = None
    """Height and width of the prepared images; None: as they are, if all are of one size."""
    channels: Literal[1, 3] | None = None
    """1 for grey images, 3 for colour; None: 3 with --resolution, otherwise as they are."""
    num_shards: int | None = None
    """Files to write; None: one for each 64 MiB, but at least 8 and at most 256."""
    verify: Path | None = None
    """Only compare this prepared folder with its checksums."""
    processes: Processes = dataclasses.field(default_factory=Processes)


def main(argv: Sequence[str]) -> None:
    """Parse the command line, then prepare or verify."""
    known = {field.name for field in dataclasses.fields(Arguments)} - {"data", "processes"} | PROCESS_OPTIONS
    known |= {f"data.{field.name}" for field in dataclasses.fields(Source)}
    args = cli.parse(Arguments, argv, Arguments(), known, str(__doc__))
    if not is_first():  # it has threads enough for any storage; the others wait for it
        return
    if args.verify is not None:
        manifest = verify_records(args.verify)
        print(f"{args.verify}: {manifest.count} images in {len(manifest.shards)} shards, all as they were written")
        return
    if args.data.source is None or args.out is None:
        missing = "--out" if args.data.source else "--data.source"
        raise InputError(f"{missing} is missing: for example --data.source ~/photos --out data/photos64 --resolution 64")
    if args.channels is not None and args.resolution is None:
        raise InputError(f"--channels {args.channels} needs --resolution")
    if args.resolution is not None and args.resolution < 1:
        raise InputError(f"--resolution {args.resolution}: must be 1 or more")
    shape = None if args.resolution is None else (args.resolution, args.resolution, args.channels or 3)
    values = {f"data.{name}": value for name, value in dataclasses.asdict(args.data).items()}
    data = override(Config(), values | {"data.image_shape": shape}).data
    manifest = prepare(data, args.out, args.num_shards)
    height, width, channels = manifest.image_shape
    print(f"{args.out}: {manifest.count} images of {height}x{width}x{channels}; train with --data.source {args.out}")


if __name__ == "__main__":
    cli.run(main)
