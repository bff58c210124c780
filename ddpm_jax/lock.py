"""One writer for each folder."""

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

    The lock is on the file .lock, see `hold`; the file stays, and what it says is for people.

    Raises:
        InputError: another process holds the folder, or it can't be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+", errors="replace")
    except OSError as error:
        raise InputError(f"can't write to run folder {workdir}: {error.strerror}: choose another --workdir") from error
    with file:
        if not hold(file.fileno(), workdir):
            file.seek(0)
            holder = file.readline(200).strip() or "another process"
            raise InputError(f"{workdir} is in use by {holder}: wait for it, stop it, or choose another --workdir")
        _say_who(file.fileno())
        yield


def hold(descriptor: int, folder: Path, wait: bool = False) -> bool:
    """Lock a file that is open for writing, for this process until it is closed. Where another has it: wait, or False.

    The lock is the kernel's (flock) and goes with the process however it ends. On NFS that of a file holds between hosts since
    Linux 2.6.12, and that of a folder does not; on a file system without locks, such as Lustre mounted without them, there is a
    warning that names the folder.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s can't be locked (%s): see to it that nothing else writes there", folder, error.strerror)
    return True


def _say_who(descriptor: int) -> None:
    """Write the holder into the file in one call; without room for it, the lock holds all the same."""
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        logger.warning("the holder of the lock can't be noted")
