"""The programs of the repository as processes of their own, alone or several that make one run.

alone = start("train.py", ["--workdir", folder], folder / "logs")
both = start_together("train.py", ["--workdir", folder], folder / "logs", count=2, devices=2, timeout=10)
statuses = [each.wait() for each in both]
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 300.0  # seconds that nothing here takes, even on a busy machine


class Missed(RuntimeError):
    """A program had done its work, on a busy machine, before something could be done to it."""


class Running:
    """A started program, whose output goes to files, so that it never waits for a reader."""

    def __init__(self, command: Sequence[str], logs: Path, env: Mapping[str, str], cwd: Path | None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.glob("*.err")))
        self._files = [logs / f"{number}.{ending}" for ending in ("out", "err")]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=dict(env), cwd=cwd)

    @property
    def output(self) -> str:
        """What it has written to stdout so far."""
        return self._files[0].read_text(errors="replace")

    @property
    def errors(self) -> str:
        """What it has written to stderr so far."""
        return self._files[1].read_text(errors="replace")

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit status, once it has ended; it is killed, and TimeoutExpired raised, after `limit` seconds."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def wait_for(self, text: str, limit: float = LIMIT) -> None:
        """Return once it has written the text to stderr. Errors: see wait_until."""
        self.wait_until(lambda: text in self.errors, limit)

    def wait_until(self, condition: Callable[[], bool], limit: float = LIMIT) -> None:
        """Return once the condition holds. Raises Missed where the program ends well before, RuntimeError if it ends otherwise
        or if `limit` seconds pass."""
        deadline = time.monotonic() + limit
        while not condition():
            ended, late = self.process.poll() is not None, time.monotonic() > deadline
            if (ended or late) and not condition():
                raise self._too_late() if ended else RuntimeError(f"the moment never came:\n{self.errors}")
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    @contextmanager
    def held(self, done: Callable[[], bool]) -> Iterator[None]:
        """Let it stand still meanwhile. Raises Missed where it has done its work before."""
        self.send(signal.SIGSTOP)
        happened = None
        if self.process.returncode is None:  # else it is no child any more
            happened = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # until then it goes on
        if happened is None or happened.si_code != os.CLD_STOPPED:
            raise self._too_late()
        try:
            if done():
                raise Missed(f"had done its work before it was held:\n{self.errors}")
            yield
        finally:
            self.send(signal.SIGCONT)

    def _too_late(self) -> RuntimeError:
        status = self.wait()
        return (Missed if status == 0 else RuntimeError)(f"ended with status {status}:\n{self.errors}")

    def kill(self) -> None:
        """End it at once, if it is still there."""
        self.process.kill()
        self.process.wait()


def start(
    program: str,
    arguments: Sequence[str | Path],
    logs: Path,
    *,
    index: int | None = None,
    count: int | None = None,
    port: int | None = None,
    timeout: int | None = None,
    devices: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Running:
    """Start a program of the repository, such as "train.py", on CPU devices.

    Args:
        program: path below the repository's root.
        arguments: what follows on the command line.
        logs: folder for what it writes to stdout and stderr.
        index: with count and port: which of how many processes this is; they meet at localhost:port.
        count: see index.
        port: see index.
        timeout: --processes.timeout in seconds; None: the default.
        devices: CPU devices that this process shall have.
        env: environment variables to set besides.
        cwd: working directory; None: this process's own.
    """
    given = {"coordinator": port and f"localhost:{port}", "count": count, "index": index, "timeout": timeout}
    options = [part for name, value in given.items() if value is not None for part in (f"--processes.{name}", value)]
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, ROOT / program, *arguments, *options]
    return Running([str(part) for part in command], logs, os.environ | variables | path | (env or {}), cwd)


def start_together(
    program: str,
    arguments: Sequence[str | Path],
    logs: Path,
    *,
    count: int,
    devices: int = 1,
    timeout: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> list[Running]:
    """Start `count` processes that make one run, each with its own devices; a single one gets no --processes options."""
    if count == 1:
        return [start(program, arguments, logs, devices=devices, env=env, cwd=cwd)]
    port = free_port()
    return [
        start(
            program, arguments, logs, index=index, count=count, port=port, timeout=timeout, devices=devices, env=env, cwd=cwd
        )
        for index in range(count)
    ]  # fmt: skip


def wait_all(running: Sequence[Running], limit: float = LIMIT) -> list[int]:
    """The exit statuses of all; none of them is left running."""
    deadline = time.monotonic() + limit
    try:
        return [each.wait(max(0.0, deadline - time.monotonic())) for each in running]
    finally:
        for each in running:
            each.kill()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
