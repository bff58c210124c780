"""Prepared images: what prepare.py writes, read in any order without decoding.

A prepared set is a folder with

    manifest.json                            what the set holds and how it was made; written last
    shard-00000-of-00008.array_record ...    the images in order: a record holds the H W C bytes of one
    labels.npy                               int32 [N], where the images have classes

Records are groups of one, not compressed: any image is one short read. ArrayRecord keeps a hash of each record and checks it
whenever the record is read, so damaged pixels are never trained on.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Float, Int, UInt8

from ddpm_jax.config import Framing
from ddpm_jax.data.image_set import ImageSet, StoredImages
from ddpm_jax.errors import InputError, first_line

MANIFEST, JOURNAL, LABELS = "manifest.json", "preparation.jsonl", "labels.npy"
FORMAT_VERSION = 1
MANIFEST_BYTES = 1 << 26  # a longer file is no manifest
LARGEST = 1 << 40  # no count, size or edge is larger
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
READ_BYTES = 16384  # at once; larger buffers made shuffled reading of 64x64 images slower, smaller ones no faster
HASH_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A shard or the labels: name, images or labels in it, size and SHA-256."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared set holds: uint8 images of one shape, and where they came from."""

    count: int
    image_shape: tuple[int, int, int]
    source: str
    split: str
    framing: Framing
    class_names: tuple[str, ...]
    labels: StoredFile | None
    shards: tuple[StoredFile, ...]

    def to_json(self) -> dict[str, Any]:
        """As nested dictionaries of JSON values."""
        return {"format_version": FORMAT_VERSION, "dtype": "uint8", **dataclasses.asdict(self)}


def shard_name(index: int, num_shards: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:05d}-of-{num_shards:05d}.array_record"


def is_prepared(path: Path) -> bool:
    """Whether a folder is a prepared set, or one that is not finished."""
    if (path / JOURNAL).is_file():
        return True
    return (path / MANIFEST).is_file() and any(path.glob("shard-*.array_record"))  # other folders have a manifest.json, too


def load_records(path: Path) -> ImageSet:
    """The images of a prepared set.

    Every shard's size and number of records is checked, its bytes are not: see verify_records.

    Raises:
        InputError: a set that is not finished, or damaged.
    """
    manifest = read_manifest(path)
    return ImageSet(RecordImages(path, manifest), _read_labels(path, manifest), manifest.class_names)


class RecordImages(StoredImages):
    """The images of a prepared set; reading is safe in several threads at once."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(manifest.count, manifest.image_shape)
        self._paths = [folder / shard.name for shard in manifest.shards]
        self._readers = [open_shard(folder, shard) for shard in manifest.shards]
        self._starts = np.cumsum([0, *(shard.count for shard in manifest.shards)])

    def read(
        self, indices: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B 3"] | None = None
    ) -> UInt8[np.ndarray, "B H W C"]:
        """See StoredImages.read."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for row, (shard, place) in enumerate(zip(shards.tolist(), (indices - self._starts[shards]).tolist(), strict=True)):
            images[row] = self._read_one(shard, place)
        return images

    def _read_one(self, shard: int, place: int) -> UInt8[np.ndarray, "H W C"]:
        try:  # one record a call: as fast as all of a shard, and other threads run meanwhile
            (record,) = self._readers[shard].read([place])
            return np.frombuffer(record, np.uint8).reshape(self.shape[1:])
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"{self._paths[shard]}: image {place} can't be read ({first_line(error)[:200]}): "
                f"python prepare.py --verify {self._paths[shard].parent} finds every damaged shard"
            ) from error


def open_shard(folder: Path, shard: StoredFile) -> ArrayRecordReader:
    """The reader of a shard whose size and number of records are right. Raises InputError."""
    path = folder / shard.name
    check_size(path, shard)
    try:
        path.open("rb").close()  # ArrayRecord's reader doesn't say why it can't open a file
    except OSError as error:
        raise InputError(f"{path} can't be opened: {error.strerror}") from error
    reader = ArrayRecordReader(str(path), options=READER_OPTIONS, file_reader_buffer_size=READ_BYTES)
    if not reader.ok() or reader.num_records() != shard.count:
        raise InputError(f"{path} is damaged: it holds {reader.num_records()} images, not {shard.count}: {_ADVICE}")
    return reader


def check_size(path: Path, file: StoredFile) -> None:
    """Raises InputError unless the file is there in its whole length."""
    if not path.is_file():
        raise InputError(f"{path} is missing: {_ADVICE}")
    size = path.stat().st_size
    if size != file.bytes:
        raise InputError(f"{path} is damaged: {size:,} bytes long instead of {file.bytes:,}: {_ADVICE}")


