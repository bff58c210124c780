"""The rules that a config keeps, beyond the types of its fields."""

import math
from typing import TYPE_CHECKING, Any

from ddpm_jax.diffusion.samplers import find_sampler
from ddpm_jax.diffusion.schedule import Schedule, make_schedule, rescale_zero_terminal_snr, spaced_timesteps
from ddpm_jax.errors import InputError

if TYPE_CHECKING:
    from ddpm_jax.config import Config, DiffusionConfig


def config_schedule(config: "Config") -> Schedule:
    """The noise schedule of a config. Raises InputError where its betas leave (0, 1)."""
    d = config.diffusion
    betas = {"beta_start": d.beta_start, "beta_end": d.beta_end} if d.schedule in ("linear", "scaled_linear") else {}
    try:
        schedule = make_schedule(d.schedule, d.num_steps, **betas)
        return rescale_zero_terminal_snr(schedule) if d.zero_terminal_snr else schedule
    except ValueError as error:
        raise InputError(f"diffusion: {error}") from error


def validate(config: "Config") -> None:
    """Raise InputError with one line on the first value that is out of range."""
    d, m, o, t, s = config.diffusion, config.model, config.optim, config.train, config.sample
    positive = {
        "diffusion.num_steps": d.num_steps,
        "diffusion.min_snr_gamma": d.min_snr_gamma,
        "model.num_res_blocks": m.num_res_blocks,
        "model.num_groups": m.num_groups,
        "model.num_heads": m.num_heads,
        "model.space_to_depth": m.space_to_depth,
        "optim.learning_rate": o.learning_rate,
        "optim.eps": o.eps,
        "optim.accumulate_steps": o.accumulate_steps,
        "train.batch_size": t.batch_size,
        "train.num_steps": t.num_steps,
        "train.fsdp": t.fsdp,
        "train.storage_timeout": t.storage_timeout,
        "train.steps_per_dispatch": t.steps_per_dispatch,
        "train.log_every_steps": t.log_every_steps,
        "train.checkpoint_every_steps": t.checkpoint_every_steps,
        "train.keep_last": t.keep_last,
        "train.preview_images": t.preview_images,
        "train.evaluate_images": t.evaluate_images,
        "train.evaluate_reference_images": t.evaluate_reference_images,
        "sample.batch_size": s.batch_size,
        "data.num_workers": config.data.num_workers,
    }
    optional = {
        "model.num_classes": m.num_classes,
        "model.head_channels": m.head_channels,
        "model.norm_eps": m.norm_eps,
        "optim.clip_norm": o.clip_norm,
        "train.keep_every_steps": t.keep_every_steps,
        "train.preview_every_steps": t.preview_every_steps,
        "train.evaluate_every_steps": t.evaluate_every_steps,
        "train.snapshot_every_steps": t.snapshot_every_steps,
    }
    positive |= {name: value for name, value in optional.items() if value is not None}
    for name, value in positive.items():
        _require(value > 0, name, value, "must be greater than 0")
    for name, value in {"optim.warmup_steps": o.warmup_steps, "optim.weight_decay": o.weight_decay, "seed": config.seed,
                        "data.device_megabytes": config.data.device_megabytes}.items():  # fmt: skip
        _require(value >= 0, name, value, "must be 0 or more")
    for name, value in {"model.dropout": m.dropout, "optim.b1": o.b1, "optim.b2": o.b2, "optim.ema_decay": o.ema_decay,
                        "diffusion.label_dropout": d.label_dropout}.items():  # fmt: skip
        _require(0 <= value < 1, name, value, "must lie in [0, 1)")
    _require(all(0 <= decay < 1 for decay in o.ema_decays), "optim.ema_decays", o.ema_decays, "all must lie in [0, 1)")
    _require(all(0 < length <= 12**-0.5 for length in o.ema_lengths), "optim.ema_lengths", o.ema_lengths,
             "all must lie in (0, 0.2886], the longest being a plain mean")  # fmt: skip
    for name, values in {"optim.ema_decays": o.ema_decays, "optim.ema_lengths": o.ema_lengths}.items():
        _require(len(set(values)) == len(values), name, values, "each value only once")
    _require(0 <= config.data.max_unusable < 1, "data.max_unusable", config.data.max_unusable, "must lie in [0, 1)")
    shape = config.data.image_shape
    _require(shape is None or min(shape) > 0, "data.image_shape", shape, "must be numbers above 0")
    _require(0 <= s.eta <= 1, "sample.eta", s.eta, "must lie in [0, 1]")
    _require(m.channels >= 4, "model.channels", m.channels, "must be 4 or more")
    _require(0 <= (m.frequency_shift or 0) < m.channels // 2, "model.frequency_shift", m.frequency_shift,
             f"must lie in 0 ... {m.channels // 2 - 1}, below half of model.channels")  # fmt: skip
    _require(m.head_channels is None or m.num_heads == 1, "model.num_heads", m.num_heads,
             f"follows from model.head_channels = {m.head_channels}: leave it at 1")  # fmt: skip
    _require(bool(m.multipliers) and min(m.multipliers) > 0, "model.multipliers", m.multipliers, "must be numbers above 0")
    _require(all(m.channels * multiplier % m.num_heads == 0 for multiplier in m.multipliers), "model.num_heads", m.num_heads,
             f"must divide the channels of every level, model.channels = {m.channels} times {list(m.multipliers)}")  # fmt: skip
    _require(t.batch_size % o.accumulate_steps == 0, "train.batch_size", t.batch_size,
             f"must be a multiple of optim.accumulate_steps = {o.accumulate_steps}")  # fmt: skip
    _require(config.seed < 2**32, "seed", config.seed, "must be below 2^32")
    _require(o.optimizer == "adamw" or o.weight_decay == 0, "optim.weight_decay", o.weight_decay, "adam has none, use adamw")
    _require(math.isfinite(m.norm_eps or 0.0), "model.norm_eps", m.norm_eps, "must be finite")
    for name in ("learning_rate", "eps", "weight_decay"):
        _require(math.isfinite(getattr(o, name)), f"optim.{name}", getattr(o, name), "must be finite")
    for name, value in {"diffusion.beta_start": d.beta_start, "diffusion.beta_end": d.beta_end}.items():
        _require(0 < value < 1, name, value, "must lie in (0, 1)")
    _check_objective(d)
    schedule = config_schedule(config)
    _validate_guidance(config)
    try:
        takes_eta = "eta" in find_sampler(s.sampler).options
    except ValueError as error:
        raise InputError(f"sample.sampler: {error}") from error
    _require(takes_eta or s.eta == 0, "sample.eta", s.eta, f"sampler {s.sampler} has no such option: use ddim, or eta = 0")
    try:
        spaced_timesteps(d.num_steps if s.num_steps is None else s.num_steps, d.num_steps, s.spacing, schedule.log_snr)
    except ValueError as error:
        raise InputError(f"sample.num_steps: {error}") from error


