"""Features of sets of images, part by part, kept in files: what is stopped goes on, and what was seen is not computed again.

A part of a data set is known by the bytes of its images, a part of a drawing by its place in it; its file also bears the
network's name and a hash of its weights and of its way of seeing images.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from ddpm_jax.config import Config, to_json
from ddpm_jax.data import ImageSet
from ddpm_jax.errors import InputError
from ddpm_jax.evaluation.networks import FeatureNetwork, NetworkName, Outputs
from ddpm_jax.files import whole_file
from ddpm_jax.inference import Model, draw_ranges
from ddpm_jax.metrics import sample_progress
from ddpm_jax.processes import check_shared, wait_for_all
from ddpm_jax.ranges import gaps, rows_of_range

PART_IMAGES = 1000
FORMAT = 2  # part of every file's name: to be raised by whoever changes what the numbers are

logger = logging.getLogger("ddpm_jax")


class Part(NamedTuple):
    """Some images of a set."""

    name: str
    """Stands for them in file names."""
    num_images: int
    """How many."""
    images: Callable[[], UInt8[np.ndarray, "N H W C"]]
    """Makes them."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A network, and the outputs that are needed of it."""

    network: FeatureNetwork
    outputs: frozenset[str]


def collect(parts: Iterator[Part], num_images: int, wanted: list[Wanted], folder: Path) -> dict[NetworkName, Outputs]:
    """The wanted outputs of all parts, from the files in a folder where they are there, and into it where not.

    Of several processes each makes its share, and all return all of it; they need one folder for that.

    Raises:
        InputError: a folder that is not the same in all processes, or a file that was damaged meanwhile.
    """
    check_shared(folder)
    makers: dict[str, int] = {}
    sizes: dict[NetworkName, list[tuple[Path, int]]] = {want.network.name: [] for want in wanted}
    found: dict[Path, Outputs] = {}
    done = 0
    with sample_progress(num_images) as on_batch:
        for index, part in enumerate(parts):
            maker = makers.setdefault(part.name, index % jax.process_count())  # one for parts that are the same
            for want in wanted:
                path = folder / f"{want.network.name}-{_network_key(want.network)}-{part.name}.npz"
                sizes[want.network.name].append((path, part.num_images))
                if maker == jax.process_index():
                    found[path] = _outputs(path, part, want)
            done += part.num_images
            on_batch(done)
    wait_for_all("features are made")
    return {want.network.name: _joined(sizes[want.network.name], found, want.outputs) for want in wanted}


def set_parts(image_set: ImageSet, num_images: int) -> Iterator[Part]:
    """The first images of a set, known by their bytes; float images are rounded to uint8 as drawn ones are."""
    for start in range(0, num_images, PART_IMAGES):
        pixels = rounded(image_set.images[start : min(start + PART_IMAGES, num_images)])
        name = hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:32]
        yield Part(name, len(pixels), functools.partial(np.asarray, pixels))


def drawn_parts(model: Model, config: Config, seed: int, num_images: int) -> Iterator[Part]:
    """Images 0 ... num_images - 1 of a seed, drawn by the settings of config.sample; known by their place."""
    for start in range(0, num_images, PART_IMAGES):
        stop = min(start + PART_IMAGES, num_images)
        images = functools.cache(functools.partial(_draw, model, config, seed, start, stop))  # once for all networks
        yield Part(f"{start:06d}-{stop:06d}", stop - start, images)


def drawing_key(model: Model, config: Config, seed: int) -> str:
    """A short hash of all that decides drawn images, but for their number."""
    decisive = {
        name: value
        for name, value in to_json(config).items()
        if name.startswith(("diffusion.", "model.", "sample.")) and name != "sample.batch_size"
    }
    text = json.dumps([FORMAT, decisive, config.data.image_shape, seed, model.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rounded(images: Shaped[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "N H W C"]:
    """Images as uint8: as they are, or from float32 in [-1, 1]."""
    if images.dtype == np.uint8:
        return images
    return np.clip(np.round((images + 1.0) * 127.5), 0.0, 255.0).astype(np.uint8)


def _draw(model: Model, config: Config, seed: int, start: int, stop: int) -> UInt8[np.ndarray, "N H W C"]:
    """Images start ... stop - 1 of a seed; class i mod num_classes as image i where there are classes."""
    rows = rows_of_range(config.sample.batch_size, PART_IMAGES, model.mesh.size)  # the same for all parts: one program
    drawn = draw_ranges(config, model.mesh, model.params, seed, gaps({}, start, stop, rows), rows)
    return np.concatenate([images for batch in drawn for images in batch.values()])


def _outputs(path: Path, part: Part, want: Wanted) -> Outputs:
    kept = _read(path, part.num_images)
    if want.outputs <= kept.keys():
        return {name: kept[name] for name in want.outputs}
    made = want.network.outputs(part.images())
    keep: Mapping[str, Any] = kept | {name: made[name] for name in want.outputs}
    with whole_file(path) as file:
        np.savez(file, **keep)
    return {name: made[name] for name in want.outputs}


def _joined(sizes: list[tuple[Path, int]], found: Mapping[Path, Mapping[str, Any]], outputs: frozenset[str]) -> Outputs:
    """Outputs of files with so many images each, one after the other; those that this process has not found are read."""
    pieces = []
    for path, size in sizes:
        pieces.append(found[path] if path in found else _read(path, size))
        if not outputs <= pieces[-1].keys():
            raise InputError(f"{path} was removed or damaged by another program: the same command makes it again")
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in sorted(outputs)}


def _read(path: Path, count: int) -> Outputs:
    """What a file holds; nothing where there is none, or a damaged one (its entries bear checksums)."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            kept = dict(arrays)
    except FileNotFoundError:
        return {}
    except Exception:  # whatever zipfile and NumPy raise on damaged files
        logger.warning("%s is damaged: its features are computed again", path)
        return {}
    whole = all(isinstance(array, np.ndarray) and array.ndim == 2 and len(array) == count for array in kept.values())
    return kept if whole else {}


def _network_key(network: FeatureNetwork) -> str:
    return hashlib.sha256(json.dumps([FORMAT, network.sha256, network.resize]).encode()).hexdigest()[:8]
