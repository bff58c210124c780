"""The training loop: data, steps, and what is written along the way, read from top to bottom."""

import functools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.checkpoint import abstract_like, check_run_folder, newest_step, restore_newest, write_config
from ddpm_jax.config import Config, TrainConfig, flatten, override
from ddpm_jax.data import ImageSet, batches, load_images
from ddpm_jax.data.pipeline import check_sampling
from ddpm_jax.endings import last_words
from ddpm_jax.errors import InputError, NonFiniteLossError
from ddpm_jax.evaluation.training_scores import TrainingScores
from ddpm_jax.files import remove_debris
from ddpm_jax.images import save_grid
from ddpm_jax.inference import draw_images, make_network
from ddpm_jax.lock import locked
from ddpm_jax.metrics import Meter, MetricsWriter, TrainProgress, plot_loss
from ddpm_jax.models import make_unet, num_params
from ddpm_jax.parallel import (
    check_batch_size,
    compile_at_first_call,
    compile_for,
    make_mesh,
    put,
    replicated,
    run_once,
    weights_here,
)
from ddpm_jax.processes import check_same, check_shared, is_first
from ddpm_jax.saving import Checkpoints
from ddpm_jax.snapshots import save_snapshot, snapshot_due
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import TrainState, init_state, state_shardings
from ddpm_jax.training.step import Metrics, make_train_step, make_train_steps
from ddpm_jax.training.stopping import stop_signals
from ddpm_jax.validation import config_schedule

logger = logging.getLogger("ddpm_jax")

MAX_SKIPPED = 100  # steps in a row; one bad batch or an overflow passes, weights that give no numbers don't come back
ABANDONED = 3600.0  # seconds without a write, after which a temporary file's writer is taken for dead


def train(config: Config, workdir: str | Path) -> TrainState:
    """Train until train.num_steps, or go on from the newest checkpoint in workdir; return the last state.

    SIGTERM and Ctrl-C save a checkpoint and end the call. Everything is written below workdir: config.json,
    metrics.jsonl, events.*, checkpoints/, snapshots/, samples/ and loss.png. All processes of a run call it with the same
    config and a folder that they share; the first one writes all but its parts of the checkpoints and snapshots.

    Raises:
        InputError: a config, data or run folder that can't be used.
        NonFiniteLossError: the loss or its gradient is NaN or infinite; with train.non_finite = "skip", MAX_SKIPPED times
            in a row.
        StorageHangError: reading or writing a checkpoint has taken longer than train.storage_timeout.
    """
    workdir = Path(workdir)
    config = override(config, flatten(config))  # checks types and ranges of a config made in Python
    if config.train.snapshot_every_steps is not None and not config.optim.ema_lengths:
        raise InputError("train.snapshot_every_steps is set, but optim.ema_lengths is empty: give lengths such as 0.05 0.1")
    image_set = load_images(config.data)
    config = fit_to_data(config, image_set)
    mesh = make_mesh(fsdp=config.train.fsdp)
    check_batch_size(config.train.batch_size, mesh, config.optim.accumulate_steps)
    check_shared(workdir)
    with locked(workdir) if is_first() else nullcontext():
        check_same(_facts(config, image_set, workdir))
        return _train(config, workdir, image_set, mesh)


