"""The diffusion process of diffusers: what a scheduler's config says in terms of ours, and ours in its.

Differs from it: our betas are given for T = 1000 and scaled by 1000 / T, theirs are those of T.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_jax.config import Config
from ddpm_jax.diffusion.schedule import make_schedule
from ddpm_jax.errors import InputError
from ddpm_jax.interop.unet2d import check_whole, known_settings, refuse

logger = logging.getLogger("ddpm_jax")

DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "variance_type": None, "clip_sample": None, "prediction_type": "epsilon", "thresholding": False,
    "dynamic_thresholding_ratio": 0.995, "clip_sample_range": 1.0, "sample_max_value": 1.0, "timestep_spacing": None,
    "steps_offset": 0, "rescale_betas_zero_snr": False,
}  # fmt: skip
"""What a config that leaves a setting out means by it; None: that depends on the scheduler."""

SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {},
    "DDIMScheduler": {"set_alpha_to_one": (True,)},
    "DPMSolverMultistepScheduler": {
        "solver_order": (2,), "algorithm_type": ("dpmsolver++",), "solver_type": ("midpoint",), "final_sigmas_type": ("zero",),
        "lower_order_final": (True, False), "flow_shift": (1.0, None), "time_shift_type": ("exponential", None),
        "lambda_min_clipped": (-np.inf,),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,), "predict_x0": (True,), "solver_type": ("bh2",), "final_sigmas_type": ("zero",),
        "lower_order_final": (True, False), "disable_corrector": ([],), "flow_shift": (1.0, None),
        "time_shift_type": ("exponential", None),
    },
}  # fmt: skip
"""The settings that only one scheduler has, and their values that have a counterpart here."""

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = {"linspace": "uniform", "leading": "uniform", "trailing": "trailing"}

NO_LIMIT = 1e6
"""A sample_max_value that no x0 reaches: ours has no such limit."""
MAX_STEPS = 1_000_000
"""More than any process has; what memory and time would be taken for is known before."""
DIGITS = 12
"""Of betas that are scaled: the rounding of the division doesn't stay."""


def read_scheduler_config(given: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """The fields of our config, by dotted name, that describe the process of a scheduler's config.

    Raises:
        InputError: a setting without a counterpart here.
    """
    kind = given.get("_class_name")
    if kind not in SAMPLERS:
        refuse(source, "_class_name", kind, f"only {', '.join(SAMPLERS)} can")
    for name, allowed in ONLY[kind].items():
        if name in given and given[name] not in allowed:
            refuse(source, name, given[name], f"only {' and '.join(map(str, allowed))} can")
    s = known_settings(given, DEFAULTS, ONLY[kind], source)
    for name, known in {"prediction_type": PREDICTIONS, "variance_type": VARIANCES, "timestep_spacing": SPACINGS}.items():
        if s[name] not in known and not (s[name] is None and DEFAULTS[name] is None):
            refuse(source, name, s[name], f"only {', '.join(known)} can")
    if s["timestep_spacing"] in (None, "leading"):
        logger.info("%s: timestep_spacing leading is taken as uniform, which includes the last step", source)
    sampler = SAMPLERS[kind]
    variance = VARIANCES.get(s["variance_type"], "fixed_small" if sampler == "ddpm" else "fixed_large")
    return {
        **_read_schedule(s, source),
        "diffusion.zero_terminal_snr": bool(s["rescale_betas_zero_snr"]),
        "diffusion.prediction": PREDICTIONS[s["prediction_type"]],
        "diffusion.variance": variance,
        "diffusion.loss": "hybrid" if variance == "learned_range" else "simple",
        "sample.sampler": sampler,
        "sample.num_steps": None if sampler == "ddpm" else min(50, s["num_train_timesteps"]),
        "sample.spacing": SPACINGS.get(s["timestep_spacing"], "uniform"),
        "sample.threshold": _read_threshold(s, sampler in ("ddpm", "ddim"), source),
    }


def write_scheduler_config(config: Config) -> dict[str, Any]:
    """The config of the DDPMScheduler that is a config's process."""
    d, dynamic = config.diffusion, config.sample.threshold == "dynamic"
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    scale = 1000 / d.num_steps if d.schedule in ("linear", "scaled_linear") else 1.0
    betas = None
    if d.schedule not in names:
        betas = [float(beta) for beta in np.asarray(make_schedule(d.schedule, d.num_steps).beta)]
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.38.0",
        "num_train_timesteps": d.num_steps,
        "beta_start": round(scale * d.beta_start, DIGITS),
        "beta_end": round(scale * d.beta_end, DIGITS),
        "beta_schedule": names.get(d.schedule, "linear"),
        "trained_betas": betas,
        "variance_type": d.variance,
        "clip_sample": config.sample.threshold == "static",
        "clip_sample_range": 1.0,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[d.prediction],
        "thresholding": dynamic,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": NO_LIMIT if dynamic else 1.0,
        "timestep_spacing": "trailing" if config.sample.spacing == "trailing" else "linspace",
        "steps_offset": 0,
        "rescale_betas_zero_snr": d.zero_terminal_snr,
    }


def _read_schedule(s: Mapping[str, Any], source: Any) -> dict[str, Any]:
    steps = check_whole(s["num_train_timesteps"], "num_train_timesteps", source, MAX_STEPS)
    if s["trained_betas"] is not None:
        return {"diffusion.schedule": _find_schedule(s["trained_betas"], steps, source), "diffusion.num_steps": steps}
    if s["beta_schedule"] not in SCHEDULES:
        refuse(source, "beta_schedule", s["beta_schedule"], f"only {', '.join(SCHEDULES)} can")
    values = {"diffusion.schedule": SCHEDULES[s["beta_schedule"]], "diffusion.num_steps": steps}
    if s["beta_schedule"] == "squaredcos_cap_v2":
        return values
    for name in ("beta_start", "beta_end"):
        if not isinstance(s[name], float):
            refuse(source, name, s[name], "it must be a number between 0 and 1")
        values[f"diffusion.{name}"] = round(s[name] * steps / 1000, DIGITS)
    return values


def _find_schedule(betas: Any, num_steps: int, source: Any) -> str:
    """The name of the schedule that has these betas, which are written out where diffusers has no name for them."""
    try:
        numbers = np.asarray(betas, np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    for kind in ("sigmoid", "linear", "cosine"):
        try:
            known = np.asarray(make_schedule(kind, num_steps).beta)
        except ValueError:  # too few steps for the betas of the linear schedule
            continue
        if numbers.shape == known.shape and np.allclose(numbers, known, rtol=1e-5, atol=0):
            return kind
    raise InputError(f"{source}: trained_betas can't be represented: they are those of no schedule known here")


def _read_threshold(s: Mapping[str, Any], clips: bool, source: Any) -> str:
    if s["thresholding"]:
        limit = s["sample_max_value"]
        if not isinstance(limit, int | float) or 1 < limit < NO_LIMIT:
            refuse(source, "sample_max_value", limit, f"only 1, or {NO_LIMIT:g} and more, which is no limit")
        if limit > 1 and s["dynamic_thresholding_ratio"] != DEFAULTS["dynamic_thresholding_ratio"]:
            refuse(source, "dynamic_thresholding_ratio", s["dynamic_thresholding_ratio"], "only 0.995 can")
        return "dynamic" if limit > 1 else "static"
    if not (clips if s["clip_sample"] is None else s["clip_sample"]):
        return "none"
    if s["clip_sample_range"] != 1:
        refuse(source, "clip_sample_range", s["clip_sample_range"], "images lie in [-1, 1]")
    return "static"
