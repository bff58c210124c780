"""What checkpoints cost the loop: the time of steps with one save among them beside that of steps without.

    python benchmarks/checkpointing.py                            configs/fashion_mnist.py, 20 pairs of 500 steps
    python benchmarks/checkpointing.py --config configs/cifar10.py --steps 20 --pairs 3

The steps are those of the training loop: its compiled program, its data, its metrics read one dispatch behind. Stretches with
a save at their start and stretches without take turns, either one first, so that a machine whose speed changes from minute to
minute does it to both of a pair. The table gives medians, and of

    lost = (with - without) / without        of a pair, scaled to one save every --per steps

the quartiles over all pairs: the middle one is the answer, the others say how far to trust it.

"blocking" is how long the loop stands still for `Checkpoints.save`, "whole" how long it takes until the checkpoint is there.
On a CPU what writes and what trains share the cores.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from speed import processor
from worker_jax import Training, start_training

from ddpm_jax import load_config
from ddpm_jax.config import Config
from ddpm_jax.data import load_images
from ddpm_jax.parallel import keep_compiled, put, replicated
from ddpm_jax.saving import Checkpoints
from ddpm_jax.training.loop import fit_to_data


class Loop:
    """Training that goes on from stretch to stretch, and what was measured of its saves."""

    def __init__(self, training: Training, checkpoints: Checkpoints, steps: int) -> None:
        self._training, self._state, self._checkpoints, self._steps = training, training.state, checkpoints, steps
        self._saves = 0
        self.blocking: list[float] = []
        self.whole: list[float] = []

    def stretch(self, save: bool) -> float:
        """Seconds that the steps take; with a save, it is begun before the first and over when they end."""
        began = time.perf_counter()
        if save:
            self._saves += 1
            self._checkpoints.save(self._state, self._saves)
            self.blocking.append(time.perf_counter() - began)
        each = self._training.config.train.steps_per_dispatch
        number = put(np.int32(each), replicated(self._training.mesh))
        pending, written = None, not save
        for _ in range(self._steps // each):
            self._state, metrics = self._training.steps(self._state, next(self._training.source), number)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
            self._checkpoints.check()
            if not written and self._checkpoints.idle:
                written = True
                self.whole.append(time.perf_counter() - began)
        jax.device_get(pending)
        self._checkpoints.wait()
        if not written:
            self.whole.append(time.perf_counter() - began)
        return time.perf_counter() - began


def measure(config: Config, steps: int, pairs: int, per: int) -> str:
    """A row of the table."""
    training = start_training(config, load_images(config.data).images)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(training.state)) / 2**20
    with tempfile.TemporaryDirectory() as workdir, Checkpoints(Path(workdir), config) as checkpoints:
        loop = Loop(training, checkpoints, steps)
        for save in (False, True):
            loop.stretch(save)
        loop.blocking.clear()
        loop.whole.clear()
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(pairs):
            for save in (True, False) if number % 2 else (False, True):
                times[save].append(loop.stretch(save))
    lost = [100 * (beside - alone) / (alone * per / steps) for alone, beside in zip(times[False], times[True], strict=True)]
    low, middle, high = statistics.quantiles(lost, n=4)
    alone = 1e3 * statistics.median(times[False]) / steps
    blocking, whole = (1e3 * statistics.median(values) for values in (loop.blocking, loop.whole))
    return f"| {size:.0f} MiB | {alone:.2f} | {blocking:.0f} | {whole:.0f} | {low:.2f}, **{middle:.2f}**, {high:.2f} % |"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "fashion_mnist.py")
    parser.add_argument("--steps", type=int, default=500, help="steps of a stretch")
    parser.add_argument("--per", type=int, default=500, help="steps between two saves that the share is given for")
    parser.add_argument("--pairs", type=int, default=20, help="stretches with and without a save")
    options = parser.parse_args()
    keep_compiled()
    config = load_config(options.config)
    config = fit_to_data(config, load_images(config.data))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, keep_last=2, keep_every_steps=None))
    row = measure(config, options.steps, options.pairs, options.per)
    print(f"{options.config.name} on {processor()}, {os.cpu_count()} cores, jax {jax.__version__}\n")
    print("| state | ms a step | blocking ms | whole ms | lost |\n|---|---|---|---|---|")
    print(row)


if __name__ == "__main__":
    main()
