"""Weights of improved-diffusion (Nichol & Dhariwal 2021), a state dict in a .pt file, as our `improved` networks.

The tensors tell the widths, the blocks, where attention is, the classes, and whether the variance is learned. What they don't
tell has that code's defaults: 64x64 images, 4 heads, and 1000 steps of the linear schedule. A JSON file of the same name beside
the weights, such as cifar10_uncond_50M_500K.json, gives other fields of our config by their names:

    {"data.image_shape": [32, 32, 3], "diffusion.schedule": "cosine", "diffusion.num_steps": 4000}
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, PyTree, Shaped

from ddpm_jax.checkpoint import Weights
from ddpm_jax.config import Config, override
from ddpm_jax.errors import InputError
from ddpm_jax.interop.diffusers import read_json
from ddpm_jax.interop.tensors import BLOCK, LEAVES, Tensors, fill, lay_out
from ddpm_jax.interop.torch_files import read_torch_file

DEFAULT_SIZE = 64
DEFAULT_HEADS = 4
QKV = ("query", "key", "value")

PLACES = {
    "time1": "time_embed.0", "time2": "time_embed.2", "classes": "label_emb", "conv_in": "input_blocks.0.0",
    "middle_block0": "middle_block.0", "middle_attention": "middle_block.1", "middle_block1": "middle_block.2",
    "norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
LAYERS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "shortcut": "skip_connection", "norm": "norm", "out": "proj_out", **{name: name for name in QKV},
}  # fmt: skip


def read_improved_diffusion(path: Path, make_abstract: Callable[[Config], PyTree]) -> Weights:
    """The network of a state dict that improved-diffusion has saved. Step 0 stands for a number that isn't known.

    Args:
        path: a .pt file, with a .json file beside it where its process or its images are not that code's defaults.
        make_abstract: the function Config -> shapes, dtypes and shardings of the weights.

    Raises:
        InputError: a file that can't be read, or a network that isn't that code's.
    """
    tensors = read_torch_file(path)
    settings = path.with_suffix(".json")
    given = read_json(settings) if settings.exists() else {}
    config = find_config(tensors, given, path)
    model = config.model
    levels = len(model.multipliers)
    assert config.data.image_shape is not None
    attended = [config.data.image_shape[0] // 2**level in model.attention_resolutions for level in range(levels)]
    separate = split_qkv(tensors, model.num_heads, path)
    abstract = lay_out(make_abstract, config, path)
    params = fill(abstract, separate, lambda place: tensor_name(place, levels, model.num_res_blocks, attended), path)
    return Weights(config, params, 0)


def find_config(tensors: Mapping[str, Shaped[np.ndarray, "..."]], given: Mapping[str, Any], source: Path) -> Config:
    """The config of a network by the shapes of its tensors; what is given goes before what is found."""
    try:
        shape = override(Config(), {"data.image_shape": given.get("data.image_shape")}).data.image_shape
        values = _found(tensors, shape)
        return override(Config(), values | dict(given) | {"data.image_shape": values["data.image_shape"]})
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{source} can't be represented: it holds no UNet of improved-diffusion") from error


def _found(tensors: Mapping[str, np.ndarray], given_shape: tuple[int, int, int] | None) -> dict[str, Any]:
    first = tensors["input_blocks.0.0.weight"]
    channels, image_channels = first.shape[:2]
    shape = given_shape or (DEFAULT_SIZE, DEFAULT_SIZE, image_channels)
    blocks = max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))
    widths, attended, per_level = [], [], []
    count, attends = 0, False
    for index in range(1, blocks + 1):  # a level ends with a downsampling, the last one with the last block
        block = f"input_blocks.{index}."
        if f"{block}0.op.weight" in tensors:
            widths.append(tensors[f"{block}0.op.weight"].shape[0])
            attended.append(attends)
            per_level.append(count)
            count, attends = 0, False
        else:
            count, attends, width = (
                count + 1,
                f"{block}1.qkv.weight" in tensors,
                tensors[f"{block}0.out_layers.3.weight"].shape[0],
            )
    widths, attended, per_level = [*widths, width], [*attended, attends], [*per_level, count]
    if len(set(per_level)) != 1 or any(width % channels for width in widths):
        raise ValueError("levels with different numbers of blocks, or channels that are no multiples")
    time = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    learned = tensors["out.2.weight"].shape[0] == 2 * image_channels
    return {
        "data.source": "unknown",
        "data.image_shape": shape,
        "diffusion.variance": "learned_range" if learned else "fixed_large",
        "diffusion.loss": "hybrid" if learned else "simple",
        "diffusion.label_dropout": 0.0,
        "model.style": "improved",
        "model.scale_and_shift": None if time == 2 * tensors["input_blocks.1.0.out_layers.3.weight"].shape[0] else False,
        "model.channels": channels,
        "model.multipliers": [width // channels for width in widths],
        "model.num_res_blocks": per_level[0],
        "model.attention_resolutions": [shape[0] // 2**level for level, has in enumerate(attended) if has],
        "model.num_heads": DEFAULT_HEADS,
        "model.num_classes": tensors["label_emb.weight"].shape[0] if "label_emb.weight" in tensors else None,
        "model.dropout": 0.0,
        "sample.sampler": "ddpm",
        "sample.num_steps": None,
    }


def split_qkv(tensors: Mapping[str, Float[np.ndarray, "..."]], num_heads: int, source: Path) -> Tensors:
    """The tensors with query, key and value apart. In theirs [3 C, ...] each head has its query, key and value together."""
    separate = {}
    for name, tensor in tensors.items():
        front, _, leaf = name.rpartition(".")
        block, _, layer = front.rpartition(".")
        if layer != "qkv":
            separate[name] = tensor
            continue
        channels = tensor.shape[0] // 3
        if tensor.shape[0] % 3 or channels % num_heads:
            raise InputError(f"{source}: model.num_heads = {num_heads} doesn't divide the {channels} channels of {name!r}")
        parts = tensor.reshape(num_heads, 3, channels // num_heads, *tensor.shape[1:])
        for index, part in enumerate(QKV):
            separate[f"{block}.{part}.{leaf}"] = parts[:, index].reshape(channels, *tensor.shape[1:])
    return separate


def tensor_name(place: str, num_levels: int, num_res_blocks: int, attended: list[bool]) -> str:
    """The name that improved-diffusion has for the array at a place of ours; query, key and value are apart.

    Their blocks are numbered through: on the way down a downsampling counts as one, on the way up an upsampling is the last
    layer of a level's last block.
    """
    block, *layers, leaf = place.split("/")
    found = BLOCK.fullmatch(block)
    if found is None:
        name = PLACES[block]
    else:
        way, level, index, attention = found.groups()
        number = 1 + int(level) * (num_res_blocks + 1)
        up = (num_levels - 1 - int(level)) * (num_res_blocks + 1)
        if index is not None:
            part = 1 if attention else 0
            name = f"input_blocks.{number + int(index)}.{part}" if way == "down" else f"output_blocks.{up + int(index)}.{part}"
        elif way == "down":
            name = f"input_blocks.{number + num_res_blocks}.0.op"
        else:
            name = f"output_blocks.{up + num_res_blocks}.{2 if attended[int(level)] else 1}.conv"
    return ".".join([name, *(LAYERS[layer] for layer in layers), LEAVES[leaf]])
