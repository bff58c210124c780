"""One training step as a pure function: noise, loss, gradient, update, moving average (Algorithm 1 of Ho et al. 2020).

All that is random is a function of the step and of the position in the global batch. Each device draws for its own images,
works out its share of the loss and of the gradient with whole weights, which it gathers from the pieces of "fsdp" as they are
needed, and updates its pieces of the state. Devices are heard of once in a step: in the sum of the gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from ddpm_jax.config import Config
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.diffusion.losses import hybrid_loss, loss_weight, simple_loss, vlb_loss
from ddpm_jax.diffusion.process import NetworkFn
from ddpm_jax.diffusion.schedule import Schedule
from ddpm_jax.diffusion.timesteps import LossHistory, draw_by_loss, draw_timesteps, record_losses
from ddpm_jax.models import UNet, bind, count_parts
from ddpm_jax.parallel import (
    BATCH_AXES,
    batch_sharding,
    free_gathered,
    gather,
    on_each_device,
    reduce_gradients,
    replicated,
    split_specs,
    sum_over,
    tree_norm,
)
from ddpm_jax.training.ema import ema_decay, ema_update, update_averages
from ddpm_jax.training.optimizer import make_learning_rate
from ddpm_jax.training.state import TrainState


class Metrics(NamedTuple):
    """What a step tells about itself, or each of K steps."""

    loss: Float[Array, "*K"]
    grad_norm: Float[Array, "*K"]
    learning_rate: Float[Array, "*K"]
    """Of this step, were no update before it skipped."""
    skipped: Float[Array, "*K"]
    """1 where loss or gradient were not finite and the update was left out, otherwise 0."""


class Examples(NamedTuple):
    """What a step learns from, and all that is random in it but dropout; the rows are those of the batch, or of a part."""

    x0: Float[Array, "*B H W C"]
    labels: Int[Array, "*B"] | None
    t: Int[Array, "*B"]
    eps: Float[Array, "*B H W C"]
    weight: Float[Array, "*B"] | None
    """Of each loss, where t is drawn by importance."""
    rows: Int[Array, "*B"]
    """Numbers of the images in the batch, by which dropout tells them apart."""


LossFn = Callable[[NetworkFn, Float[Array, "B H W C"], Int[Array, " B"], Float[Array, "B H W C"]], Float[Array, " B"]]
LossAndGrad = Callable[..., tuple[Float[Array, ""], PyTree, LossHistory | None]]

LABELS = 2**32 - 1  # folded into a step's key for its label dropout, so that its other keys don't depend on there being any

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
TrainSteps = Callable[[TrainState, Batch, Int[Array, ""]], tuple[TrainState, Metrics]]


def make_train_step(
    config: Config, schedule: Schedule, unet: UNet, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> TrainStep:
    """The pure function (state, batch) -> (state, metrics); its randomness is fold_in(seed, state.step).

    With train.non_finite = "skip", a loss or gradient that is NaN or infinite leaves all of the state but the step as it was.
    """
    learning_rate = make_learning_rate(config.optim, config.train.num_steps)
    loss_and_grad = make_loss_and_grad(config, schedule, unet, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(config.seed, state.step)
        loss, grads, history = loss_and_grad(key, state.params, batch, state.loss_history)
        norm = tree_norm(mesh, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, norm=norm)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step, config.optim.ema_decay, config.optim.ema_warmup)
        ema = ema_update(state.ema, params, decay)
        averages = update_averages(state.averages, params, state.step, config.optim)
        new, skipped = TrainState(state.step + 1, params, ema, opt_state, history, averages), jnp.zeros(())
        if config.train.non_finite == "skip":
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
            new, skipped = kept._replace(step=state.step + 1), 1.0 - finite
        return new, Metrics(loss, norm, jnp.asarray(learning_rate(state.step), jnp.float32), skipped)

    return train_step


def step_key(seed: int, step: Int[Array, ""] | int) -> Key[Array, ""]:
    """The key that all randomness of a training step comes from."""
    return jax.random.fold_in(jax.random.key(seed), step)


class StepKeys(NamedTuple):
    """The keys of a step, each for one purpose."""

    flip: Key[Array, ""]
    t: Key[Array, ""]
    eps: Key[Array, ""]
    dropout: Key[Array, ""]


def split_step_key(key: Key[Array, ""]) -> StepKeys:
    """The keys that the key of a step splits into."""
    return StepKeys(*jax.random.split(key, len(StepKeys._fields)))


def make_train_steps(train_step: TrainStep, max_count: int) -> TrainSteps:
    """The function (state, batches [K, B, ...], count) -> (state, metrics [K]) that makes the first count <= K steps.

    One loop for any count, so that the numbers don't depend on where a run is interrupted. K = 1 needs none, and no count.
    """

    def train_steps(state: TrainState, batches: Batch, count: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        def body(i: Array | int, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = train_step(carry[0], jax.tree.map(lambda x: x[i], batches))
            return state, jax.tree.map(lambda all_steps, one: all_steps.at[i].set(one), carry[1], metrics)

        empty = Metrics(*jnp.zeros((len(Metrics._fields), max_count)))
        return body(0, (state, empty)) if max_count == 1 else jax.lax.fori_loop(0, count, body, (state, empty))

    return train_steps


def make_loss_and_grad(config: Config, schedule: Schedule, unet: UNet, mesh: Mesh) -> LossAndGrad:
    """The function (key, params, batch, loss history = None) -> (loss, gradient, loss history after the batch).

    Loss and gradient are means over the batch, in optim.accumulate_steps parts, on a CPU each in further ones, float32 and
    summed between devices as such whatever the network's compute dtype. The gradient is split as the weights are. Where there
    is a history, t is drawn by it.
    """
    rows = PartitionSpec(BATCH_AXES)

    def loss_and_grad(
        key: Key[Array, ""], params: PyTree, batch: Batch, history: LossHistory | None = None
    ) -> tuple[Float[Array, ""], PyTree, LossHistory | None]:
        examples = draw_examples(config, schedule, key, batch, history)
        examples = jax.lax.with_sharding_constraint(examples, batch_sharding(mesh))
        specs = split_specs(mesh, params)
        of_device = _make_device_gradient(config, schedule, unet, params, specs, len(batch.images))
        arguments, results = (PartitionSpec(), specs, rows), (PartitionSpec(), specs, rows)
        loss, grads, losses = on_each_device(mesh, of_device, arguments, results)(split_step_key(key).dropout, params, examples)
        if history is not None:
            t, losses = jax.lax.with_sharding_constraint((examples.t, losses), replicated(mesh))
            history = record_losses(history, t, losses)
        return loss, grads, history

    return loss_and_grad


def _make_device_gradient(
    config: Config, schedule: Schedule, unet: UNet, params: PyTree, specs: PyTree, batch_size: int
) -> Callable[..., Any]:
    """What each device does: (dropout key, its pieces of the weights, its examples) -> (loss, its pieces of the gradient,
    loss of each of its images); loss and gradient are those of the whole batch.
    """
    accumulated = config.optim.accumulate_steps
    losses_of = make_loss(config, schedule)

    def loss_fn(pieces: PyTree, key: Key[Array, ""], examples: Examples) -> tuple[Array, Array]:
        x0, labels, t, eps, weight, rows = examples
        losses = losses_of(bind(unet, gather(pieces, specs), labels, key, rows), x0, t, eps)
        return jnp.sum(losses if weight is None else weight * losses) / batch_size, losses

    grad_fn = jax.value_and_grad(free_gathered(loss_fn, params, specs), has_aux=True)

    def of_device(key: Key[Array, ""], pieces: PyTree, examples: Examples) -> tuple[Array, PyTree, Array]:
        images = examples.x0
        parts = accumulated * count_parts(config.model, params, images.shape[1:], len(images) // accumulated)
        if parts == 1:
            (loss, losses), grads = grad_fn(pieces, key, examples)
        else:

            def add(total: PyTree, part: Examples) -> tuple[PyTree, Array]:
                (loss, losses), grads = grad_fn(pieces, key, part)
                return jax.tree.map(jnp.add, total, (loss, grads)), losses

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, pieces))
            examples = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), examples)
            (loss, grads), losses = jax.lax.scan(add, zero, examples)
            losses = losses.reshape(-1)
        return sum_over(BATCH_AXES, loss), reduce_gradients(grads, specs), losses

    return of_device


def draw_examples(
    config: Config, schedule: Schedule, key: Key[Array, ""], batch: Batch, history: LossHistory | None = None
) -> Examples:
    """What a step with this key learns from; each row by its position in the batch, so that a device draws its own alone."""
    keys, size = split_step_key(key), len(batch.images)
    x0 = augment(config, keys.flip, jnp.asarray(batch.images))
    if config.diffusion.timesteps == "importance":
        assert history is not None
        t, weight = draw_by_loss(keys.t, history, size)
    else:
        t, weight = draw_timesteps(keys.t, size, schedule.num_steps, config.diffusion.timesteps), None
    eps = jax.random.normal(keys.eps, x0.shape)
    labels = None if batch.labels is None else jnp.asarray(batch.labels)
    if labels is not None and config.model.num_classes is not None and config.diffusion.label_dropout:
        labels = drop_labels(jax.random.fold_in(key, LABELS), labels, config.diffusion.label_dropout, config.model.num_classes)
    return Examples(x0, labels, t, eps, weight, jnp.arange(size))


def make_loss(config: Config, schedule: Schedule) -> LossFn:
    """The function (network function, x0, t, eps) -> loss of each image, as config.diffusion says."""
    d = config.diffusion
    if d.loss == "vlb":
        return lambda network_fn, x0, t, eps: vlb_loss(schedule, network_fn, x0, t, eps, d.prediction, d.variance)
    weight = None if d.loss_weight == "constant" else loss_weight(schedule, d.loss_weight, d.prediction, d.min_snr_gamma)
    loss = hybrid_loss if d.loss == "hybrid" else simple_loss
    return lambda network_fn, x0, t, eps: loss(schedule, network_fn, x0, t, eps, d.prediction, weight)


def to_float(images: Shaped[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """uint8 [0, 255] as x / 127.5 - 1 in [-1, 1]; float32 as it is."""
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def augment(config: Config, key: Key[Array, ""], images: Shaped[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """The images as the network sees them, before noise: in [-1, 1], mirrored by the step's flip key if data.flip says so."""
    x0 = to_float(images)
    return random_flip(key, x0) if config.data.flip else x0


def random_flip(key: Key[Array, ""], images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, 0.5, images.shape[:1])[:, None, None, None]
    return jnp.where(mirrored, images[:, :, ::-1], images)


def drop_labels(key: Key[Array, ""], labels: Int[Array, " B"], rate: float, num_classes: int) -> Int[Array, " B"]:
    """Each label replaced by num_classes, the open class, with probability `rate`: Algorithm 1 of Ho & Salimans (2022)."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), num_classes, labels)
