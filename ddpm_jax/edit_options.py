"""The options of sample.py that edit images, which of them go together, and what is called for each."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Int, UInt8

from ddpm_jax import editing
from ddpm_jax.errors import InputError
from ddpm_jax.images import read_image, read_mask
from ddpm_jax.inference import Model

DEFAULT_STRENGTH = 0.5


@dataclasses.dataclass(frozen=True)
class EditOptions:
    """Options that edit; without --interpolate and --init, images are drawn from nothing but noise."""

    interpolate: tuple[int, ...] | None = None
    """Numbers of two images of the seed: draws the way from one to the other, by itself from image 0 to image 1. A .gif
    moves along it."""
    init: tuple[Path, ...] = ()
    """Image file to start from, as far as --strength says, or with --mask; with --interpolate two, the ends of the way."""
    strength: float | None = None
    """How much of --init is made anew: 0 nothing, 1 all of it; None: 0.5."""
    mask: Path | None = None
    """Image file that is white where --init is to be painted anew, black where it is kept. Sampler: ddpm unless given."""
    num_resamples: int | None = None
    """With --mask: how often each stretch of the steps is gone so that both parts fit; None: 10."""
    jump_length: int | None = None
    """With --mask: steps of such a stretch; None: 10."""

    @property
    def named(self) -> str | None:
        """What is asked for: "interpolate", "mask", "init", or None."""
        if self.interpolate is not None:
            return "interpolate"
        return "mask" if self.mask is not None else "init" if self.init else None


def check_edit(options: EditOptions, kind: str) -> None:
    """Raise InputError unless the options go together, with an output of this kind (".png", ".gif", ...)."""
    given = [name for name in ("strength", "mask") if getattr(options, name) is not None]
    repaint = [name for name in ("num_resamples", "jump_length") if getattr(options, name) is not None]
    if options.interpolate is not None:
        if given or repaint:
            raise InputError(f"--interpolate and {_dashed([*given, *repaint][0])} don't go together: leave one out")
        if options.interpolate and options.init:
            raise InputError("--interpolate has its ends twice: give two numbers, or two files with --init")
        if options.init and len(options.init) != 2:
            raise InputError(f"--interpolate needs two files with --init, its ends, not {len(options.init)}")
        if not options.init and len(options.interpolate) not in (0, 2):
            raise InputError(f"--interpolate takes the numbers of two images, or none, not {len(options.interpolate)}")
        return
    if (given or repaint) and not options.init:
        raise InputError(f"{_dashed([*given, *repaint][0])} needs --init IMAGE, the image to edit")
    if len(options.init) > 1:
        raise InputError(f"--init takes one file, not {len(options.init)}, except with --interpolate")
    if repaint and options.mask is None:
        raise InputError(f"{_dashed(repaint[0])} needs --mask MASK")
    if len(given) == 2:
        raise InputError("--strength and --mask don't go together: what the mask shows white is made wholly anew")
    if options.strength is not None and not 0 <= options.strength <= 1:
        raise InputError(f"--strength {options.strength:g} must lie in 0 ... 1")
    if options.mask is not None and kind == ".gif":
        raise InputError("--mask goes back and forth between noise and image, which no .gif is made of: use .png")


def check_alone(options: EditOptions) -> None:
    """Raise InputError where several processes were started to edit images or to draw an animation."""
    if jax.process_count() > 1:
        what = "an animation" if options.named is None else f"--{options.named}"
        raise InputError(f"{what} is drawn by one process: start sample.py once, without --processes")


def draw(
    model: Model,
    options: EditOptions,
    num_images: int,
    seed: int,
    labels: int | Int[np.ndarray, " N"] | None,
    num_frames: int,
    on_batch: Callable[[int], None],
    settings: dict[str, Any],
) -> UInt8[np.ndarray, "... N H W C"]:
    """The images that the options ask for: those of model.sample, or edited ones; with num_frames [F, N, H, W, C]."""
    shape, files = model.image_shape, options.init
    common = {"num_images": num_images, "seed": seed, "labels": labels, "on_batch": on_batch, **settings}
    if options.named is None:
        return model.sample(num_frames=num_frames, **common)
    if options.named == "interpolate":
        numbers = cast(tuple[int, int], options.interpolate or (0, 1))
        ends = np.stack([read_image(path, shape) for path in files]) if files else numbers
        images = editing.interpolate(model, ends, **common)
        return images[:, None] if num_frames else images
    image = read_image(files[0], shape)
    if options.mask is None:
        strength = DEFAULT_STRENGTH if options.strength is None else options.strength
        return editing.image_to_image(model, image, strength, num_frames=num_frames, **common)
    walk = {name: getattr(options, name) for name in ("jump_length", "num_resamples")}
    walk = {name: value for name, value in walk.items() if value is not None}
    return editing.inpaint(model, image, read_mask(options.mask, files[0], shape), **walk, **common)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")
