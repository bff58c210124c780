"""Everything that training changes, in one visible structure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ddpm_jax.config import Config
from ddpm_jax.diffusion.timesteps import LossHistory, empty_history
from ddpm_jax.models import UNet, init_params


class TrainState(NamedTuple):
    """The state of a run; with the config and the data it determines everything that follows."""

    step: Int[Array, ""]
    """Updates made so far; also the position in the data and in the random numbers."""
    params: PyTree
    """Weights of the network, float32."""
    ema: PyTree
    """Moving average of the weights, float32."""
    opt_state: PyTree
    """State of the optimiser."""
    loss_history: LossHistory | None = None
    """The last losses of each timestep, for diffusion.timesteps = "importance"."""


def init_state(config: Config, unet: UNet, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the moving average starts as a copy of the weights."""
    assert config.data.image_shape is not None
    params = init_params(unet, config.seed, config.data.image_shape)
    by_loss = config.diffusion.timesteps == "importance"
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        loss_history=empty_history(config.diffusion.num_steps) if by_loss else None,
    )


def ema_decay(step: Int[Array, ""], decay: float, warmup: bool) -> Float[Array, ""]:
    """Decay of the average's update number n = step (from 0): min(decay, (1 + n) / (10 + n)) with warm-up."""
    limit = jnp.float32(decay)
    if not warmup:
        return limit
    n = step.astype(jnp.float32)
    return jnp.minimum(limit, (1.0 + n) / (10.0 + n))


def ema_update(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    """decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda average, value: average + (1.0 - decay) * (value - average), ema, params)
