"""Files: written whole or not at all, and where what is kept between runs lies."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when it is whole; what was there before stays until then.

    Several programs may write it at once: each has a temporary file of its own, and the last one that is whole stays. A durable
    one survives a crash of the machine from then on; that takes the time of writing it to the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_debris(folder: Path, name: str = "*", seconds: float = 0.0) -> None:
    """Remove temporary files that killed programs have left of `whole_file`, as far as that is possible.

    Args:
        folder: where they lie; it needn't be there.
        name: pattern of the names that the files were to have.
        seconds: 0 where nobody else is writing such files now; otherwise those stay that were written to within so many.
    """
    for path in folder.glob(f".{name}.{8 * '[0-9a-f]'}.tmp"):
        with suppress(OSError):
            if not seconds or time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def sync(path: Path) -> None:
    """See to it that a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """See to it that a folder is on the disk with everything in it, and under its name."""
    for entry in folder.rglob("*"):
        sync(entry)
    sync(folder)
    sync(folder.parent)


def cache_folder(name: str) -> Path:
    """A folder of that name in the user's cache folder, for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm_jax" / name
