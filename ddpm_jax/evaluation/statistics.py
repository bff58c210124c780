"""Means and covariances of features in files: what distances need of a data set, to be kept and exchanged.

An .npz file with "mu" [F] and "sigma" [F, F], as pytorch-fid writes it; "mu_s" and "sigma_s" are those of sFID's features, as
in the reference batches of guided-diffusion. Files written here also have "count", the number of images, and "network".
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.errors import InputError, first_line
from ddpm_jax.evaluation.distance import Moments
from ddpm_jax.evaluation.networks import NetworkName
from ddpm_jax.files import whole_file

ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""The names of mean and covariance by the network's output."""


def save_statistics(path: Path, network: NetworkName, found: Mapping[str, Moments]) -> None:
    """Write the moments of a network's outputs."""
    arrays: dict[str, Any] = {}
    for output, each in found.items():
        mean, covariance = ARRAYS[output]
        arrays |= {mean: each.mean, covariance: each.covariance, "count": np.asarray(each.count)}
    with whole_file(path) as file:
        np.savez(file, network=np.asarray(network), **arrays)


def read_statistics(path: Path, network: NetworkName) -> dict[str, Moments]:
    """The moments of a file by the network's output.

    Raises:
        InputError: no such file, a damaged one, or one that was written of another network.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = {"count", "network", *(name for pair in ARRAYS.values() for name in pair)}
            held = {name: arrays[name] for name in names & set(arrays)}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} can't be read as statistics: {reason}: an .npz file with mu and sigma is needed") from error
    if "network" in held and str(held["network"]) != network:
        raise InputError(f"{path} holds statistics of {held['network']}, not of {network}")
    count = int(held["count"]) if "count" in held else None
    found = {}
    for output, (mean, covariance) in ARRAYS.items():
        if mean in held and covariance in held:
            found[output] = _checked(path, mean, held[mean], covariance, held[covariance], count)
    if not found:
        raise InputError(f"{path} holds no arrays mu and sigma")
    return found


def _checked(path: Path, mean_name: str, mean: np.ndarray, name: str, covariance: np.ndarray, count: int | None) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{mean.shape} and {covariance.shape}"
        raise InputError(f"{path}: {mean_name} and {name} must be [F] and [F, F], not {shapes}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: {mean_name} or {name} is not finite")
    return Moments(mean, covariance, count)
