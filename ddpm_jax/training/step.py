"""One training step as a pure function: noise, loss, gradient, update, moving average (Algorithm 1 of Ho et al. 2020)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from ddpm_jax.config import Config
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.diffusion.losses import hybrid_loss, loss_weight, simple_loss, vlb_loss
from ddpm_jax.diffusion.process import NetworkFn
from ddpm_jax.diffusion.schedule import Schedule
from ddpm_jax.diffusion.timesteps import LossHistory, draw_by_loss, draw_timesteps, record_losses
from ddpm_jax.models import UNet, bind
from ddpm_jax.training.ema import ema_decay, ema_update, update_averages
from ddpm_jax.training.optimizer import make_learning_rate
from ddpm_jax.training.state import TrainState


class Metrics(NamedTuple):
    """What a step tells about itself, or each of K steps."""

    loss: Float[Array, "*K"]
    grad_norm: Float[Array, "*K"]
    learning_rate: Float[Array, "*K"]


LossFn = Callable[[NetworkFn, Float[Array, "B H W C"], Int[Array, " B"], Float[Array, "B H W C"]], Float[Array, " B"]]
LossAndGrad = Callable[..., tuple[Float[Array, ""], PyTree, LossHistory | None]]

LABELS = 2**32 - 1  # folded into a step's key for its label dropout, so that its other keys don't depend on there being any

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
TrainSteps = Callable[[TrainState, Batch, Int[Array, ""]], tuple[TrainState, Metrics]]


def make_train_step(config: Config, schedule: Schedule, unet: UNet, optimizer: optax.GradientTransformation) -> TrainStep:
    """The pure function (state, batch) -> (state, metrics); its randomness is fold_in(seed, state.step)."""
    learning_rate = make_learning_rate(config.optim, config.train.num_steps)
    loss_and_grad = make_loss_and_grad(config, schedule, unet)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(config.seed, state.step)
        loss, grads, history = loss_and_grad(key, state.params, batch, state.loss_history)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step, config.optim.ema_decay, config.optim.ema_warmup)
        ema = ema_update(state.ema, params, decay)
        averages = update_averages(state.averages, params, state.step, config.optim)
        metrics = Metrics(loss, optax.tree.norm(grads), jnp.asarray(learning_rate(state.step), jnp.float32))
        return TrainState(state.step + 1, params, ema, opt_state, history, averages), metrics

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


def make_loss_and_grad(config: Config, schedule: Schedule, unet: UNet) -> LossAndGrad:
    """The function (key, params, batch, loss history = None) -> (loss, gradient, loss history after the batch).

    Loss and gradient are means over the batch, in optim.accumulate_steps parts. Where there is a history, t is drawn by it.
    """
    parts = config.optim.accumulate_steps
    losses_of = make_loss(config, schedule)

    def loss_fn(
        params: PyTree, key: Key[Array, ""], images: Array, labels: Array | None, t: Array, eps: Array, share: Array | None
    ) -> tuple[Array, Array]:
        losses = losses_of(bind(unet, params, labels, dropout_key=key), images, t, eps)
        return jnp.mean(losses if share is None else share * losses), losses

    def loss_and_grad(
        key: Key[Array, ""], params: PyTree, batch: Batch, history: LossHistory | None = None
    ) -> tuple[Float[Array, ""], PyTree, LossHistory | None]:
        flip_key, t_key, eps_key, dropout_key = split_step_key(key)
        x0 = augment(config, flip_key, jnp.asarray(batch.images))
        if config.diffusion.timesteps == "importance":
            assert history is not None
            t, share = draw_by_loss(t_key, history, x0.shape[0])
        else:
            t, share = draw_timesteps(t_key, x0.shape[0], schedule.num_steps, config.diffusion.timesteps), None
        eps = jax.random.normal(eps_key, x0.shape)
        labels = batch.labels
        if labels is not None and config.model.num_classes is not None and config.diffusion.label_dropout:
            key = jax.random.fold_in(key, LABELS)
            labels = drop_labels(key, jnp.asarray(labels), config.diffusion.label_dropout, config.model.num_classes)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if parts == 1:
            (loss, losses), grads = grad_fn(params, dropout_key, x0, labels, t, eps, share)
            return loss, grads, None if history is None else record_losses(history, t, losses)
        pieces = jax.tree.map(lambda x: _split(x, parts), (x0, labels, t, eps, share))
        keys = jax.random.split(dropout_key, parts)

        def add(total: PyTree, piece: PyTree) -> tuple[PyTree, Array]:
            part_key, arrays = piece
            (loss, losses), grads = grad_fn(params, part_key, *arrays)
            return jax.tree.map(jnp.add, total, (loss, grads)), losses

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        total, losses = jax.lax.scan(add, zero, (keys, pieces))
        loss, grads = jax.tree.map(lambda x: x / parts, total)
        return loss, grads, None if history is None else record_losses(history, t, _join(losses))

    return loss_and_grad


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


def _split(x: Shaped[Array, "B *rest"], parts: int) -> Shaped[Array, "P N *rest"]:
    """[B] -> [parts, B / parts], every part with its share of each device's images."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(pieces: Shaped[Array, "P N *rest"]) -> Shaped[Array, "B *rest"]:
    """The inverse of _split."""
    return pieces.swapaxes(0, 1).reshape(-1, *pieces.shape[2:])
