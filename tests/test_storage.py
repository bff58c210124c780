"""Storage that is full, forbidden, gone, hanging, or left behind by a killed process."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import jax
import numpy as np
import pytest
from helpers import ROOT, one_line_error, start_script
from test_checkpoint import CONFIG, abstract, assert_same_bits, make_state, names, with_train, write

from ddpm_jax import saving
from ddpm_jax.checkpoint import load_weights, newest_step, restore_newest, write_config
from ddpm_jax.errors import InputError, StorageHangError
from ddpm_jax.saving import Checkpoints
from ddpm_jax.storage import Background, reason, remove_checkpoint, remove_leftovers, within

# Orbax drops the coroutines of what has failed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine '.*' was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
)


# Writes that go on when the event loop that waited for them has been closed.
BROKEN_OFF = """
import asyncio, logging, sys, time
import numpy as np, tensorstore
from ddpm_jax.storage import hush_leftovers

logging.getLogger("asyncio").setLevel(logging.CRITICAL)
if sys.argv[2] == "hushed":
    hush_leftovers()

async def write():
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": sys.argv[1]}, "create": True,
            "metadata": {"shape": [2000, 2000], "dtype": "<f4", "chunks": [100, 100]}}
    await (await tensorstore.open(spec)).write(np.random.rand(2000, 2000).astype(np.float32))

async def main():
    task = asyncio.ensure_future(write())
    await asyncio.sleep(0.05)

loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
time.sleep(2)
class Other:
    def __del__(self):
        raise ValueError("another error")
Other()
"""


@pytest.mark.parametrize("how", ["hushed", "aloud"])
def test_nothing_is_printed_of_an_event_loop_that_was_closed(tmp_path, how):
    command = [sys.executable, "-c", BROKEN_OFF, tmp_path / "array", how]
    errors = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).stderr
    assert "another error" in errors
    assert ("Event loop is closed" in errors) == (how == "aloud"), errors


# --- limits of time


def test_work_ends_with_its_result_or_its_error():
    assert within("adding", 5, lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        within("dividing", 5, lambda: 1 // 0)


def test_work_that_hangs_is_left_when_its_time_is_over():
    release = threading.Event()
    work = Background("writing X", 1, release.wait)
    assert not work.due()
    began = time.monotonic()
    with pytest.raises(StorageHangError, match="writing X has not ended after 1 s: the storage hangs"):
        work.wait()
    assert 0.9 < time.monotonic() - began < 5
    assert work.due()
    release.set()


def test_time_counts_from_the_start_of_the_work():
    release = threading.Event()
    work = Background("writing X", 1, release.wait)
    time.sleep(1.1)
    assert work.due()
    began = time.monotonic()
    with pytest.raises(StorageHangError):
        work.wait()
    assert time.monotonic() - began < 0.5
    release.set()


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, jump):
    """Neither limits of time, nor which checkpoint is the newest, nor which ones stay."""
    real, jumps = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jumps[0])
    with Checkpoints(tmp_path, with_train(keep_last=2, storage_timeout=60)) as checkpoints:
        for step in (1, 2, 3, 4):
            jumps[0] = jump if step == 3 else 0.0
            checkpoints.save(make_state(step), step)
            jumps[0] = jump * (step % 2)
            checkpoints.wait()
    assert names(tmp_path) == ["3", "4"]
    for step, when in ((3, 2e9), (4, 1e9)):
        os.utime(tmp_path / "checkpoints" / str(step), (when, when))
    assert newest_step(tmp_path) == 4
    assert_same_bits(restore_newest(tmp_path, abstract()), make_state(4))


@contextmanager
def pipe_in_place_of(path):
    """A named pipe where a file was: whoever opens it to read waits for ever. At the end the file is back, and they go on."""
    content, aside = path.read_bytes(), path.with_name("pipe")
    path.unlink()
    os.mkfifo(path)
    yield
    path.rename(aside)
    path.write_bytes(content)
    os.close(os.open(aside, os.O_RDWR | os.O_NONBLOCK))
    for thread in threading.enumerate():  # Orbax confuses what two operations at once are waiting for
        if thread.name.startswith("reading"):
            thread.join(30)


def test_a_read_that_hangs_ends_with_an_error(tmp_path):
    write(tmp_path, [1])
    with pipe_in_place_of(tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA"):
        with pytest.raises(StorageHangError, match=r"reading checkpoint .*/1 has not ended after 1 s"):
            restore_newest(tmp_path, abstract(), timeout=1)
        assert names(tmp_path) == ["1"]  # a storage that hangs is no damage


def test_a_write_that_hangs_is_noticed_between_steps(tmp_path, monkeypatch):
    write(tmp_path, [1])
    release = threading.Event()
    monkeypatch.setattr(saving, "write_items", lambda *_: release.wait)

    def run():
        with Checkpoints(tmp_path, with_train(storage_timeout=1)) as checkpoints:
            checkpoints.save(make_state(2), 2)
            for _ in range(200):
                checkpoints.check()
                time.sleep(0.05)

    began = time.monotonic()
    with pytest.raises(StorageHangError) as caught:
        run()
    assert time.monotonic() - began < 8
    release.set()
    message = str(caught.value)
    assert f"writing checkpoint {tmp_path / 'checkpoints' / '2'} has not ended after 1 s" in message
    assert f"the newest whole checkpoint is {tmp_path / 'checkpoints' / '1'}" in message
    assert "\n" not in message


def test_a_program_ends_although_its_threads_hang(tmp_path):
    """The pipe is never let go; the threads of Orbax that read it can't be ended, and Python would wait for them."""
    config = "from ddpm_jax import Config\nconfig = Config()\n"
    (tmp_path / "config.py").write_text(config)
    write(tmp_path / "run", [5])
    (tmp_path / "run" / "config.json").unlink()
    description = tmp_path / "run" / "checkpoints" / "5" / "_CHECKPOINT_METADATA"
    description.unlink()
    os.mkfifo(description)
    began = time.monotonic()
    options = ("--config", "config.py", "--workdir", "run", "--data.source", "fashion_mnist", "--train.storage-timeout", "2")
    small = ("--model.channels", "32", "--model.multipliers", "1", "--model.attention-resolutions", "--train.batch-size", "4")
    process = start_script("train.py", *options, *small, cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2, output + errors
    assert "has not ended after 2 s: the storage hangs" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert time.monotonic() - began < 100


# --- errors in one line


def test_reasons_are_the_systems_own_words():
    tensorstore = "RESOURCE_EXHAUSTED: Error writing \"x\" in OCDBT: Failed to write 7 bytes [os_error_code='28']"
    assert reason(ValueError(tensorstore)) == "No space left on device"
    assert reason(PermissionError(13, "whatever", "/there")) == "Permission denied"
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 1000))) < 250


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_no_checkpoint(small_disk, capfd):
    """A state takes 0.6 MB: the third has no room beside the two before."""
    run = small_disk / "run"
    with pytest.raises(InputError) as caught:
        write(run, [1, 2, 3, 4, 5])
    full = newest_step(run)
    newest = run / "checkpoints" / str(full)
    failed = run / "checkpoints" / str(full + 1)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {failed} can't be written: No space left on device; the newest whole")
    assert str(newest) in message and "\n" not in message
    assert names(run) == [str(step) for step in range(1, full + 1)]  # nothing half-written is in the way
    assert_same_bits(restore_newest(run, abstract()), make_state(full))
    assert "Traceback" not in capfd.readouterr().err
    fill(small_disk / "rest")
    one_line_error(write_config, run, CONFIG, fragments=["can't write to run folder", "No space left on device"])
    assert (run / "config.json").read_text().endswith("}\n")


