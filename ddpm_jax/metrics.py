"""What people look at while a run goes on: progress, metrics.jsonl, TensorBoard, and the loss curve."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_jax.errors import InputError
from ddpm_jax.files import whole_file
from ddpm_jax.json_lines import parse_records


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Within, importing a module fails as where it isn't installed, unless it has been imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# tensorboardX imports PyTorch where it finds it, which takes seconds and 250 MiB and serves nothing that is used here.
with _absent("torch"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

logger = logging.getLogger("ddpm_jax")
console = Console(stderr=True)

FLUSH_SECONDS = 10.0  # after which TensorBoard may see what was recorded


def log_to_terminal() -> None:
    """Show what the package logs, above the progress bar if there is one; called by the command lines."""
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, highlighter=NullHighlighter()
        )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class MetricsWriter:
    """Appends records to metrics.jsonl and to TensorBoard's event files in the run folder.

    Args:
        workdir: the run folder.
        start: the step that the run goes on from, or 0: what was recorded after it is removed, as it comes again.
    """

    def __init__(self, workdir: Path, start: int) -> None:
        self._path, self._start = workdir / "metrics.jsonl", start
        with self._explained():
            before = self._path.read_bytes() if self._path.exists() else b""
            kept = b"".join(line + b"\n" for line in before.splitlines() if _step_of(line) <= start)
            if kept != before:  # also where the last line of a killed run is torn
                with whole_file(self._path) as file:
                    file.write(kept)
            self._file = self._path.open("a")
        self._events: Events | None = None  # made by the first record: a run with nothing left to do has none

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one record. Raises InputError where it can't be written."""
        with self._explained():
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            if self._events is None:
                self._events = Events(self._path.parent, self._start)
            self._events.write(step, values)

    def close(self) -> None:
        """Finish both files."""
        with suppress(OSError):  # of a line that could not be written, which was raised then
            self._file.close()
        with suppress(OSError):
            if self._events is not None:
                self._events.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            again = "the same command goes on from the last checkpoint"
            raise InputError(f"{self._path} can't be written: {error.strerror}; {again}") from error


class Events:
    """TensorBoard's event file, written in this thread: that of SummaryWriter, and what it does at exit, print tracebacks where
    the disk is full. Where a run goes on, TensorBoard is told to forget what came after `start`.
    """

    def __init__(self, folder: Path, start: int, flush_seconds: float = FLUSH_SECONDS) -> None:
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._flush_seconds, self._flushed = flush_seconds, -flush_seconds
        if start:
            self._writer.write_event(
                Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START))
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed >= self._flush_seconds:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is held back, and close the file."""
        self._writer.close()


def _step_of(line: bytes) -> int:
    """The step of a record; -1 for a line that is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl by rising step, the newest of each (runs resume); torn lines are skipped."""
    found = parse_records((workdir / "metrics.jsonl").read_bytes())
    records = {record["step"]: record for record in found if isinstance(record.get("step"), int)}
    return [records[step] for step in sorted(records)]


def plot_loss(workdir: Path) -> None:
    """Draw loss against step into loss.png, on a logarithmic scale."""
    records = read_metrics(workdir)
    if not records:
        return
    from matplotlib.figure import Figure  # here, because it would be a fifth of every program's start

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in records], [r.get("loss", math.nan) for r in records], linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log", title="Training loss")
    axes.grid(visible=True, which="both", alpha=0.3)
    with whole_file(workdir / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)


class TrainProgress:
    """A progress bar on a terminal, otherwise a line for every record."""

    def __init__(self, start: int, total: int, batch_size: int) -> None:
        self._total = total
        self._batch_size = batch_size
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} images/s  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=start, loss="-", speed="-")

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Show a record."""
        rate = values.get("images_per_second")
        loss = f"{values['loss']:.4f}" if "loss" in values else "-"
        speed = "-" if rate is None else f"{rate:.0f}"
        self._bar.update(self._task, loss=loss, speed=speed)
        if not console.is_terminal:
            seconds = None if rate is None else int((self._total - step) * self._batch_size / rate)
            left = "-" if seconds is None else f"{seconds // 60}:{seconds % 60:02d}"
            logger.info("step %d/%d  loss %s  %s images/s  left %s", step, self._total, loss, speed, left)


class Meter:
    """Means of the metrics, images per second, and the share of time spent waiting for data, since the last record.

    Skipped steps are left out of the means, and counted where they may occur.
    """

    def __init__(self, batch_size: int, counts_skipped: bool = False) -> None:
        self._batch_size = batch_size
        self._counts_skipped = counts_skipped
        self._values: list[tuple[float, float, float, float]] = []
        self._since: float | None = None
        self._timed_steps = 0
        self._waited = 0.0

    def add(self, *steps: tuple[float, float, float, float]) -> None:
        """Take in (loss, grad_norm, learning_rate, skipped) of the steps of one dispatch.

        The first dispatch only starts the clock: its time is mostly the compiler's.
        """
        self._values.extend(steps)
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._timed_steps += len(steps)

    def exclude(self, seconds: float) -> None:
        """Leave out time that went into something else than steps, such as a preview."""
        if self._since is not None:
            self._since += seconds

    def waited(self, seconds: float) -> None:
        """Take in time in which the loop could do nothing, as the next images were not there."""
        if self._since is not None:
            self._waited += seconds

    def record(self) -> dict[str, float]:
        """The record of the steps since the last one; without loss and norm where all of them were skipped."""
        now = time.perf_counter()
        made = [values for values in self._values if not values[3]]
        record = dict(zip(("loss", "grad_norm"), np.mean(made, axis=0).tolist(), strict=False)) if made else {}
        record["learning_rate"] = self._values[-1][2]
        if self._counts_skipped:
            record["skipped_steps"] = float(len(self._values) - len(made))
        if self._timed_steps and self._since is not None:
            record["images_per_second"] = self._timed_steps * self._batch_size / (now - self._since)
            record["data_wait"] = self._waited / (now - self._since)
        self._values, self._since, self._timed_steps, self._waited = [], now, 0, 0.0
        return record


@contextmanager
def sample_progress(num_images: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for sampling, as a function of the number of images done; lines where there is no terminal."""
    count = TextColumn("image {task.completed:.0f}/{task.total:.0f}")
    left = TimeRemainingColumn(elapsed_when_finished=True)
    began = time.perf_counter()
    with Progress(count, BarColumn(), left, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_images)

        def on_batch(done: int) -> None:
            bar.update(task, completed=done)
            if not console.is_terminal:
                seconds = int((time.perf_counter() - began) / done * (num_images - done))
                logger.info("image %d/%d  left %d:%02d", done, num_images, *divmod(seconds, 60))

        yield on_batch
