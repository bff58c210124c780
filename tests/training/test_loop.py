"""The training loop in this process: what it writes, that it goes on exactly, and how it ends.

The network is PixelNet on one device, and runs that differ only in what they write share one compiled step, so that a
run takes a second. test_runs.py runs train.py itself.
"""

import dataclasses
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import make_pixel_net
from PIL import Image

from ddpm_jax import inference
from ddpm_jax.checkpoint import abstract_like, read_config, restore_newest
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from ddpm_jax.data import ImageSet, StoredImages, batches
from ddpm_jax.errors import InputError, NonFiniteLossError
from ddpm_jax.parallel import compile_at_first_call, make_mesh, replicated
from ddpm_jax.training import loop
from ddpm_jax.training.step import make_train_step as library_train_step
from ddpm_jax.training.step import make_train_steps as library_train_steps

COMPILED = {}


def make_train_step(config, *args):
    """The library's step, the same object for runs that differ in config.train alone: the learning rate is constant."""
    assert config.optim.decay == "constant"
    key = dataclasses.replace(config, train=TrainConfig())
    return COMPILED.setdefault(key, library_train_step(config, *args))


def make_train_steps(train_step, count):
    """Likewise."""
    return COMPILED.setdefault((train_step, count), library_train_steps(train_step, count))


def compile_for(mesh, function, **options):
    """Compiled once, quickly."""
    if function not in COMPILED:
        COMPILED[function] = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)
    return COMPILED[function]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda fsdp: make_mesh(jax.devices()[:1], fsdp))
        patch.setattr(loop, "make_unet", make_pixel_net)
        patch.setattr(inference, "make_unet", make_pixel_net)
        patch.setattr(loop, "make_train_step", make_train_step)
        patch.setattr(loop, "make_train_steps", make_train_steps)
        patch.setattr(loop, "compile_for", compile_for)
        inference.make_draw.cache_clear()
        yield
        inference.make_draw.cache_clear()
        COMPILED.clear()


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """What the package logs, even after a command line in this process has taken its logger away from the root."""
    monkeypatch.setattr(logging.getLogger("ddpm_jax"), "propagate", True)
    caplog.set_level(logging.INFO, logger="ddpm_jax")
    return caplog


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The path of 12 images of 8x8x1, whose order matters: 4 of them are one batch."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=pictures, labels=np.arange(12) % 3)
    return path


@pytest.fixture(scope="module")
def config(images):
    return Config(
        data=DataConfig(source=str(images), flip=True),
        diffusion=DiffusionConfig(num_steps=50),
        model=ModelConfig(dropout=0.2, num_classes=3, multipliers=(1,), attention_resolutions=()),
        optim=OptimConfig(warmup_steps=5, learning_rate=1e-2),
        train=TrainConfig(
            batch_size=4, num_steps=10, log_every_steps=3, checkpoint_every_steps=4, keep_last=2, keep_every_steps=None,
            preview_every_steps=None, preview_images=5,
        ),
        sample=SampleConfig(num_steps=3),
    )  # fmt: skip


