"""What the command lines share: options from dataclasses, one-line errors, exit statuses.

Exit status 0: done, or stopped on request with everything saved. 1: training diverged. 2: unusable input. 3: another process
of the run was lost (where JAX notices first, it ends by SIGABRT). 130 and 143: interrupted by Ctrl-C, SIGTERM.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jax
import tyro

from ddpm_jax.config import unknown_name
from ddpm_jax.endings import end_lost, end_now, end_well
from ddpm_jax.errors import InputError, NonFiniteLossError, StorageHangError, first_line
from ddpm_jax.joining import Processes, start_processes
from ddpm_jax.metrics import log_to_terminal
from ddpm_jax.parallel import keep_compiled
from ddpm_jax.processes import several

T = TypeVar("T")

BROKEN = re.compile("gloo|nccl|connection|socket|peer|unavailable|deadline|aborted|cancelled|heartbeat|coordination", re.I)
HEARD_WITHIN = 2.0  # seconds in which a process hears why another one has ended, if it said why


def run(main: Callable[[Sequence[str]], None], joins: bool = True) -> NoReturn:
    """Call main with the command line's arguments; turn bad input into one line on stderr and an exit status.

    Before, join the other processes of the run, unless the program is not one that joins.
    """
    log_to_terminal()
    keep_compiled()
    for name in ("absl", "asyncio"):  # Orbax reports there what is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = functools.partial(_send_again, otherwise=sys.unraisablehook)
    argv = sys.argv[1:]
    try:
        if joins and "--help" not in argv:
            start_processes(_processes(argv))
        main(argv)
        end_well()
    except InputError as error:
        _end(error, 2)
    except NonFiniteLossError as error:
        _end(error, 1)
    except StorageHangError as error:  # Python would wait for the thread that hangs
        end_now(str(error), 2)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # a full disk, a folder without permission
        _end(error, 2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            _end(f"out of device memory: use a smaller batch ({first_line(error)})", 2)
        if not several():
            raise
        time.sleep(HEARD_WITHIN)
        if BROKEN.search(str(error)):
            end_lost(first_line(error)[:200])
        _end_in_defect(error)
    except KeyboardInterrupt:
        end_now("interrupted" if several() else None, 130)
    except _Terminated:
        end_now("ended by SIGTERM" if several() else None, 143)
    except Exception as error:
        if not several():
            raise
        _end_in_defect(error)
    sys.exit(0)


def _processes(argv: Sequence[str]) -> Processes:
    """The options --processes.*, before the others: reading a config may use JAX, which must have joined by then."""
    given = {field.name: option(argv, f"processes.{field.name}") for field in dataclasses.fields(Processes)}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return parse(Processes, words, Processes(), set(given), "")


class _Terminated(BaseException):
    """SIGTERM, where nothing else is done about it."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _send_again(dropped: Any, otherwise: Callable[[Any], Any]) -> None:
    """Send a signal once more whose exception Python has dropped: JAX has a callback in each collection of garbage, which is
    often the first Python code after long work in C++, and so where a handler is called.
    """
    number = {_Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(dropped.exc_type)
    if number is None:
        otherwise(dropped)
        return
    with contextlib.suppress(RuntimeError):  # Python is ending, and starts no thread
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def _end(error: Any, status: int) -> NoReturn:
    """One line, and an end that waits for threads and devices unless other processes wait for this one."""
    if several():
        end_now(str(error), status)
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)


def _end_in_defect(error: Exception) -> NoReturn:
    traceback.print_exc()
    end_now(f"{type(error).__name__}: {first_line(error)}", 1)


def parse(arguments: type[T], argv: Sequence[str], default: T, known: Collection[str], description: str) -> T:
    """The dataclass `arguments` filled from argv, starting from `default`. --help prints every field and ends.

    Raises:
        InputError: an unknown option (the nearest is named) or a value of the wrong type.
    """
    names = {name.replace("_", "-") for name in known}
    for token in argv:
        if re.match(r"--[A-Za-z]", token):
            name = token[2:].partition("=")[0].replace("_", "-")
            if name not in names and re.sub(r"(^|\.)no-", r"\1", name) not in names and name != "help":
                raise InputError(unknown_name(name, names, "option"))
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(arguments, args=argv, default=default, description=description)
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(_one_line(output.getvalue())) from None


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of one option, before the others can be parsed; the last one counts."""
    value = None
    for index, token in enumerate(argv):
        if token == f"--{name}" and index + 1 < len(argv):
            value = argv[index + 1]
        elif token.startswith(f"--{name}="):
            value = token.partition("=")[2]
    return value


def _one_line(text: str) -> str:
    """The message inside the frame that tyro draws around an error."""
    lines = (line for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if "╭" not in line)
    message = " ".join(re.sub(r"[│╰╯─]+", " ", " ".join(lines)).split())
    for rest in ("Argument helptext:", "For full helptext", "Similar options:"):
        message = message.partition(rest)[0]
    return message.strip()
