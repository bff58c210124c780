"""What the command lines share: options from dataclasses, one-line errors, exit statuses.

Exit status 0: done, or stopped on request with everything saved. 1: training diverged. 2: unusable input.
"""

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import tyro

from ddpm_jax.config import unknown_name
from ddpm_jax.errors import InputError, NonFiniteLossError, StorageHangError
from ddpm_jax.metrics import log_to_terminal
from ddpm_jax.parallel import keep_compiled
from ddpm_jax.storage import leave

T = TypeVar("T")


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Call main with the command line's arguments; turn bad input into one line on stderr and an exit status."""
    log_to_terminal()
    keep_compiled()
    for name in ("absl", "asyncio"):  # Orbax reports there what is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(_report(error, 2))
    except NonFiniteLossError as error:
        sys.exit(_report(error, 1))
    except StorageHangError as error:
        leave(_report(error, 2))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # a full disk, a folder without permission
        sys.exit(_report(error, 2))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(_report(f"out of device memory: use a smaller batch ({str(error).partition(chr(10))[0]})", 2))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


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


def _report(error: Any, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
