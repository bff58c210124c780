"""Train a diffusion model.

    python train.py                                                    the packaged images, on whatever is there
    python train.py --config configs/cifar10.py --workdir runs/cifar10 --train.batch-size 256

The same command goes on where a run was stopped. Several processes make one run where the cluster or --processes.* says so.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ddpm_jax import cli
from ddpm_jax.config import Config, flatten, load_config
from ddpm_jax.joining import PROCESS_OPTIONS, Processes
from ddpm_jax.training.loop import train

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "fashion_mnist.py"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of train.py; those with a dot override the config."""

    config: Path
    """Python file that exports `config`."""
    workdir: Path
    """Folder of the run; a run found there goes on."""
    processes: Processes
    run: Annotated[Config, tyro.conf.arg(name="")]


def main(argv: Sequence[str]) -> None:
    """Parse the command line and train."""
    path = Path(cli.option(argv, "config") or DEFAULT_CONFIG)
    config = load_config(path)
    default = Arguments(path, Path("runs") / path.stem, Processes(), config)
    known = {"config", "workdir", *PROCESS_OPTIONS, *flatten(config)}
    arguments = cli.parse(Arguments, argv, default, known, str(__doc__))
    train(arguments.run, arguments.workdir)


if __name__ == "__main__":
    cli.run(main)
