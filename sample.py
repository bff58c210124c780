"""Draw images from a trained model.

    python sample.py --ckpt runs/fashion_mnist                         a grid, samples.png in the run folder
    python sample.py --list-samplers                                   the samplers and what is to be known of them
    python sample.py --ckpt runs/cifar10 --num-images 64 --sampler ddim --num-steps 50 --seed 0 --out samples.gif
    python sample.py --ckpt runs/fashion_mnist_cond --labels "ankle boot,bag"
    python sample.py --ckpt runs/cifar10 --interpolate 3 7             from image 3 of the seed to image 7
    python sample.py --ckpt runs/cifar10 --init cat.png --strength 0.6  images that resemble cat.png
    python sample.py --ckpt runs/cifar10 --init cat.png --mask mask.png  cat.png painted anew where mask.png is white

What is written follows from the ending of --out: .png (a grid), .gif (the way from noise to images), .npz (an array
"images", uint8 [N, H, W, C]), or, without an ending, a folder of PNG files. What takes more than one batch is kept in parts,
OUT.parts, until it is written: after a kill the same command goes on, and several processes share the work.
"""

import dataclasses
import inspect
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from ddpm_jax import cli
from ddpm_jax.checkpoint import run_folder
from ddpm_jax.config import SampleConfig, Threshold
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.diffusion.schedule import Spacing
from ddpm_jax.drawing import draw_in_parts, needs_parts, parts_folder
from ddpm_jax.edit_options import EditOptions, check_alone, check_edit, draw
from ddpm_jax.errors import InputError
from ddpm_jax.images import check_output, save_output
from ddpm_jax.inference import load
from ddpm_jax.joining import PROCESS_OPTIONS, Processes
from ddpm_jax.labels import find_labels
from ddpm_jax.metrics import sample_progress

GIF_FRAMES = 40

logger = logging.getLogger("ddpm_jax")


@dataclasses.dataclass(frozen=True)
class Arguments(EditOptions):
    """Options of sample.py; those left at None are the run's own."""

    ckpt: Path | None = None
    """Run folder, or one of its checkpoints/STEP folders. Required."""
    out: Path | None = None
    """File (.png, .gif, .npz) or folder to write; None: samples.png in the run folder."""
    num_images: int = 64
    """Images to draw."""
    seed: int = 0
    """Seed; image i is the same whatever the number of images."""
    weights: str = "ema"
    """The moving average of the weights (ema), the weights themselves (raw), another average of the run (decay:0.999), or the
    power function average of any length (ema:0.08)."""
    sampler: str | None = None
    """Sampling algorithm; see --list-samplers."""
    list_samplers: bool = False
    """Show the samplers, and draw nothing."""
    num_steps: int | None = None
    """Steps from noise to image."""
    eta: float | None = None
    """Noise of ddim, 0 to 1."""
    spacing: Spacing | None = None
    """Which timesteps are visited."""
    threshold: Threshold | None = None
    """What is done with an x0 outside [-1, 1]."""
    labels: str | None = None
    """Classes by name or number, such as sneaker or "ankle boot,9", which the images show by turns; None: all classes."""
    guidance: float | None = None
    """How strongly images follow their class: 1 as learnt, above 1 more strongly, 0 not at all."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma between which guidance acts, low and high."""
    guidance_rescale: float | None = None
    """How far guided outputs are brought back to the standard deviation of unguided ones, 0 to 1."""
    batch_size: int | None = None
    """Images that each device draws at once."""
    processes: Processes = dataclasses.field(default_factory=Processes)


def main(argv: Sequence[str]) -> None:
    """Parse the command line, draw and write."""
    known = {field.name for field in dataclasses.fields(Arguments)} - {"processes"} | PROCESS_OPTIONS
    argv = [re.sub(r"^--label(?==|$)", "--labels", token) for token in argv]  # as it was called before there were names
    args = cli.parse(Arguments, argv, Arguments(), known, str(__doc__))
    if args.list_samplers:
        print(sampler_table())
        return
    if args.ckpt is None:
        raise InputError("--ckpt is missing: give a run folder, such as runs/fashion_mnist")
    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {args.sampler!r}: choose one of {', '.join(SAMPLERS)}")
    check_edit(args, args.out.suffix.lower() if args.out else "")
    model = load(args.ckpt, args.weights)
    labels = None if args.labels is None else find_labels(model.config.data, args.labels, args.num_images)
    out = args.out or run_folder(args.ckpt) / "samples.png"
    in_parts = args.named is None and out.suffix.lower() != ".gif" and needs_parts(model, out, args.num_images, args.batch_size)
    kind = check_output(out, model.image_shape[-1], begun=in_parts and parts_folder(out).is_dir())
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(SampleConfig)}
    if in_parts:
        draw_in_parts(model, out, kind, args.num_images, args.seed, labels, settings)
    else:
        check_alone(args)
        with sample_progress(args.num_images) as on_batch:
            frames = GIF_FRAMES if kind == ".gif" else 0
            images = draw(model, args, args.num_images, args.seed, labels, frames, on_batch, settings)
        save_output(out, kind, images)
    used = model.config.sample
    sampler = args.sampler or ("ddpm" if args.mask else used.sampler)
    steps = next(n for n in (args.num_steps, used.num_steps, model.schedule.num_steps) if n is not None)
    logger.info(
        "%s: %d images by %s, %d steps, seed %d, from the %s weights of step %d",
        out, args.num_images, sampler, steps, args.seed, model.weights, model.step,
    )  # fmt: skip


def sampler_table() -> str:
    """The samplers, one a line; what each of them is stands in the first line of its step's docstring."""
    lines = ["name          evaluations  order  stochastic  what it is"]
    for name, sampler in SAMPLERS.items():
        random = "if eta > 0" if "eta" in sampler.options else "yes" if sampler.stochastic else "no"
        what = (inspect.getdoc(sampler.step) or "").partition("\n")[0]
        lines.append(f"{name:12}  {sampler.evaluations:11}  {sampler.order:5}  {random:10}  {what}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
