"""Measure a trained model on a set of images.

    python evaluate.py --ckpt runs/demo --metrics bpd --num-images 1000
    python evaluate.py --ckpt runs/cifar10 --metrics bpd,bpd_ode --split test
    python evaluate.py --ckpt runs/demo --metrics fd_efficientnet_lite0,kid_efficientnet_lite0
    python evaluate.py --ckpt runs/cifar10 --metrics fid,kid,is,pr,sfid --num-images 50000
    python evaluate.py --images samples.npz --metrics fid --stats cifar10.npz

bpd       bits/dim by the variational bound: as many network evaluations for each image as the process has steps
bpd_ode   bits/dim by the probability-flow ODE, about six times the cost for each of its steps

and, of drawn images beside real ones,

fid, kid, is, pr, sfid     in the features of FID's Inception network, whose weights are fetched once
fd_dinov2                  the Frechet distance in those of DINOv2, whose weights are given by --dinov2
fd_efficientnet_lite0, kid_efficientnet_lite0, pr_efficientnet_lite0
                           in those of a small network whose weights are a Python package: works offline, and is nobody's FID

The result is printed as JSON; the file --out also has the bound's terms for every timestep, "L_t". Each result of a run is a
line of evaluations.jsonl in its folder, too. What is scored is kept in bits_per_dim.jsonl there, and in bits_per_dim.1.jsonl
and so on by further processes: the same command goes on where it was stopped, by any number of processes, and parts that were
scored with --first-image and --num-images are not scored again as parts of the whole. Features of drawn images are kept
likewise, in the folder "evaluation". More in docs/evaluation.md.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_jax import cli
from ddpm_jax.checkpoint import run_folder
from ddpm_jax.config import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.data.sources import PACKAGED
from ddpm_jax.errors import InputError
from ddpm_jax.evaluation.bits_per_dim import Scoring, check_scoring, evaluate_bits_per_dim
from ddpm_jax.evaluation.samples import DRAWING_OPTIONS, Drawing, SampleOptions, evaluate_samples
from ddpm_jax.evaluation.scores import METRICS as OF_SAMPLES
from ddpm_jax.files import whole_file
from ddpm_jax.inference import load
from ddpm_jax.joining import PROCESS_OPTIONS, Processes
from ddpm_jax.json_lines import append_record
from ddpm_jax.processes import is_first

METRICS = ("bpd", "bpd_ode", *OF_SAMPLES)


@dataclasses.dataclass(frozen=True)
class Arguments(SampleOptions):
    """Options of evaluate.py; those left at None are the run's own."""

    ckpt: Path | None = None
    """Run folder, or one of its checkpoints/STEP folders. Required."""
    metrics: str = "bpd"
    """What to measure, separated by commas; see above."""
    data: str | None = None
    """Real images, as --data.source of train.py; None: those that the model was trained with."""
    split: str | None = None
    """Which part of a set of TensorFlow Datasets or Hugging Face, such as test; None: the part that was trained with."""
    first_image: int = 0
    """First image to score, by bpd and bpd_ode."""
    num_images: int | None = None
    """Images to score, or to draw; None: all from the first one on, or as many as there are real ones, up to 50,000."""
    seed: int = 0
    """Seed of the noise; an image's number is the same whatever others are scored."""
    weights: str = "ema"
    """The moving average of the weights (ema), the weights themselves (raw), another average of the run (decay:0.999), or the
    power function average of any length (ema:0.08)."""
    ode_steps: int | None = None
    """Timesteps that the ODE of bpd_ode visits; None: all."""
    ode_probes: int = 1
    """Probes of bpd_ode's divergence: more of them make its estimate less noisy."""
    batch_size: int | None = None
    """Images that each device scores or draws at once."""
    out: Path | None = None
    """JSON file to write; None: evaluation.json in the run folder."""
    processes: Processes = dataclasses.field(default_factory=Processes)


def main(argv: Sequence[str]) -> None:
    """Parse the command line, measure, print and write."""
    known = {field.name for field in dataclasses.fields(Arguments)} - {"processes"} | PROCESS_OPTIONS
    args = cli.parse(Arguments, argv, Arguments(), known, str(__doc__))
    metrics = [name.strip() for name in args.metrics.split(",")]
    _check(args, metrics)
    result = measure_images(args, metrics) if args.ckpt is None else measure_run(args, args.ckpt, metrics)
    if is_first():
        _report(result, None if args.ckpt is None else run_folder(args.ckpt), args.out)


