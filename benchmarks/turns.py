"""How a worker takes turns: it warms up, says so, then runs for as long as it is told to, one line of JSON for each turn.

Between turns a worker waits for a line on its standard input and uses no processor. `Worker` is the side that tells it.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Worker:
    """A worker process and what it has told so far."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        began = time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.first = self._hear()
        self.first_step_seconds = time.perf_counter() - began
        self._hear()
        self.speeds: list[float] = []
        self.peak_mib = 0.0

    def turn(self, seconds: float) -> None:
        """Let it work for about so long."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        self.speeds.append(self._hear()["images_per_second"])

    def end(self) -> None:
        """Let it finish."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.peak_mib = self._hear()["peak_mib"]
        self.process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["it ended without a word"])[-1]
        raise RuntimeError(f"{self.name}: {last}")


def take_turns(workers: Sequence[Worker], rounds: int, seconds: float) -> None:
    """Let the workers work one after the other, round by round, and finish."""
    for _ in range(rounds):
        for worker in workers:
            worker.turn(seconds)
    for worker in workers:
        worker.end()


def serve(run: Callable[[], int], num_params: int, versions: dict[str, str], **facts: object) -> None:
    """Call run() for each turn; it returns when its work is done, with the number of images that it worked on."""
    run()
    _say({"event": "first", "num_params": num_params, "versions": versions} | facts)
    began = time.perf_counter()
    run()
    once = time.perf_counter() - began
    _say({"event": "ready"})
    for line in sys.stdin:
        calls = max(1, round(float(line) / once))
        began = time.perf_counter()
        images = sum(run() for _ in range(calls))
        _say({"event": "turn", "images_per_second": images / (time.perf_counter() - began)})
    _say({"event": "end", "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def _say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)
