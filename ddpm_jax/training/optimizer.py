"""The optimiser: learning rate schedule, global-norm clipping, Adam."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ddpm_jax.config import OptimConfig


def make_learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0, then constant, or a half cosine that reaches 0 at num_steps."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, num_steps - config.warmup_steps))
    else:
        after = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Clip the gradient's global norm, then Adam (or AdamW), as Ho et al. (2020), appendix B."""
    learning_rate = make_learning_rate(config, num_steps)
    if config.optimizer == "adamw":
        adam = optax.adamw(learning_rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    else:
        adam = optax.adam(learning_rate, config.b1, config.b2, config.eps)
    clip = optax.identity() if config.clip_norm is None else clip_by_norm(config.clip_norm)
    return optax.chain(clip, adam)


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scale a gradient g whose norm exceeds max_norm down to it: g max_norm / |g|.

    The norm may be given, `update(..., norm=norm)`, where it is known already.
    """

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None, *, norm: Float[Array, ""] | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        norm = optax.tree.norm(grads) if norm is None else norm
        factor = jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
