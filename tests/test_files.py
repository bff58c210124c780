"""Files that are there whole or not at all, whoever else writes them, and whoever is killed."""

import glob
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ROOT

from ddpm_jax.files import remove_debris, whole_file

KILLED = """
import os, signal, sys
from pathlib import Path
from ddpm_jax.files import whole_file
folder = Path(sys.argv[1])
with whole_file(folder / "a.png"), whole_file(folder / "b[1].json"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
OTHERS = [".a.png.tmp", "notes.txt"]


def test_a_file_that_two_write_at_once_is_whole_at_any_time(tmp_path):
    path, piece = tmp_path / "file", 5000

    def write(letter):
        for _ in range(300):
            with whole_file(path) as file:
                for _ in range(4):
                    file.write(piece * letter)
                    file.flush()

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, letter) for letter in (b"a", b"b")]
        while not all(writer.done() for writer in writers):
            if path.exists():
                assert path.read_bytes() in (4 * piece * b"a", 4 * piece * b"b")
    for writer in writers:
        writer.result()
    assert list(tmp_path.iterdir()) == [path]


def write_half(path, durable):
    with whole_file(path, durable) as file:
        file.write(b"half")
        raise RuntimeError


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, durable):
    path = tmp_path / "deep" / "file"
    with whole_file(path, durable) as file:
        file.write(b"before")
    with pytest.raises(RuntimeError):
        write_half(path, durable)
    assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == {"file": b"before"}


@pytest.fixture
def left(tmp_path):
    """A folder in which a program was killed while it wrote a.png and b[1].json, beside files that are not its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=env).returncode == -signal.SIGKILL
    for name in OTHERS:
        (tmp_path / name).touch()
    return tmp_path


def debris(folder):
    """The names, after a dot, that files were to have."""
    return sorted(entry.name.rpartition(".tmp")[0][:-9] for entry in folder.iterdir() if entry.name not in OTHERS)


def test_debris_is_removed_by_the_name_that_the_file_was_to_have(left):
    assert debris(left) == [".a.png", ".b[1].json"]
    remove_debris(left, "*.png")
    assert debris(left) == [".b[1].json"]
    remove_debris(left, glob.escape("b[1].json"))
    assert sorted(entry.name for entry in left.iterdir()) == OTHERS
    remove_debris(left / "nowhere")


def test_debris_is_removed_by_its_age(left):
    remove_debris(left, seconds=3600.0)
    assert debris(left) == [".a.png", ".b[1].json"]
    for path in left.iterdir():
        os.utime(path, (0, 0))
    remove_debris(left, seconds=3600.0)
    assert sorted(entry.name for entry in left.iterdir()) == OTHERS