def _check_objective(d: "DiffusionConfig") -> None:
    """Raise InputError where prediction, variance, loss, weight and schedule don't go together."""
    learned = d.variance == "learned_range"
    _require(not learned or d.loss != "simple", "diffusion.loss", d.loss,
             "trains no variance, so diffusion.variance = learned_range needs hybrid or vlb")  # fmt: skip
    _require(learned or d.loss != "hybrid", "diffusion.loss", d.loss,
             f"its bound trains the variance alone, and diffusion.variance = {d.variance} has none to train: use simple or vlb,"
             " or learned_range")  # fmt: skip
    _require(d.loss != "vlb" or d.loss_weight == "constant", "diffusion.loss_weight", d.loss_weight,
             "the bound has weights of its own, so diffusion.loss = vlb needs constant")  # fmt: skip
    if d.zero_terminal_snr:
        _require(d.prediction != "eps", "diffusion.prediction", d.prediction,
                 "tells nothing of x0 where diffusion.zero_terminal_snr leaves nothing but noise: use v or x0")  # fmt: skip
        _require(d.loss_weight != "min_snr", "diffusion.loss_weight", d.loss_weight,
                 "gives no weight to the step that diffusion.zero_terminal_snr leaves without signal: use another")  # fmt: skip


def _validate_guidance(config: "Config") -> None:
    s = config.sample
    _require(math.isfinite(s.guidance) and s.guidance >= 0, "sample.guidance", s.guidance, "must be 0 or more, and finite")
    _require(0 <= s.guidance_rescale <= 1, "sample.guidance_rescale", s.guidance_rescale, "must lie in [0, 1]")
    low, high = s.guidance_interval or (0.0, math.inf)
    _require(0 <= low < high, "sample.guidance_interval", s.guidance_interval, "needs 0 <= low < high")
    if s.guidance != 1:
        without = "must be 1, since the network was trained without classes (model.num_classes)"
        _require(config.model.num_classes is not None, "sample.guidance", s.guidance, without)
        no_null = "must be 1, since the network was trained with no class left open (diffusion.label_dropout)"
        _require(config.diffusion.label_dropout > 0, "sample.guidance", s.guidance, no_null)


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise InputError(f"{name} = {value}: {rule}")
