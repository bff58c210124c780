"""How the cost of a training step grows: with the batch, the resolution, the number of devices, and with rematerialisation.

    python benchmarks/growth.py                                  every table: half an hour or so on two cores
    python benchmarks/growth.py --tables batch --batches 1 4 16 --rounds 3

Every point has a process of its own, which compiles, then waits; the points of a table work in turn, so that a machine whose
speed drifts slows all of them, and the table gives medians. Temporary memory is what the compiler reserves on each device
for the intermediate arrays of its program; peak memory is the largest resident memory of the process after compilation
(Linux; elsewhere compilation counts too). Slopes are exponents: cost ~ size^slope, by least squares over all points and, in
brackets, between the two largest.

The devices are the processor's cores shared out (--xla_force_host_platform_device_count), and the batch over all of them
stays the same: time can't fall below what the cores give one device already. What the table tells is what splitting costs,
and how the temporary memory of each device falls.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
from cases import CASES
from speed import processor
from turns import Worker, serve, take_turns
from worker_jax import make_config, make_run, start_training

from ddpm_jax.config import override
from ddpm_jax.models import num_params
from ddpm_jax.parallel import keep_compiled, put, replicated

TABLES = ("batch", "resolution", "devices", "remat")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Point:
    """One program to measure."""

    case: str
    """The network, from cases.py."""
    batch: int
    """Images of a step, over all devices."""
    height: int
    """Height and width of the images; the levels with attention are those of the case, whatever their resolution."""
    devices: int = 1
    """Devices that the host's processor is made to look like."""
    remat: bool = False
    """Whether the backward pass recomputes each block."""


