"""Records in files, a JSON object a line: what is added begins a line of its own, and torn lines are skipped by who reads."""

import json
import os
from pathlib import Path
from typing import Any


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a file, which is made where it is absent."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line of a killed program
                file.write(b"\n")
        file.write((json.dumps(record) + "\n").encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, in order; none where there is no file."""
    return parse_records(path.read_bytes()) if path.is_file() else []


def parse_records(content: bytes) -> list[dict[str, Any]]:
    """The objects that lines hold, in order. Lines that hold anything else are skipped."""
    records = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
