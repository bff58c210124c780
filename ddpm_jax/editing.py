"""Editing with a trained model: uint8 images go in and out, and the mathematics is in `diffusion/editing.py`.

Image i depends on (weights, seed, i, what is edited, settings) alone, as in `inference.py`. `settings` are those of
`Model.sample` (sampler, num_steps, eta, spacing, batch_size ...); the ones that are not given, or None, are the run's own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from ddpm_jax.config import Config
from ddpm_jax.diffusion import editing as diffusion
from ddpm_jax.diffusion.inversion import invert as invert_images
from ddpm_jax.diffusion.process import AnyKey, Denoiser, make_denoiser, normal
from ddpm_jax.diffusion.samplers import find_sampler, sample
from ddpm_jax.diffusion.schedule import Schedule
from ddpm_jax.errors import InputError
from ddpm_jax.inference import CLIP, DrawFn, Model, draw_images, guided_network, image_keys, make_network, to_uint8
from ddpm_jax.parallel import compile_for, put, replicated
from ddpm_jax.validation import config_schedule

OnBatch = Callable[[int], None]


def interpolate(
    model: Model,
    ends: tuple[int, int] | UInt8[np.ndarray, "2 H W C"] = (0, 1),
    num_images: int = 10,
    seed: int = 0,
    labels: int | None = None,
    on_batch: OnBatch = lambda count: None,
    **settings: Any,
) -> UInt8[np.ndarray, "N H W C"]:
    """Images on the way from one to another, by spherical interpolation of their x_T.

    Args:
        model: see ddpm_jax.load.
        ends: the numbers of two images of the seed, as model.sample draws them; or two images, whose x_T are found by
            inverting DDIM in as many steps as are sampled.
        num_images: N >= 2, the ends among them.
        seed: that of the numbers.
        labels: the class of all images; a class-conditional model needs it.
        on_batch: called with the number of images done after each batch.
        **settings: of a sampler without noise.

    Raises:
        InputError: a sampler with noise, no label for a class-conditional model, or a setting out of range.
    """
    config, classes = model.settle(settings, num_images, seed, labels)
    used = config.sample
    if find_sampler(used.sampler).stochastic or (used.sampler == "ddim" and used.eta > 0):
        raise InputError(
            f"interpolation needs a sampler without noise, not {used.sampler} with eta = {used.eta:g}: use ddim, eta 0"
        )
    if num_images < 2:
        raise InputError(f"num_images = {num_images}: an interpolation has 2 or more, its ends")
    if config.model.num_classes is not None and labels is None:
        raise InputError("interpolation with a class-conditional model needs one label for all images")
    if isinstance(ends, tuple):
        start, end = _noises(model, seed, ends)
    else:
        start, end = invert(model, ends, labels, **settings)
    share = jnp.linspace(0.0, 1.0, num_images)
    noises = np.asarray(diffusion.interpolate(jnp.asarray(start), jnp.asarray(end), share))
    draw = _make_draw(config, model.mesh, _from_noise, _of_sampler(config))
    return draw_images(config, model.mesh, model.params, seed, num_images, classes, 0, on_batch, draw, (noises,))


def image_to_image(
    model: Model,
    image: UInt8[np.ndarray, "*N H W C"],
    strength: float = 0.5,
    num_images: int = 16,
    seed: int = 0,
    labels: int | Int[np.ndarray, " N"] | None = None,
    num_frames: int = 0,
    on_batch: OnBatch = lambda count: None,
    **settings: Any,
) -> UInt8[np.ndarray, "... N H W C"]:
    """Images that resemble the given one: it is noised to a level and sampled from there (SDEdit, Meng et al. 2022).

    Args:
        model: see ddpm_jax.load.
        image: one image [H, W, C], or one for each of the N.
        strength: share of the way to noise, 0 (the image as it is) to 1 (nothing of it is left).
        num_images: N >= 1.
        seed: 0 ... 2^32 - 1; image i is noised with the noise that model.sample would make image i from.
        labels: as in model.sample.
        num_frames: as in model.sample.
        on_batch: called with the number of images done after each batch.
        **settings: num_steps are those from the noised image on, as many as there are timesteps at the most.

    Raises:
        InputError: a strength outside [0, 1], an image of another shape than the model's, or a setting out of range.
    """
    config, classes = model.settle(settings, num_images, seed, labels)
    if not 0 <= strength <= 1:
        raise InputError(f"strength = {strength:g}: must lie in [0, 1]")
    options = {**_of_sampler(config), "strength": strength, "trajectory": num_frames}
    draw = _make_draw(config, model.mesh, diffusion.image_to_image, options)
    images = _images(model, image, num_images)
    return draw_images(config, model.mesh, model.params, seed, num_images, classes, num_frames, on_batch, draw, (images,))


def inpaint(
    model: Model,
    image: UInt8[np.ndarray, "*N H W C"],
    mask: Bool[np.ndarray, "H W 1"],
    num_images: int = 16,
    seed: int = 0,
    labels: int | Int[np.ndarray, " N"] | None = None,
    jump_length: int = 10,
    num_resamples: int = 10,
    on_batch: OnBatch = lambda count: None,
    **settings: Any,
) -> UInt8[np.ndarray, "N H W C"]:
    """The image with its masked pixels painted to fit the others, which stay as they are (RePaint, Lugmayr et al. 2022).

    Args:
        model: see ddpm_jax.load.
        image: one image [H, W, C], or one for each of the N.
        mask: True where to paint.
        num_images: N >= 1.
        seed: 0 ... 2^32 - 1.
        labels: as in model.sample.
        jump_length: steps that the walk goes back at a time; this and the next as in ddpm_jax.inpaint.
        num_resamples: how often each stretch of the walk is gone; the time it takes grows with it.
        on_batch: called with the number of images done after each batch.
        **settings: where no sampler is given it is ddpm, as in the paper, not the run's own.

    Raises:
        InputError: an image or mask of another shape than the model's, or a setting out of range.
    """
    settings["sampler"] = settings.get("sampler") or "ddpm"
    config, classes = model.settle(settings, num_images, seed, labels)
    if mask.shape != (*model.image_shape[:2], 1):
        raise InputError(f"a mask of shape {mask.shape} doesn't fit images of {model.image_shape}")
    try:
        diffusion.sampler_without_memory(config.sample.sampler)
        diffusion.repaint_moves(config.sample.num_steps or model.schedule.num_steps, jump_length, num_resamples)
    except ValueError as error:
        raise InputError(str(error)) from error
    options = {**_of_sampler(config), "jump_length": jump_length, "num_resamples": num_resamples}
    draw = _make_draw(config, model.mesh, diffusion.inpaint, options)
    inputs = (_images(model, image, num_images), np.broadcast_to(mask, (num_images, *mask.shape)))
    return draw_images(config, model.mesh, model.params, seed, num_images, classes, 0, on_batch, draw, inputs)


def invert(
    model: Model, images: UInt8[np.ndarray, "N H W C"], labels: int | Int[np.ndarray, " N"] | None = None, **settings: Any
) -> Float[np.ndarray, "N H W C"]:
    """The x_T that ddim without noise makes the images of, all in one batch; see ddpm_jax.invert.

    Raises:
        InputError: images of another shape than the model's, or a setting out of range.
    """
    config, classes = model.settle(settings, len(images), 0, labels)
    used, schedule, images = config.sample, model.schedule, _images(model, images, len(images))

    def run(params: PyTree, images: UInt8[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        denoiser = _denoiser(config, schedule, params, None if classes is None else jnp.asarray(classes, jnp.int32))
        return invert_images(schedule, denoiser, _from_uint8(images), used.num_steps, used.spacing)

    return np.asarray(compile_for(model.mesh, run)(model.params, put(images, replicated(model.mesh))))


def _make_draw(config: Config, mesh: Mesh, edit: Callable[..., Float[Array, "..."]], options: dict[str, Any]) -> DrawFn:
    return _compiled(config, mesh, edit, tuple(options.items()))


@functools.lru_cache(maxsize=8)
def _compiled(config: Config, mesh: Mesh, edit: Callable[..., Float[Array, "..."]], options: tuple[Any, ...]) -> DrawFn:
    """The compiled function (params, keys, labels, *inputs) -> images of edit(keys, schedule, denoiser, *inputs, **options)."""
    schedule = config_schedule(config)

    def draw(
        params: PyTree, keys: Key[Array, " B"], labels: Int[Array, " B"] | None, *inputs: Array
    ) -> UInt8[Array, "... H W C"]:
        floats = (_from_uint8(x) if x.dtype == jnp.uint8 else x for x in inputs)
        return to_uint8(edit(keys, schedule, _denoiser(config, schedule, params, labels), *floats, **dict(options)))

    return compile_for(mesh, draw)


def _from_noise(
    key: AnyKey, schedule: Schedule, denoiser: Denoiser, x_init: Float[Array, "B H W C"], **options: Any
) -> Float[Array, "B H W C"]:
    return sample(key, schedule, denoiser, x_init.shape, x_init=x_init, **options)


def _denoiser(config: Config, schedule: Schedule, params: PyTree, labels: Int[Array, " B"] | None) -> Denoiser:
    network_fn = guided_network(config, schedule, make_network(config), params, labels)
    return make_denoiser(schedule, network_fn, config.diffusion.prediction, CLIP[config.sample.threshold])


def _of_sampler(config: Config) -> dict[str, Any]:
    s = config.sample
    settings = {"sampler": s.sampler, "num_steps": s.num_steps, "eta": s.eta, "spacing": s.spacing}
    return settings | {"variance": config.diffusion.variance}


def _images(model: Model, image: UInt8[np.ndarray, "*N H W C"], num_images: int) -> UInt8[np.ndarray, "N H W C"]:
    shape = model.image_shape
    if image.dtype != np.uint8 or image.shape not in (shape, (num_images, *shape)):
        raise InputError(
            f"images must be uint8 {list(shape)}, one or {num_images} of them, not {image.dtype} {list(image.shape)}"
        )
    return np.broadcast_to(image, (num_images, *shape))


def _noises(model: Model, seed: int, numbers: tuple[int, int]) -> Float[np.ndarray, "2 H W C"]:
    """The x_T of images of a seed, by their numbers, as `sample` draws them."""
    if min(numbers) < 0 or max(numbers) >= 2**32:
        raise InputError(f"images {numbers[0]} and {numbers[1]}: their numbers must lie in 0 ... 2^32 - 1")
    keys = image_keys(np.uint32(seed), np.asarray(numbers, np.uint32))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, model.schedule.num_steps)
    return np.asarray(normal(keys, (len(numbers), *model.image_shape)))


def _from_uint8(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    return images.astype(jnp.float32) / 127.5 - 1.0
