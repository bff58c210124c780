"""Speed beside PyTorch: the same network, batch and optimiser, one process for each candidate, taking turns.

    pip install -e ".[bench]"
    python benchmarks/speed.py                                       all cases and tasks: an hour or so on two cores
    python benchmarks/speed.py --cases default --tasks train --rounds 3
    python benchmarks/speed.py --ours python3.11 python3.13 --peer-python ../torch/bin/python

Every candidate warms up, then they work in turn for a few seconds at a time, so that a machine whose speed drifts slows all of
them; the table gives medians over the rounds, and the ratio to the fastest PyTorch candidate. While one works the others wait
for input and use no processor. The first step is timed from the start of the process, imports included, once with an empty
compilation cache and once with a full one. Peak memory is the largest resident memory of the whole process.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.figure
from cases import CASES
from turns import Worker, take_turns

HERE = Path(__file__).parent
PEERS = ("diffusers", "diffusers-channels-last", "diffusers-compile", "lucidrains")
TASKS = ("train", "forward", "ddim64", "ddim1")


class Candidate(Worker):
    """A worker process for one implementation, case and task."""

    def __init__(self, name: str, python: str, case: str, task: str, environment: dict[str, str]) -> None:
        self.is_peer = name in PEERS
        worker = HERE / ("worker_torch.py" if self.is_peer else "worker_jax.py")
        batch = task.removeprefix("ddim") if task.startswith("ddim") else str(CASES[case].batch_size)
        command = [python, str(worker), name, case, "ddim" if task.startswith("ddim") else task, batch]
        super().__init__(name, command, environment)
        self.num_params, self.versions = self.first["num_params"], self.first["versions"]


def compare(case: str, task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each candidate that runs here."""
    candidates: list[Candidate] = []
    cached: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
        starts = [(f"ddpm_jax {number}" if number else "ddpm_jax", python) for number, python in enumerate(options.ours)]
        starts += [(peer, options.peer_python) for peer in options.peers]
        for name, python in starts:
            try:
                candidates.append(Candidate(name, python, case, task, environment))
                if not candidates[-1].is_peer and task == "train":
                    again = Candidate(name, python, case, task, environment)
                    cached[name] = again.first_step_seconds
                    again.end()
            except (RuntimeError, OSError) as error:
                print(f"left out: {error}", file=sys.stderr)
        take_turns(candidates, options.rounds, options.seconds)
    best = max((statistics.median(c.speeds) for c in candidates if c.is_peer), default=None)
    return [
        {
            "case": case, "task": task, "candidate": c.name, "versions": c.versions, "parameters": c.num_params,
            "images_per_second": round(statistics.median(c.speeds), 3), "all": [round(speed, 3) for speed in c.speeds],
            "ratio": None if best is None else round(statistics.median(c.speeds) / best, 3), "peak_mib": round(c.peak_mib),
            "first_step_seconds": round(c.first_step_seconds, 1),
            "first_step_cached_seconds": round(cached[c.name], 1) if c.name in cached else None,
        }
        for c in candidates
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | task | candidate | images/s | ratio | peak MiB | first step s (cached) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        first = f"{row['first_step_seconds']}"
        if row["first_step_cached_seconds"] is not None:
            first += f" ({row['first_step_cached_seconds']})"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        speed, peak = f"{row['images_per_second']:.4g}", row["peak_mib"]
        lines.append(
            f"| {row['case']} | {row['task']} | {row['candidate']} ({versions}) | {speed} | {ratio} | {peak} | {first} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of each candidate's ratio to the fastest PyTorch candidate."""
    groups = list(dict.fromkeys((row["case"], row["task"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(1.5 + 1.6 * len(groups), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        points = [(groups.index((r["case"], r["task"])), r["ratio"] or 0) for r in rows if r["candidate"] == name]
        axes.bar(
            [place + (number - (len(names) - 1) / 2) * width for place, _ in points], [y for _, y in points], width, label=name
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{case}\n{task}" for case, task in groups])
    axes.set_ylabel("images/s, relative to the fastest PyTorch candidate")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def main() -> None:
    """Parse the command line, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a turn takes")
    parser.add_argument("--ours", nargs="+", default=[sys.executable], help="interpreters to run ddpm_jax with")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter to run the PyTorch peers with")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder for speed.json and speed.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for task in options.tasks:
            rows += compare(case, task, options)
            machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
            (options.out / "speed.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
            print(table(rows[-len(options.ours) - len(options.peers) :]), flush=True)
    print(table(rows))
    plot(rows, options.out / "speed.png")


if __name__ == "__main__":
    main()