def _check(args: Arguments, metrics: list[str]) -> None:
    """Raise InputError with one line on what can't be measured, or on options that don't go together."""
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        if name in OF_SAMPLES and args.first_image != 0:
            raise InputError(f"first_image = {args.first_image}: {name} is measured of images from 0 on, so leave it out")
    if args.num_images is not None and args.num_images < 1:
        raise InputError(f"num_images = {args.num_images}: must be 1 or more")
    if args.data is not None and args.stats is not None:
        raise InputError("both --data and --stats are given: give one of them")
    if args.out is not None and args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder: give the name of a file in it")


def _report(result: dict[str, Any], run: Path | None, out: Path | None) -> None:
    """Print the result without what is long; then add it to those of the run, and write it, if there are places for it."""
    short = {k: {n: x for n, x in v.items() if n != "L_t"} if isinstance(v, dict) else v for k, v in result.items()}
    print(json.dumps(short, indent=2))
    if run is not None:
        append_record(run / "evaluations.jsonl", result)
        out = run / "evaluation.json" if out is None else out
    if out is not None:
        with whole_file(out) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())


def _data(config: DataConfig, args: Arguments) -> DataConfig:
    """The real images: those of a config, but for what the options say. Raises InputError for a split where there are none."""
    source = config.source if args.data is None else args.data
    if args.split is None:
        return dataclasses.replace(config, source=source)
    if source in PACKAGED or Path(source).expanduser().exists():
        raise InputError(f"split = {args.split!r}: {source} has no splits, which sets of tfds: and hf: have; leave it out")
    return dataclasses.replace(config, source=source, split=args.split)


def measure_images(args: Arguments, metrics: list[str]) -> dict[str, Any]:
    """The metrics of --images."""
    if args.images is None:
        raise InputError("--ckpt is missing: give a run folder, such as runs/fashion_mnist, or images with --images")
    for name in metrics:
        if name not in OF_SAMPLES:
            raise InputError(f"{name} is measured of a model: give a run folder with --ckpt, in place of --images")
    default = Arguments()
    given = [name for name in (*DRAWING_OPTIONS, "weights", "seed") if getattr(args, name) != getattr(default, name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{options}: of no use to --images, which are drawn already: leave out")
    drawn = load_images(DataConfig(source=str(args.images)))
    data = None if args.data is None else _data(DataConfig(source=args.data), args)
    return {"images": str(args.images)} | evaluate_samples(metrics, drawn, args, data, args.num_images)


def measure_run(args: Arguments, ckpt: Path, metrics: list[str]) -> dict[str, Any]:
    """The metrics of a run, and what they were measured with."""
    if args.images is not None:
        raise InputError("both --ckpt and --images are given: measure one of them")
    model, folder = load(ckpt, args.weights), run_folder(ckpt)
    data = _data(model.config.data, args)
    of_samples = [name for name in metrics if name in OF_SAMPLES]
    scorings = [
        Scoring(name, args.seed, args.ode_steps, args.ode_probes)  # type: ignore[arg-type]
        for name in metrics
        if name not in OF_SAMPLES
    ]
    compares = args.stats is None and any(OF_SAMPLES[name].needs != "nothing" for name in of_samples)
    if args.data is None and data.source == "unknown" and (scorings or compares):
        raise InputError(f"--data is missing: what {ckpt} was trained with isn't known")
    result: dict[str, Any] = {"ckpt": str(ckpt), "step": model.step, "weights": model.weights, "data": data.source}
    if scorings:
        image_set = load_images(data)
        count = len(image_set.images) - args.first_image if args.num_images is None else args.num_images
        for scoring in scorings:  # before any image is drawn
            check_scoring(model, image_set, scoring, args.first_image, count, args.batch_size)
        result |= {"first_image": args.first_image, "num_images": count}
    result["seed"] = args.seed
    if of_samples:
        drawing = Drawing.of(model, folder, args, args.seed, args.batch_size)
        result |= evaluate_samples(of_samples, drawing, args, data, args.num_images)
    for scoring in scorings:
        scored = evaluate_bits_per_dim(
            model, image_set, folder / "bits_per_dim.jsonl", scoring, args.first_image, count, args.batch_size
        )
        about = {"data": data.source, "split": data.split, "first_image": args.first_image, "num_images": count}
        result[scoring.metric] = scored | {"protocol": about | {"seed": args.seed} | scoring.about(model.config)}
    return result


if __name__ == "__main__":
    cli.run(main)
