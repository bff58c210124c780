"""What people look at while a run goes on."""

import io
import json
import logging
import math
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import one_line_error
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from ddpm_jax import metrics
from ddpm_jax.metrics import Meter, MetricsWriter, TrainProgress, plot_loss, read_metrics, sample_progress


def write(workdir, *records, start=0):
    writer = MetricsWriter(workdir, start)
    for step, values in records:
        writer.write(step, values)
    writer.close()


def test_records_read_back(tmp_path):
    write(tmp_path, (10, {"loss": 0.5, "grad_norm": 1.25}), (20, {"loss": 1 / 3}))
    assert read_metrics(tmp_path) == [{"step": 10, "loss": 0.5, "grad_norm": 1.25}, {"step": 20, "loss": 1 / 3}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == read_metrics(tmp_path)


def test_records_are_there_before_the_end(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    writer.close()


@pytest.mark.parametrize("keep", range(1, 20))
def test_torn_last_line(tmp_path, keep):
    """A killed run leaves a part of its last line; what was before it stays, and so does what comes after."""
    write(tmp_path, (10, {"loss": 3.0}), (20, {"loss": 2.0}))
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    assert keep < len(second) - 1
    path.write_text(first + second[:keep])
    assert read_metrics(tmp_path) == [{"step": 10, "loss": 3.0}]
    write(tmp_path, (20, {"loss": 1.0}), start=10)
    assert read_metrics(tmp_path) == [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.0}]


def test_last_line_that_lacks_only_its_end(tmp_path):
    write(tmp_path, (10, {"loss": 3.0}))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write(tmp_path, (20, {"loss": 1.0}), start=10)
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20]


def test_the_newest_record_of_a_step_wins(tmp_path):
    """Also where an earlier version of this program has left those that came again."""
    write(tmp_path, *((step, {"loss": step / 10}) for step in (10, 20, 30)))
    write(tmp_path, *((step, {"loss": step / 100}) for step in (20, 30, 40)), start=30)
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [
        (10, 1.0),
        (20, 0.2),
        (30, 0.3),
        (40, 0.4),
    ]


