"""One training step as a pure function: noise, loss, gradient, update, moving average (Algorithm 1 of Ho et al. 2020)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from ddpm_jax.config import Config
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.diffusion.losses import draw_timesteps, simple_loss
from ddpm_jax.diffusion.schedule import Schedule
from ddpm_jax.models import UNet, bind
from ddpm_jax.training.optimizer import make_learning_rate
from ddpm_jax.training.state import TrainState, ema_decay, ema_update


class Metrics(NamedTuple):
    """What a step tells about itself, or each of K steps."""

    loss: Float[Array, "*K"]
    grad_norm: Float[Array, "*K"]
    learning_rate: Float[Array, "*K"]


LABELS = 2**32 - 1  # folded into a step's key for its label dropout, so that its other keys don't depend on there being any

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
TrainSteps = Callable[[TrainState, Batch, Int[Array, ""]], tuple[TrainState, Metrics]]


def make_train_step(config: Config, schedule: Schedule, unet: UNet, optimizer: optax.GradientTransformation) -> TrainStep:
    """The pure function (state, batch) -> (state, metrics); its randomness is fold_in(seed, state.step)."""
    learning_rate = make_learning_rate(config.optim, config.train.num_steps)
    loss_and_grad = make_loss_and_grad(config, schedule, unet)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, grads = loss_and_grad(key, state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step, config.optim.ema_decay, config.optim.ema_warmup)
        ema = ema_update(state.ema, params, decay)
        metrics = Metrics(loss, optax.tree.norm(grads), jnp.asarray(learning_rate(state.step), jnp.float32))
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


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


def make_loss_and_grad(
    config: Config, schedule: Schedule, unet: UNet
) -> Callable[[Key[Array, ""], PyTree, Batch], tuple[Float[Array, ""], PyTree]]:
    """The function (key, params, batch) -> (loss, gradient): means over the batch, in optim.accumulate_steps parts."""
    parts = config.optim.accumulate_steps

    def loss_fn(params: PyTree, key: Key[Array, ""], images: Array, labels: Array | None, t: Array, eps: Array) -> Array:
        network_fn = bind(unet, params, labels, dropout_key=key)
        return jnp.mean(simple_loss(schedule, network_fn, images, t, eps, config.diffusion.prediction))

    def loss_and_grad(key: Key[Array, ""], params: PyTree, batch: Batch) -> tuple[Float[Array, ""], PyTree]:
        flip_key, t_key, eps_key, dropout_key = jax.random.split(key, 4)
        x0 = to_float(jnp.asarray(batch.images))
        if config.data.flip:
            x0 = random_flip(flip_key, x0)
        t = draw_timesteps(t_key, x0.shape[0], schedule.num_steps, config.diffusion.timesteps)
        eps = jax.random.normal(eps_key, x0.shape)
        labels = batch.labels
        if labels is not None and config.model.num_classes is not None and config.diffusion.label_dropout:
            key = jax.random.fold_in(key, LABELS)
            labels = drop_labels(key, jnp.asarray(labels), config.diffusion.label_dropout, config.model.num_classes)
        grad_fn = jax.value_and_grad(loss_fn)
        if parts == 1:
            return grad_fn(params, dropout_key, x0, labels, t, eps)
        pieces = jax.tree.map(lambda x: _split(x, parts), (x0, labels, t, eps))
        keys = jax.random.split(dropout_key, parts)

        def add(total: PyTree, piece: PyTree) -> tuple[PyTree, None]:
            part_key, arrays = piece
            return jax.tree.map(jnp.add, total, grad_fn(params, part_key, *arrays)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, (keys, pieces))
        return jax.tree.map(lambda x: x / parts, total)

    return loss_and_grad


def to_float(images: Shaped[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """uint8 [0, 255] as x / 127.5 - 1 in [-1, 1]; float32 as it is."""
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


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
