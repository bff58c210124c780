"""Folders of diffusers in and out.

    FOLDER/model_index.json                         a pipeline's parts and their classes
    FOLDER/unet/config.json, weights                its network; unet_ema/ is the moving average that its training program keeps
    FOLDER/scheduler/scheduler_config.json          its process

What has no folder of its own lies in FOLDER itself, as in the repositories of google/ddpm-*. A UNet2DModel alone is read too.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from ddpm_jax.checkpoint import Weights
from ddpm_jax.config import Config, override
from ddpm_jax.errors import InputError, first_line
from ddpm_jax.files import whole_file
from ddpm_jax.interop.schedulers import read_scheduler_config, write_scheduler_config
from ddpm_jax.interop.tensors import Tensors, fill, lay_out, named_leaves, read_tensors, to_torch, write_tensors
from ddpm_jax.interop.unet2d import new_name, read_unet_config, tensor_name, write_unet_config

logger = logging.getLogger("ddpm_jax")

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""The files that weights are in; the first that is there."""
MAX_JSON_BYTES = 2**24


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder is a pipeline of diffusers or a model of its; run folders have a config.json too."""
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        return True
    return (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json")


def read_folder(path: Path, weights: str, make_abstract: Callable[[Config], PyTree]) -> tuple[Weights, str]:
    """The network and the process of a diffusers folder, and what its weights are: "ema", "raw", or "imported" where it has
    one set of them and doesn't say. Step 0 stands for a number of steps that isn't known.

    Args:
        path: a pipeline's folder, or one with a UNet2DModel's config.json and weights.
        weights: "raw" reads unet/; "ema" reads unet_ema/ where it is there, and unet/ otherwise.
        make_abstract: the function Config -> shapes, dtypes and shardings of the weights.

    Raises:
        InputError: files that are missing or damaged, or what has no counterpart here, by its name.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights = {weights!r}: a diffusers folder has ema and raw alone")
    unet, scheduler, kind = _find_parts(path, weights)
    given = read_json(unet / "config.json")
    if given.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise InputError(f"{unet / 'config.json'}: only a UNet2DModel can be represented, not {str(given['_class_name'])[:80]}")
    values = _translate(read_unet_config, given, unet / "config.json")
    learned = given.get("out_channels") != given.get("in_channels")
    if scheduler is not None:
        values |= _translate(read_scheduler_config, read_json(scheduler), scheduler)
    else:
        logger.warning("%s: no scheduler beside it, so the process is taken to be Ho et al.'s", unet)
        values |= {"diffusion.variance": "learned_range", "diffusion.loss": "hybrid"} if learned else {}
    if learned != (values.get("diffusion.variance") == "learned_range"):
        raise InputError(
            f"{unet / 'config.json'}: out_channels = {given.get('out_channels')} doesn't fit the scheduler's variance_type: "
            "a network tells its variance in twice as many channels where that is learned_range, and only there"
        )
    config = _config(values, path)
    file = _weights_file(unet)
    tensors = {new_name(name): tensor for name, tensor in read_tensors(file).items()}
    if config.model.num_res_blocks * len(config.model.multipliers) > len(tensors):  # before a huge network is laid out
        raise InputError(f"{file}: {len(tensors)} tensors are fewer than its config has blocks")
    abstract = lay_out(make_abstract, config, unet / "config.json")
    num_levels = len(config.model.multipliers)
    params = fill(abstract, tensors, lambda place: tensor_name(place, num_levels), file)
    return Weights(config, params, 0), kind


def write_folder(out: Path, config: Config, params: PyTree, card: str) -> None:
    """Write a folder that `diffusers.DDPMPipeline.from_pretrained` runs.

    Args:
        out: a folder that is empty or not there yet.
        config: with data.image_shape.
        params: the weights; the same ones make the same files.
        card: the text of its README.md.

    Raises:
        InputError: a config that diffusers can't represent, by the name of the field; nothing is written then.
    """
    unet, scheduler = write_unet_config(config, params), write_scheduler_config(config)
    check_empty(out)
    write_tensors(out / "unet" / WEIGHTS[0], _tensors(jax.device_get(params), len(config.model.multipliers)))
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": unet["_diffusers_version"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
    }
    _write_json(out / "unet" / "config.json", unet)
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    with whole_file(out / "README.md") as file:
        file.write(card.encode())
    _write_json(out / "model_index.json", index)


def check_empty(out: Path) -> None:
    """Raise InputError where a folder to write already holds something, or is a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is there already: choose another")


def _tensors(params: PyTree, num_levels: int) -> Tensors:
    return {
        tensor_name(place, num_levels): to_torch(place, array, as_convolution="/shortcut/" in place)
        for place, array in named_leaves(params).items()
    }


def _find_parts(path: Path, weights: str) -> tuple[Path, Path | None, str]:
    """The folder of the UNet, the scheduler's file, if there is one, and what the weights are."""
    index = path / "model_index.json"
    if index.is_file():
        _check_pipeline(index)
    folder = path / "scheduler"
    scheduler = (folder if folder.is_dir() else path) / "scheduler_config.json"
    process = scheduler if scheduler.is_file() or index.is_file() else None
    if (path / "unet_ema").is_dir():
        return path / ("unet_ema" if weights == "ema" else "unet"), process, weights
    if weights == "ema":
        logger.info("%s: its one set of weights is taken; whether it is a moving average isn't recorded there", path)
    return (path / "unet" if (path / "unet").is_dir() else path), process, "imported"


def _check_pipeline(index: Path) -> None:
    """Raise InputError where a pipeline has parts besides its network and its process, such as one that decodes images."""
    parts = [name for name, value in read_json(index).items() if not name.startswith("_") and isinstance(value, list)]
    others = sorted(set(parts) - {"unet", "scheduler"})
    if others:
        what = f"the part {others[0][:80]!r} has no counterpart: only pipelines of unet and scheduler can be read"
        raise InputError(f"{index}: {what}")


def _weights_file(unet: Path) -> Path:
    for name in WEIGHTS:
        if (unet / name).is_file():
            return unet / name
    raise InputError(f"no weights in {unet}: there is neither {WEIGHTS[0]} nor {WEIGHTS[1]}")


def _translate(
    reader: Callable[[Mapping[str, Any], Any], dict[str, Any]], given: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """What one of the readers makes of a file; a value of a type that makes no sense is an InputError as well."""
    try:
        return reader(given, source)
    except (TypeError, OverflowError) as error:
        raise InputError(f"{source}: a value has a type that it can't have: {first_line(error)}") from error


def _config(values: dict[str, Any], source: Path) -> Config:
    # A network of diffusers has learned its classes alone, with none left open, and of its images only the shape is known.
    fixed = {"data.source": "unknown", "diffusion.label_dropout": 0.0, "sample.num_steps": None}
    try:
        return override(Config(), fixed | values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises InputError where it holds none, or can't be read."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES)
        values = json.loads(text)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} can't be read: it holds a {type(values).__name__}, not an object")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
