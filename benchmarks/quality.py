"""Quality over training time, beside PyTorch: who draws the better images after the same minutes on the same cores?

    python benchmarks/quality.py                                       1, 2, 5, 10 and 20 minutes, all contestants
    python benchmarks/quality.py --minutes 5 20 --peer-python ../torch/bin/python --plot docs/quality.png
    python benchmarks/quality.py --contestants ddpm_jax --minutes 1 --num-images 500

Each contestant learns from the 10,000 packaged images (28x28x1) with its own published defaults, in a process of its own that
uses all cores while nobody else runs:

ddpm_jax      `python train.py`: configs/fashion_mnist.py
lucidrains    the README's example of denoising-diffusion-pytorch, with its own Trainer; its averaged weights draw
diffusers     the tutorial "Train a diffusion model"; it has no average, so that the weights themselves draw

The peers' networks halve the resolution three and five times: they get the images padded with zeros to 32x32, and what they
draw is cut back to 28x28. Both of their examples are for colour and for a GPU. They get one channel here, compute in float32,
and don't mirror images, as the reference isn't mirrored.

The clock runs from the start of a process: imports, reading, compilation (with an empty cache) and all steps count. "start"
is the part of it before the first step. Nothing is drawn while it runs, and it stands still while a peer's weights are saved.

A peer trains once, for the longest time, and its weights are put aside at each mark: lucidrains' learning rate is constant,
and diffusers' cosine ends after 50 epochs, which no mark comes near. Our default's cosine ends at train.num_steps, which its
user sets to the time there is, so that each mark has a run of its own. First "ddpm_jax as configured" runs with train.num_steps
untouched, at most for the longest time; its speed tells how many steps fit into each mark. A run that is not done at
its mark is stopped there.

All draw as many images with DDIM of as many steps, each with its own sampler, and all are scored by the same code against the
images that they learned from, in the features of EfficientNet-lite0: see docs/evaluation.md. The Frechet distance of few images
is too large, the kernel distance is not; "real images" tells what as many real ones have beside all the others.

What is done is kept in --out: the same command goes on after a kill, with more minutes, or with another number of images.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from marks import label_of, write_json
from quality_scores import CONFIGURED, Scorer, image_file, plot, score_all, table

from ddpm_jax.config import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.errors import InputError
from ddpm_jax.images import save_folder, save_npz
from ddpm_jax.inference import load
from ddpm_jax.metrics import read_metrics
from ddpm_jax.models import num_params
from ddpm_jax.parallel import keep_compiled

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train.py"
WORKER = Path(__file__).with_name("worker_quality_torch.py")
OURS, PEERS = "ddpm_jax", ("lucidrains", "diffusers")
PADDING = 2
FIT = 0.98  # of the time that is left after the start is filled with steps: machines drift
FEWEST_STEPS = 200  # of a run that is fitted to a mark


class Unable(Exception):
    """A contestant can't run here, with the reason."""


def run_process(command: Sequence[str | Path], log: Path, minutes: float | None = None, **environment: str) -> float:
    """Run to the end, or ask for it by SIGTERM after so many minutes; the seconds until then."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)
        try:
            try:
                process.wait(None if minutes is None else 60 * minutes)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
            seconds = time.time() - began
            status = process.wait()
        finally:
            process.kill()
    if status:
        last = (log.read_text().strip().splitlines() or ["it ended without a word"])[-1]
        raise Unable(f"{last} ({log})")
    return seconds


def train_ours(folder: Path, minutes: Sequence[float]) -> list[str]:
    """The run as configured, and for each mark one whose learning rate ends there; their labels."""
    configured = f"{CONFIGURED}-{label_of(minutes[-1])}"
    facts = once(folder / f"{configured}.json", lambda: train_run(folder / configured, minutes[-1], None))
    for mark in minutes:
        steps = fit_steps(60 * mark, facts["start_seconds"], facts["steps_per_second"])
        workdir = folder / label_of(mark)
        once(folder / f"{workdir.name}.json", functools.partial(train_run, workdir, mark, steps))
    return [configured, *map(label_of, minutes)]


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The facts in a file, made if it is not there."""
    if not path.exists():
        facts = make()
        write_json(path, facts)
    return json.loads(path.read_text())


def fit_steps(seconds: float, start_seconds: float, steps_per_second: float) -> int:
    """Steps that a run of so many seconds has time for."""
    return max(FEWEST_STEPS, int(FIT * (seconds - start_seconds) * steps_per_second))


