"""Denoising diffusion probabilistic models in JAX: train, sample from, and evaluate them."""

from ddpm_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    load_config,
)
from ddpm_jax.diffusion.editing import image_to_image, inpaint, interpolate
from ddpm_jax.diffusion.guidance import classifier_free, classifier_guided
from ddpm_jax.diffusion.inversion import invert
from ddpm_jax.diffusion.likelihood import VariationalBound, bits_per_dim, ode_bits_per_dim, ode_log_likelihood
from ddpm_jax.diffusion.process import (
    Denoised,
    make_denoiser,
    p_sample,
    predict_eps,
    predict_v,
    predict_x0,
    q_posterior,
    q_sample,
)
from ddpm_jax.diffusion.samplers import SAMPLERS, Sampler, sample
from ddpm_jax.diffusion.schedule import Schedule, make_schedule, rescale_zero_terminal_snr, schedule_from_betas
from ddpm_jax.errors import InputError, NonFiniteLossError
from ddpm_jax.inference import Model, load
from ddpm_jax.models import UNet
from ddpm_jax.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS",
    "Config",
    "DataConfig",
    "Denoised",
    "DiffusionConfig",
    "InputError",
    "Model",
    "ModelConfig",
    "NonFiniteLossError",
    "OptimConfig",
    "SampleConfig",
    "Sampler",
    "Schedule",
    "TrainConfig",
    "UNet",
    "VariationalBound",
    "bits_per_dim",
    "classifier_free",
    "classifier_guided",
    "image_to_image",
    "inpaint",
    "interpolate",
    "invert",
    "load",
    "load_config",
    "make_denoiser",
    "make_schedule",
    "ode_bits_per_dim",
    "ode_log_likelihood",
    "p_sample",
    "predict_eps",
    "predict_v",
    "predict_x0",
    "q_posterior",
    "q_sample",
    "rescale_zero_terminal_snr",
    "sample",
    "schedule_from_betas",
    "train",
]
