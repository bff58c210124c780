"""How a process ends when it can't wait for its threads and devices, and how the other processes of its run come to know.

A process of several that ends in error tells all others, and each of them ends with the same line and status. One that is
killed tells nothing: after --processes.timeout seconds JAX's service counts it as lost, and JAX aborts the others from a
thread of its own, with lines of C++. (It would take a callback instead, but not one in Python: jaxlib 0.10 and 0.12 end in
std::bad_cast.) So a small process beside each of several, `last_words.py`, has the last word: it outlives the abort.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, NoReturn

import jax

from ddpm_jax.processes import hear, is_first, process_index, several, tell, wait_for_all

LOST = 3  # exit status where another process was lost, unless JAX aborts this one
OVER = "over"
LINGER = 2.0  # seconds for which the first process, which holds the service, stays for the others to hear

_ending = threading.Lock()  # never released: who takes it ends the process
_words = "the connection to another process was lost; start the same command again in all processes"
_beside: IO[bytes] | None = None  # what last_words.py reads, once this process has joined others
_listener: threading.Thread | None = None


def end_now(message: str | None, status: int) -> NoReturn:
    """Say one line on stderr, if any, and end this process at once, whatever its threads and devices are at.

    The others of a run end likewise. Where several threads call it, the first one speaks.
    """
    _ending.acquire()
    _say(message)
    if _beside is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            tell("end", f"{status} {process_index()} {message or 'stopped'}")
    _leave(status)


def end_well() -> None:
    """Wait for the others, and part from them; after that, the process can end as any other. A single one has none."""
    if _listener is not None:
        wait_for_all("the end")  # the first process may have more to write, and it holds the service
        tell("end", OVER)
        _listener.join()  # a thread that is still in JAX when Python ends would abort the process
        jax.distributed.shutdown()


def end_lost(reason: str) -> NoReturn:
    """Likewise, since another process was lost."""
    end_now(f"{_words} ({reason})", LOST)


def end_with_others() -> None:
    """From now on, this process ends when another one of the run ends in error; and has last words where JAX aborts it."""

    def listen() -> None:
        try:
            heard = hear("end")
        except jax.errors.JaxRuntimeError:  # the service is gone, and JAX about to abort this process
            return
        if heard != OVER:
            status, origin, message = heard.split(" ", 2)
            _ending.acquire()
            _say(f"process {origin}: {message}")
            _leave(int(status))

    global _listener
    last_words(_words)
    _listener = threading.Thread(target=listen, name="ends", daemon=True)
    _listener.start()


def last_words(line: str) -> None:
    """Set what is said where another process is lost. A single process has no last words."""
    global _words, _beside
    if not several():
        return
    if _beside is None:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("last_words.py"))]
        # In a session of its own, Ctrl-C doesn't reach it.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        assert process.stdin is not None
        _beside = process.stdin
        faulthandler.enable(file=_beside, all_threads=False)
    _words = line
    _beside.write(f"{line}\n".encode())
    _beside.flush()


def _leave(status: int) -> NoReturn:
    if _beside is not None and is_first():
        time.sleep(LINGER)
    os._exit(status)


def _say(message: str | None) -> None:
    stderr = sys.__stderr__  # another thread may catch what it writes to sys.stderr, as cli.parse does
    with contextlib.suppress(OSError, ValueError):  # a stream may be closed
        sys.stdout.flush()
        if stderr is not None:
            if stderr.isatty():
                stderr.write("\x1b[?25h")  # a progress bar has hidden the cursor
            if message is not None:
                print(f"error: {' '.join(message.split())}", file=stderr)
            stderr.flush()
