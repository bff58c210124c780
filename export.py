"""Write a trained model for other programs.

    python export.py --ckpt runs/cifar10 --out cifar10                      for diffusers.DDPMPipeline.from_pretrained
    python export.py --ckpt runs/cifar10 --out served --format stablehlo    its sampler as a program for JAX alone

The folder has a model card, README.md, with the config, the data, what evaluate.py has measured, and a line on licences. What
the other program can't represent is refused by its name.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ddpm_jax import cli
from ddpm_jax.checkpoint import run_folder
from ddpm_jax.errors import InputError
from ddpm_jax.inference import load
from ddpm_jax.interop.diffusers import check_empty, write_folder
from ddpm_jax.interop.model_card import model_card
from ddpm_jax.interop.serving import write_sampler

logger = logging.getLogger("ddpm_jax")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of export.py; those left at None are the run's own."""

    ckpt: Path | None = None
    """Run folder, or one of its checkpoints/STEP folders, or a folder that another program made. Required."""
    out: Path | None = None
    """Folder to write; it must be empty or not there. Required."""
    format: Literal["diffusers", "stablehlo"] = "diffusers"
    """A pipeline of diffusers, or the sampler as one program of jax.export."""
    weights: str = "ema"
    """Which weights of the run: ema, raw, decay:0.999, ema:0.08."""
    sampler: str | None = None
    """Sampling algorithm; this and the next two are for stablehlo."""
    num_steps: int | None = None
    """Steps from noise to image."""
    batch_size: int | None = None
    """Images that the program draws at once."""


def main(argv: Sequence[str]) -> None:
    """Parse the command line, load and write."""
    known = {field.name for field in dataclasses.fields(Arguments)}
    args = cli.parse(Arguments, argv, Arguments(), known, str(__doc__))
    if args.ckpt is None or args.out is None:
        name, example = ("ckpt", "a run folder, such as runs/cifar10") if args.ckpt is None else ("out", "a folder to write")
        raise InputError(f"--{name} is missing: give {example}")
    settings = {name: getattr(args, name) for name in ("sampler", "num_steps", "batch_size")}
    given = [name for name, value in settings.items() if value is not None]
    if given and args.format == "diffusers":
        raise InputError(f"--{given[0].replace('_', '-')} is of no use to diffusers, which chooses when it draws: leave it out")
    check_empty(args.out)
    model = load(args.ckpt, args.weights)
    config, _ = model.settle(settings, 1, 0, None)
    model = dataclasses.replace(model, config=config)
    run = run_folder(args.ckpt)
    card = model_card(config, model.params, model.weights, model.step, run, args.format)
    if args.format == "diffusers":
        write_folder(args.out, config, model.params, card)
    else:
        write_sampler(args.out, model, card)
    logger.info("%s: the %s weights of step %d as %s", args.out, model.weights, model.step, args.format)


if __name__ == "__main__":
    cli.run(main)
