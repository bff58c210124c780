"""How near the machine's floor a training step is: its layers one by one, against what arithmetic and memory allow at best.

    python benchmarks/floor.py --case small                       a few minutes

In the same run, by the same compiler: the best rate of a float32 matrix product, and the bandwidth of a copy between arrays
that fit the L2 cache, arrays that fit larger ones, and arrays that fit none. Then every distinct layer of the network, found
by tracing it, as programs of its own, repeated in a loop on the device so that no dispatch is counted, times how often it
occurs: with as many images as are worked on at a time, once for each part of the batch. The floor of a program is

    max(operations / peak, bytes / bandwidth)

with operations counted from shapes (2 for each multiplication and addition of a direct convolution or matrix product; other
arithmetic counts as none), every input and output read or written once, and the bandwidth of the smallest of these copies
that moves as many bytes. Winograd's algorithm needs half of these operations or fewer, so that a ratio may exceed 1. The sum
of the phases leaves out noise, loss, concatenation, upsampling and residual additions, which the last line tells.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import CASES
from jax.sharding import Mesh
from jaxtyping import PyTree
from layers import Function, Layer, abstract, nbytes, programs, trace_layers
from speed import processor
from worker_jax import Training, make_config, make_run, start_training

from ddpm_jax.config import Config
from ddpm_jax.models import count_parts, num_params
from ddpm_jax.parallel import compile_for, keep_compiled
from ddpm_jax.training.ema import ema_decay, ema_update
from ddpm_jax.training.optimizer import make_optimizer


@dataclass(frozen=True)
class Cost:
    """What one program needs at least, and what it took."""

    phase: str
    shapes: str
    occurrences: int
    operations: int
    bytes: int
    seconds: float
    floor: float = 0.0


class Machine:
    """Programs in a loop, and how quick the quickest of them are."""

    def __init__(self, mesh: Mesh, seconds: float, repeats: int) -> None:
        self._mesh, self._seconds, self._repeats = mesh, seconds, repeats
        self.peak = 0.0
        """Operations a second."""
        self.bandwidth: dict[int, float] = {}
        """By the bytes of both arrays of a copy, bytes a second."""

    def probe(self) -> None:
        """Measure peak and bandwidth; of several probes in a run the best counts."""
        for size in (512, 1024, 2048):
            matrices = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * 2
            self.peak = max(self.peak, 2 * size**3 / self.time(jnp.dot, *matrices))
        for mib in (0.5, 8, 64, 512):
            array = jax.ShapeDtypeStruct((int(mib * 2**20) // 8,), jnp.float32)
            speed = mib * 2**20 / self.time(lambda x: x * 0.5, array)
            self.bandwidth[int(mib * 2**20)] = max(speed, self.bandwidth.get(int(mib * 2**20), 0))

    def floor(self, operations: int, moved: int) -> float:
        """Seconds that a program of so many operations and moved bytes takes at best."""
        fitting = [speed for size, speed in sorted(self.bandwidth.items()) if size >= moved]
        return max(operations / self.peak, moved / (fitting[0] if fitting else self.bandwidth[max(self.bandwidth)]))

    def time(self, function: Function, *shapes: PyTree) -> float:
        """Median seconds of function(*arguments) for random arguments, in a loop on the device."""
        arguments = _random(shapes)
        outputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))

        # One element of every argument comes from the last outputs, so that no part of the loop is known beforehand, and
        # the outputs are carried whole, so that all of them are computed. The sort is for XLA:CPU, which may compile a loop
        # without one, or convolutions or the like, as a single function, which runs on one core and takes long to compile.
        def body(_: int, carry: PyTree) -> PyTree:
            arguments, outputs = carry
            value = jnp.sort(1e-6 * jnp.tanh(jax.tree.leaves(outputs)[0].ravel()[0]) * jnp.arange(8.0))[-1]
            arguments = tuple(_touch(argument, value) for argument in arguments)
            return arguments, function(*arguments)

        def loop(arguments: PyTree, outputs: PyTree, count: int) -> PyTree:
            return jax.lax.fori_loop(0, count, body, (arguments, outputs))[1]

        program = compile_for(self._mesh, loop)

        def seconds(count: int) -> float:
            began = time.perf_counter()
            jax.block_until_ready(program(arguments, outputs, np.int32(count)))
            return time.perf_counter() - began

        seconds(1)
        count = max(3, math.ceil(self._seconds / seconds(1)))
        # Without what every execution does once: mapping memory, and copying the arguments into the loop's own.
        return statistics.median(seconds(1 + count) - seconds(1) for _ in range(self._repeats)) / count


def _touch(argument: PyTree, value: Any) -> PyTree:
    leaves, structure = jax.tree.flatten(argument)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(jnp.asarray(value, leaves[0].dtype))
    return jax.tree.unflatten(structure, leaves)


def _random(shapes: PyTree) -> PyTree:
    generator = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(generator.random(leaf.shape, np.float32))

    return jax.tree.map(draw, shapes)


def measure_layers(machine: Machine, layers: list[Layer]) -> list[Cost]:
    """The costs of every distinct layer's programs."""
    distinct: dict[str, list[Layer]] = {}
    first = next(layer for layer in layers if layer.kind == "convolution")
    for layer in layers:
        shapes = [str(leaf.shape) for leaf in jax.tree.leaves((layer.inputs, layer.params, layer.output))]
        distinct.setdefault(f"{'first ' if layer is first else ''}{layer.kind} {' '.join(shapes)}", []).append(layer)
    costs = []
    for same in distinct.values():
        layer = same[0]
        shapes = f"{', '.join(str(leaf.shape) for leaf in layer.inputs)} -> {layer.output.shape}"
        for phase, function, arguments, operations, moved in programs(layer, layer is first):
            costs.append(Cost(phase, shapes, len(same), operations, moved, machine.time(function, *arguments)))
    return costs