def work(point: Point) -> None:
    """Compile the point's training step, tell its memory, and take turns."""
    keep_compiled()
    case = CASES[point.case]
    shape = (point.height, point.height, case.image_shape[2])
    attention = tuple(height * point.height // case.image_shape[0] for height in case.attention_resolutions)
    case = dataclasses.replace(case, image_shape=shape, attention_resolutions=attention)
    training = start_training(override(make_config(case, point.batch), {"model.remat": point.remat}))
    count = num_params(training.state.params)
    number = put(np.int32(1), replicated(training.mesh))
    steps = training.steps.lower(training.state, next(training.source), number).compile()
    run = make_run(training._replace(steps=steps))
    temp_mib = steps.memory_analysis().temp_size_in_bytes / MIB
    del training
    forget_peak()
    serve(run, count, {"jax": jax.__version__}, temp_mib=temp_mib)


def forget_peak() -> None:
    """Give the compiler's memory back, and let the peak of resident memory count from here; on Linux only."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def start(point: Point) -> Worker:
    """A process for the point that has compiled and warmed up."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={point.devices}"
    command = [sys.executable, __file__, "--point", json.dumps(dataclasses.asdict(point))]
    return Worker(str(point), command, os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"})


def measure(name: str, points: list[Point], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each point of a table."""
    workers = [start(point) for point in points]
    take_turns(workers, options.rounds, options.seconds)
    rows = []
    for point, worker in zip(points, workers, strict=True):
        speed = statistics.median(worker.speeds)
        rows.append(
            {
                "table": name, **dataclasses.asdict(point), "versions": worker.first["versions"],
                "parameters": worker.first["num_params"], "step_seconds": point.batch / speed, "images_per_second": speed,
                "all_step_seconds": [point.batch / s for s in worker.speeds], "temp_mib": worker.first["temp_mib"],
                "peak_mib": worker.peak_mib,
            }
        )  # fmt: skip
    return rows


def size(row: dict[str, Any]) -> int:
    """What a table's points differ in, as the plot's horizontal axis and the slopes have it."""
    key = {"batch": "batch", "resolution": "height", "devices": "devices", "remat": "batch"}[row["table"]]
    return row[key] ** 2 if key == "height" else row[key]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with what follows from them underneath."""
    lines = ["| batch | resolution | devices | remat | ms/step (range) | images/s | temporary MiB | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = 1e3 * min(row["all_step_seconds"]), 1e3 * max(row["all_step_seconds"])
        remat = "yes" if row["remat"] else "no"
        lines.append(
            f"| {row['batch']} | {row['height']} | {row['devices']} | {remat} | {1e3 * row['step_seconds']:.4g} "
            f"({low:.4g}-{high:.4g}) | {row['images_per_second']:.4g} | {row['temp_mib']:.1f} | {row['peak_mib']:.0f} |"
        )
    return "\n".join([*lines, "", *conclusions(rows)])


def conclusions(rows: list[dict[str, Any]]) -> list[str]:
    """Slopes over what a table varies, and the ratios of rematerialisation."""
    lines = []
    over = {"batch": "batch", "resolution": "pixels", "devices": "devices", "remat": "batch"}[rows[0]["table"]]
    for remat in (False, True):
        some = [row for row in rows if row["remat"] is remat]
        if len(some) > 1:
            parts = [f"{what} {slopes(some, key)}" for key, what in MEASURES.items()]
            lines.append(f"Slopes over {over}{', with remat' if remat else ''}: {', '.join(parts)}.")
    for row in rows:
        plain = [r for r in rows if row["remat"] and not r["remat"] and r["batch"] == row["batch"]]
        if plain:
            parts = [f"{what} x {row[key] / plain[0][key]:.2f}" for key, what in MEASURES.items()]
            lines.append(f"Remat at batch {row['batch']}: {', '.join(parts)}.")
    return lines


MEASURES = {"step_seconds": "time", "temp_mib": "temporary memory", "peak_mib": "peak memory"}


def slopes(rows: list[dict[str, Any]], key: str) -> str:
    """The exponent over all rows, and between the last two."""
    x, y = np.log([size(row) for row in rows]), np.log([row[key] for row in rows])
    return f"{np.polyfit(x, y, 1)[0]:.2f} ({(y[-1] - y[-2]) / (x[-1] - x[-2]):.2f})"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time, temporary and peak memory, over what each table varies, on logarithmic scales."""
    names = list(dict.fromkeys(row["table"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(3.6 * len(names), 6), layout="constrained")
    for number, name in enumerate(names):
        top, bottom = figure.add_subplot(2, len(names), number + 1), figure.add_subplot(2, len(names), len(names) + number + 1)
        for remat, style in ((False, "-"), (True, "--")):
            some = [row for row in rows if row["table"] == name and row["remat"] is remat]
            x, suffix = [size(row) for row in some], ", remat" if remat else ""
            if some:
                top.plot(x, [row["step_seconds"] for row in some], f"o{style}", color="C0", label=f"time{suffix}")
                bottom.plot(x, [row["temp_mib"] for row in some], f"o{style}", color="C1", label=f"temporary{suffix}")
                bottom.plot(x, [row["peak_mib"] for row in some], f"s{style}", color="C2", label=f"peak{suffix}")
        ticks = sorted({size(row) for row in rows if row["table"] == name})
        labels = [f"{round(t**0.5)}²" if name == "resolution" else str(t) for t in ticks]
        for axes in (top, bottom):
            axes.set(xscale="log", yscale="log", xlabel={"resolution": "pixels", "remat": "batch"}.get(name, name))
            axes.set_xticks(ticks, labels, minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(visible=True, which="both", alpha=0.3)
            axes.legend(fontsize="small")
        top.set_title(name)
        top.set_ylabel("seconds a step")
        bottom.set_ylabel("MiB")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line, measure table by table, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--case", choices=list(CASES), default="small")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="of the table batch")
    parser.add_argument("--heights", nargs="+", type=int, default=[16, 24, 32, 48, 64], help="of the table resolution")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8], help="of the table devices")
    parser.add_argument("--remat-batches", nargs="+", type=int, default=[4, 16, 64], help="of the table remat")
    parser.add_argument("--fixed-batch", type=int, default=16, help="batch where something else varies")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each point")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a turn takes; one dispatch at least")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="folder for growth.json and growth.png")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        work(Point(**json.loads(options.point)))
        return
    case, batch, height = options.case, options.fixed_batch, CASES[options.case].image_shape[0]
    points = {
        "batch": [Point(case, n, height) for n in options.batches],
        "resolution": [Point(case, batch, n) for n in options.heights],
        "devices": [Point(case, batch, height, devices=n) for n in options.devices],
        "remat": [Point(case, n, height, remat=remat) for n in options.remat_batches for remat in (False, True)],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
    for name in options.tables:
        rows += measure(name, points[name], options)
        print(f"\n{name}: {CASES[case].title}\n\n{table([row for row in rows if row['table'] == name])}", flush=True)
        (options.out / "growth.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        plot(rows, options.out / "growth.png")


if __name__ == "__main__":
    main()
