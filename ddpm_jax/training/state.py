"""Everything that training changes, in one visible structure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from ddpm_jax.config import Config
from ddpm_jax.diffusion.timesteps import LossHistory, empty_history
from ddpm_jax.models import UNet, init_params
from ddpm_jax.parallel import replicated, split_sharding
from ddpm_jax.training.ema import average_names


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
    averages: dict[str, PyTree] = {}  # noqa: RUF012, nothing changes it in place
    """Further moving averages of the weights, float32, by the names of `average_names`."""


def init_state(config: Config, unet: UNet, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the moving averages start as copies of the weights."""
    assert config.data.image_shape is not None
    params = init_params(unet, config.seed, config.data.image_shape)
    by_loss = config.diffusion.timesteps == "importance"
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        loss_history=empty_history(config.diffusion.num_steps) if by_loss else None,
        averages={name: jax.tree.map(jnp.copy, params) for name in average_names(config.optim)},
    )


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """How the arrays of a state, or of its shapes, lie on the devices: weights, averages and the optimiser's state are split
    along "fsdp" by `split_sharding`, the step and the loss history are whole.
    """

    def split(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: split_sharding(mesh, leaf.shape), tree)

    whole = replicated(mesh)
    return TrainState(
        step=whole,  # type: ignore[arg-type]
        params=split(state.params),
        ema=split(state.ema),
        opt_state=split(state.opt_state),
        loss_history=jax.tree.map(lambda _: whole, state.loss_history),
        averages={name: split(average) for name, average in state.averages.items()},
    )