def measure_optimizer(machine: Machine, config: Config, training: Training) -> Cost:
    """Clipping, Adam and the moving average by themselves."""
    optimizer = make_optimizer(config.optim, config.train.num_steps)

    def update(grads: PyTree, params: PyTree, ema: PyTree, opt_state: PyTree) -> PyTree:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, ema_update(ema, params, ema_decay(jnp.int32(0), config.optim.ema_decay, False)), opt_state

    state = jax.tree.map(abstract, training.state)
    moved = 3 * nbytes(state.params) + 2 * nbytes(state.ema) + 2 * nbytes(state.opt_state)
    seconds = machine.time(update, state.params, state.params, state.ema, state.opt_state)
    return Cost("optimiser", f"{num_params(state.params)} parameters", 1, 0, moved, seconds)


def table(rows: list[tuple[str, int, list[Cost]]]) -> str:
    """One line for each (name, seconds in all, costs) as Markdown."""
    lines = ["| | programs | GFLOP | MB | floor ms | measured ms | floor / measured |", "|---|---|---|---|---|---|---|"]
    for name, seconds, costs in rows:
        gflop, megabytes = total(costs, "operations") / 1e9, total(costs, "bytes") / 1e6
        floor, measured = 1e3 * total(costs, "floor"), 1e3 * seconds
        numbers = f"{gflop:.2f} | {megabytes:.0f} | {floor:.2f} | {measured:.2f} | {floor / measured:.2f}"
        lines.append(f"| {name} | {len(costs)} | {numbers} |")
    return "\n".join(lines)


def total(costs: list[Cost], what: str) -> float:
    """The sum over all occurrences."""
    return sum(cost.occurrences * getattr(cost, what) for cost in costs)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="small")
    parser.add_argument("--batch", type=int, help="images of a step; the case's own where not given")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each program, of which the median counts")
    parser.add_argument("--seconds", type=float, default=0.15, help="about how long each of them takes")
    parser.add_argument("--out", type=Path, default=Path("runs/floor"), help="folder for floor-CASE.json")
    options = parser.parse_args()
    keep_compiled()
    config = make_config(CASES[options.case], options.batch or CASES[options.case].batch_size)
    training = start_training(config)
    machine = Machine(training.mesh, options.seconds, options.repeats)
    machine.probe()
    assert config.data.image_shape is not None
    parts = count_parts(config.model, training.state.params, config.data.image_shape, config.train.batch_size)
    layers = trace_layers(config, config.train.batch_size // parts)
    counted = sum(num_params(layer.params) for layer in layers if layer.kind != "dropout")
    known = num_params(training.state.params)
    assert counted == known, f"the layers found hold {counted} of {known} parameters"
    costs = [measure_optimizer(machine, config, training)]
    run = make_run(training)
    run()

    def step_seconds() -> float:
        began = time.perf_counter()
        return config.train.batch_size / (run() / (time.perf_counter() - began))

    steps = [step_seconds() for _ in range(options.repeats)]
    costs = measure_layers(machine, layers * parts) + costs
    steps += [step_seconds() for _ in range(options.repeats)]
    whole = statistics.median(steps)
    machine.probe()
    costs = [replace(cost, floor=machine.floor(cost.operations, cost.bytes)) for cost in costs]

    phases = list(dict.fromkeys(cost.phase for cost in costs))
    groups = [(phase, [cost for cost in costs if cost.phase == phase]) for phase in phases]
    batch = f"batch {config.train.batch_size}" + (f" in {parts} parts" if parts > 1 else "")
    print(f"{CASES[options.case].title}, {batch}: peak {machine.peak / 1e9:.0f} GFLOP/s; copies of ", end="")
    print(", ".join(f"{size / 2**20:g} MiB {speed / 1e9:.0f} GB/s" for size, speed in machine.bandwidth.items()) + "\n")
    rows = [(phase, total(some, "seconds"), some) for phase, some in groups]
    print(table([*rows, ("sum of the phases", total(costs, "seconds"), costs), ("whole step", whole, costs)]))
    print(f"\nWhole step {1e3 * min(steps):.1f}-{1e3 * max(steps):.1f} ms; ", end="")
    print(f"not in the phases: {1e3 * (whole - total(costs, 'seconds')):.1f} ms, {1 - total(costs, 'seconds') / whole:.0%}")
    print("\nFarthest above the floor:\n")
    worst = sorted(costs, key=lambda cost: cost.occurrences * (cost.floor - cost.seconds))[:10]
    print(table([(f"{c.phase} {c.shapes} x {c.occurrences}", c.occurrences * c.seconds, [c]) for c in worst]))
    options.out.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}, "jax": jax.__version__,
        "case": options.case, "batch": config.train.batch_size, "peak": machine.peak, "bandwidth": machine.bandwidth,
        "step_seconds": whole, "all_step_seconds": steps, "programs": [asdict(cost) for cost in costs],
    }  # fmt: skip
    (options.out / f"floor-{options.case}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
