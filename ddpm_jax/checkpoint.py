"""How runs are stored: Orbax checkpoints in a run folder, each with its config inside.

    RUN/config.json                 the config of the run
    RUN/checkpoints/STEP/           params, ema, further averages, training (optimiser state, step, loss history),
                                    each readable alone
    RUN/snapshots/STEP/             see snapshots.py

A checkpoint is written to a temporary folder and renamed when whole, so a killed run leaves either all of it or none.
One that was damaged later is put aside as STEP.damaged, and the one before it is used.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ddpm_jax.config import Config, differences, from_json, to_json
from ddpm_jax.errors import InputError, first_line
from ddpm_jax.snapshots import WeightsError, find_weights, item_name, parse_weights, reconstruct
from ddpm_jax.training.state import TrainState

logger = logging.getLogger("ddpm_jax")

Checkpointer: TypeAlias = ocp.training.Checkpointer


def check_run_folder(workdir: Path, config: Config) -> None:
    """Raise InputError where the folder holds checkpoints of a run whose config differs in a field that matters.

    Snapshots count too: a run that was killed before its first checkpoint goes on with the ones it has made.
    """
    newest = next(itertools.chain(_newest_first(workdir / "checkpoints"), _newest_first(workdir / "snapshots")), None)
    if newest is None:
        return
    path = workdir / "config.json"
    changed = differences(read_config(path) if path.exists() else _stored_config(newest), config)
    if changed:
        raise InputError(f"{workdir} holds a run with another config ({'; '.join(changed)}): choose another --workdir")


def write_config(workdir: Path, config: Config) -> None:
    """Create the run folder and its config.json. Raises InputError where the folder can't be written."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(to_json(config), indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"can't write to run folder {workdir}: {error.strerror}: choose another --workdir") from error


