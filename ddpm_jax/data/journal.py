"""The folder of a preparation: one writer, a journal of what is finished, and files that are there whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ddpm_jax.data.records import JOURNAL, MANIFEST, Manifest, StoredFile
from ddpm_jax.errors import InputError
from ddpm_jax.files import sync
from ddpm_jax.lock import hold

OWN_NAMES = re.compile(r"\.?(shard-\d{5}-of-\d{5}\.array_record|manifest\.json|labels\.npy)(\.partial)?|preparation\.jsonl")


def check_folder(out: Path) -> None:
    """Raises InputError where the folder holds anything that this module doesn't write."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give the name of a folder")
    others = sorted(path.name for path in out.iterdir() if not OWN_NAMES.fullmatch(path.name)) if out.exists() else []
    if others:
        raise InputError(f"{out} holds other files, such as {others[0]}: give a new or empty folder")


def check_same(out: Path, old: object, new: Manifest) -> None:
    """Raises InputError unless a plan in JSON is the new one; the first field that differs is named."""
    expected = json.loads(json.dumps(new.to_json()))
    if not isinstance(old, dict) or set(old) != set(expected):
        raise InputError(f"{out} was begun by another version of this program: give another --out")
    for name, wanted in expected.items():
        if old[name] == wanted:
            continue
        before, after = (f"{len(v)} files" if name == "shards" else repr(v) for v in (old[name], wanted))
        change = "other ones" if name == "labels" or before == after else f"{before} instead of {after}"
        raise InputError(f"{out} is another preparation ({name}: {change}): give another --out")


@contextmanager
def claim(out: Path) -> Iterator[BinaryIO]:
    """The journal of a folder, made where it is absent, held by this process alone; removed once there is a manifest."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal = (out / JOURNAL).open("a+b", buffering=0)
    except OSError as error:
        raise InputError(f"{out} can't be written: {error.strerror}") from error
    with journal:
        if not hold(journal.fileno(), out):
            raise InputError(f"another process is preparing {out}: wait for it, or stop it")
        try:
            yield journal
        finally:
            if (out / MANIFEST).is_file():
                remove(out / JOURNAL)


def read_journal(journal: BinaryIO, out: Path, plan: Manifest) -> dict[str, StoredFile]:
    """The shards that an earlier start has noted, by name; a new journal begins with the plan."""
    journal.seek(0)
    content = journal.read()
    end = content.rfind(b"\n") + 1
    journal.truncate(end)  # a line that was being written when the process was killed
    if not end:
        note(journal, plan.to_json())
        return {}
    try:
        header, *notes = (json.loads(line) for line in content[:end].splitlines())
        kept = {values["name"]: StoredFile(**values) for values in notes}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{out / JOURNAL} is damaged: remove {out} and prepare again") from error
    check_same(out, header, plan)
    return kept


def note(journal: BinaryIO, values: object) -> None:
    """Add a line to the journal."""
    try:
        journal.write(json.dumps(values).encode() + b"\n")
        os.fsync(journal.fileno())
    except OSError as error:
        raise InputError(f"{journal.name} can't be written: {error.strerror}; run again to go on") from error


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, whatever happens to process or machine."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        take_name(partial, path)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}; run again to go on") from error
    finally:
        remove(partial)


def take_name(partial: Path, path: Path) -> None:
    """Give a file its name once its bytes are on the disk, and see to it that the name is."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file that may be there."""
    if path.exists():  # asked first, so that folders that can't be written do no harm
        path.unlink(missing_ok=True)
