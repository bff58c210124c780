"""Bits/dim of a data set under a trained model, batch by batch, resumable.

Every batch that is scored becomes a line of a JSON-lines file:

    {"key": ..., "start": 0, "stop": 64, "images": ..., "bits_per_dim": [64 numbers], "terms": [sums over the 64 images]}

"key" stands for the weights, the process and the settings, "images" for the bytes of images start ... stop - 1. A line whose
key and images are those of a later call is not computed again; so a killed run goes on, and parts add up to the whole. Of
several processes each scores its share into a file of its own, the first into FILE.jsonl, the next into FILE.1.jsonl and so
on; all of them are read. The randomness of image i is fold_in(fold_in(key(seed), SCORING), i), whatever the batch and the
devices.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from ddpm_jax.config import Config, to_json
from ddpm_jax.data import ImageSet
from ddpm_jax.diffusion.likelihood import bits_per_dim, ode_bits_per_dim
from ddpm_jax.diffusion.process import make_denoiser
from ddpm_jax.errors import InputError
from ddpm_jax.inference import Model, make_network
from ddpm_jax.json_lines import read_records
from ddpm_jax.metrics import sample_progress
from ddpm_jax.models import bind
from ddpm_jax.parallel import batch_sharding, compile_for, put, replicated
from ddpm_jax.processes import check_shared, is_first, wait_for_all
from ddpm_jax.ranges import Range, batches, gaps, one_behind, rows_of_range
from ddpm_jax.training.step import to_float
from ddpm_jax.validation import config_schedule

SCORING = 2**32 - 2  # keeps these keys apart from those of training steps and of samples, see inference.SAMPLING
FORMAT = 1  # part of every line's key: to be raised by whoever changes what the numbers are

logger = logging.getLogger("ddpm_jax")

ScoreFn = Callable[[PyTree, Key[Array, " B"], UInt8[Array, "B H W C"], Int[Array, " B"] | None], Float[Array, "B K"]]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What is computed of each image."""

    metric: Literal["bpd", "bpd_ode"] = "bpd"
    """The variational bound, with the config's variance, or the probability-flow ODE's."""
    seed: int = 0
    """Seed of the noise, 0 ... 2^32 - 1."""
    ode_steps: int | None = None
    """Timesteps that the ODE visits, 2 ... T; None: T."""
    ode_probes: int = 1
    """Probes of the ODE's divergence."""

    def about(self, config: Config) -> dict[str, Any]:
        """What decides the numbers besides weights, images and seed, for the protocol."""
        total_steps = config.diffusion.num_steps
        if self.metric == "bpd":
            return {"variance": config.diffusion.variance, "evaluations": total_steps}
        return {"ode_steps": total_steps if self.ode_steps is None else self.ode_steps, "ode_probes": self.ode_probes}


