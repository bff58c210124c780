"""How runs are stored: Orbax checkpoints in a run folder, each with its config inside.

    RUN/config.json                 the config of the run
    RUN/checkpoints/STEP/           params, ema, further averages, training (optimiser state, step, loss history),
                                    each readable alone
    RUN/snapshots/STEP/             see snapshots.py

How they are written, see saving.py: a killed run leaves either all of a checkpoint or none. One that was damaged later, down
to a single bit, is put aside as STEP.damaged, and the one before it is used.
"""

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ddpm_jax.config import Config, differences, from_json, to_json
from ddpm_jax.errors import InputError, StorageHangError
from ddpm_jax.files import whole_file
from ddpm_jax.processes import anywhere, is_first, wait_for_all
from ddpm_jax.saving import item_name, items_of, read_description, read_items
from ddpm_jax.snapshots import WeightsError, find_weights, parse_weights, reconstruct
from ddpm_jax.storage import TIMEOUT, newest_first, reason, within
from ddpm_jax.training.state import TrainState

T = TypeVar("T")

logger = logging.getLogger("ddpm_jax")


def check_run_folder(workdir: Path, config: Config) -> None:
    """Raise InputError where the folder holds checkpoints of a run whose config differs in a field that matters.

    Snapshots count too: a run that was killed before its first checkpoint goes on with the ones it has made.
    """
    written = [*newest_first(workdir / "checkpoints"), *newest_first(workdir / "snapshots")]
    if not written:
        return
    path = workdir / "config.json"
    stored = read_config(path) if path.exists() else _described_config(written, config.train.storage_timeout)
    changed = differences(stored, config)
    if changed:
        raise InputError(f"{workdir} holds a run with another config ({'; '.join(changed)}): choose another --workdir")


def _described_config(written: list[Path], timeout: int) -> Config:
    """The config of the first of these checkpoints that tells it. Raises what the first did, where none does."""

    def config_of(path: Path) -> Config:
        return from_json(_description(path)["config"])

    errors = []
    for path in written:
        try:
            return within(f"reading the config of {path}", timeout, functools.partial(config_of, path))
        except InputError as error:
            errors.append(error)
    raise errors[0]


