"""The one door for weights of other programs: which program's they are follows from the files."""

from collections.abc import Callable
from pathlib import Path

import jax
from jaxtyping import PyTree

from ddpm_jax.checkpoint import Weights
from ddpm_jax.config import Config
from ddpm_jax.interop.diffusers import is_diffusers_folder, read_folder
from ddpm_jax.interop.improved_diffusion import read_improved_diffusion
from ddpm_jax.parallel import put


def read_foreign(path: str | Path, weights: str, make_abstract: Callable[[Config], PyTree]) -> tuple[Weights, str] | None:
    """The weights of a diffusers folder or of a file of improved-diffusion, and what they are; None for anything else.

    Args:
        path: a folder or a file.
        weights: "ema" or "raw".
        make_abstract: the function Config -> shapes, dtypes and shardings of the weights.

    Returns:
        The weights on the devices, and "ema", "raw" or "imported".

    Raises:
        InputError: files that can't be read, or networks that have no counterpart here.
    """
    path = Path(path)
    if path.is_file() and path.suffix in (".pt", ".pth"):
        loaded, kind = read_improved_diffusion(path, make_abstract), "imported"
    elif path.is_dir() and is_diffusers_folder(path):
        loaded, kind = read_folder(path, weights, make_abstract)
    else:
        return None
    abstract = make_abstract(loaded.config)
    params = jax.tree.map(lambda array, leaf: put(array, leaf.sharding), loaded.params, abstract)
    return Weights(loaded.config, params, loaded.step), kind
