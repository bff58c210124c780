"""Means and covariances of features in files: what distances need of a data set, to be kept and exchanged.

An .npz file with "mu" [F] and "sigma" [F, F], as pytorch-fid writes it; "mu_s" and "sigma_s" are those of sFID's features, as
in the reference batches of guided-diffusion. Files written here also have "count", the number of images, and "network".
"""

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
KINDS = {"count": ("iu", "one whole number"), "network": ("U", "one name")}
"""NumPy's kinds of what is no array of numbers, and what it is."""


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
        InputError: no such file, a damaged one, one with other entries than these, or one that was written of another network.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = {"count", "network", *(name for pair in ARRAYS.values() for name in pair)}
            held = {name: arrays[name] for name in sorted(names & set(arrays))}
    except Exception as error:  # whatever zipfile and NumPy raise on damaged files
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} can't be read as statistics: {reason}: an .npz file with mu and sigma is needed") from error
    for name, value in held.items():
        _check_kind(path, name, value)
    if "network" in held and str(held["network"]) != network:
        raise InputError(f"{path} holds statistics of {str(held['network'])[:80]!r}, not of {network}")
    count = int(held["count"]) if "count" in held else None
    if count is not None and count < 1:
        raise InputError(f"{path}: count = {count}: must be 1 or more")
    found = {}
    for output, (mean, covariance) in ARRAYS.items():
        if mean in held and covariance in held:
            found[output] = _checked(path, mean, held[mean], covariance, held[covariance], count)
    if not found:
        raise InputError(f"{path} holds no arrays mu and sigma")
    return found


def _check_kind(path: Path, name: str, value: Any) -> None:
    """Raise InputError unless an entry is what its name says; NumPy gives bytes for one that isn't an array."""
    kinds, what = KINDS.get(name, ("fiu", "an array of numbers"))
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or (name in KINDS and value.ndim > 0):
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{path}: {name} must be {what}, not {found}: give another file")


def _checked(path: Path, mean_name: str, mean: np.ndarray, name: str, covariance: np.ndarray, count: int | None) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{mean.shape} and {covariance.shape}"
        raise InputError(f"{path}: {mean_name} and {name} must be [F] and [F, F], not {shapes}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: {mean_name} or {name} is not finite")
    return Moments(mean, covariance, count)
