"""Values of config fields: loaded from a Python file, overridden by dotted name, kept as JSON, compared."""

import dataclasses
import difflib
import runpy
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ddpm_jax.config.fields import Config, SampleConfig
from ddpm_jax.errors import InputError
from ddpm_jax.validation import validate

# Fields that may change between two starts of the same run: they decide what is written, not what is computed.
HARMLESS = (
    "train.num_steps",
    "train.fsdp",
    "train.non_finite",
    "train.storage_timeout",
    "train.steps_per_dispatch",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_last",
    "train.keep_every_steps",
    "train.snapshot_every_steps",
    "train.preview_every_steps",
    "train.preview_images",
    "train.evaluate_every_steps",
    "train.evaluate_metrics",
    "train.evaluate_images",
    "train.evaluate_reference_images",
    "data.max_unusable",
    "data.device_megabytes",
    "data.num_workers",
    *(f"sample.{field.name}" for field in dataclasses.fields(SampleConfig)),
)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The `config` of a Python file, with overrides such as {"train.num_steps": 500} applied.

    Raises:
        InputError: the file is missing or broken, exports no Config, or an override doesn't fit.
    """
    if not Path(path).is_file():
        raise InputError(f"no config file at {path}: give the path of one, such as configs/fashion_mnist.py")
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:  # a config file is a program; whatever is wrong with it is the user's to mend
        reason = str(error).partition("\n")[0]
        raise InputError(f"config file {path} does not run: {type(error).__name__}: {reason}") from error
    if not isinstance(config, Config):
        raise InputError(f"config file {path} exports no `config` of type ddpm_jax.Config")
    return override(config, flatten(config) | dict(overrides or {}))


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with fields replaced by dotted name, types checked, then validated.

    Raises:
        InputError: an unknown name (the nearest one is given), a value of the wrong type, or one out of range.
    """
    known = flatten(config)
    for name, value in values.items():
        if name not in known:
            raise InputError(unknown_name(name, known))
        room, _, field = name.rpartition(".")
        if not room:
            config = dataclasses.replace(config, **{field: _convert(name, value, int)})
            continue
        section = getattr(config, room)
        converted = _convert(name, value, get_type_hints(type(section))[field])
        config = dataclasses.replace(config, **{room: dataclasses.replace(section, **{field: converted})})
    validate(config)
    return config


def flatten(config: Config) -> dict[str, Any]:
    """{"data.source": ..., "seed": ...}: every field by its dotted name."""
    return dict(_flatten(dataclasses.asdict(config), ""))


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries of JSON values."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in flatten(config).items()}


def from_json(values: Any) -> Config:
    """The inverse of to_json; fields that are absent have their defaults, so that older runs stay readable."""
    if not isinstance(values, dict):
        raise InputError("a stored config must be a JSON object of dotted names")
    # Runs with classes that are older than label dropout were trained without it.
    older = {"diffusion.label_dropout": 0.0} if values.get("model.num_classes") is not None else {}
    return override(Config(), older | values)


def differences(old: Config, new: Config) -> list[str]:
    """One text for each field that differs and would change what a started run computes."""
    before, after = flatten(old), flatten(new)
    harmless = set(HARMLESS)
    if new.optim.decay == "cosine":
        harmless.remove("train.num_steps")  # the learning rate of every step depends on it
    if not (old.data.class_names and new.data.class_names):
        harmless.add("data.class_names")  # older runs have none; other names would be other classes
    changed = [name for name in before if before[name] != after[name] and name not in harmless]
    return [f"{name}: {before[name]} -> {after[name]}" for name in changed]


def unknown_name(name: str, known: Any, what: str = "config field") -> str:
    """The message for a name that no field or option has."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"unknown {what} {name!r}" + (f": did you mean {nearest[0]!r}?" if nearest else "")


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _convert(name: str, value: Any, hint: Any) -> Any:
    """The value as the type of a field; lists become tuples and whole numbers floats. Raises InputError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(name, value, arguments[0])
    if origin is Literal:
        if value in arguments:
            return value
        raise InputError(f"{name} = {value!r}: choose one of {', '.join(map(str, arguments))}")
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis or len(value) == len(arguments):
            return tuple(_convert(name, item, arguments[0]) for item in value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, bool) == (hint is bool) and isinstance(hint, type) and isinstance(value, hint):
        return value
    expected = hint.__name__ if origin is None else hint
    raise InputError(f"{name} = {value!r}: expected {expected}, not {type(value).__name__}")
