"""How fast images come: folders, prepared sets and arrays, beside bare Pillow and PyTorch's DataLoader with torchvision.

    pip install -e ".[bench]"
    python benchmarks/data.py                                        all tables: about twenty minutes on two cores
    python benchmarks/data.py --tables png --rounds 3 --seconds 3
    python benchmarks/data.py --peer-python ../torch/bin/python      PyTorch from another environment

Tables:
    png     64x64 PNG files: the folder, the same prepared by prepare.py, and the same as an array
    jpeg    500x375 JPEG files framed to 64x64
    idle    the share of its time that training waits for images: the default config with its set on the device, and streamed
            from what prepare.py made of it

The pictures are made by pictures.py. Everyone has as many workers as there are cores and delivers batches of 128, shuffled,
uint8, framed to 64x64 without distortion. Each candidate has a process of its own; they take turns of whole epochs, and the
table gives medians over the rounds, and the ratio to the folder in the same run. While one works the others wait.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from pictures import write_jpegs, write_pngs
from PIL import Image
from speed import processor
from turns import Worker, take_turns

HERE = Path(__file__).parent
ROOT = HERE.parent
SIZE = 64  # pixels of the edge of what is delivered
BATCH = 128
BARE = ("pillow-threads", "pillow-processes")
TORCH = ("torch-pillow", "torch-tensor")


def make_sources(table: str, folder: Path, count: int) -> dict[str, Path]:
    """Candidate of this project -> its source; what the peers read is that of "folder"."""
    files = folder / table
    if table == "jpeg":
        write_jpegs(files, count)
        return {"folder": files}
    write_pngs(files, count)
    paths = sorted(files.rglob("*.png"))
    np.save(folder / "images.npy", np.stack([np.asarray(Image.open(path)) for path in paths]))
    prepare(folder / "prepared", "--data.source", files, "--resolution", SIZE)
    array = folder / "images.npy"
    return {"folder": files, "prepared": folder / "prepared", "array": array, "array-resident": array}


def prepare(out: Path, *options: object) -> None:
    """What prepare.py writes with these options."""
    command = [sys.executable, ROOT / "prepare.py", "--out", out, *options]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=environment())


def environment() -> dict[str, str]:
    """Installed or not, the package that is measured is the one beside this file."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def compare(table: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each candidate that runs here."""
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(table, Path(folder), options.count)
        starts = [(name, sys.executable, "worker_data.py", source) for name, source in sources.items()]
        starts += [(name, sys.executable, "worker_data.py", sources["folder"]) for name in BARE]
        starts += [(name, options.peer_python, "worker_data_torch.py", sources["folder"]) for name in TORCH]
        candidates: list[Worker] = []
        for name, python, worker, source in starts:
            arguments = map(str, (HERE / worker, name, source, SIZE, BATCH, options.workers))
            try:
                candidates.append(Worker(name, [python, *arguments], environment() | {"XDG_CACHE_HOME": folder}))
            except (RuntimeError, OSError) as error:
                print(f"left out: {error}", file=sys.stderr)
        take_turns(candidates, options.rounds, options.seconds)
    ours = next((statistics.median(c.speeds) for c in candidates if c.name == "folder"), None)
    return [
        {
            "table": table, "candidate": c.name, "versions": c.first["versions"],
            "images_per_second": statistics.median(c.speeds), "all": c.speeds,
            "ratio": None if ours is None else statistics.median(c.speeds) / ours,
        }
        for c in candidates
    ]  # fmt: skip


def idle(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way that the default config's images take to the device."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "prepared", "--data.source", "fashion_mnist")
        streamed = ["--data.source", f"{folder}/prepared", "--data.device-megabytes", "0"]
        return [
            {"table": "idle", "candidate": name} | train(extra, Path(folder) / name, options.steps)
            for name, extra in (("packaged, on the device", []), ("prepared, streamed", streamed))
        ]


def train(extra: list[str], workdir: Path, steps: int) -> dict[str, Any]:
    """Share of waiting and speed of a run of the default config, without its first record, in which it compiles."""
    command = [sys.executable, ROOT / "train.py", "--workdir", workdir, "--train.num-steps", steps,
               "--train.preview-every-steps", "None", "--train.log-every-steps", "100"]  # fmt: skip
    subprocess.run(
        [*map(str, command), *extra], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][1:]
    waits = [record["data_wait"] for record in records]
    speeds = [record["images_per_second"] for record in records]
    return {"data_wait": statistics.mean(waits), "most": max(waits), "images_per_second": statistics.median(speeds)}


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    if rows and "data_wait" in rows[0]:
        lines = ["| training | images/s | waits for images | at most, over 100 steps |", "|---|---|---|---|"]
        return "\n".join(
            lines
            + [f"| {r['candidate']} | {r['images_per_second']:.0f} | {r['data_wait']:.2%} | {r['most']:.2%} |" for r in rows]
        )
    lines = ["| files | candidate | images/s (range) | ratio to the folder |", "|---|---|---|---|"]
    for r in rows:
        versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
        speeds = f"{r['images_per_second']:.0f} ({min(r['all']):.0f} to {max(r['all']):.0f})"
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        lines.append(f"| {r['table']} | {r['candidate']} ({versions}) | {speeds} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("png", "jpeg", "idle")
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long a turn takes")
    parser.add_argument("--count", type=int, default=8192, help="pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads or processes of each candidate")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the table idle")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter to run PyTorch with")
    parser.add_argument("--out", type=Path, default=Path("runs/data"), help="folder for data.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
    rows: list[dict[str, Any]] = []
    for name in options.tables:
        rows += idle(options) if name == "idle" else compare(name, options)
        (options.out / "data.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        print(table_of([row for row in rows if row["table"] == name]), flush=True)


if __name__ == "__main__":
    main()