def verify_records(path: Path) -> Manifest:
    """The manifest of a prepared set, once every byte of it has been compared with the checksums.

    Raises:
        InputError: files that are missing or differ, all of them named.
    """
    manifest = read_manifest(path)
    files = (*manifest.shards, *([manifest.labels] if manifest.labels else []))
    wrong = []
    for file in files:
        stored = path / file.name
        if not stored.is_file() or stored.stat().st_size != file.bytes or sha256_of(stored) != file.sha256:
            wrong.append(file.name)
    if wrong:
        raise InputError(f"{path}: {len(wrong)} of {len(files)} files are damaged: {', '.join(wrong)}: {_ADVICE}")
    load_records(path)
    return manifest


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a prepared set, checked.

    Raises:
        InputError: there is none, or it is not what prepare.py writes.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path} is not prepared to its end: give the same prepare.py command again")
    try:
        if file.stat().st_size > MANIFEST_BYTES:
            raise ValueError(f"longer than {MANIFEST_BYTES:,} bytes")
        return manifest_from_json(json.loads(file.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a manifest of prepare.py ({first_line(error)[:200]}): {_ADVICE}") from error


def manifest_from_json(values: Any) -> Manifest:
    """The inverse of Manifest.to_json. Raises ValueError where the values are not such."""
    _require(isinstance(values, dict), "not an object")
    version = values.get("format_version")
    _require(version == FORMAT_VERSION, f"format_version is {version!r}, this program reads {FORMAT_VERSION}")
    _require(values.get("dtype") == "uint8", f"dtype is {values.get('dtype')!r}, not 'uint8'")
    shape, names, shards = (values.get(name) for name in ("image_shape", "class_names", "shards"))
    _require(isinstance(shape, list) and len(shape) == 3 and all(map(_is_size, shape)), f"image_shape is {shape!r}")
    _require(isinstance(names, list) and all(isinstance(name, str) for name in names), "class_names is no list of texts")
    _require(isinstance(shards, list) and bool(shards), "shards is no list")
    _require(_is_size(values.get("count")), f"count is {values.get('count')!r}")
    _require(values.get("framing") in get_args(Framing), f"framing is {values.get('framing')!r}")
    for name in ("source", "split"):
        _require(isinstance(values.get(name), str), f"{name} is no text")
    files = tuple(_stored_file(shard, shard_name(index, len(shards))) for index, shard in enumerate(shards))
    _require(sum(file.count for file in files) == values["count"], "the shards' counts are not the count")
    _require(all(file.bytes >= file.count * math.prod(shape) for file in files), "the shards are too small for such images")
    labels = None if values.get("labels") is None else _stored_file(values["labels"], LABELS)
    _require(labels is None or labels.count == values["count"], "there are not as many labels as images")
    return Manifest(
        values["count"], (shape[0], shape[1], shape[2]), values["source"], values["split"], values["framing"],
        tuple(names), labels, files,
    )  # fmt: skip


def _stored_file(values: Any, name: str) -> StoredFile:
    """A file of the set, which has the one name that it can have: no path leads out of the folder."""
    _require(isinstance(values, dict) and set(values) == {"name", "count", "bytes", "sha256"}, f"{name} is not described")
    _require(values["name"] == name, f"{name} is called {values['name']!r}")
    _require(_is_size(values["count"]) and _is_size(values["bytes"]), f"the count or size of {name} is no number above 0")
    _require(isinstance(values["sha256"], str) and len(values["sha256"]) == 64, f"the sha256 of {name} is none")
    return StoredFile(**values)


def _read_labels(path: Path, manifest: Manifest) -> Int[np.ndarray, "N"] | None:
    if manifest.labels is None:
        return None
    file = path / LABELS
    check_size(file, manifest.labels)
    try:
        labels = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: a header that lies can't make it allocate
    except ValueError as error:
        raise InputError(f"{file} can't be read ({first_line(error)[:200]}): {_ADVICE}") from error
    whole = labels.dtype == np.int32 and labels.shape == (manifest.count,) and sha256_of(file) == manifest.labels.sha256
    highest = len(manifest.class_names) or math.inf
    if not whole or labels.min() < 0 or labels.max() >= highest:
        raise InputError(f"{file} is damaged: it is not the one that was written: {_ADVICE}")
    return np.array(labels)


_ADVICE = "copy the set again, or remove it and prepare it again"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST


def _require(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)
