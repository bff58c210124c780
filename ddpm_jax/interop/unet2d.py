"""The network of diffusers: what a `UNet2DModel`'s config says in terms of ours, and where its tensors lie.

A UNet2DModel is Ho et al.'s UNet with choices. Most of the choices are fields of ModelConfig; the rest have one value here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jaxtyping import PyTree

from ddpm_jax.config import Config
from ddpm_jax.errors import InputError
from ddpm_jax.interop.tensors import BLOCK, LEAVES, named_leaves
from ddpm_jax.models.styles import DDPM, find_style

DEFAULTS: Mapping[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
    "num_train_timesteps": None,
}  # fmt: skip
"""What a config that leaves a setting out means by it."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "center_input_sample": (False,), "time_embedding_type": ("positional",), "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,), "downsample_padding": (0, 1), "downsample_type": ("conv",), "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"), "resnet_time_scale_shift": ("default", "scale_shift"), "class_embed_type": (None,),
}  # fmt: skip
"""The values that have a counterpart here, of settings that have others."""

OF_AVERAGES = {
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power", "foreach",
}  # fmt: skip
"""What diffusers adds to the config of a moving average; it tells nothing of the network."""

MAX_NUMBER = 2**20
"""More than any network has of anything that is counted."""

ATTENTION = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}


def refuse(source: Any, name: str, value: Any, rule: str) -> NoReturn:
    """Raise the InputError for a setting that has no counterpart here."""
    raise InputError(f"{source}: {name} = {str(value)[:80]} can't be represented: {rule}")


def check_whole(value: Any, name: str, source: Any, most: int = MAX_NUMBER) -> int:
    """The value of a setting. Raises InputError unless it is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        refuse(source, name, value, f"it must be a whole number, 1 to {most}")
    return value


def known_settings(
    given: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Iterable[str], source: Any
) -> dict[str, Any]:
    """defaults | given. Raises InputError on a name that isn't known here, unless what it names is off."""
    for name, value in given.items():
        if name not in defaults and name not in ignored and not name.startswith("_") and value not in (None, False):
            refuse(source, name, value, "no such setting is known here")
    return dict(defaults) | {name: value for name, value in given.items() if name in defaults}


