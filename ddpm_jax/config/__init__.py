"""The configuration of a run."""

from ddpm_jax.config.fields import (
    Config,
    DataConfig,
    DiffusionConfig,
    Framing,
    ModelConfig,
    ModelStyle,
    OptimConfig,
    SampleConfig,
    Threshold,
    TrainConfig,
)
from ddpm_jax.config.values import HARMLESS, differences, flatten, from_json, load_config, override, to_json, unknown_name

__all__ = [
    "HARMLESS",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "Framing",
    "ModelConfig",
    "ModelStyle",
    "OptimConfig",
    "SampleConfig",
    "Threshold",
    "TrainConfig",
    "differences",
    "flatten",
    "from_json",
    "load_config",
    "override",
    "to_json",
    "unknown_name",
]
