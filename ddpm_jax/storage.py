"""Storage as it is: it may hang, be full or forbidden, and hold what a killed process has left.

Work on it goes through `Background`, a thread with a limit of time. A thread that hangs can't be ended, only left: the
caller gets StorageHangError, and the program must end by `endings.end_now`, as Python would wait for the thread.
"""

import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from ddpm_jax.errors import StorageHangError, first_line

T = TypeVar("T")

TIMEOUT = 600  # seconds, where no config says
LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|removed)")


class Background(Generic[T]):
    """Work in a thread of its own, which may take a number of seconds from its start.

    The clock is monotonic: setting the machine's time changes nothing.
    """

    def __init__(self, what: str, seconds: int, work: Callable[[], T]) -> None:
        self._what, self._seconds, self._began = what, seconds, time.monotonic()
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=what, daemon=True)
        self._thread.start()

    def due(self) -> bool:
        """Whether `wait` would not wait: the work has ended, or its time has."""
        return not self._thread.is_alive() or self._left() <= 0

    def wait(self) -> T:
        """The result of the work, or its exception. Raises StorageHangError where it has not ended in time."""
        self._thread.join(max(0.0, self._left()))
        if self._thread.is_alive():
            raise StorageHangError(f"{self._what} has not ended after {self._seconds} s: the storage hangs")
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _left(self) -> float:
        return self._began + self._seconds - time.monotonic()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._result.append(work())
        except BaseException as error:
            self._error = error


def within(what: str, seconds: int, work: Callable[[], T]) -> T:
    """The result of the work. Raises StorageHangError where it takes longer than this."""
    return Background(what, seconds, work).wait()


def reason(error: BaseException) -> str:
    """Why the storage failed, in one short line: the system's own words where there are any."""
    number = error.errno if isinstance(error, OSError) else None
    found = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))  # TensorStore's
    if found:
        number = int(found[1] or found[2])
    if number:
        return os.strerror(number)
    text = first_line(error)  # type: ignore[arg-type]
    return text if len(text) <= 200 else text[:200] + " ..."


def newest_first(folder: Path) -> Iterator[Path]:
    """The folders of whole checkpoints, from the highest step down: no clock decides which is the newest."""
    if not folder.is_dir():
        return
    steps = sorted((int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()), reverse=True)
    yield from (folder.absolute() / str(step) for step in steps)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; killed halfway, this leaves a leftover and no broken checkpoint."""
    removed = path.with_name(f"{path.name}.removed")
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals that were broken off have left. Nothing else may be writing there."""
    for entry in folder.iterdir():
        if LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def hush_leftovers() -> None:
    """Keep quiet what Orbax's broken-off reads and writes print afterwards; the error itself is raised.

    Its coroutines are dropped before they were awaited, and TensorStore calls back into an event loop that is closed.
    """
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    if sys.unraisablehook is not _hook:
        _others.append(sys.unraisablehook)
        sys.unraisablehook = _hook


_others: list[Callable[["sys.UnraisableHookArgs"], object]] = []


def _hook(what: "sys.UnraisableHookArgs") -> None:
    if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
        _others[-1](what)
