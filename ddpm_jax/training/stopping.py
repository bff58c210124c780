"""How training is stopped on request: SIGTERM, which is also how clusters announce a pre-emption, and Ctrl-C.

Several processes must stop after the same dispatch, though the signal comes to one of them and at another moment in each. So
the one that gets it tells the others; then each holds its loop for the moment in which all say how many dispatches they have
begun, and the next one that none has begun is the last. Until then nothing is exchanged.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

from ddpm_jax.processes import from_all, hear, several, tell

OVER = "over"

logger = logging.getLogger("ddpm_jax")
_runs = 0  # runs that this process has begun: each agrees by a name of its own


class Stop:
    """Whether to stop, the same in all processes."""

    def __init__(self) -> None:
        global _runs
        self._asked = threading.Event()
        self._name = f"stop {_runs}"
        _runs += 1
        self._hold = threading.Lock()
        self._dispatch = -1
        self._last: int | None = None
        self._thread: threading.Thread | None = None
        if several():
            self._thread = threading.Thread(target=self._agree, name="stop", daemon=True)
            self._thread.start()

    def ask(self) -> None:
        """Ask for an end, in whichever process."""
        self._asked.set()
        if self._thread is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the run is over anyhow
                tell(self._name, "please")

    def after(self, dispatch: int) -> bool:
        """Whether this dispatch is the last one. To be called with 0, 1, 2, ... as they are begun."""
        if self._thread is None:
            return self._asked.is_set()
        with self._hold:
            self._dispatch = dispatch
            return dispatch == self._last

    def close(self) -> None:
        """End the wait for a request: training is over."""
        if self._thread is not None:
            tell(self._name, OVER)  # where another process has asked before, the others are still told what this one has begun
            self._thread.join()

    def _agree(self) -> None:
        try:
            if hear(self._name) == OVER:
                return
            with self._hold:
                begun = from_all(f"{self._name}, begun", str(self._dispatch))
                self._last = max(int(number) for number in begun) + 1
        except jax.errors.JaxRuntimeError:  # the run is over
            return


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """A request to stop that SIGTERM and Ctrl-C make; a second Ctrl-C interrupts at once. Outside the main thread, neither."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.ask()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.info("%s: stopping after this step", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        stop.close()
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
        stop.close()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