def test_what_was_recorded_after_the_step_that_a_run_goes_on_from_is_removed(tmp_path):
    write(tmp_path, *((step, {"loss": step / 10}) for step in (10, 20, 30)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    writer = MetricsWriter(tmp_path, 20)
    for step in (30, 40):
        writer.write(step, {"loss": step / 100})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [(record["step"], record["loss"]) for record in lines] == [(10, 1.0), (20, 2.0), (30, 0.3), (40, 0.4)]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    one_line_error(MetricsWriter, tmp_path, 0, fragments=["metrics.jsonl can't be written: Is a directory", "the same command"])


def test_a_full_disk_is_one_line_and_closes(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    with open("/dev/full", "wb") as full:  # noqa: PTH123, a device
        os.dup2(full.fileno(), writer._file.fileno())
    one_line_error(writer.write, 1, {"loss": 1.0}, fragments=["metrics.jsonl can't be written: No space left on device"])
    writer.close()


def test_lines_that_are_no_records(tmp_path):
    lines = [
        '{"step": 7, "loss": 1.0}',
        "",
        "3",
        "[1, 2]",
        '"text"',
        "null",
        '{"loss": 2.0}',
        "\x00\x00",
        '{"step": 5, "loss": 4.0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_metrics(tmp_path) == [{"step": 5, "loss": 4.0}, {"step": 7, "loss": 1.0}]


def test_tensorboard_events(tmp_path):
    write(tmp_path, (10, {"loss": 0.5, "grad_norm": 2.0}), (20, {"loss": 0.25, "grad_norm": 1.0}))
    (path,) = tmp_path.glob("events.*")
    content, scalars = path.read_bytes(), []
    while content:  # TFRecord: length, its checksum, the message, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    assert scalars == [(10, "loss", 0.5), (10, "grad_norm", 2.0), (20, "loss", 0.25), (20, "grad_norm", 1.0)]


def test_plot(tmp_path):
    write(tmp_path, *((step, {"loss": 1 / step}) for step in range(1, 50)))
    plot_loss(tmp_path)
    with Image.open(tmp_path / "loss.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 400 and picture.height > 200
        drawn = np.asarray(picture.convert("RGB"))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 10
    # The curve falls: its colour lies higher on the left than on the right.
    blue = (drawn[..., 2].astype(int) - drawn[..., 0]) > 100
    rows, columns = np.nonzero(blue)
    assert rows[columns == columns.min()].mean() < rows[columns == columns.max()].mean()


def test_plot_of_one_record_and_of_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    plot_loss(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    write(tmp_path, (1, {"loss": 0.5}))
    plot_loss(tmp_path)
    assert (tmp_path / "loss.png").exists()


# Means and speed


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_meter_means(clock):
    meter = Meter(batch_size=4)
    meter.add((1.0, 10.0, 0.1, 0.0))
    meter.add((2.0, 20.0, 0.2, 0.0))
    meter.add((6.0, 0.0, 0.3, 0.0))
    clock.now += 1
    record = meter.record()
    assert record["loss"] == pytest.approx(3.0) and record["grad_norm"] == pytest.approx(10.0)
    assert record["learning_rate"] == 0.3  # that of the last step
    meter.add((5.0, 7.0, 0.4, 0.0))
    clock.now += 1
    again = meter.record()
    assert (again["loss"], again["grad_norm"], again["learning_rate"]) == (5.0, 7.0, 0.4)  # nothing of the last record


def test_meter_speed(clock):
    meter = Meter(batch_size=10)
    clock.now += 100  # compiling
    for _ in range(3):
        meter.add((1.0, 1.0, 1.0, 0.0))
        clock.now += 2
    # The first step only started the clock: two steps of 10 images since, in 6 seconds.
    assert meter.record()["images_per_second"] == pytest.approx(20 / 6)
    for _ in range(4):
        clock.now += 2
        meter.add((1.0, 1.0, 1.0, 0.0))
    clock.now += 30
    meter.exclude(30.0)  # a preview
    assert meter.record()["images_per_second"] == pytest.approx(40 / 8)


def test_meter_leaves_out_all_steps_of_the_first_dispatch(clock):
    meter = Meter(batch_size=10)
    clock.now += 100  # compiling, and 4 steps
    for _ in range(3):
        meter.add(*[(1.0, 1.0, 1.0, 0.0)] * 4)
        clock.now += 2
    assert meter.record()["images_per_second"] == pytest.approx(80 / 6)


def test_meter_tells_the_share_of_time_spent_waiting(clock):
    meter = Meter(batch_size=10)
    meter.waited(7.0)  # before the clock starts, nothing counts
    meter.add((1.0, 1.0, 1.0, 0.0))
    for _ in range(3):
        meter.waited(0.5)
        clock.now += 2
        meter.add((1.0, 1.0, 1.0, 0.0))
    assert meter.record()["data_wait"] == pytest.approx(1.5 / 6)
    meter.add((1.0, 1.0, 1.0, 0.0))
    clock.now += 4
    assert meter.record()["data_wait"] == 0  # nothing of the last record


def test_meter_of_one_step_has_no_speed(clock):
    meter = Meter(batch_size=10)
    meter.exclude(5.0)  # before the first step there is nothing to leave out
    meter.add((0.5, 1.0, 0.1, 0.0))
    clock.now += 1
    assert meter.record() == {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 0.1}


def test_meter_leaves_skipped_steps_out_of_means_and_counts_them(clock):
    meter = Meter(batch_size=10, counts_skipped=True)
    meter.add((1.0, 2.0, 0.1, 0.0), (math.nan, math.inf, 0.2, 1.0), (3.0, 4.0, 0.3, 0.0))
    assert meter.record() == {"loss": 2.0, "grad_norm": 3.0, "learning_rate": 0.3, "skipped_steps": 1.0}
    clock.now += 1
    meter.add((math.nan, math.nan, 0.4, 1.0))  # nothing that isn't a number is written: JSON has no NaN
    record = meter.record()
    assert record["skipped_steps"] == 1 and record["learning_rate"] == 0.4 and not {"loss", "grad_norm"} & record.keys()
    meter.add((5.0, 6.0, 0.5, 0.0))
    clock.now += 1
    assert meter.record()["skipped_steps"] == 0


# Progress


@pytest.fixture
def terminal(monkeypatch):
    """Puts a stream in the terminal's place, as one or as none."""

    def put(is_terminal):
        stream = io.StringIO()
        monkeypatch.setattr(metrics, "console", Console(file=stream, force_terminal=is_terminal, width=100))
        return stream

    return put


def test_progress_without_a_terminal_is_plain_lines(terminal, caplog):
    stream = terminal(False)
    progress = TrainProgress(start=0, total=1000, batch_size=32)
    with caplog.at_level(logging.INFO, "ddpm_jax"), progress:
        for step in range(1, 201):
            progress.advance(step)
        progress.report(200, {"loss": 0.123456, "images_per_second": 160.0})
    (line,) = caplog.messages
    assert "200/1000" in line and "0.1235" in line and "160 images/s" in line
    assert "2:40" in line  # 800 steps x 32 images at 160 a second: 160 seconds
    assert stream.getvalue() == ""


def test_progress_without_a_speed_yet(terminal, caplog):
    terminal(False)
    progress = TrainProgress(start=0, total=10, batch_size=32)
    with caplog.at_level(logging.INFO, "ddpm_jax"), progress:
        progress.report(1, {"loss": 2.0})
    assert "1/10" in caplog.text and "2.0000" in caplog.text


def test_progress_on_a_terminal_is_a_bar(terminal, caplog):
    stream = terminal(True)
    progress = TrainProgress(start=300, total=1000, batch_size=32)
    with caplog.at_level(logging.INFO, "ddpm_jax"), progress:
        progress.advance(400)
        progress.report(400, {"loss": 0.5, "images_per_second": 99.6})
    text = stream.getvalue()
    assert "400/1000" in text and "0.5000" in text and "100 images/s" in text
    assert caplog.messages == []


def test_sample_progress_on_a_terminal_is_a_bar(terminal, caplog):
    stream = terminal(True)
    with caplog.at_level(logging.INFO, "ddpm_jax"), sample_progress(64) as on_batch:
        on_batch(32)
        on_batch(64)
    assert "64/64" in stream.getvalue() and caplog.messages == []


def test_sample_progress_without_a_terminal_is_plain_lines(terminal, caplog, clock):
    stream = terminal(False)
    with caplog.at_level(logging.INFO, "ddpm_jax"), sample_progress(96) as on_batch:
        clock.now += 70
        on_batch(32)
        clock.now += 140
        on_batch(96)
    first, last = caplog.messages
    assert "32/96" in first and "2:20" in first  # 32 images in 70 seconds, so 64 in 140
    assert "96/96" in last and "0:00" in last
    assert stream.getvalue() == ""


def test_pytorch_is_left_alone(tmp_path):
    """TensorBoard's writer would import it; whoever wants it afterwards gets it."""
    (tmp_path / "torch.py").write_text("NAME = 'torch'")
    program = "import sys, ddpm_jax.metrics\nassert 'torch' not in sys.modules\nimport torch\nassert torch.NAME == 'torch'"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