def _train(config: Config, workdir: Path, image_set: ImageSet, mesh: Mesh) -> TrainState:
    check_run_folder(workdir, config)

    unet = make_network(config)
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    abstract = jax.eval_shape(lambda: init_state(config, unet, optimizer))
    shardings = state_shardings(mesh, abstract)
    state = restore_newest(workdir, abstract_like(abstract, shardings), config.train.storage_timeout)
    if state is None:
        state = run_once(mesh, lambda: init_state(config, unet, optimizer), shardings)
    start, total = int(state.step), config.train.num_steps
    if start > total:
        raise InputError(f"train.num_steps = {total}, but {workdir} has already made {start} steps")
    if is_first():
        write_config(workdir, config)
        for folder in (workdir, workdir / "samples"):
            remove_debris(folder, seconds=ABANDONED)
    last_words(f"another process of {workdir} was lost; the same command, in all of them, goes on from the newest checkpoint")
    _introduce(config, image_set, state, mesh)
    if start:
        logger.info("resuming %s from step %d", workdir, start)

    train_step = make_train_step(config, config_schedule(config), unet, optimizer, mesh)
    train_steps = make_train_steps(train_step, config.train.steps_per_dispatch)
    out_shardings = (shardings, replicated(mesh))
    train_steps = compile_at_first_call(compile_for(mesh, train_steps, donate_argnums=0, out_shardings=out_shardings))
    spans = functools.partial(dispatches, config.train, start)
    scores = None if config.train.evaluate_every_steps is None else TrainingScores(config, workdir, image_set, mesh)
    with (
        stop_signals() as stop,
        Checkpoints(workdir, config) as checkpoints,
        _Recorder(config, workdir, start, mesh, checkpoints) as recorder,
        closing(batches(config, image_set, mesh, (span.start for span in spans()))) as stream,
    ):
        pending: tuple[range, Metrics] | None = None
        step = start
        for number, steps in enumerate(spans()):
            with recorder.waiting():
                batch = next(stream)
            state, metrics = train_steps(state, batch, put(np.int32(len(steps)), replicated(mesh)))
            if pending is not None:  # one dispatch behind, so that the devices never wait for the host
                recorder.take(*pending)
            pending, step = (steps, metrics), steps.stop
            checkpoints.check()
            stopping = stop.after(number) and step < total
            last = step == total or stopping
            checkpoint_due = last or step % config.train.checkpoint_every_steps == 0
            if checkpoint_due or snapshot_due(config.train, step):
                recorder.take(*pending)
                pending = None
            if snapshot_due(config.train, step):
                checkpoints.wait()  # Orbax confuses what two saves at once are waiting for
                save_snapshot(workdir, state, step, config)
            if checkpoint_due:
                checkpoints.save(state, step)
            if recorder.due(config.train.preview_every_steps, step) and not stopping:
                recorder.preview(step, state)
            if scores is not None and recorder.due(config.train.evaluate_every_steps, step) and not stopping:
                with recorder.excluded():
                    scores.measure(step, state.ema)
            if last:
                break
        checkpoints.wait()
    if step < total:
        logger.info("stopped at step %d of %d and saved; the same command goes on from there", step, total)
    else:
        if is_first():
            plot_loss(workdir)
        logger.info("trained %d steps; next: python sample.py --ckpt %s", total, workdir)
    return state


