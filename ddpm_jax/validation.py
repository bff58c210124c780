"""The rules that a config keeps, beyond the types of its fields."""

import math
from typing import TYPE_CHECKING, Any

from ddpm_jax.diffusion.samplers import find_sampler
from ddpm_jax.diffusion.schedule import Schedule, make_schedule, spaced_timesteps
from ddpm_jax.errors import InputError

if TYPE_CHECKING:
    from ddpm_jax.config import Config


def config_schedule(config: "Config") -> Schedule:
    """The noise schedule of a config. Raises InputError where its betas leave (0, 1)."""
    d = config.diffusion
    betas = {"beta_start": d.beta_start, "beta_end": d.beta_end} if d.schedule in ("linear", "scaled_linear") else {}
    try:
        return make_schedule(d.schedule, d.num_steps, **betas)
    except ValueError as error:
        raise InputError(f"diffusion: {error}") from error


def validate(config: "Config") -> None:
    """Raise InputError with one line on the first value that is out of range."""
    d, m, o, t, s = config.diffusion, config.model, config.optim, config.train, config.sample
    positive = {
        "diffusion.num_steps": d.num_steps,
        "model.num_res_blocks": m.num_res_blocks,
        "model.num_groups": m.num_groups,
        "model.space_to_depth": m.space_to_depth,
        "optim.learning_rate": o.learning_rate,
        "optim.eps": o.eps,
        "optim.accumulate_steps": o.accumulate_steps,
        "train.batch_size": t.batch_size,
        "train.num_steps": t.num_steps,
        "train.steps_per_dispatch": t.steps_per_dispatch,
        "train.log_every_steps": t.log_every_steps,
        "train.checkpoint_every_steps": t.checkpoint_every_steps,
        "train.keep_last": t.keep_last,
        "train.preview_images": t.preview_images,
        "sample.batch_size": s.batch_size,
    }
    optional = {
        "model.num_classes": m.num_classes,
        "optim.clip_norm": o.clip_norm,
        "train.keep_every_steps": t.keep_every_steps,
        "train.preview_every_steps": t.preview_every_steps,
    }
    positive |= {name: value for name, value in optional.items() if value is not None}
    for name, value in positive.items():
        _require(value > 0, name, value, "must be greater than 0")
    for name, value in {"optim.warmup_steps": o.warmup_steps, "optim.weight_decay": o.weight_decay, "seed": config.seed,
                        "data.device_megabytes": config.data.device_megabytes}.items():  # fmt: skip
        _require(value >= 0, name, value, "must be 0 or more")
    for name, value in {"model.dropout": m.dropout, "optim.b1": o.b1, "optim.b2": o.b2, "optim.ema_decay": o.ema_decay}.items():
        _require(0 <= value < 1, name, value, "must lie in [0, 1)")
    _require(0 <= s.eta <= 1, "sample.eta", s.eta, "must lie in [0, 1]")
    _require(m.channels >= 4, "model.channels", m.channels, "must be 4 or more")
    _require(bool(m.multipliers) and min(m.multipliers) > 0, "model.multipliers", m.multipliers, "must be numbers above 0")
    _require(t.batch_size % o.accumulate_steps == 0, "train.batch_size", t.batch_size,
             f"must be a multiple of optim.accumulate_steps = {o.accumulate_steps}")  # fmt: skip
    _require(config.seed < 2**32, "seed", config.seed, "must be below 2^32")
    _require(o.optimizer == "adamw" or o.weight_decay == 0, "optim.weight_decay", o.weight_decay, "adam has none, use adamw")
    for name in ("learning_rate", "eps", "weight_decay"):
        _require(math.isfinite(getattr(o, name)), f"optim.{name}", getattr(o, name), "must be finite")
    for name, value in {"diffusion.beta_start": d.beta_start, "diffusion.beta_end": d.beta_end}.items():
        _require(0 < value < 1, name, value, "must lie in (0, 1)")
    schedule = config_schedule(config)
    try:
        find_sampler(s.sampler)
    except ValueError as error:
        raise InputError(f"sample.sampler: {error}") from error
    try:
        spaced_timesteps(d.num_steps if s.num_steps is None else s.num_steps, d.num_steps, s.spacing, schedule.log_snr)
    except ValueError as error:
        raise InputError(f"sample.num_steps: {error}") from error


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise InputError(f"{name} = {value}: {rule}")