def train_run(workdir: Path, minutes: float, num_steps: int | None) -> dict[str, Any]:
    """Run train.py for at most so many minutes; what it has done."""
    shutil.rmtree(workdir, ignore_errors=True)  # one that was interrupted: its clock can't be gone on with
    with tempfile.TemporaryDirectory() as cache:
        log, command = workdir.with_name(f"{workdir.name}.log"), [sys.executable, TRAIN, *train_options(workdir, num_steps)]
        seconds = run_process(command, log, minutes, XDG_CACHE_HOME=cache, JAX_PLATFORMS="cpu")
    model, records = load(workdir), read_metrics(workdir)
    speed = mean_speed([record["step"] for record in records], [record["images_per_second"] for record in records])
    batch_size = model.config.train.batch_size
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    return {
        "minutes": minutes, "seconds": seconds, "start_seconds": seconds - model.step * batch_size / speed,
        "steps": model.step, "planned_steps": model.config.train.num_steps, "images": model.step * batch_size,
        "steps_per_second": speed / batch_size, "parameters": num_params(model.params), "versions": versions,
    }  # fmt: skip


def train_options(workdir: Path, num_steps: int | None) -> list[str]:
    """train.py's options: the default config without previews, and with another number of steps where one is given."""
    options = ["--workdir", str(workdir), "--train.preview-every-steps", "None"]
    return options if num_steps is None else [*options, "--train.num-steps", str(num_steps)]


def mean_speed(steps: Sequence[int], speeds: Sequence[float]) -> float:
    """Images a second over all steps, from records that end at the given steps."""
    if not steps:
        raise Unable("no time for the first record of metrics")
    parts = np.diff(steps, prepend=0)
    return float(parts.sum() / (parts / np.asarray(speeds)).sum())


def train_peer(peer: str, folder: Path, minutes: Sequence[float], images: Path, python: str) -> list[str]:
    """Train a peer until the last mark that it has no weights of, and put the weights of all such marks aside; all labels."""
    missing = [mark for mark in minutes if not (folder / f"{label_of(mark)}.json").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        command = [python, WORKER, "train", peer, folder, images, str(time.time()), *map(str, missing)]
        run_process(command, folder / "train.log", ACCELERATE_USE_CPU="true")
    return [*map(label_of, minutes)]


def pad_images(folder: Path) -> Path:
    """The packaged images as PNG files, each with PADDING zeros around it."""
    if not folder.exists():
        images, temporary = load_images(DataConfig()).images, folder.with_name(f".{folder.name}")
        save_folder(temporary, np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))))
        temporary.replace(folder)
    return folder


def draw(contestant: str, folder: Path, labels: Sequence[str], num_images: int, steps: int, python: str) -> None:
    """Draw the images that are missing into LABEL-SUFFIX.npz."""
    missing = [label for label in labels if not image_file(folder, label, num_images, steps).exists()]
    if contestant == OURS:
        for label in missing:
            images = load(folder / label).sample(num_images, seed=0, sampler="ddim", num_steps=steps)
            save_npz(image_file(folder, label, num_images, steps), images)
    elif missing:
        command = [python, WORKER, "draw", contestant, folder, str(num_images), str(steps), f"{num_images}x{steps}", *missing]
        run_process(command, folder / "draw.log", ACCELERATE_USE_CPU="true")


def main() -> None:
    """Parse the command line, train, draw, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 2, 5, 10, 20], help="marks on the training clock")
    parser.add_argument("--contestants", nargs="+", choices=(OURS, *PEERS), default=[OURS, *PEERS])
    parser.add_argument("--num-images", type=int, default=1000, help="images drawn at each mark")
    parser.add_argument("--sampling-steps", type=int, default=50, help="DDIM steps from noise to image")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter to run the PyTorch peers with")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder for everything that is written")
    parser.add_argument("--plot", type=Path, help="where the plot goes; quality.png in --out")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contestant at work is ended as well
    keep_compiled()
    minutes, out = sorted(set(options.minutes)), options.out.resolve()
    labels: dict[str, list[str]] = {}
    for name in options.contestants:
        print(f"training: {name}", file=sys.stderr)
        try:
            if name == OURS:
                labels[name] = train_ours(out / name, minutes)
            else:
                images = pad_images(out / "images")
                labels[name] = train_peer(name, out / name, minutes, images, options.peer_python)
        except (Unable, InputError, OSError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
    if not labels:
        sys.exit("error: no contestant can run here")
    for name in labels:
        print(f"drawing: {name}", file=sys.stderr)
        draw(name, out / name, labels[name], options.num_images, options.sampling_steps, options.peer_python)
    result = score_all(out, labels, options.num_images, options.sampling_steps, functools.cache(Scorer))
    (out / "quality.md").write_text(table(result) + "\n")
    print(table(result))
    plot(result, options.plot or out / "quality.png")


if __name__ == "__main__":
    main()