def fill(path):
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def save_second(run):
    with Checkpoints(run, CONFIG) as checkpoints:
        checkpoints.save(make_state(2), 2)


def test_a_disk_that_is_read_only(small_disk):
    run = small_disk / "run"
    write(run, [1])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    one_line_error(write_config, run, CONFIG, fragments=["can't write to run folder", "Read-only file system"])
    with pytest.raises(InputError, match=r"2 can't be written: Read-only file system; the newest whole checkpoint is .*/1;"):
        save_second(run)
    assert_same_bits(restore_newest(run, abstract()), make_state(1))
    assert load_weights(run, "raw", lambda config: abstract().params).step == 1


@pytest.mark.parametrize("gone", ["checkpoints", "."])
def test_a_folder_that_vanishes_under_a_run(tmp_path, gone):
    """What can be made again is; the checkpoint that is being written is whole, or there is one line."""
    run = tmp_path / "run"
    with Checkpoints(run, CONFIG) as checkpoints:
        checkpoints.save(make_state(1), 1)
        checkpoints.wait()
        shutil.rmtree(run / gone)
        checkpoints.save(make_state(2), 2)
    assert names(run) == ["2"]
    assert_same_bits(restore_newest(run, abstract()), make_state(2))


# --- what is left behind


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    stay = ["10", "20.damaged", "20.damaged2", "notes", "30.orbax", "x.removed"]
    for name in (*stay, "30.orbax-checkpoint-tmp", "30.orbax-checkpoint-tmp-1234", "5.removed"):
        (tmp_path / name / "inner").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(stay)


def test_a_removal_that_is_broken_off_leaves_no_broken_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, [1, 2])
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(tmp_path / "checkpoints" / "2")
    assert names(tmp_path) == ["1", "2.removed"]
    assert newest_step(tmp_path) == 1


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    write(tmp_path, [5])
    other = jax.tree.map(lambda leaf: leaf + 1, make_state(5))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(other, 5)
        checkpoints.save(other, 4)
    assert names(tmp_path) == ["5"]
    assert_same_bits(restore_newest(tmp_path, abstract()), make_state(5))


SAVER = """
import sys
from pathlib import Path
from test_checkpoint import CONFIG, make_state, newest_step
from ddpm_jax.saving import Checkpoints
workdir = Path(sys.argv[1])
with Checkpoints(workdir, CONFIG) as checkpoints:
    for step in range((newest_step(workdir) or 0) + 1, 10**6):
        checkpoints.save(make_state(step), step)
        checkpoints.wait()
        print(step, flush=True)
"""


@pytest.mark.heavy
def test_a_process_that_is_killed_while_it_saves_leaves_whole_checkpoints(tmp_path):
    """Saves without a pause, killed at random instants: every one that was reported is there, and each can be read."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    random, reported = np.random.default_rng(0), 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVER, tmp_path], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            reported = int(process.stdout.readline())
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        reported = max([reported, *map(int, rest.split())])
        newest = newest_step(tmp_path)
        assert reported <= newest <= reported + 1
        assert_same_bits(restore_newest(tmp_path, abstract()), make_state(newest))
        for path in (tmp_path / "checkpoints").iterdir():
            if path.name.isdigit():
                assert load_weights(path, "ema", lambda config: abstract().params).step == int(path.name)
        assert not list(tmp_path.rglob("*.damaged*"))
