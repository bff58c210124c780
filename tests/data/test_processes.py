"""Two and three real processes that train together, each with its share of six devices, read what one reads."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

BATCH_SIZE, NUM_STEPS = 12, 11
NUM_IMAGES = 35  # neither the batch nor the number of processes divides it


def read_together(folder, num_processes, first):
    """{way: {step: {row: what it holds}}}, put together from all processes; no row may come from two of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={6 // num_processes}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    script = Path(__file__).with_name("read_as_process.py")
    outs = [folder / f"{num_processes}_{first}_{number}.json" for number in range(num_processes)]
    running = [
        subprocess.Popen(
            [sys.executable, script, address, *map(str, (num_processes, number, NUM_IMAGES, first, NUM_STEPS, out))],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for number, out in enumerate(outs)
    ]  # fmt: skip
    try:
        for process in running:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    parts = [json.loads(out.read_text()) for out in outs]
    assert {part.pop("read_here") for part in parts} == {BATCH_SIZE // num_processes * (NUM_STEPS - first)}
    together = {way: {} for way in parts[0]}
    for way, steps in together.items():
        for step in range(first, NUM_STEPS):
            rows = [(int(row), held) for part in parts for row, held in part[way][str(step)].items()]
            assert sorted(row for row, _ in rows) == list(range(BATCH_SIZE))
            steps[step] = dict(rows)
    return together


@pytest.mark.heavy
def test_processes_together_read_what_one_reads(tmp_path):
    """The union is each image once an epoch; a run resumed by another number of processes goes on the same, crops too."""
    alone = read_together(tmp_path, 1, 0)
    assert set(alone) == {"resident", "array", "random"}
    for way, steps in alone.items():
        stream = [steps[step][row] for step in range(NUM_STEPS) for row in range(BATCH_SIZE)]
        assert all(label == pixel for label, pixel, _ in stream)
        for epoch in range(len(stream) // NUM_IMAGES):
            shown = [label for label, _, _ in stream[epoch * NUM_IMAGES : (epoch + 1) * NUM_IMAGES]]
            assert sorted(shown) == list(range(NUM_IMAGES))
        assert len({corner for _, _, corner in stream}) > (50 if way == "random" else 30)
    assert read_together(tmp_path, 2, 0) == alone
    resumed = {way: {step: steps[step] for step in range(5, NUM_STEPS)} for way, steps in alone.items()}
    assert read_together(tmp_path, 3, 5) == resumed