def read_unet_config(given: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """The fields of our config, by dotted name, that describe the network of a UNet2DModel's config.

    Raises:
        InputError: a setting without a counterpart here.
    """
    s = known_settings(given, DEFAULTS, OF_AVERAGES, source)
    for name, allowed in ONLY.items():
        if s[name] not in allowed or isinstance(s[name], bool) != isinstance(allowed[0], bool):
            refuse(source, name, s[name], f"only {' and '.join(map(str, allowed))} can")
    widths, height = _whole_numbers(s, "block_out_channels", source), _image_size(s, source)[0]
    optional = [name for name in ("num_class_embeds", "attention_head_dim") if s[name] is not None]
    for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", *optional):
        check_whole(s[name], name, source)
    if any(width % widths[0] for width in widths):
        refuse(source, "block_out_channels", list(widths), "all levels' must be multiples of the first one's")
    if s["time_embedding_dim"] not in (None, 4 * widths[0]):
        refuse(
            source,
            "time_embedding_dim",
            s["time_embedding_dim"],
            f"only 4 times the first level's channels can, {4 * widths[0]}",
        )
    if s["out_channels"] not in (s["in_channels"], 2 * s["in_channels"]):
        refuse(source, "out_channels", s["out_channels"], f"only in_channels = {s['in_channels']} or twice as many can")
    _check_middle_norm(s, source)
    levels = _attention_levels(s, len(widths), source)
    values = {
        "data.image_shape": (*_image_size(s, source), s["in_channels"]),
        "model.channels": widths[0],
        "model.multipliers": tuple(width // widths[0] for width in widths),
        "model.num_res_blocks": s["layers_per_block"],
        "model.attention_resolutions": tuple(height // 2**level for level in levels),
        "model.middle_attention": bool(s["add_attention"]),
        "model.head_channels": s["attention_head_dim"],
        "model.dropout": s["dropout"],
        "model.num_groups": s["norm_num_groups"],
        "model.num_classes": s["num_class_embeds"],
    }
    details = {
        "cos_first": s["flip_sin_to_cos"],
        "frequency_shift": s["freq_shift"],
        "scale_and_shift": s["resnet_time_scale_shift"] == "scale_shift",
        "pad_all_sides": s["downsample_padding"] == 1,
        "norm_eps": s["norm_eps"],
    }
    return values | {f"model.{name}": None if value == getattr(DDPM, name) else value for name, value in details.items()}


def write_unet_config(config: Config, abstract: PyTree) -> dict[str, Any]:
    """The config of the UNet2DModel that is a config's network.

    Args:
        config: ours, with data.image_shape.
        abstract: shapes of the weights.

    Raises:
        InputError: a field that a UNet2DModel has no setting for.
    """
    model, style, shape = config.model, find_style(config.model), config.data.image_shape
    assert shape is not None
    if model.space_to_depth != 1:
        refuse("export", "model.space_to_depth", model.space_to_depth, "UNet2DModel sees single pixels")
    if model.multipliers[0] != 1:
        refuse("export", "model.multipliers", list(model.multipliers), "UNet2DModel's first level has the channels themselves")
    if style.thousand_steps and config.diffusion.num_steps != 1000:
        refuse("export", "diffusion.num_steps", config.diffusion.num_steps,
               "with model.style = improved the network sees t as a part of 1000 steps, UNet2DModel as it is")  # fmt: skip
    attended = [shape[0] // 2**level in model.attention_resolutions for level in range(len(model.multipliers))]
    widths = [model.channels * multiplier for multiplier in model.multipliers]
    groups = _common_groups(model.num_groups, abstract)
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.38.0",
        **DEFAULTS,
        "sample_size": shape[0] if shape[0] == shape[1] else list(shape[:2]),
        "in_channels": shape[2],
        "out_channels": shape[2] * (2 if config.diffusion.variance == "learned_range" else 1),
        "freq_shift": style.frequency_shift,
        "flip_sin_to_cos": style.cos_first,
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)],
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "downsample_padding": 1 if style.pad_all_sides else 0,
        "dropout": model.dropout,
        "attention_head_dim": _head_channels(config, attended, widths),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if style.scale_and_shift and model.middle_attention else None,
        "norm_eps": style.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if style.scale_and_shift else "default",
        "add_attention": model.middle_attention,
        "num_class_embeds": model.num_classes,
    }


PLACES = {
    "conv_in": "conv_in", "time1": "time_embedding.linear_1", "time2": "time_embedding.linear_2",
    "classes": "class_embedding", "middle_block0": "mid_block.resnets.0", "middle_block1": "mid_block.resnets.1",
    "middle_attention": "mid_block.attentions.0", "norm_out": "conv_norm_out", "conv_out": "conv_out",
}  # fmt: skip
LAYERS = {
    "time": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v",
    "out": "to_out.0",
}  # fmt: skip
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def tensor_name(place: str, num_levels: int) -> str:
    """The name that diffusers has for the array at a place of ours, such as "down0_block0/conv1/kernel"."""
    block, *layers, leaf = place.split("/")
    found = BLOCK.fullmatch(block)
    if found is None:
        name = PLACES[block]
    else:
        way, level, index, attention = found.groups()
        number = int(level) if way == "down" else num_levels - 1 - int(level)
        part = f"{way}samplers.0.conv" if index is None else f"{'attentions' if attention else 'resnets'}.{index}"
        name = f"{way}_blocks.{number}.{part}"
    return ".".join([name, *(LAYERS.get(layer, layer) for layer in layers), LEAVES[leaf]])


def new_name(name: str) -> str:
    """The name of a tensor as diffusers has had it since attention layers were given new names."""
    front, _, leaf = name.rpartition(".")
    front, _, layer = front.rpartition(".")
    return f"{front}.{OLD_NAMES.get(layer, layer)}.{leaf}" if ".attentions." in front else name


def _attention_levels(s: Mapping[str, Any], num_levels: int, source: Any) -> list[int]:
    """The levels that have attention."""
    attended = {}
    for name in ("down_block_types", "up_block_types"):
        types = s[name] if isinstance(s[name], list | tuple) else []
        kinds = [str(kind).removeprefix("UNetRes") for kind in types]
        unknown = [kind for kind in kinds if kind not in ATTENTION or name[:2] not in kind.lower()]
        if unknown or len(kinds) != num_levels:
            rule = "there must be one for each of block_out_channels"
            refuse(source, name, s[name], f"{unknown[0]} has no counterpart" if unknown else rule)
        attended[name] = [ATTENTION[kind] for kind in kinds]
    if attended["up_block_types"][::-1] != attended["down_block_types"]:
        refuse(
            source, "up_block_types", s["up_block_types"], "attention must be at the levels at which down_block_types has it"
        )
    return [level for level, has in enumerate(attended["down_block_types"]) if has]


def _check_middle_norm(s: Mapping[str, Any], source: Any) -> None:
    groups = s["attn_norm_num_groups"]
    if groups is None and s["resnet_time_scale_shift"] == "scale_shift" and s["add_attention"]:
        refuse(source, "attn_norm_num_groups", None, "with scale_shift it leaves the middle attention without its norm")
    if groups not in (None, s["norm_num_groups"]) and s["add_attention"]:
        refuse(source, "attn_norm_num_groups", groups, f"only that of the other layers can, {s['norm_num_groups']}")


def _image_size(s: Mapping[str, Any], source: Any) -> tuple[int, int]:
    size = s["sample_size"]
    if size is None:
        refuse(source, "sample_size", None, "write the height of its images, in pixels, into the file")
    return (check_whole(size, "sample_size", source),) * 2 if not isinstance(size, list) else _two(s, source)


def _two(s: Mapping[str, Any], source: Any) -> tuple[int, int]:
    sizes = _whole_numbers(s, "sample_size", source)
    if len(sizes) != 2:
        refuse(source, "sample_size", s["sample_size"], "it must be one number, or height and width")
    return sizes[0], sizes[1]


def _whole_numbers(s: Mapping[str, Any], name: str, source: Any) -> tuple[int, ...]:
    if not isinstance(s[name], list | tuple) or not s[name]:
        refuse(source, name, s[name], "it must be a list of whole numbers above 0")
    return tuple(check_whole(value, name, source) for value in s[name])


def _head_channels(config: Config, attended: list[bool], widths: list[int]) -> int | None:
    """attention_head_dim; None makes one head."""
    model = config.model
    if model.head_channels is not None or model.num_heads == 1:
        return model.head_channels
    of_layers = {width for width, has in zip(widths, attended, strict=True) if has}
    of_layers |= {widths[-1]} if model.middle_attention else set()
    if len(of_layers) > 1:
        refuse("export", "model.num_heads", model.num_heads,
               f"UNet2DModel fixes the channels of a head, and its layers have {sorted(of_layers)}")  # fmt: skip
    return of_layers.pop() // model.num_heads if of_layers else None


def _common_groups(num_groups: int, abstract: PyTree) -> int:
    """norm_num_groups: the number of groups that all layers have."""
    widths = {leaf.shape[0] for place, leaf in named_leaves(abstract).items() if place.endswith("/scale")}
    groups = {math.gcd(num_groups, width) for width in widths}
    if len(groups) > 1:
        refuse("export", "model.num_groups", num_groups,
               f"UNet2DModel has the same number of groups everywhere, here there are {sorted(groups)}")  # fmt: skip
    return groups.pop()
