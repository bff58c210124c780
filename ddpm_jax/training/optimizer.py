"""The optimiser: learning rate schedule, global-norm clipping, Adam."""

import optax

from ddpm_jax.config import OptimConfig


def make_learning_rate(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0, then constant, or a half cosine that reaches 0 at num_steps."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, num_steps - config.warmup_steps))
    else:
        after = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip the gradient's global norm, then Adam (or AdamW), as Ho et al. (2020), appendix B."""
    learning_rate = make_learning_rate(config, num_steps)
    if config.optimizer == "adamw":
        adam = optax.adamw(learning_rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    else:
        adam = optax.adam(learning_rate, config.b1, config.b2, config.eps)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, adam)