def write_config(workdir: Path, config: Config) -> None:
    """Create the run folder and its config.json. Raises InputError where the folder can't be written."""
    path = workdir / "config.json"
    try:
        with whole_file(path, durable=True) as file:
            file.write((json.dumps(to_json(config), indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"can't write to run folder {workdir}: {error.strerror}: choose another --workdir") from error


def read_config(path: Path) -> Config:
    """The config of a run from its config.json. Raises InputError where it can't be read."""
    try:
        return from_json(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


def restore_newest(workdir: Path, abstract_state: TrainState, timeout: int = TIMEOUT) -> TrainState | None:
    """The newest checkpoint of a run folder that can be read, or None if it holds none.

    Newer ones that can't be read are put aside once an older one has been.

    Args:
        workdir: the run folder.
        abstract_state: shapes, dtypes and shardings of the state to be.
        timeout: seconds that reading one of them may take.

    Raises:
        InputError: there are checkpoints, but none can be read.
        StorageHangError: reading has not ended in time.
    """
    items = items_of(abstract_state)
    damaged: dict[Path, str] = {}
    for path in newest_first(workdir / "checkpoints"):
        loaded, why = _read(path, items, timeout)
        if loaded is None:
            damaged[path] = why
            continue
        _put_all_aside(damaged)
        averages = {name: loaded[item_name(name)] for name in abstract_state.averages}
        return TrainState(params=loaded["params"], ema=loaded["ema"], averages=averages, **loaded["training"])
    if damaged:
        path, why = next(iter(damaged.items()))
        raise InputError(f"none of the {len(damaged)} checkpoints of {workdir} can be read; {path.name}: {why}")
    return None


def _read(path: Path, items: dict[str, PyTree], timeout: int) -> tuple[dict[str, PyTree] | None, str]:
    """The items of a checkpoint, or None and the reason why not; all processes must ask, and none gets it where one doesn't."""
    description, why = _everywhere(path, timeout, lambda: read_description(path))
    if description is None:
        return None, why
    # Processes read the arrays together, and Orbax counts how often: one that didn't begin would be out of step from then on.
    return _everywhere(path, timeout, lambda: read_items(path, items, description))


def _everywhere(path: Path, timeout: int, read: Callable[[], T]) -> tuple[T | None, str]:
    """What this process reads of a checkpoint, or None and the reason where any process can't."""
    found: T | None = None
    why = "another process can't read it"
    try:
        found = within(f"reading checkpoint {path}", timeout, read)
    except StorageHangError:
        raise
    except Exception as error:  # whatever Orbax or its storage raise: the checkpoint can't be used
        why = reason(error)
    return (None, why) if anywhere(found is None) else (found, "")


def run_folder(path: Path) -> Path:
    """The run folder of a path that load_weights takes; of another program's file, the folder that it lies in."""
    if path.is_file():
        return path.parent
    step_folder = path.absolute()
    return step_folder.parents[1] if step_folder.parent.name == "checkpoints" else path


def newest_step(workdir: Path) -> int | None:
    """The step of a run folder's newest checkpoint, readable or not."""
    newest = next(newest_first(workdir / "checkpoints"), None)
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
        StorageHangError: reading has taken longer than ten minutes.
    """
    path = Path(path).absolute()
    parse_weights(weights)

    def load(checkpoint: Path) -> Weights:
        return within(f"reading checkpoint {checkpoint}", TIMEOUT, lambda: _load_one(checkpoint, weights, make_abstract))

    if not path.exists():
        raise InputError(f"no checkpoint at {path}: there is no such folder")
    is_run = (path / "checkpoints").is_dir()  # its name may be a number, too
    if path.is_dir() and path.name.isdigit() and not is_run and ocp.is_orbax_checkpoint(path):
        return load(path)
    candidates = list(newest_first(path / "checkpoints")) if path.is_dir() else []
    if not candidates:
        raise InputError(f"no checkpoint at {path}: give a run folder, such as runs/demo, or one of its checkpoints/STEP")
    for candidate in candidates[:-1]:
        try:
            return load(candidate)
        except WeightsError:
            raise
        except InputError as error:
            logger.warning("%s; falling back to the checkpoint before", error)
    return load(candidates[-1])


def _load_one(path: Path, weights: str, make_abstract: Callable[[Config], PyTree]) -> Weights:
    description = _description(path)
    config = from_json(description["config"])
    name = find_weights(weights, config)
    abstract = make_abstract(config)
    try:
        if isinstance(name, float):
            return Weights(config, reconstruct(path, name, config, abstract), int(path.name))
        _check_same_network(path, ocp.metadata(path, name).metadata, abstract)
        params = read_items(path, {name: abstract}, description)[name]
    except InputError:
        raise
    except Exception as error:  # see restore_newest
        raise InputError(f"checkpoint {path} can't be read: {reason(error)}") from error
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


def _description(path: Path) -> dict[str, Any]:
    """The description of a checkpoint of this program. Raises InputError where it can't be read or is another's."""
    try:
        stored = read_description(path)
    except Exception as error:  # see restore_newest
        raise InputError(f"checkpoint {path} can't be read: {reason(error)}") from error
    if "config" not in stored:
        raise InputError(f"checkpoint {path} holds no config: it was not written by ddpm_jax")
    return stored


def _put_all_aside(damaged: dict[Path, str]) -> None:
    wait_for_all("damaged checkpoints are known")
    if is_first():
        for path, why in damaged.items():
            logger.warning("checkpoint %s can't be read (%s): put aside as %s", path, why, _put_aside(path).name)
    wait_for_all("damaged checkpoints are put aside")


def _put_aside(path: Path) -> Path:
    """Rename a checkpoint to STEP.damaged, or STEP.damaged2 and so on where that is taken."""
    names = (f"{path.name}.damaged{number if number > 1 else ''}" for number in itertools.count(1))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(aside)


def abstract_like(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes and dtypes of a tree of arrays or shapes, to be restored with the given sharding, or one for each leaf."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda leaf, each: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each), tree, shardings)