def read_config(path: Path) -> Config:
    """The config of a run from its config.json. Raises InputError where it can't be read."""
    try:
        return from_json(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


def open_checkpoints(workdir: Path, config: Config) -> Checkpointer:
    """The checkpoints of a run folder, for writing: the newest train.keep_last and every train.keep_every_steps stay."""
    policies = ocp.training.preservation_policies
    keep: list[Any] = [policies.LatestN(config.train.keep_last)]
    if config.train.keep_every_steps is not None:
        keep.append(policies.EveryNSteps(config.train.keep_every_steps))
    return Checkpointer(
        (workdir / "checkpoints").absolute(),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
    )


def save(checkpoints: Checkpointer, state: TrainState, step: int, config: Config) -> None:
    """Start writing a checkpoint; training goes on meanwhile. `checkpoints.wait()` ends when it is written."""
    items = {"params": state.params, "ema": state.ema, "training": _training(state)} | _averages(state)
    checkpoints.save_checkpointables_async(step, items, force=True, custom_metadata={"config": to_json(config)})


def restore_newest(workdir: Path, abstract_state: TrainState) -> TrainState | None:
    """The newest checkpoint of a run folder that can be read, or None if it holds none.

    Newer ones that can't be read are put aside once an older one has been.

    Args:
        workdir: the run folder.
        abstract_state: shapes, dtypes and shardings of the state to be.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    items = {"params": abstract_state.params, "ema": abstract_state.ema, "training": _training(abstract_state)}
    items |= _averages(abstract_state)
    damaged: dict[Path, str] = {}
    for path in _newest_first(workdir / "checkpoints"):
        try:
            loaded = ocp.load_checkpointables(path, items)
        except Exception as error:  # whatever Orbax or its storage raise: the checkpoint can't be used
            damaged[path] = _shortened(error)
            continue
        for bad, reason in damaged.items():
            logger.warning("checkpoint %s can't be read (%s): put aside as %s", bad, reason, _put_aside(bad).name)
        averages = {name: loaded[item_name(name)] for name in abstract_state.averages}
        return TrainState(params=loaded["params"], ema=loaded["ema"], averages=averages, **loaded["training"])
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise InputError(f"none of the {len(damaged)} checkpoints of {workdir} can be read; {path.name}: {reason}")
    return None


def run_folder(path: Path) -> Path:
    """The run folder of a path that load_weights takes."""
    step_folder = path.absolute()
    return step_folder.parents[1] if step_folder.parent.name == "checkpoints" else path


def newest_step(workdir: Path) -> int | None:
    """The step of a run folder's newest checkpoint, readable or not."""
    newest = next(_newest_first(workdir / "checkpoints"), None)
    return None if newest is None else int(newest.name)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights read from a checkpoint."""

    config: Config
    """The config that they were trained with."""
    params: PyTree
    """The weights: raw, or a moving average of them."""
    step: int
    """Updates made before they were saved."""


def load_weights(path: str | Path, weights: str, make_abstract: Callable[[Config], PyTree]) -> Weights:
    """The weights of a run folder (its newest readable checkpoint) or of one checkpoint folder.

    Args:
        path: RUN or RUN/checkpoints/STEP.
        weights: "ema", "raw", or one of the run's further averages: "decay:0.999", "ema:0.08".
        make_abstract: function Config -> abstract parameters (shapes, dtypes, shardings).

    Raises:
        InputError: no checkpoint there, one whose arrays don't fit the network of its config, or weights it doesn't have.
    """
    path = Path(path).absolute()
    parse_weights(weights)
    if not path.exists():
        raise InputError(f"no checkpoint at {path}: there is no such folder")
    if path.is_dir() and path.name.isdigit() and ocp.is_orbax_checkpoint(path):
        return _load_one(path, weights, make_abstract)
    candidates = list(_newest_first(path / "checkpoints")) if path.is_dir() else []
    if not candidates:
        raise InputError(f"no checkpoint at {path}: give a run folder, such as runs/demo, or one of its checkpoints/STEP")
    for candidate in candidates[:-1]:
        try:
            return _load_one(candidate, weights, make_abstract)
        except WeightsError:
            raise
        except InputError as error:
            logger.warning("%s; falling back to the checkpoint before", error)
    return _load_one(candidates[-1], weights, make_abstract)


def _load_one(path: Path, weights: str, make_abstract: Callable[[Config], PyTree]) -> Weights:
    config = _stored_config(path)
    name = find_weights(weights, config)
    abstract = make_abstract(config)
    try:
        if isinstance(name, float):
            return Weights(config, reconstruct(path, name, config, abstract), int(path.name))
        stored = ocp.checkpointables_metadata(path).metadata[name]
        if stored is None:
            raise InputError(f"checkpoint {path} can't be read: the description of its {weights} weights is missing")
        _check_same_network(path, stored, abstract)
        params = ocp.load_checkpointables(path, {name: abstract})[name]
    except InputError:
        raise
    except Exception as error:  # see restore_newest
        raise InputError(f"checkpoint {path} can't be read: {_shortened(error)}") from error
    return Weights(config, params, int(path.name))


def _check_same_network(path: Path, stored: PyTree, abstract: PyTree) -> None:
    """Raise InputError on the first array whose name or shape is not what the config's network has."""
    found, wanted = _shapes(stored), _shapes(abstract)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            texts = [str(shapes.get(name, "absent")) for shapes in (found, wanted)]
            what = f"{name} is {texts[0]}, not {texts[1]}"
            raise InputError(f"checkpoint {path} holds another network than its config describes: {what}")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(place, simple=True, separator="/"): tuple(leaf.shape) for place, leaf in leaves}


def _stored_config(path: Path) -> Config:
    try:
        stored = ocp.metadata(path).custom_metadata or {}
    except Exception as error:  # see restore_newest
        raise InputError(f"checkpoint {path} can't be read: {_shortened(error)}") from error
    if "config" not in stored:
        raise InputError(f"checkpoint {path} holds no config: it was not written by ddpm_jax")
    return from_json(stored["config"])


def _put_aside(path: Path) -> Path:
    """Rename a checkpoint to STEP.damaged, or STEP.damaged2 and so on where that is taken."""
    names = (f"{path.name}.damaged{number if number > 1 else ''}" for number in itertools.count(1))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(aside)


def _newest_first(folder: Path) -> Iterator[Path]:
    """The folders of whole checkpoints, from the highest step down."""
    if not folder.is_dir():
        return
    steps = sorted((int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()), reverse=True)
    yield from (folder.absolute() / str(step) for step in steps)


def _training(state: TrainState) -> dict[str, PyTree]:
    # What a run has none of is left out, so that checkpoints of before it existed stay readable.
    history = {} if state.loss_history is None else {"loss_history": state.loss_history}
    return {"step": state.step, "opt_state": state.opt_state} | history


def _averages(state: TrainState) -> dict[str, PyTree]:
    return {item_name(name): average for name, average in state.averages.items()}


def _shortened(error: Exception) -> str:
    text = first_line(error)
    return text if len(text) <= 200 else text[:200] + " ..."


def abstract_like(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and dtypes of a tree of arrays or shapes, to be restored with the given sharding, or one for each leaf."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda leaf, each: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each), tree, shardings)
