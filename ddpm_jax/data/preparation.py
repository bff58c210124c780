"""Any source of images written as a prepared set, see records.py.

The set is a function of the source and the number of shards alone: not of the workers, nor of how often the writing was killed.
A shard is written under another name, synced, renamed, and then noted in a journal with its checksum; a later start keeps the
shards that were noted, and writes the others. The manifest comes last, and the journal goes when it is there.
"""

import dataclasses
import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_jax.config import DataConfig
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.data.journal import check_folder, check_same, claim, note, read_journal, remove, take_name, write_whole
from ddpm_jax.data.records import (
    JOURNAL,
    LABELS,
    MANIFEST,
    Manifest,
    StoredFile,
    load_records,
    open_shard,
    read_manifest,
    sha256_of,
    shard_name,
)
from ddpm_jax.data.sources import load_images
from ddpm_jax.errors import InputError
from ddpm_jax.metrics import console

WRITER_OPTIONS = "group_size:1,uncompressed"  # zstd: emoji take a quarter of the room, and 1.8 times as long to read
SHARD_BYTES = 1 << 26
USUAL_SHARDS = (8, 256)  # the fewest and the most, unless asked for
MOST_SHARDS = 512  # every shard stays open while the set is in use
READ_BYTES = 1 << 22  # images that a worker holds

logger = logging.getLogger("ddpm_jax")


def prepare(config: DataConfig, out: Path, num_shards: int | None = None) -> Manifest:
    """Write the images that a config names, at its image_shape, as a prepared set; go on where that was stopped.

    Args:
        config: images of float32 in [-1, 1] are rounded to 256 grey levels. num_workers threads read and write.
        out: a folder that is new, empty, or an earlier start of the same preparation.
        num_shards: None: one for each 64 MiB, but at least 8, and 256 at most.

    Raises:
        InputError: unusable images, a folder that holds something else, or one that can't be written; shards that were
            finished are kept.
    """
    if num_shards is not None and not 1 <= num_shards <= MOST_SHARDS:
        raise InputError(f"num_shards = {num_shards}: must lie in 1 ... {MOST_SHARDS}")
    check_folder(out)
    image_set = load_images(config)
    plan = _make_plan(config, image_set, num_shards)
    if _is_finished(out, plan):
        logger.info("%s is prepared already: %d images", out, plan.count)
        return read_manifest(out)
    with claim(out) as journal:
        if _is_finished(out, plan):  # by another process, since it was asked
            return read_manifest(out)
        starts = np.cumsum([0, *(shard.count for shard in plan.shards)]).tolist()
        kept = read_journal(journal, out, plan)
        shards = [_kept_or_planned(out, image_set, kept.get(s.name, s), i) for s, i in zip(plan.shards, starts, strict=False)]
        if any(shard.bytes for shard in shards):
            logger.info("going on in %s: %d of %d shards are there", out, sum(s.bytes > 0 for s in shards), len(shards))
        _write_shards(out, image_set, shards, starts, config.num_workers, journal)
        if plan.labels is not None and image_set.labels is not None:
            write_whole(out / LABELS, _npy(image_set.labels))
        manifest = dataclasses.replace(plan, shards=tuple(shards))
        write_whole(out / MANIFEST, (json.dumps(manifest.to_json(), indent=1) + "\n").encode())
    return manifest


