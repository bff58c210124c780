"""How the processes of a run find each other.

On a TPU pod, under SLURM, Open MPI and the like, through the cluster's environment; elsewhere the options of `Processes` say
where they meet. A single process needs neither, and starts no service.
"""

import dataclasses
import logging
import threading

import jax
from jax._src import distributed  # tells whom JAX has found

from ddpm_jax.endings import end_now, end_with_others
from ddpm_jax.errors import InputError, first_line
from ddpm_jax.processes import is_first, several

SPARE = 60  # seconds for which JAX would wait longer than we do: it aborts the process then

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
    """Seconds to wait for the others at the start; and seconds without a word from one after which all end."""


PROCESS_OPTIONS = frozenset(f"processes.{field.name}" for field in dataclasses.fields(Processes))


def start_processes(processes: Processes) -> None:
    """Join the other processes, if there are any. To be called before JAX is first used.

    Of several, all but the first log no more than warnings from then on, and where one ends in error, all end. If they don't
    come together in time, this process ends with one line and status 2.

    Raises:
        InputError: options that don't go together, or an address that can't be used.
    """
    _check(processes)
    if processes.count == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which training/stopping.py handles
    late = threading.Timer(processes.timeout, _too_late, (processes.timeout,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            processes.coordinator, processes.count, processes.index,
            initialization_timeout=processes.timeout + SPARE, heartbeat_timeout_seconds=processes.timeout,
            shutdown_timeout_seconds=processes.timeout,
        )  # fmt: skip
    except ValueError as error:  # no cluster
        if processes.coordinator is not None:
            raise InputError(f"--processes: {first_line(error)}") from error
    except jax.errors.JaxRuntimeError as error:
        what = f"can't wait for the other processes at {distributed.global_state.coordinator_address}"
        raise InputError(f"{what} ({first_line(error)}): is the port free? else choose another, the same for all") from error
    except RuntimeError:  # JAX is in use already, as where Python calls a command line
        if processes.coordinator is not None:
            raise
    finally:
        late.cancel()
        late.join()
    if several():
        if not is_first():
            logger.setLevel(logging.WARNING)
        end_with_others()


def _check(processes: Processes) -> None:
    options = {name: getattr(processes, name) for name in ("coordinator", "count", "index")}
    absent = [f"--processes.{name}" for name, value in options.items() if value is None]
    coordinator, count, index = options.values()
    if processes.timeout < 1:
        raise InputError(f"--processes.timeout {processes.timeout}: must be 1 second or more")
    if count is not None and count < 1:
        raise InputError(f"--processes.count {count}: must be 1 or more")
    if count is not None and index is not None and not 0 <= index < count:
        raise InputError(f"--processes.index {index}: must lie in 0 ... {count - 1}, as --processes.count is {count}")
    if count != 1 and 0 < len(absent) < len(options):
        raise InputError(f"{' and '.join(absent)} missing: of several processes, each needs all three options or none")
    host, _, port = (coordinator or "host:1").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--processes.coordinator {coordinator}: must be HOST:PORT, such as 10.0.0.1:1234")


def _too_late(timeout: int) -> None:
    state = distributed.global_state
    who = f"not all of {state.num_processes} processes came to" if is_first() else "process 0 and the others don't meet at"
    advice = "start all within this time, with the same --processes.coordinator and --processes.count, or raise the timeout"
    advice += "; for this process alone: --processes.count 1"
    end_now(f"{who} {state.coordinator_address} within --processes.timeout = {timeout} s: {advice}", 2)
