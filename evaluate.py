"""Measure a trained model on a set of images.

    python evaluate.py --ckpt runs/demo --metrics bpd --num-images 1000
    python evaluate.py --ckpt runs/cifar10 --metrics bpd,bpd_ode --data test.npz

bpd       bits/dim by the variational bound: as many network evaluations for each image as the process has steps
bpd_ode   bits/dim by the probability-flow ODE, about six times the cost for each of its steps

The result is printed as JSON; the file --out also has the bound's terms for every timestep, "L_t". What is scored is kept in
bits_per_dim.jsonl in the run folder, and in bits_per_dim.1.jsonl and so on by further processes: the same command goes on where
it was stopped, by any number of processes, and parts that were scored with --first-image and --num-images are not scored
again as parts of the whole.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ddpm_jax import cli
from ddpm_jax.checkpoint import run_folder
from ddpm_jax.data import load_images
from ddpm_jax.errors import InputError
from ddpm_jax.evaluation.bits_per_dim import Scoring, evaluate_bits_per_dim
from ddpm_jax.files import whole_file
from ddpm_jax.inference import load
from ddpm_jax.joining import PROCESS_OPTIONS, Processes
from ddpm_jax.processes import is_first

METRICS = ("bpd", "bpd_ode")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of evaluate.py; those left at None are the run's own."""

    ckpt: Path | None = None
    """Run folder, or one of its checkpoints/STEP folders. Required."""
    metrics: str = "bpd"
    """What to measure, separated by commas: bpd, bpd_ode."""
    data: str | None = None
    """Packaged set, .npy or .npz file; None: the images that the model was trained with."""
    first_image: int = 0
    """First image to score."""
    num_images: int | None = None
    """Images to score; None: all from the first one on."""
    seed: int = 0
    """Seed of the noise; an image's number is the same whatever others are scored."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the weights, or the weights themselves."""
    ode_steps: int | None = None
    """Timesteps that the ODE of bpd_ode visits; None: all."""
    ode_probes: int = 1
    """Probes of bpd_ode's divergence: more of them make its estimate less noisy."""
    batch_size: int | None = None
    """Images that each device scores at once."""
    out: Path | None = None
    """JSON file to write; None: evaluation.json in the run folder."""
    processes: Processes = dataclasses.field(default_factory=Processes)


def main(argv: Sequence[str]) -> None:
    """Parse the command line, measure, print and write."""
    known = {field.name for field in dataclasses.fields(Arguments)} - {"processes"} | PROCESS_OPTIONS
    args = cli.parse(Arguments, argv, Arguments(), known, str(__doc__))
    if args.ckpt is None:
        raise InputError("--ckpt is missing: give a run folder, such as runs/fashion_mnist")
    metrics = [name.strip() for name in args.metrics.split(",")]
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
    if args.num_images is not None and args.num_images < 1:
        raise InputError(f"num_images = {args.num_images}: must be 1 or more")
    if args.out is not None and args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder: give the name of a file in it")
    model = load(args.ckpt, args.weights)
    folder = run_folder(args.ckpt)
    source = model.config.data.source if args.data is None else args.data
    image_set = load_images(dataclasses.replace(model.config.data, source=source))
    count = len(image_set.images) - args.first_image if args.num_images is None else args.num_images
    result: dict[str, Any] = {
        "ckpt": str(args.ckpt), "step": model.step, "weights": model.weights, "data": source, "first_image": args.first_image,
        "num_images": count, "seed": args.seed,
    }  # fmt: skip
    for name in metrics:
        scoring = Scoring(name, args.seed, args.ode_steps, args.ode_probes)  # type: ignore[arg-type]
        result[name] = evaluate_bits_per_dim(
            model, image_set, folder / "bits_per_dim.jsonl", scoring, args.first_image, count, args.batch_size
        )
    if is_first():
        _report(result, args.out or folder / "evaluation.json")


def _report(result: dict[str, Any], path: Path) -> None:
    """Write the result, and print it without what is long."""
    with whole_file(path) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    short = {k: {n: x for n, x in v.items() if n != "L_t"} if isinstance(v, dict) else v for k, v in result.items()}
    print(json.dumps(short, indent=2))


if __name__ == "__main__":
    cli.run(main)