def evaluate_bits_per_dim(
    model: Model,
    image_set: ImageSet,
    path: Path,
    scoring: Scoring,
    first_image: int = 0,
    num_images: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Mean bits/dim of images first_image ... first_image + num_images - 1, and its standard error over images.

    Args:
        model: a trained model; a class-conditional one is asked for log p(image | its label).
        image_set: uint8 images of the model's shape.
        path: the JSON-lines file of what is scored already; made where there is none. All processes must call this, with
            the same path on one file system.
        scoring: what is computed.
        first_image: where to begin.
        num_images: how many; None: up to the last one.
        batch_size: images that each device scores at once; config.sample's if not given. It changes the numbers by rounding
            alone.

    Returns:
        {"bits_per_dim", "standard_error"} and, of the variational bound, {"L_T", "L_0", "L_t": [L_1, ..., L_{T-1}]}, the means
        of its terms, t counted from 0; all in bits/dim.

    Raises:
        InputError: images or settings that can't be used, a network whose numbers are not finite, a folder that is not the same
            in all processes, or records that another program has changed meanwhile.
    """
    check_scoring(model, image_set, scoring, first_image, num_images, batch_size)
    check_shared(path.parent)
    last = len(image_set.images) if num_images is None else first_image + num_images
    batch_size = model.config.sample.batch_size if batch_size is None else batch_size
    rows = rows_of_range(batch_size, last - first_image, model.mesh.size * jax.process_count())
    if model.config.model.num_classes is None:
        image_set = dataclasses.replace(image_set, labels=None)
    key = _key(model, scoring)
    stored = _stored_records(path, key, image_set, first_image, last)
    wait_for_all("what is scored already is read")  # before the first record is written
    todo = gaps({start: record["stop"] for start, record in stored.items()}, first_image, last, rows)
    missing = sum(stop - start for start, stop in todo)
    if missing < last - first_image and is_first():
        logger.info("%s holds %d of the %d images already", path, last - first_image - missing, last - first_image)
    if todo:
        stored |= _score_missing(model, image_set, path, key, scoring, todo, rows)
        wait_for_all("all images are scored")
    if jax.process_count() > 1:
        stored = _stored_records(path, key, image_set, first_image, last)
    _check_whole(path, stored, first_image, last)
    return _summary(scoring.metric, [stored[start] for start in sorted(stored)])


def make_score(config: Config, mesh: Mesh, scoring: Scoring) -> ScoreFn:
    """The compiled function (params, keys [B], images [B, H, W, C], labels [B]) -> bits/dim [B, K] that add up to the image's.

    K = T + 1 terms L_0, ..., L_{T-1}, L_T of the variational bound, 1 of the ODE.
    """
    unet, schedule, diffusion = make_network(config), config_schedule(config), config.diffusion

    def score(
        params: PyTree, keys: Key[Array, " B"], images: UInt8[Array, "B H W C"], labels: Int[Array, " B"] | None
    ) -> Float[Array, "B K"]:
        network_fn, x0 = bind(unet, params, labels), to_float(images)
        if scoring.metric == "bpd_ode":
            denoiser = make_denoiser(schedule, network_fn, diffusion.prediction, clip=False)
            return ode_bits_per_dim(keys, schedule, denoiser, x0, scoring.ode_steps, scoring.ode_probes)[:, None]
        denoiser = make_denoiser(schedule, network_fn, diffusion.prediction)
        bound = bits_per_dim(keys, schedule, denoiser, x0, diffusion.variance)
        return jnp.concatenate([bound.terms, bound.prior[:, None]], axis=1)

    return compile_for(mesh, score)


def _score_missing(
    model: Model, image_set: ImageSet, path: Path, key: str, scoring: Scoring, todo: list[Range], rows: int
) -> dict[int, dict[str, Any]]:
    """Score this process's share of the ranges into its file; the records by start. Its progress stands for that of all."""
    index, count = jax.process_index(), jax.process_count()
    own = path if index == 0 else path.with_name(f"{path.stem}.{index}{path.suffix}")
    missing, done = sum(stop - start for start, stop in todo), 0
    records: dict[int, dict[str, Any]] = {}
    with own.open("a") as file, sample_progress(missing) as on_batch:
        if file.tell() and not own.read_bytes().endswith(b"\n"):  # the last line of a killed run
            file.write("\n")
        for batch in _score(model, image_set, scoring, todo[index::count], rows):
            file.writelines(json.dumps({"key": key} | record) + "\n" for record in batch)
            file.flush()
            records |= {record["start"]: record for record in batch}
            done += sum(record["stop"] - record["start"] for record in batch)
            if is_first():
                on_batch(min(missing, done * count))
    return records


def _score(
    model: Model, image_set: ImageSet, scoring: Scoring, ranges: list[Range], rows: int
) -> Iterator[list[dict[str, Any]]]:
    """The records of the ranges of at most `rows` images, a batch of ranges at a time, one for each device."""
    score, split = make_score(model.config, model.mesh, scoring), batch_sharding(model.mesh)
    seed = put(np.uint32(scoring.seed), replicated(model.mesh))

    def scored() -> Iterator[tuple[Sequence[Range], Float[Array, "B K"]]]:
        for batch, numbers in batches(ranges, rows, model.mesh.size):
            images = put(image_set.images[numbers], split)
            labels = None if image_set.labels is None else put(image_set.labels[numbers], split)
            keys = _image_keys(seed, put(numbers.astype(np.uint32), split))
            yield batch, score(model.params, keys, images, labels)

    for batch, scores in one_behind(scored()):
        host = jax.device_get(scores)
        yield [_record(image_set, start, stop, host[place * rows :]) for place, (start, stop) in enumerate(batch)]


def _record(image_set: ImageSet, start: int, stop: int, scores: Float[np.ndarray, "R K"]) -> dict[str, Any]:
    terms = scores[: stop - start].astype(np.float64)
    totals = terms.sum(axis=1)
    if not np.isfinite(totals).all():
        bad = int(np.argmin(np.isfinite(totals)))
        raise InputError(f"image {start + bad} has {totals[bad]} bits/dim: the network's numbers are not finite")
    where = {"start": start, "stop": stop, "images": _digest(*_arrays(image_set, start, stop))}
    return where | {"bits_per_dim": totals.tolist(), "terms": terms.sum(axis=0).tolist()}


def _stored_records(path: Path, key: str, image_set: ImageSet, first: int, last: int) -> dict[int, dict[str, Any]]:
    """All files' records of this key and these images within first ... last, by start, the longest of each, none overlapping.

    Torn lines are skipped.
    """
    records: dict[int, dict[str, Any]] = {}
    for file in [path, *sorted(path.parent.glob(f"{path.stem}.*[0-9]{path.suffix}"))]:
        for record in read_records(file):
            if _is_usable(record, key, first, last) and (
                record["start"] not in records or records[record["start"]]["stop"] < record["stop"]
            ):
                records[record["start"]] = record
    fitting = {s: r for s, r in records.items() if r["images"] == _digest(*_arrays(image_set, s, r["stop"]))}
    chosen: dict[int, dict[str, Any]] = {}
    position = first
    for start in sorted(fitting):
        if start >= position:
            chosen[start], position = fitting[start], fitting[start]["stop"]
    return chosen


def _is_usable(record: dict[str, Any], key: str, first: int, last: int) -> bool:
    try:
        start, stop = record["start"], record["stop"]
        return record["key"] == key and first <= start < stop <= last and len(record["bits_per_dim"]) == stop - start
    except (KeyError, TypeError):
        return False


def _check_whole(path: Path, stored: dict[int, dict[str, Any]], first: int, last: int) -> None:
    """Raise InputError unless the records, none of which overlap, are of all images first ... last - 1."""
    missing = gaps({start: record["stop"] for start, record in stored.items()}, first, last, last - first)
    if missing:
        start, stop = missing[0]
        changed = f"{path} was changed by another program: it lacks images {start} ... {stop - 1}"
        raise InputError(f"{changed}; the same command scores what is missing")


def _summary(metric: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the images of all records."""
    each = np.concatenate([record["bits_per_dim"] for record in records])
    error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    result: dict[str, Any] = {"bits_per_dim": float(each.mean()), "standard_error": error}
    if metric == "bpd":
        *terms, prior = (np.sum([record["terms"] for record in records], axis=0) / len(each)).tolist()
        result |= {"L_T": prior, "L_0": terms[0], "L_t": terms[1:]}
    return result


def _key(model: Model, scoring: Scoring) -> str:
    """A short hash of all that decides an image's number, but for the image."""
    decisive = {name: value for name, value in to_json(model.config).items() if name.startswith(("diffusion.", "model."))}
    settings = dataclasses.asdict(scoring)
    if scoring.metric == "bpd":
        settings = {"metric": scoring.metric, "seed": scoring.seed}
    text = json.dumps([FORMAT, decisive, settings, model.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(images: np.ndarray, labels: np.ndarray | None) -> str:
    labels = np.zeros(0, np.int32) if labels is None else labels
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]


def _arrays(image_set: ImageSet, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    labels = image_set.labels
    return image_set.images[start:stop], None if labels is None else labels[start:stop]


@jax.jit
def _image_keys(seed: Array, indices: Array) -> Key[Array, " B"]:
    root = jax.random.fold_in(jax.random.key(seed), SCORING)
    return jax.vmap(jax.random.fold_in, (None, 0))(root, indices)


def check_scoring(
    model: Model,
    image_set: ImageSet,
    scoring: Scoring,
    first_image: int = 0,
    num_images: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Raise InputError with one line on what `evaluate_bits_per_dim` can't use of the same arguments."""
    images, count, total_steps = image_set.images, len(image_set.images), model.schedule.num_steps
    last = count if num_images is None else first_image + num_images
    if images.dtype != np.uint8:
        raise InputError(f"bits/dim counts 256 grey levels, but the images are {images.dtype}: save them as uint8 in [0, 255]")
    if image_set.image_shape != model.image_shape:
        raise InputError(f"the images are {image_set.image_shape}, but the model's are {model.image_shape}")
    if not 0 <= first_image < last <= count:
        raise InputError(f"images {first_image} ... {last - 1} were asked for: there are 0 ... {count - 1}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: must be 1 or more")
    if not 0 <= scoring.seed < 2**32:
        raise InputError(f"seed = {scoring.seed}: must lie in 0 ... 2^32 - 1")
    if scoring.ode_steps is not None and not min(2, total_steps) <= scoring.ode_steps <= total_steps:
        raise InputError(f"ode_steps = {scoring.ode_steps}: must lie in 2 ... {total_steps}, the steps of the model")
    if scoring.ode_probes < 1:
        raise InputError(f"ode_probes = {scoring.ode_probes}: must be 1 or more")
    num_classes = model.config.model.num_classes
    if num_classes is not None and (image_set.labels is None or image_set.labels.max() >= num_classes):
        raise InputError(f"the network has {num_classes} classes: each image needs a label, 0 ... {num_classes - 1}")
