"""Checkpoints that several processes write and read together, each its own parts."""

import os
import socket
import subprocess
import sys

import jax
import pytest
from helpers import ROOT
from test_checkpoint import abstract, assert_same_bits, host_state, make_state, names, truncate, write

from ddpm_jax.checkpoint import restore_newest
from ddpm_jax.checksums import checksums
from ddpm_jax.parallel import make_mesh, put
from ddpm_jax.saving import items_of, read_description
from ddpm_jax.training.state import state_shardings

pytestmark = pytest.mark.scale

# Restores what is there, compares it with what it should be, and saves the next step.
WORKER = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
from test_checkpoint import CONFIG, host_state
from ddpm_jax.checkpoint import abstract_like, restore_newest
from ddpm_jax.parallel import make_mesh, put
from ddpm_jax.saving import Checkpoints
from ddpm_jax.training.state import state_shardings
workdir, fsdp, expected = Path(sys.argv[1]), int(sys.argv[5]), int(sys.argv[6])
mesh = make_mesh(fsdp=fsdp)
whole = host_state(expected)
shardings = state_shardings(mesh, whole)
state = restore_newest(workdir, abstract_like(whole, shardings))
assert (state is None) == (expected == 0), state
if state is not None:
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        for shard in got.addressable_shards:
            assert (jax.device_get(shard.data) == wanted[shard.index]).all()
with Checkpoints(workdir, CONFIG) as checkpoints:
    checkpoints.save(jax.tree.map(put, host_state(expected + 10), shardings), expected + 10)
"""


def run_together(workdir, count, devices, fsdp, expected):
    """Let processes restore the expected step together (0: nothing) and save the one ten steps later."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    commands = [
        [sys.executable, "-c", WORKER, workdir, address, str(count), str(index), str(fsdp), str(expected)]
        for index in range(count)
    ]
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    return "\n".join(outputs)


def fsdp_state(step, fsdp):
    state = host_state(step)
    return jax.tree.map(put, state, state_shardings(make_mesh(fsdp=fsdp), state))


@pytest.mark.parametrize("fsdp", [1, 4])
def test_two_processes_and_one_read_what_the_other_wrote(tmp_path, fsdp):
    """Written by one process, read and gone on with by two, read by one; then the newest is damaged for both."""
    write(tmp_path, [10])
    run_together(tmp_path, 2, 2, fsdp, expected=10)
    assert names(tmp_path) == ["10", "20"]
    assert_same_bits(restore_newest(tmp_path, abstract(2)), make_state(20))
    stored = read_description(tmp_path / "checkpoints" / "20")
    assert stored["checksums"] == checksums(items_of(make_state(20))) == checksums(items_of(fsdp_state(20, 4)))
    for file in (tmp_path / "checkpoints" / "20" / "ema").rglob("d/*"):
        truncate(file)
    output = run_together(tmp_path, 2, 2, fsdp, expected=10)
    assert names(tmp_path) == ["10", "20", "20.damaged"]
    assert output.count("put aside as 20.damaged") == 1
    assert_same_bits(restore_newest(tmp_path, abstract()), make_state(20))


def test_two_processes_begin_a_run(tmp_path):
    run_together(tmp_path, 2, 2, 2, expected=0)
    assert names(tmp_path) == ["10"]
    assert_same_bits(restore_newest(tmp_path, abstract()), make_state(10))