def dispatches(config: TrainConfig, start: int) -> Iterator[range]:
    """The steps from start to train.num_steps in the parts that are dispatched together: nothing is due within a part."""
    optional = (config.preview_every_steps, config.snapshot_every_steps, config.evaluate_every_steps)
    due = (config.log_every_steps, config.checkpoint_every_steps, *(every or config.num_steps for every in optional))
    while start < config.num_steps:
        stop = min(start + config.steps_per_dispatch, config.num_steps, *((start // every + 1) * every for every in due))
        yield range(start, stop)
        start = stop


def fit_to_data(config: Config, image_set: ImageSet) -> Config:
    """The config with the image shape of the data, and with classes their names, once network and data are known to fit."""
    height, width, channels = image_set.image_shape
    try:
        make_unet(config.model, channels).check_resolution(height, width)
    except ValueError as error:
        raise InputError(f"model.multipliers = {config.model.multipliers}: {error}") from error
    heights = [height // config.model.space_to_depth // 2**level for level in range(len(config.model.multipliers))]
    absent = set(config.model.attention_resolutions) - set(heights)
    if absent:
        resolutions = config.model.attention_resolutions
        raise InputError(f"model.attention_resolutions = {resolutions}: feature maps here have heights {heights}")
    check_sampling(config, image_set)
    num_classes, names = config.model.num_classes, config.data.class_names
    if num_classes is not None:
        names = names or image_set.class_names
        if image_set.labels is None:
            raise InputError(f"model.num_classes = {num_classes}, but {config.data.source} holds no labels")
        highest = image_set.labels.max()
        if highest >= num_classes:
            raise InputError(f"model.num_classes = {num_classes}, but {config.data.source} holds label {highest}")
        if len(names) not in (0, num_classes):
            raise InputError(f"model.num_classes = {num_classes}, but there are {len(names)} data.class_names")
    return override(config, {"data.image_shape": image_set.image_shape, "data.class_names": names})


class _Recorder:
    """What a run writes besides checkpoints: metrics, progress, previews."""

    def __init__(self, config: Config, workdir: Path, start: int, mesh: Mesh, checkpoints: Checkpoints) -> None:
        self._config, self._workdir, self._mesh, self._checkpoints = config, workdir, mesh, checkpoints
        self._writer = MetricsWriter(workdir, start) if is_first() else None
        self._progress = TrainProgress(start, config.train.num_steps, config.train.batch_size)
        self._meter = Meter(config.train.batch_size, counts_skipped=config.train.non_finite == "skip")
        self._skipped_in_a_row = 0

    def __enter__(self) -> "_Recorder":
        if self._writer is not None:
            self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._progress.__exit__(None, None, None)
            self._writer.close()

    def take(self, steps: range, metrics: Metrics) -> None:
        """Read the metrics of steps, counted from 0, and write the record that is due. Raises NonFiniteLossError."""
        values = jax.device_get(metrics)
        rows = list(zip(*(value[: len(steps)].tolist() for value in values), strict=True))
        for number, (loss, grad_norm, _, skipped) in enumerate(rows, steps.start + 1):
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
            if not finite and (not skipped or self._skipped_in_a_row == MAX_SKIPPED):
                raise NonFiniteLossError(self._diverged(number, loss, grad_norm))
        if self._writer is None:  # the first process writes
            return
        self._meter.add(*rows)
        step = steps.stop
        self._progress.advance(step)
        if step % self._config.train.log_every_steps == 0 or step == self._config.train.num_steps:
            record = self._meter.record()
            self._writer.write(step, record)
            self._progress.report(step, record)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time that is spent on waiting for the next images."""
        began = time.perf_counter()
        yield
        self._meter.waited(time.perf_counter() - began)

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time that goes into something else than steps."""
        began = time.perf_counter()
        yield
        self._meter.exclude(time.perf_counter() - began)

    def due(self, every: int | None, step: int) -> bool:
        """Whether what is made every so many steps, or never, is made at this one; at the last one it is."""
        return every is not None and (step % every == 0 or step == self._config.train.num_steps)

    def preview(self, step: int, state: TrainState) -> None:
        """Write samples/STEP.png: images of the averaged weights from the same noise every time."""
        with self.excluded():
            mesh, ema = weights_here(self._mesh, state.ema)
            if self._writer is None:
                return
            images = draw_images(self._config, mesh, ema, self._config.seed, self._config.train.preview_images)
            save_grid(self._workdir / "samples" / f"{step:08d}.png", images)

    def _diverged(self, step: int, loss: float, grad_norm: float) -> str:
        self._checkpoints.wait()
        newest = newest_step(self._workdir)
        folder = self._workdir / "checkpoints"
        good = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is {folder / str(newest)}"
        count = self._skipped_in_a_row
        times = f", the {count}th step in a row to be skipped" if self._config.train.non_finite == "skip" else ""
        what = f"the loss is {loss}, the gradient's norm {grad_norm},"
        advice = "try a lower optim.learning-rate or a longer optim.warmup-steps in another --workdir"
        return f"{what} at step {step}{times}; {good}; {advice}"


def _facts(config: Config, image_set: ImageSet, workdir: Path) -> dict[str, Any]:
    """What must be the same in all processes."""
    settings = {name: value for name, value in flatten(config).items() if name != "data.num_workers"}
    images = {"images": len(image_set.images), "image shape": image_set.image_shape, "checkpoint": newest_step(workdir)}
    return images | settings


def _introduce(config: Config, image_set: ImageSet, state: TrainState, mesh: Mesh) -> None:
    count, (height, width, channels) = len(image_set.images), image_set.image_shape
    logger.info(
        "%s: %d images of %dx%dx%d; network of %d parameters; %d %s device%s; the first step compiles",
        config.data.source, count, height, width, channels, num_params(state.params), mesh.size,
        mesh.devices.flat[0].platform, "s" if mesh.size > 1 else "",
    )  # fmt: skip