def _make_plan(config: DataConfig, image_set: ImageSet, num_shards: int | None) -> Manifest:
    """The manifest as far as it is known before shards are written: they have neither size nor checksum."""
    count = len(image_set.images)
    names = config.class_names or image_set.class_names
    labels = None
    if image_set.labels is not None:
        content = _npy(image_set.labels)
        labels = StoredFile(LABELS, count, len(content), hashlib.sha256(content).hexdigest())
    if names and (image_set.labels is None or image_set.labels.max() >= len(names)):
        highest = "no labels" if image_set.labels is None else f"label {image_set.labels.max()}"
        raise InputError(f"{config.source} holds {highest}, but there are {len(names)} class names: {', '.join(names[:10])}")
    if num_shards is None:
        wanted = -(-count * int(np.prod(image_set.image_shape, dtype=np.int64)) // SHARD_BYTES)
        num_shards = int(np.clip(wanted, *USUAL_SHARDS))
    num_shards = min(num_shards, count)
    ends = [count * index // num_shards for index in range(num_shards + 1)]
    shards = (StoredFile(shard_name(i, num_shards), ends[i + 1] - ends[i], 0, "") for i in range(num_shards))
    shape = image_set.image_shape
    return Manifest(count, shape, config.source, config.split, config.framing, tuple(names), labels, tuple(shards))


def _is_finished(out: Path, plan: Manifest) -> bool:
    """Whether the folder holds the planned set, whole. Raises InputError if it holds another one, or if it is damaged."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_manifest(out)
    stored = dataclasses.replace(manifest, shards=_planned(manifest.shards))
    check_same(out, json.loads(json.dumps(stored.to_json())), plan)
    load_records(out)
    remove(out / JOURNAL)  # there if the process was killed between its last two acts
    return True


def _planned(shards: tuple[StoredFile, ...]) -> tuple[StoredFile, ...]:
    return tuple(dataclasses.replace(shard, bytes=0, sha256="") for shard in shards)


def _kept_or_planned(out: Path, image_set: ImageSet, shard: StoredFile, start: int) -> StoredFile:
    """The shard as it was noted if it is whole, otherwise as one to be written.

    Raises:
        InputError: its first or last image is not the source's: the source has changed.
    """
    if not shard.bytes:
        return shard
    ends = [0, shard.count - 1]
    try:
        reader = open_shard(out, shard)
        stored = [reader.read([end])[0] for end in ends]
    except (InputError, RuntimeError):  # RuntimeError: a record that is not what its hash says
        return _planned((shard,))[0]
    if stored != [image.tobytes() for image in _to_uint8(image_set.images[np.array(ends) + start])]:
        raise InputError(f"{out}: the images have changed since {shard.name} was written: remove {out}, or give another --out")
    return shard


def _write_shards(
    out: Path, image_set: ImageSet, shards: list[StoredFile], starts: list[int], num_workers: int, journal: BinaryIO
) -> None:
    """Write the shards that are only planned; put what was written in their place."""
    todo = [index for index, shard in enumerate(shards) if not shard.bytes]
    stop = threading.Event()
    with _progress(sum(shards[i].count for i in range(len(shards)) if i not in todo), starts[-1]) as advance:

        def write(index: int) -> StoredFile:
            return _write_shard(out, image_set, shards[index], starts[index], advance, stop)

        with ThreadPoolExecutor(num_workers) as pool:
            try:
                futures = {pool.submit(write, index): index for index in todo}
                for future in as_completed(futures):
                    shards[futures[future]] = future.result()
                    note(journal, dataclasses.asdict(future.result()))
                    if not console.is_terminal:
                        logger.info("shard %d of %d written", sum(s.bytes > 0 for s in shards), len(shards))
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)


def _write_shard(
    out: Path, image_set: ImageSet, shard: StoredFile, start: int, advance: Callable[[int], None], stop: threading.Event
) -> StoredFile:
    path = out / shard.name
    partial = path.with_name(f".{path.name}.partial")
    step = max(1, READ_BYTES // int(np.prod(image_set.image_shape, dtype=np.int64)))
    try:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        for begin in range(start, start + shard.count, step):
            if stop.is_set():
                raise InputError("stopped")  # never seen: whatever stopped the others is
            images = _to_uint8(image_set.images[begin : min(begin + step, start + shard.count)])
            for image in images:
                writer.write(image.tobytes())
            advance(len(images))
        writer.close()
        written = dataclasses.replace(shard, bytes=partial.stat().st_size, sha256=sha256_of(partial))
        open_shard(out, dataclasses.replace(written, name=partial.name)).close()
        take_name(partial, path)
        return written
    except RuntimeError as error:  # of ArrayRecord's writer: "write() failed: No space left on device; writing PATH; ..."
        raise InputError(f"{path} can't be written: {str(error).partition(';')[0]}; run again to go on") from error
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}; run again to go on") from error
    finally:
        remove(partial)


def _to_uint8(images: np.ndarray) -> UInt8[np.ndarray, "B H W C"]:
    """The images as they are, or floats in [-1, 1] as the nearest of 256 grey levels."""
    return images if images.dtype == np.uint8 else np.rint((images.astype(np.float64) + 1) * 127.5).astype(np.uint8)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


@contextmanager
def _progress(completed: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; the function that moves it."""
    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("images  left"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=completed)
        yield lambda count: bar.advance(task, count)