def with_train(config, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


@dataclasses.dataclass
class Run:
    workdir: Path
    state: object


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted run of 10 steps, a record of each."""
    workdir = tmp_path_factory.mktemp("whole")
    return Run(workdir, loop.train(with_train(config, log_every_steps=1, preview_every_steps=4), workdir))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(rows):
    return [{name: value for name, value in row.items() if name not in ("images_per_second", "data_wait")} for row in rows]


def checkpoints(workdir):
    return sorted(int(entry.name) for entry in (workdir / "checkpoints").iterdir())


def test_a_run_writes_its_folder(whole):
    assert int(whole.state.step) == 10
    names = {entry.name.partition(".out")[0] for entry in whole.workdir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "events", "checkpoints", "samples", "loss.png", ".lock"}
    assert checkpoints(whole.workdir) == [8, 10]
    assert sorted(entry.name for entry in (whole.workdir / "samples").iterdir()) == [f"{n:08d}.png" for n in (4, 8, 10)]
    with Image.open(whole.workdir / "samples" / "00000010.png") as picture:
        assert picture.mode == "L"
    assert [row["step"] for row in records(whole.workdir)] == list(range(1, 11))
    assert read_config(whole.workdir / "config.json").data.image_shape == (8, 8, 1)
    abstract = abstract_like(whole.state, replicated(make_mesh(jax.devices()[:1])))
    assert_same_bits(restore_newest(whole.workdir, abstract), whole.state)


def test_records_are_means_since_the_last_one(config, whole, tmp_path):
    loop.train(config, tmp_path)
    single = {row["step"]: row for row in records(whole.workdir)}
    for row, steps in zip(records(tmp_path), [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10,)], strict=True):
        assert row["step"] == steps[-1]
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(row[name], np.mean([single[step][name] for step in steps]), rtol=1e-12)
        # The rate with which the record's own update was made: update n = step - 1 of a ramp over 5.
        np.testing.assert_allclose(row["learning_rate"], 1e-2 * min(1, (row["step"] - 1) / 5), rtol=1e-5)


def test_stopping_and_going_on_is_the_uninterrupted_run(config, whole, tmp_path, log):
    config = with_train(config, log_every_steps=1)
    loop.train(with_train(config, num_steps=4), tmp_path)
    loop.train(with_train(config, num_steps=7), tmp_path)
    log.clear()
    parts = loop.train(config, tmp_path)
    assert f"resuming {tmp_path} from step 7" in log.text
    assert_same_bits(parts, whole.state)
    assert without_speed(records(tmp_path)) == without_speed(records(whole.workdir))


def test_importance_sampling_goes_on_where_it_stopped(config, tmp_path):
    """Its losses are in the checkpoint: hybrid loss, learned variance, parts of a batch, all steps in the same bits."""
    diffusion = DiffusionConfig(num_steps=3, schedule="cosine", variance="learned_range", loss="hybrid", timesteps="importance")
    optim = dataclasses.replace(config.optim, accumulate_steps=2)
    config = with_train(dataclasses.replace(config, diffusion=diffusion, optim=optim), batch_size=12)
    whole = loop.train(config, tmp_path / "whole")
    assert (np.asarray(whole.loss_history.seen) >= 10).all()
    loop.train(with_train(config, num_steps=7), tmp_path / "parts")
    assert_same_bits(loop.train(config, tmp_path / "parts"), whole)
    with pytest.raises(InputError, match=r"diffusion.timesteps: importance -> uniform"):
        loop.train(
            dataclasses.replace(config, diffusion=dataclasses.replace(diffusion, timesteps="uniform")), tmp_path / "parts"
        )


@pytest.mark.parametrize("together", [3, 100])
def test_steps_dispatched_together_train_the_same(config, whole, tmp_path, together):
    """Also where records and checkpoints, due every 3 and 4 steps, cut the parts short."""
    config = with_train(config, steps_per_dispatch=together)
    loop.train(with_train(config, num_steps=5), tmp_path)
    state = loop.train(config, tmp_path)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert_same_bits(loop.train(config, tmp_path / "again"), state)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.none() | st.integers(1, 9), st.integers(0, 12))
def test_nothing_is_due_within_a_dispatch(together, log, checkpoint, preview, start):
    train = TrainConfig(
        num_steps=40, steps_per_dispatch=together, log_every_steps=log, checkpoint_every_steps=checkpoint,
        preview_every_steps=preview,
    )  # fmt: skip
    parts = list(loop.dispatches(train, start))
    assert [step for part in parts for step in part] == list(range(start, 40))
    for part in parts:
        assert 1 <= len(part) <= together
        within = range(part.start + 1, part.stop)
        assert not [step for step in within for every in (log, checkpoint, preview) if every and step % every == 0]


def test_images_sent_batch_by_batch_train_the_same(config, whole, tmp_path):
    streamed = dataclasses.replace(config, data=dataclasses.replace(config.data, device_megabytes=0))
    assert_same_bits(loop.train(streamed, tmp_path), whole.state)


def test_the_loop_moves_nothing_behind_the_back(config, tmp_path, monkeypatch):
    """Every step but the first, with records, checkpoints and previews, under a guard that lets explicit transfers pass."""
    config = with_train(config, log_every_steps=1, checkpoint_every_steps=3, preview_every_steps=5, num_steps=12)
    loop_batches, draw_images = loop.batches, loop.draw_images
    guarded = []

    def batches(*args):
        stream = loop_batches(*args)
        yield next(stream)
        with jax.transfer_guard("disallow"):
            for batch in stream:
                with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
                    jnp.square(np.ones(3, np.float32))
                guarded.append(batch)
                yield batch

    def draw(*args):
        with jax.transfer_guard("allow"):  # tracing makes constants: the first call may
            draw_images(*args)
        return draw_images(*args)

    monkeypatch.setattr(loop, "batches", batches)
    monkeypatch.setattr(loop, "draw_images", draw)
    assert int(loop.train(config, tmp_path).step) == 12
    assert len(guarded) == 11


def contents(workdir):
    """All files but the ones that every start writes: TensorBoard's events and the plot."""
    files = (path for path in workdir.rglob("*") if path.is_file() and "events." not in path.name and path.name != "loss.png")
    return {path: path.read_bytes() for path in files}


def test_a_finished_run_stays_as_it_is(config, tmp_path, log):
    first = loop.train(config, tmp_path)
    before = contents(tmp_path)
    log.clear()
    assert_same_bits(loop.train(config, tmp_path), first)
    assert "trained 10 steps" in log.text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(config, whole, tmp_path, monkeypatch, log, number):
    loop_batches = loop.batches

    def batches(*args):
        for step, batch in enumerate(loop_batches(*args), 1):
            if step == 6:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", batches)
        stopped = loop.train(config, tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert int(stopped.step) == 6
    assert checkpoints(tmp_path) == [4, 6]
    assert "stopped at step 6 of 10 and saved; the same command goes on from there" in log.text
    assert_same_bits(loop.train(config, tmp_path), whole.state)


def test_a_signal_during_the_last_step_leaves_nothing_out(config, tmp_path, monkeypatch, log):
    """The run is whole then: its last preview and its plot are made."""
    loop_batches = loop.batches

    def batches(*args):
        for step, batch in enumerate(loop_batches(*args), 1):
            if step == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "batches", batches)
    loop.train(with_train(config, preview_every_steps=8), tmp_path)
    assert "SIGTERM" in log.text and "trained 10 steps" in log.text
    assert checkpoints(tmp_path) == [8, 10] and (tmp_path / "loss.png").exists()
    assert sorted(entry.name for entry in (tmp_path / "samples").iterdir()) == ["00000008.png", "00000010.png"]


def test_what_killed_programs_have_left_in_a_run_folder_is_removed_in_time(config, tmp_path):
    old = [tmp_path / ".config.json.0123abcd.tmp", tmp_path / "samples" / ".00000004.png.0123abcd.tmp"]
    new = tmp_path / ".evaluation.json.0123abcd.tmp"  # of a program that may be at it
    (tmp_path / "samples").mkdir()
    for path in (*old, new):
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    loop.train(with_train(config, num_steps=1), tmp_path)
    assert new.exists() and not any(path.exists() for path in old)


class Unreadable(StoredImages):
    """Images of which the last can't be read."""

    def read(self, indices, draws=None):
        if 11 in indices:
            raise InputError("image 11 can't be read")
        return np.zeros((len(indices), 8, 8, 1), np.uint8)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def test_threads_that_read_end_with_the_run(config, tmp_path, monkeypatch):
    """On a signal, and where an image can't be read, which ends in its one line."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, device_megabytes=0))
    during = []
    take = loop._Recorder.take

    def take_and_stop(self, steps, metrics):
        during.extend(readers())
        os.kill(os.getpid(), signal.SIGTERM)
        take(self, steps, metrics)

    monkeypatch.setattr(loop._Recorder, "take", take_and_stop)
    assert int(loop.train(config, tmp_path / "stopped").step) < 10
    unreadable = ImageSet(Unreadable(12, (8, 8, 1)), np.arange(12, dtype=np.int32) % 3)
    monkeypatch.setattr(loop._Recorder, "take", take)
    monkeypatch.setattr(loop, "load_images", lambda data: unreadable)
    with pytest.raises(InputError, match=r"^image 11 can't be read$"):
        loop.train(config, tmp_path / "failed")
    for thread in readers():
        thread.join(timeout=5)
    assert during and readers() == []


def test_records_tell_the_share_of_time_spent_waiting(config, tmp_path, monkeypatch):
    """Where each batch takes 50 ms to come, most of the time; and all of it is between 0 and 1."""

    def slow(*args):
        for batch in batches(*args):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(loop, "batches", slow)
    loop.train(with_train(config, checkpoint_every_steps=100), tmp_path)
    shares = [record["data_wait"] for record in records(tmp_path)]
    assert len(shares) == 4 and all(0 <= share <= 1 for share in shares) and shares[1] > 0.2


def test_training_works_outside_the_main_thread(config, whole, tmp_path):
    """There, Python forbids signal handlers."""
    states = []
    thread = threading.Thread(target=lambda: states.append(loop.train(config, tmp_path)))
    thread.start()
    thread.join()
    assert_same_bits(states[0], whole.state)


# --- divergence


def diverge(monkeypatch, at_step, field):
    """Make one of the metrics NaN at a step, and the weights that it leaves, too."""

    def compile_diverging(program):
        train_step = compile_at_first_call(program)

        def diverging(state, batch, count):
            bad = int(state.step) >= at_step - 1
            state, metrics = train_step(state, batch, count)
            if not bad:
                return state, metrics
            params = jax.tree.map(lambda x: x * jnp.nan, state.params)
            return state._replace(params=params), metrics._replace(**{field: jnp.full((1,), jnp.nan)})

        return diverging

    monkeypatch.setattr(loop, "compile_at_first_call", compile_diverging)


@pytest.mark.parametrize(("at_step", "kept"), [(2, []), (4, []), (6, [4])])
@pytest.mark.parametrize("field", ["loss", "grad_norm"])
def test_numbers_that_are_not_finite_end_the_run(config, tmp_path, monkeypatch, field, at_step, kept):
    """Checkpoints are due at steps 4 and 8; one of the step that went wrong must not be written."""
    diverge(monkeypatch, at_step, field)
    with pytest.raises(NonFiniteLossError, match=rf"\bnan\b.* at step {at_step}; ") as caught:
        loop.train(config, tmp_path)
    assert "\n" not in str(caught.value)
    assert "optim.learning-rate" in str(caught.value)
    assert checkpoints(tmp_path) == kept
    if not kept:
        assert "there is no checkpoint yet" in str(caught.value)


def test_the_message_names_a_checkpoint_that_is_still_being_written(config, tmp_path, monkeypatch):
    diverge(monkeypatch, 5, "loss")
    with pytest.raises(NonFiniteLossError) as caught:
        loop.train(config, tmp_path)
    assert checkpoints(tmp_path) == [4]
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '4'}" in str(caught.value)


def test_the_message_names_the_last_checkpoint_of_an_earlier_start(config, tmp_path, monkeypatch):
    loop.train(with_train(config, num_steps=4), tmp_path)
    diverge(monkeypatch, 6, "loss")
    with pytest.raises(NonFiniteLossError, match=f"the last good checkpoint is {tmp_path / 'checkpoints' / '4'}"):
        loop.train(config, tmp_path)


# --- input


def test_classes_must_cover_the_labels(config, tmp_path):
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=2))
    with pytest.raises(InputError, match=r"model\.num_classes = 2, but .* holds label 2"):
        loop.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_need_labels(config, tmp_path):
    path = tmp_path / "unlabelled.npy"
    np.save(path, np.zeros((4, 8, 8, 1), np.uint8))
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(path)))
    with pytest.raises(InputError, match=r"num_classes = 3, but .*unlabelled.npy holds no labels"):
        loop.train(wrong, tmp_path / "run")


def test_another_config_is_refused_before_anything_is_written(config, tmp_path):
    loop.train(with_train(config, num_steps=2), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, channels=64))
    with pytest.raises(InputError, match=r"model\.channels: 128 -> 64"):
        loop.train(wrong, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert checkpoints(tmp_path) == [2]


def test_a_batch_that_devices_cannot_share_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda fsdp: make_mesh(jax.devices()[:8], fsdp))
    with pytest.raises(InputError, match=r"train\.batch_size = 4 .* 8 devices: use 8"):
        loop.train(config, tmp_path)


def test_fewer_steps_than_were_made_are_refused(config, tmp_path):
    loop.train(with_train(config, num_steps=4), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"train\.num_steps = 2, but .* has already made 4 steps"):
        loop.train(with_train(config, num_steps=2), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_attention_at_a_resolution_that_does_not_occur_is_refused(config, tmp_path):
    model = dataclasses.replace(config.model, multipliers=(1, 1), attention_resolutions=(8, 2))
    with pytest.raises(InputError, match=r"attention_resolutions = \(8, 2\): feature maps here have heights \[8, 4\]"):
        loop.train(dataclasses.replace(config, model=model), tmp_path)
