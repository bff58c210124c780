"""The lock of a run folder, between real processes."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ROOT, one_line_error

import ddpm_jax as ddpm
from ddpm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from ddpm_jax.data.journal import claim
from ddpm_jax.lock import hold, locked

# Holds the lock with nothing but the system's call, as any other program might.
HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 123 on there\\n"); file.flush()
print("held", flush=True)
time.sleep(60)
"""
TAKER = """
import sys, time
from pathlib import Path
from ddpm_jax.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start():
    """Start a Python program and wait until it says that it holds the lock; kill it after the test."""
    started = []

    def call(program, path):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", program, path], env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_that_another_process_holds_is_refused(tmp_path, start):
    start(HOLDER, tmp_path / ".lock")
    one_line_error(locked(tmp_path).__enter__, fragments=[str(tmp_path), "is in use by process 123 on there", "--workdir"])


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path, start):
    workdir = tmp_path / "deep" / "run"
    process = start(TAKER, workdir)
    who = f"is in use by process {process.pid} on {socket.gethostname()}"
    one_line_error(locked(workdir).__enter__, fragments=[who])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert f"process {process.pid}" in (workdir / ".lock").read_text()
    with locked(workdir):
        assert f"process {os.getpid()} " in (workdir / ".lock").read_text()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"process 1\n" * 1000])
def test_what_the_file_says_never_matters(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_it_is_let_go_when_an_error_passes(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("take", [locked, claim])
def test_where_there_are_no_locks_a_warning_names_the_folder(tmp_path, monkeypatch, caplog, take):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with take(tmp_path / "run"):
        assert f"{tmp_path / 'run'} can't be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        one_line_error(locked(workdir).__enter__, fragments=["can't write to run folder", "choose another --workdir"])


def test_training_in_a_folder_in_use_changes_nothing_there(tmp_path, start):
    config = Config(
        data=DataConfig(source="fashion_mnist"),
        model=ModelConfig(channels=8, multipliers=(1,), attention_resolutions=(), num_groups=4),
        train=TrainConfig(batch_size=8, num_steps=1),
    )
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    start(HOLDER, tmp_path / ".lock")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    one_line_error(ddpm.train, config, tmp_path, fragments=["is in use by process 123 on there"])
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_lock_may_be_waited_for(tmp_path, start):
    process = start(HOLDER, tmp_path / ".lock")
    with (tmp_path / ".lock").open("ab") as file, ThreadPoolExecutor(1) as pool:
        assert not hold(file.fileno(), tmp_path)
        waiting = pool.submit(hold, file.fileno(), tmp_path, wait=True)
        time.sleep(0.2)
        assert not waiting.done()
        process.kill()
        assert waiting.result(timeout=30)
