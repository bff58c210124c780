"""Snapshots of the power function averages, and averages of any other length put together from them.

    RUN/snapshots/STEP/             one average for each of optim.ema_lengths, each readable alone; all are kept for good

A snapshot is written whole before training goes on: no checkpoint can be ahead of one that is missing, so a killed run makes
again what was not written, and only that.
"""

import logging
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from ddpm_jax.config import Config, TrainConfig
from ddpm_jax.errors import InputError, StorageHangError
from ddpm_jax.files import sync_all
from ddpm_jax.processes import is_first
from ddpm_jax.saving import item_name, read_description, read_items, write_items
from ddpm_jax.storage import reason, within
from ddpm_jax.training.ema import MAX_LENGTH, Profile, average_names, gamma_from_length, solve_weights
from ddpm_jax.training.state import TrainState

MAX_DISTANCE = 0.1  # between profiles, relative; what is farther off is another average than the one asked for

logger = logging.getLogger("ddpm_jax")


class WeightsError(InputError):
    """Weights that a run can't give, from whichever checkpoint."""


def parse_weights(weights: str) -> tuple[str, float | None]:
    """("raw", None), ("ema", None), ("decay", 0.999) or ("ema", 0.08). Raises InputError for what no run has."""
    kind, colon, text = weights.partition(":")
    try:
        value = float(text) if colon else None
    except ValueError:
        kind = ""
    if kind not in (("ema", "decay") if colon else ("ema", "raw")):
        raise InputError(f"unknown weights {weights!r}: choose ema, raw, decay:VALUE or ema:LENGTH")
    return kind, value


def find_weights(weights: str, config: Config) -> str | float:
    """What is stored of the weights asked for: the name of a checkpoint's item, or the length of an average to put together.

    Raises:
        WeightsError: weights that a run with this config doesn't have; the message lists those it has.
    """
    kind, value = parse_weights(weights)
    if value is None:
        return "params" if kind == "raw" else "ema"
    followed = config.optim.ema_decays if kind == "decay" else config.optim.ema_lengths
    if value in followed:
        return item_name(f"{kind}:{value}")
    if kind == "ema" and followed and 0 < value <= MAX_LENGTH:
        return value
    choices = ["ema", "raw", *average_names(config.optim)]
    choices += [f"ema:LENGTH up to {MAX_LENGTH:.4f}"] if config.optim.ema_lengths else []
    advice = "optim.ema_decays and optim.ema_lengths decide what a run follows"
    raise WeightsError(f"this run has no weights {weights!r}: choose {', '.join(choices[:-1])} or {choices[-1]}; {advice}")


def snapshot_due(config: TrainConfig, step: int) -> bool:
    """Whether this step is one that a snapshot is made at."""
    return config.snapshot_every_steps is not None and step % config.snapshot_every_steps == 0


def save_snapshot(workdir: Path, state: TrainState, step: int, config: Config) -> None:
    """Write a snapshot, unless it is there: then a run that was stopped is repeating the steps since its last checkpoint."""
    path = workdir.absolute() / "snapshots" / str(step)
    if not path.exists():
        followed = {item_name(name): state.averages[name] for name in average_names(config.optim) if name.startswith("ema:")}
        items = jax.device_get(followed) if jax.process_count() == 1 else followed
        try:
            within(f"writing snapshot {path}", config.train.storage_timeout, lambda: write_items(path, items, config)())
        except StorageHangError:
            raise
        except Exception as error:  # whatever Orbax or its storage raise
            again = "the same command goes on from the last checkpoint"
            raise InputError(f"snapshot {path} can't be written: {reason(error)}; {again}") from error
        if is_first():
            sync_all(path)


def reconstruct(checkpoint: Path, length: float, config: Config, abstract: PyTree) -> PyTree:
    """The power function average of any length at a checkpoint, from its own averages and the run's snapshots until then.

    Karras et al. (2024), section 3.2. The sum is made in float64 on the host.

    Args:
        checkpoint: RUN/checkpoints/STEP.
        length: relative standard deviation, 0 < length <= 1/sqrt(12).
        config: the config of the run.
        abstract: shapes, dtypes and shardings of the weights.

    Raises:
        WeightsError: a snapshot can't be read, or there are too few for this length.
    """
    step, lengths = int(checkpoint.name), config.optim.ema_lengths
    folders = _snapshots(checkpoint, step) or [checkpoint]
    if folders[-1].name != checkpoint.name:
        folders.append(checkpoint)
    stored = [Profile(int(folder.name), gamma_from_length(each)) for folder in folders for each in lengths]
    shares, distance = solve_weights(stored, Profile(step, gamma_from_length(length)))
    followed = f"the averages of lengths {', '.join(map(str, lengths))} at {len(folders)} step{'s' if folders[1:] else ''}"
    if distance > MAX_DISTANCE:
        advice = "choose a length nearer to these, or a smaller train.snapshot_every_steps for another run"
        raise WeightsError(f"weights ema:{length}: {followed} give its profile only to {distance:.0%}: {advice}")
    what = "weights ema:%s of step %d from %s; their profiles give its own to %.2g %%"
    logger.info(what, length, step, followed, 100 * distance)
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), abstract)
    items = {item_name(f"ema:{each}"): abstract for each in lengths}
    for folder, each in zip(folders, shares.reshape(len(folders), len(lengths)), strict=True):
        loaded = read_items(folder, items, read_description(folder)) if folder == checkpoint else _load_snapshot(folder, items)
        for name, share in zip(items, each, strict=True):
            total = jax.tree.map(lambda a, b: a + share * np.asarray(b, np.float64), total, loaded[name])  # noqa: B023
    return jax.tree.map(lambda value, leaf: jax.device_put(value.astype(leaf.dtype), leaf.sharding), total, abstract)


def _load_snapshot(folder: Path, items: dict[str, PyTree]) -> dict[str, PyTree]:
    try:
        return read_items(folder, items, read_description(folder))
    except Exception as error:  # whatever Orbax or its storage raise
        raise WeightsError(f"snapshot {folder} can't be read: move it away to do without ({reason(error)})") from error


def _snapshots(checkpoint: Path, step: int) -> list[Path]:
    """The run's snapshots up to a step, oldest first; none for a checkpoint that was copied out of its run."""
    folder = checkpoint.parents[1] / "snapshots"
    if checkpoint.parent.name != "checkpoints" or not folder.is_dir():
        return []
    steps = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())
    return [folder / str(each) for each in steps if each <= step]
