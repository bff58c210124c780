"""How busy the loops keep the device: wall time of training and sampling beside that of their compiled programs alone.

    python benchmarks/dispatch.py                                 configs/fashion_mnist.py, a few minutes

Training is `ddpm_jax.train` into a temporary folder, with its data, metrics and logging, timed between its own records of
metrics; there is no preview, and the one checkpoint, at the end, comes after the last record. Sampling is `Model.sample`,
with its keys and its copies to the host. Beside them stand the same compiled programs, executed back to back with their
inputs ready, waiting only at the end. Both take turns over several rounds; the table gives medians and

    overhead = 1 - device / wall

On a CPU the host's work and the device's share the same cores. An overhead below what the rounds differ by is none.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from speed import processor
from worker_jax import start_training

from ddpm_jax import Config, Model, load_config, train
from ddpm_jax.data import load_images
from ddpm_jax.inference import make_draw
from ddpm_jax.metrics import read_metrics
from ddpm_jax.models import init_params, make_unet
from ddpm_jax.parallel import keep_compiled, make_mesh, put, replicated, run_once
from ddpm_jax.training.loop import fit_to_data
from ddpm_jax.validation import config_schedule

Turn = Callable[[], float]


def train_turns(config: Config, records: int) -> tuple[Turn, Turn]:
    """Milliseconds a step: of the loop, and of its compiled program alone."""
    # The first record's interval has compilation in it, or the end of it.
    total = (records + 1) * config.train.log_every_steps
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, num_steps=total, checkpoint_every_steps=total, preview_every_steps=None),
    )
    training = start_training(config, load_images(config.data).images)
    count, steps, state = config.train.steps_per_dispatch, training.steps, training.state
    ready = [next(training.source) for _ in range(records * config.train.log_every_steps // count)]
    number = put(np.int32(count), replicated(training.mesh))

    def device() -> float:
        nonlocal state
        began = time.perf_counter()
        for batch in ready:
            state, _ = steps(state, batch, number)
        jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - began) / (len(ready) * count)

    def wall() -> float:
        with tempfile.TemporaryDirectory() as workdir:
            train(config, workdir)
            speeds = [record["images_per_second"] for record in read_metrics(Path(workdir))[1:]]
        return 1e3 * config.train.batch_size * statistics.mean(1 / speed for speed in speeds)

    return wall, device


def sample_turns(config: Config, num_batches: int) -> tuple[Turn, Turn]:
    """Milliseconds an image: of `Model.sample`, and of its compiled program alone."""
    assert config.data.image_shape is not None
    shape, mesh, batch_size = config.data.image_shape, make_mesh(), config.sample.batch_size
    unet = make_unet(config.model, shape[-1])
    params = run_once(mesh, lambda: init_params(unet, 0, shape))
    model = Model(config, params, config_schedule(config), 0, "raw", mesh)
    draw, keys = make_draw(config, mesh), jax.random.split(jax.random.key(0), batch_size)
    num_images = num_batches * batch_size

    def device() -> float:
        began = time.perf_counter()
        jax.block_until_ready([draw(params, keys, None) for _ in range(num_batches)])
        return 1e3 * (time.perf_counter() - began) / num_images

    def wall() -> float:
        began = time.perf_counter()
        model.sample(num_images)
        return 1e3 * (time.perf_counter() - began) / num_images

    return wall, device


def compare(task: str, unit: str, turns: tuple[Turn, Turn], rounds: int) -> dict[str, Any]:
    """The row of one task: both sides by turns, either one first, after one turn each that doesn't count."""
    wall, device = turns
    wall(), device()
    pairs = []
    for number in range(rounds):
        if number % 2:
            alone, real = device(), wall()
        else:
            real, alone = wall(), device()
        pairs.append((real, alone))
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    overheads = [1 - alone / real for real, alone in pairs]
    return {
        "task": task, "unit": unit, "wall_ms": medians[0], "device_ms": medians[1], "overhead": 1 - medians[1] / medians[0],
        "all_wall_ms": [pair[0] for pair in pairs], "all_device_ms": [pair[1] for pair in pairs], "all_overhead": overheads,
    }  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_path = Path(__file__).parents[1] / "configs" / "fashion_mnist.py"
    parser.add_argument("--config", type=Path, default=config_path)
    parser.add_argument("--tasks", nargs="+", choices=("train", "sample"), default=["train", "sample"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--records", type=int, default=4, help="records of metrics that a turn of training covers")
    parser.add_argument("--batches", type=int, default=2, help="batches of sample.batch_size images that a turn draws")
    parser.add_argument("--out", type=Path, default=Path("runs/dispatch"), help="folder for dispatch.json")
    options = parser.parse_args()
    keep_compiled()
    config = load_config(options.config)
    config = fit_to_data(config, load_images(config.data))
    rows = []
    if "train" in options.tasks:
        rows.append(compare("train", "step", train_turns(config, options.records), options.rounds))
    if "sample" in options.tasks:
        rows.append(compare("sample", "image", sample_turns(config, options.batches), options.rounds))
    print("| task | wall ms | device ms | overhead (range) |\n|---|---|---|---|")
    for row in rows:
        low, high = min(row["all_overhead"]), max(row["all_overhead"])
        times = f"{row['wall_ms']:.3f} a {row['unit']} | {row['device_ms']:.3f}"
        print(f"| {row['task']} | {times} | {row['overhead']:.1%} ({low:.1%} to {high:.1%}) |")
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
    result = {"machine": machine, "jax": jax.__version__, "config": str(options.config), "rows": rows}
    (options.out / "dispatch.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
