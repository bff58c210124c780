"""Which files of a folder are images that can be decoded: looked at once, and remembered in the user's cache folder.

A file is known by path, size and time of change; one that is new or has changed is decoded again. No link is followed, to a
file or a folder, so that nothing outside is read and no loop is entered.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from ddpm_jax.data.decoding import UnusableImage, check
from ddpm_jax.errors import InputError
from ddpm_jax.files import cache_folder, whole_file
from ddpm_jax.metrics import console

logger = logging.getLogger("ddpm_jax")
VERSION = 1  # of what is stored, and of the rules by which a file is usable
MAX_BYTES = 1 << 28  # an uncompressed image of as many pixels as are decoded
# Those that aren't decoded are counted and named too, rather than passed over in silence.
ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
)


class Entry(NamedTuple):
    """What is known of a file; width and height as seen upright, 0 where it is unusable for the reason given."""

    size: int
    mtime_ns: int
    width: int
    height: int
    reason: str


def folder_index(folder: Path, num_workers: int) -> dict[str, Entry]:
    """Every image file below a folder, by its path in it with "/", in the order of the paths' bytes.

    Raises:
        InputError: the folder or one below it can't be listed.
    """
    try:
        stats = dict(sorted(_walk(folder, ""), key=lambda item: os.fsencode(item[0])))
    except OSError as error:
        raise InputError(f"{folder} can't be read: {error.strerror}: {shown(str(error.filename))}") from error
    known = _load(folder)
    found = {name: known[name] for name, size_and_time in stats.items() if name in known and known[name][:2] == size_and_time}
    new = [name for name in stats if name not in found]
    try:
        found.update(_examine(folder, new, stats, num_workers))
    finally:  # what an interrupted run has seen is kept
        if new or len(found) != len(known):
            _save(folder, found)
    return {name: found[name] for name in stats}


def cache_path(folder: Path, ending: str) -> Path:
    """Where what belongs to a folder is kept between runs."""
    return cache_folder("indexes") / (hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32] + ending)


def shown(name: str) -> str:
    """A file's name as it can be printed on one line, whatever bytes it has."""
    return "".join(c if c.isprintable() else "?" for c in os.fsencode(name).decode("utf-8", "replace"))


def read_file(path: str) -> bytes:
    """The bytes of a file that isn't a link. Raises OSError."""
    with open(path, "rb", buffering=0, opener=_open_no_link) as file:
        return file.read()


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path in the folder, and (size, mtime_ns), of every regular file that is named like an image."""
    folders = [prefix]
    while folders:
        prefix = folders.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{prefix}{entry.name}/")
                elif os.path.splitext(entry.name)[1].lower() in ENDINGS:  # noqa: PTH122 - 100,000 times
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield prefix + entry.name, (status.st_size, status.st_mtime_ns)


def _examine(
    folder: Path, names: list[str], stats: dict[str, tuple[int, int]], num_workers: int
) -> Iterable[tuple[str, Entry]]:
    """The entries of files that are not known yet, decoded in threads."""
    if not names:
        return
    logger.info("%s: looking at %d image files, once", folder, len(names))
    pool = ThreadPoolExecutor(num_workers)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            entries = pool.map(lambda name: _entry(f"{folder}/{name}", *stats[name]), names)
            yield from bar.track(zip(names, entries, strict=True), total=len(names), description="images")
    finally:
        pool.shutdown(cancel_futures=True)


def _entry(path: str, size: int, mtime_ns: int) -> Entry:
    if size > MAX_BYTES:
        return Entry(size, mtime_ns, 0, 0, f"a file of {size} bytes, more than {MAX_BYTES}")
    try:
        return Entry(size, mtime_ns, *check(read_file(path)), "")
    except UnusableImage as error:
        return Entry(size, mtime_ns, 0, 0, shown(str(error)))
    except OSError as error:
        return Entry(size, -1, 0, 0, f"can't be read: {error.strerror}")  # no file's time: it may be mended without a change


def _load(folder: Path) -> dict[str, Entry]:
    """What is remembered of a folder; nothing where that is missing, damaged or of another version."""
    try:
        stored = json.loads(cache_path(folder, ".json").read_bytes())
        if stored["version"] != VERSION or stored["folder"] != str(folder.resolve()):
            return {}
        entries = {name: Entry(*values) for name, values in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    kinds = (int, int, int, int, str)
    whole = all(type(value) is kind for entry in entries.values() for value, kind in zip(entry, kinds, strict=True))
    return entries if whole else {}


def _save(folder: Path, entries: dict[str, Entry]) -> None:
    path = cache_path(folder, ".json")
    try:
        with whole_file(path) as file:
            file.write(json.dumps({"version": VERSION, "folder": str(folder.resolve()), "files": entries}).encode())
    except OSError as error:
        logger.warning("what was found in %s can't be remembered in %s: %s", folder, path, error.strerror)
