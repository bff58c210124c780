"""Records of TFRecord files, read in any order without TensorFlow.

A file is a sequence of: length (uint64, little endian), checksum of it (uint32), that many bytes, their checksum (uint32).
The checksums are CRC-32C, which the standard library lacks; lengths, counts and the files' ends are checked instead.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_jax.errors import InputError

BEFORE, AFTER = 12, 4  # bytes around a record's data


class Part(NamedTuple):
    """The `take` records of a file after its first `skip`."""

    file: Path
    skip: int
    take: int


class TfRecords:
    """Records of several files, one file after the other; files are opened where they are read, by any thread."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._files = [part.file for part in parts]
        self._starts = [_starts(part.file)[part.skip : part.skip + part.take] for part in parts]
        for part, starts in zip(parts, self._starts, strict=True):
            if len(starts) != part.take:
                raise InputError(f"{part.file} holds fewer records than the set says: prepare the set again")
        self._stops = np.cumsum([part.take for part in parts])

    def __len__(self) -> int:
        return int(self._stops[-1]) if self._files else 0

    def __getitems__(self, places: Sequence[int]) -> list[bytes]:
        """The data of the records at these places."""
        return [self[place] for place in places]

    def __getitem__(self, place: int) -> bytes:
        """The data of one record."""
        number = int(np.searchsorted(self._stops, place, side="right"))
        starts = self._starts[number]
        with self._files[number].open("rb") as file:
            file.seek(int(starts[place - int(self._stops[number])]))  # counted from the end of the file's part
            (length,) = struct.unpack("<Q", file.read(BEFORE)[:8])
            return file.read(length)


def _starts(path: Path) -> np.ndarray:
    """Where each record of a file begins, int64. Raises InputError."""
    starts, start, size = [], 0, path.stat().st_size
    with path.open("rb") as file:
        while start < size:
            file.seek(start)
            head = file.read(BEFORE)
            following = start + BEFORE + struct.unpack("<Q", head[:8])[0] + AFTER if len(head) == BEFORE else size + 1
            if following > size:
                raise InputError(f"{path} is cut short or damaged: prepare the set again")
            starts.append(start)
            start = following
    return np.array(starts, np.int64)
