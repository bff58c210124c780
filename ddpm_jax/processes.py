"""Processes: how several of them become one run, who writes, and what they agree on.

On a TPU pod, under SLURM, Open MPI and the like, each process finds the others through the cluster's environment; elsewhere
the options of `Processes` say where they meet. A single process needs neither.
"""

import dataclasses
import logging

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.errors import InputError, first_line

logger = logging.getLogger("ddpm_jax")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Where the processes of a run meet; None: as the cluster's environment says, or there is only one."""

    coordinator: str | None = None
    """Address of the first process, HOST:PORT."""
    count: int | None = None
    """Number of processes."""
    index: int | None = None
    """Which of them this is, from 0."""
    timeout: int = 100
    """Seconds after which a process that is not heard of counts as lost, and the others end."""


def start_processes(processes: Processes) -> None:
    """Join the other processes, if there are any. To be called before JAX is first used.

    Raises:
        InputError: options that don't go together, or other processes that can't be reached.
    """
    given = {processes.coordinator, processes.count, processes.index} != {None}
    try:
        jax.distributed.initialize(
            processes.coordinator, processes.count, processes.index, heartbeat_timeout_seconds=processes.timeout
        )
    except ValueError as error:  # no cluster
        if given:
            raise InputError(f"--processes: {first_line(error)}") from error


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def wait_for_all(name: str) -> None:
    """Go on when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
