"""Checkpoints as they are written and read: items of arrays, each readable alone, with checksums and the config.

A state that this process holds wholly is copied to the host, and everything else happens in a thread; of one that is split
among processes, each writes its parts, and only the writing itself happens in threads. A checkpoint has another name until it
is whole.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ddpm_jax.checksums import check, checksums, seal, unseal
from ddpm_jax.config import Config, to_json
from ddpm_jax.errors import InputError, StorageHangError
from ddpm_jax.files import sync_all
from ddpm_jax.processes import is_first, wait_for_all
from ddpm_jax.storage import Background, hush_leftovers, newest_first, reason, remove_checkpoint, remove_leftovers, within
from ddpm_jax.training.state import TrainState

# 95 years in seconds: Orbax measures its limit by the wall clock, which may jump, and train.storage_timeout holds instead.
# Threads can't wait for more than 9e9 seconds.
NO_LIMIT = 3 * 10**9


def item_name(name: str) -> str:
    """The name under which an average is stored: a colon is not for every file system."""
    return name.replace(":", "-")


def items_of(state: TrainState) -> dict[str, PyTree]:
    """The items of a checkpoint. What a run has none of is left out, so that checkpoints of before it existed stay readable."""
    history = {} if state.loss_history is None else {"loss_history": state.loss_history}
    training = {"step": state.step, "opt_state": state.opt_state} | history
    averages = {item_name(name): average for name, average in state.averages.items()}
    return {"params": state.params, "ema": state.ema, "training": training} | averages


def write_items(path: Path, items: Mapping[str, PyTree], config: Config) -> Callable[[], None]:
    """Begin to write a checkpoint; the function that is returned ends when it is there under its name.

    With several processes all must call this, in their main thread or while that waits; the end may be awaited anywhere.
    """
    hush_leftovers()
    metadata = seal({"config": to_json(config), "checksums": checksums(items)})
    with ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=NO_LIMIT)):
        return ocp.save_checkpointables_async(path, dict(items), custom_metadata=metadata).result


def read_description(path: Path) -> dict[str, Any]:
    """What is stored of a checkpoint beside its items: config and checksums. Raises what `read_items` does."""
    hush_leftovers()
    return unseal(ocp.metadata(path).custom_metadata or {})


def read_items(path: Path, abstract: Mapping[str, PyTree], description: Mapping[str, Any]) -> dict[str, PyTree]:
    """Items of a checkpoint, shaped and laid out as the abstract ones, compared with the checksums of its description.

    Raises:
        DamagedError: bits are not those that were saved. In checkpoints of before there were checksums that goes unnoticed.
        Exception: whatever Orbax and its storage raise where it can't be read.
    """
    loaded = ocp.load_checkpointables(path, dict(abstract))
    if "checksums" in description:
        check({name: loaded[name] for name in abstract}, description["checksums"])
    return loaded


class Checkpoints:
    """The checkpoints of a run folder, for writing, one at a time: the newest train.keep_last and every
    train.keep_every_steps stay.

    With several processes, all call each method at the same step.
    """

    def __init__(self, workdir: Path, config: Config) -> None:
        self._folder, self._config = (workdir / "checkpoints").absolute(), config
        self._pending: tuple[Path, Background[None]] | None = None
        try:
            if is_first():
                self._folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self._folder)
            wait_for_all("the folder of checkpoints is there")
            self._newest = next(newest_first(self._folder), None)
        except OSError as error:
            raise InputError(f"{self._folder} can't be written: {reason(error)}: choose another --workdir") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or not issubclass(kind, StorageHangError):
            self.close()

    def save(self, state: TrainState, step: int) -> None:
        """Start writing a checkpoint; training goes on meanwhile. Nothing happens where that step or a later one is saved.

        Raises:
            InputError: this checkpoint, or the one before it, could not be written; the message names the newest whole one.
            StorageHangError: writing one has taken longer than train.storage_timeout.
        """
        self.wait()
        if self._newest is not None and step <= int(self._newest.name):
            return
        path, items = self._folder / str(step), items_of(state)
        if jax.process_count() == 1:
            items = jax.device_get(items)
            self._pending = path, self._start(path, lambda: write_items(path, items, self._config)())
        else:
            with self._explained(path):
                what, seconds = f"beginning checkpoint {path}", self._config.train.storage_timeout
                finish = within(what, seconds, lambda: write_items(path, items, self._config))
            self._pending = path, self._start(path, finish)

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._pending is None

    def check(self) -> None:
        """Raise what `wait` would if writing has failed or takes too long; otherwise go on at once."""
        if self._pending is not None and self._pending[1].due():
            self.wait()

    def wait(self) -> None:
        """Go on when what was begun is written. Raises as `save`."""
        if self._pending is None:
            return
        (path, work), self._pending = self._pending, None
        with self._explained(path):
            work.wait()
        self._newest = path

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self.wait()

    def _start(self, path: Path, write: Callable[[], None]) -> Background[None]:
        def work() -> None:
            write()
            if is_first():
                sync_all(path)
                self._remove_old()

        return Background(f"writing checkpoint {path}", self._config.train.storage_timeout, work)

    def _remove_old(self) -> None:
        every = self._config.train.keep_every_steps
        for path in list(newest_first(self._folder))[self._config.train.keep_last :]:
            if every is None or int(path.name) % every:
                remove_checkpoint(path)

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """What goes wrong within, in one line that names the newest whole checkpoint."""
        newest = "there is no checkpoint yet" if self._newest is None else f"the newest whole checkpoint is {self._newest}"
        try:
            yield
        except StorageHangError as error:
            raise StorageHangError(f"{error}; {newest}; the same command goes on from there") from error
        except Exception as error:  # whatever Orbax or its storage raise
            if is_first():
                shutil.rmtree(path.with_name(f"{path.name}.orbax-checkpoint-tmp"), ignore_errors=True)
            what = f"checkpoint {path} can't be written: {reason(error)}"
            raise InputError(f"{what}; {newest}; the same command goes on from there") from error
