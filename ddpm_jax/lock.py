"""One writer for each run folder."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm_jax.errors import InputError

LOCK = ".lock"

logger = logging.getLogger("ddpm_jax")


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold a run folder, made where it is absent, for this process alone.

    The lock is the kernel's (flock), on the file .lock, and goes with the process however it ends; the file stays, and what
    it says is for people. On NFS it holds between hosts since Linux 2.6.12; on a file system without locks, such as Lustre
    mounted without them, there is a warning instead.

    Raises:
        InputError: another process holds the folder, or it can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+", errors="replace")
    except OSError as error:
        raise InputError(f"can't write to run folder {workdir}: {error.strerror}: choose another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.readline(200).strip() or "another process"
            raise InputError(f"{workdir} is in use by {holder}: wait for it, stop it, or choose another --workdir") from error
        except OSError as error:
            logger.warning("%s can't be locked (%s): see to it that nothing else writes there", workdir, error.strerror)
        _say_who(file.fileno())
        yield


def _say_who(descriptor: int) -> None:
    """Write the holder into the file in one call; without room for it, the lock holds all the same."""
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        logger.warning("the holder of the lock can't be noted")
