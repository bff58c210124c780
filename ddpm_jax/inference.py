"""A trained model: load it, ask its network, draw images from it.

The noise of image i comes from fold_in(fold_in(key(seed), SAMPLING), i) alone, so it depends neither on the batch it is
drawn in, nor on the number of devices, nor on how many other images are asked for.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from ddpm_jax.checkpoint import abstract_like, load_weights
from ddpm_jax.config import Config, Threshold, override
from ddpm_jax.diffusion.guidance import classifier_free
from ddpm_jax.diffusion.process import Clip, NetworkFn, make_denoiser
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.diffusion.schedule import Schedule, Spacing
from ddpm_jax.errors import InputError
from ddpm_jax.interop.foreign import read_foreign
from ddpm_jax.models import UNet, bind, init_params, make_unet
from ddpm_jax.parallel import batch_sharding, compile_for, local_mesh, put, replicated
from ddpm_jax.ranges import Range, batches, gaps, one_behind, rows_of_range
from ddpm_jax.validation import config_schedule

SAMPLING = 2**32 - 1  # keeps the keys of images apart from those of training steps, which fold in the step

CLIP: dict[str, Clip] = {"static": True, "dynamic": "dynamic", "none": False}  # by the names of sample.threshold

DrawFn = Callable[..., UInt8[Array, "... H W C"]]
"""(params, keys [B], labels [B] or None, and further inputs [B, ...] if any) -> images [B, H, W, C]."""


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """[-1, 1] as [0, 255]: the inverse of x / 127.5 - 1, rounded, clipped."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


@functools.lru_cache(maxsize=8)
def make_draw(config: Config, mesh: Mesh, num_frames: int = 0) -> DrawFn:
    """draw_function, compiled for a mesh over whose devices the batch is split."""
    return compile_for(mesh, draw_function(config, num_frames))


def draw_function(config: Config, num_frames: int = 0) -> DrawFn:
    """The function (params, keys [B], labels [B]) -> images [B, H, W, C], by config.sample's settings.

    Args:
        config: with data.image_shape.
        num_frames: 0, or the number of frames [F, B, H, W, C] to return of the way from noise to images.
    """
    shape = _image_shape(config)
    unet, schedule, settings = make_network(config), config_schedule(config), config.sample

    def draw(params: PyTree, keys: Key[Array, " B"], labels: Int[Array, " B"] | None) -> UInt8[Array, "... H W C"]:
        network_fn = guided_network(config, schedule, unet, params, labels)
        denoiser = make_denoiser(schedule, network_fn, config.diffusion.prediction, CLIP[settings.threshold])
        images = sample(
            keys, schedule, denoiser, (keys.shape[0], *shape), settings.sampler, settings.num_steps, settings.eta,
            settings.spacing, trajectory=num_frames, variance=config.diffusion.variance,
        )  # fmt: skip
        return to_uint8(images)

    return draw


def guided_network(
    config: Config, schedule: Schedule, unet: UNet, params: PyTree, labels: Int[Array, " B"] | None
) -> NetworkFn:
    """The network with its weights, labels and the guidance of config.sample as a function (xt, t) -> output."""
    s, conditional = config.sample, bind(unet, params, labels)
    if unet.num_classes is None:
        return conditional
    return classifier_free(schedule, conditional, bind(unet, params), s.guidance, s.guidance_interval, s.guidance_rescale)


def draw_images(
    config: Config,
    mesh: Mesh,
    params: PyTree,
    seed: int,
    num_images: int,
    labels: Int[np.ndarray, " N"] | None = None,
    num_frames: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
    draw: DrawFn | None = None,
    inputs: Sequence[np.ndarray] = (),
) -> UInt8[np.ndarray, "... N H W C"]:
    """Images 0 ... num_images - 1 of a seed, batch by batch.

    A class-conditional network without labels draws class i mod num_classes as image i. `on_batch` is told how many images
    are done. `draw` takes the place of make_draw's program and is given the rows of `inputs` [N, ...] that belong to its
    images.
    """
    rows = rows_of_range(config.sample.batch_size, num_images, mesh.size)
    ranges = gaps({}, 0, num_images, rows)
    pieces: list[np.ndarray] = []
    for batch in draw_ranges(config, mesh, params, seed, ranges, rows, labels, num_frames, draw, inputs):
        pieces.extend(batch.values())
        on_batch(max(stop for _, stop in batch))
    return np.concatenate(pieces, axis=1 if num_frames else 0)


def draw_ranges(
    config: Config,
    mesh: Mesh,
    params: PyTree,
    seed: int,
    ranges: Sequence[Range],
    rows: int,
    labels: Int[np.ndarray, " N"] | None = None,
    num_frames: int = 0,
    draw: DrawFn | None = None,
    inputs: Sequence[np.ndarray] = (),
) -> Iterator[dict[Range, UInt8[np.ndarray, "... H W C"]]]:
    """The images of ranges of at most `rows`, a batch of ranges at a time, one for each device; see draw_images."""
    draw = make_draw(config, mesh, num_frames) if draw is None else draw
    num_classes, split = config.model.num_classes, batch_sharding(mesh)

    def drawn() -> Iterator[tuple[Sequence[Range], UInt8[Array, "... B H W C"]]]:
        for batch, numbers in batches(ranges, rows, mesh.size):
            classes = None
            if num_classes is not None:
                named = numbers % num_classes if labels is None else labels[numbers]
                classes = put(named.astype(np.int32), split)
            keys = image_keys(put(np.uint32(seed), replicated(mesh)), put(numbers.astype(np.uint32), split))
            yield batch, draw(params, keys, classes, *(put(array[numbers], split) for array in inputs))

    for batch, images in one_behind(drawn()):
        host, axis = jax.device_get(images), 1 if num_frames else 0
        places = (place * rows + np.arange(stop - start) for place, (start, stop) in enumerate(batch))
        yield {each: host.take(place, axis=axis) for each, place in zip(batch, places, strict=True)}


@jax.jit
def image_keys(seed: Array, indices: Array) -> Key[Array, " B"]:
    """The keys of images [B] of a seed, by their numbers; `sample` makes their noise from these alone."""
    root = jax.random.fold_in(jax.random.key(seed), SAMPLING)
    return jax.vmap(jax.random.fold_in, (None, 0))(root, indices)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network with its weights and all that is needed to draw from it; made by `load`."""

    config: Config
    """The config that it was trained with."""
    params: PyTree
    """Its weights, on all devices."""
    schedule: Schedule
    """Its noise schedule."""
    step: int
    """Training steps behind the weights."""
    weights: str
    """Which weights they are: "ema", "raw", "decay:0.999", "ema:0.08"; "imported" where another program didn't say."""
    mesh: Mesh
    """The devices it runs on, all of this process."""

    def network_fn(
        self, xt: Float[Array, "B H W C"], t: Int[Array, " B"], labels: Int[Array, " B"] | None = None
    ) -> Float[Array, "B H W O"]:
        """The raw network: eps, x0 or v, as config.diffusion.prediction says, for noisy images in the model's range.

        With a learned variance O = 2 C, and the second half tells it; otherwise O = C. Labels are those of `UNet`. It may take
        part in a compiled program, and be differentiated.
        """
        if isinstance(xt, jax.core.Tracer):  # compiler options are for the outermost program alone
            return bind(make_network(self.config), self.params, labels)(xt, t)
        return self._apply(self.params, xt, t, labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of its images."""
        return _image_shape(self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and their names."""
        digest = hashlib.sha256()
        for place, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(self.params)):
            digest.update(jax.tree_util.keystr(place).encode() + np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        unet = make_network(self.config)
        return compile_for(self.mesh, lambda params, xt, t, labels: bind(unet, params, labels)(xt, t))

    def sample(
        self,
        num_images: int = 16,
        seed: int = 0,
        sampler: str | None = None,
        num_steps: int | None = None,
        eta: float | None = None,
        spacing: Spacing | None = None,
        threshold: Threshold | None = None,
        labels: int | Int[np.ndarray, " N"] | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        batch_size: int | None = None,
        num_frames: int = 0,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> UInt8[np.ndarray, "... N H W C"]:
        """Draw images, uint8 [N, H, W, C]; image i depends on the weights, seed, i and the sampler's settings alone.

        Args:
            num_images: N >= 1.
            seed: 0 ... 2^32 - 1.
            sampler: algorithm; this and the next five are those of config.sample where not given, see `ddpm_jax.sample`.
            num_steps: steps from noise to image; `heun` evaluates the network twice in each.
            eta: noise of ddim.
            spacing: which timesteps are visited.
            threshold: what is done with an x0 outside [-1, 1].
            batch_size: images that each device draws at once; has no influence on them.
            labels: one class for all images or one for each; image i shows class i mod num_classes where not given.
            guidance: how strongly images follow their class, see `ddpm_jax.classifier_free`: 1 as learnt, 0 not at all. This
                and the next two are those of config.sample where not given.
            guidance_interval: noise levels sigma at which guidance acts, (low, high].
            guidance_rescale: how far guided outputs are brought back to the deviation of unguided ones, 0 ... 1.
            num_frames: 0, or how many frames [F, N, H, W, C] to return of the way from noise to images, 2 or more.
            on_batch: called with the number of images done after each batch.

        Raises:
            InputError: a setting out of range, or labels that the network doesn't know.
        """
        given = {
            "sampler": sampler, "num_steps": num_steps, "eta": eta, "spacing": spacing, "threshold": threshold,
            "batch_size": batch_size,
            "guidance": guidance, "guidance_interval": guidance_interval, "guidance_rescale": guidance_rescale,
        }  # fmt: skip
        config, classes = self.settle(given, num_images, seed, labels)
        if num_frames < 0 or num_frames == 1:
            raise InputError(f"num_frames = {num_frames}: must be 0, or 2 or more")
        return draw_images(config, self.mesh, self.params, seed, num_images, classes, num_frames, on_batch)

    def settle(
        self, given: Mapping[str, Any], num_images: int, seed: int, labels: Any
    ) -> tuple[Config, Int[np.ndarray, " N"] | None]:
        """The config with the settings of config.sample that are given, not None, and the class of each image, checked."""
        config = override(self.config, {f"sample.{name}": value for name, value in given.items() if value is not None})
        if num_images < 1:
            raise InputError(f"num_images = {num_images}: must be 1 or more")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed = {seed}: must lie in 0 ... 2^32 - 1")
        return config, self._check_labels(labels, num_images)

    def _check_labels(self, labels: Any, num_images: int) -> Int[np.ndarray, " N"] | None:
        if labels is None:
            return None
        num_classes = self.config.model.num_classes
        if num_classes is None:
            raise InputError("labels were given, but the network was trained without classes")
        classes = np.asarray(labels)
        if classes.shape not in ((), (num_images,)) or classes.dtype.kind not in "iu":
            raise InputError(f"labels must be one whole number, or {num_images} of them, not {classes.dtype} {classes.shape}")
        classes = np.broadcast_to(classes, (num_images,))
        if classes.min() < 0 or classes.max() >= num_classes:
            raise InputError(f"labels must lie in 0 ... {num_classes - 1}")
        return classes


def load(path: str | Path, weights: str = "ema") -> Model:
    """A trained model from a run folder (its newest checkpoint), a checkpoint's own folder, or another program's files.

    It lies on this process's devices.

    Args:
        path: runs/NAME or runs/NAME/checkpoints/STEP; a folder of diffusers with a pipeline or a UNet2DModel, whose step is
            given as 0; a .pt file of improved-diffusion, see `ddpm_jax.interop.improved_diffusion`.
        weights: "ema", the moving average; "raw", the weights as the last step left them; "decay:0.999", one of
            optim.ema_decays; "ema:0.08", the power function average of any length, followed in training (one of
            optim.ema_lengths) or put together from the snapshots of those that were.

    Raises:
        InputError: no checkpoint there, a damaged one, or weights that it doesn't have.
    """
    mesh = local_mesh()
    foreign = read_foreign(path, weights, lambda config: abstract_params(config, mesh))
    if foreign is None:
        loaded = load_weights(path, weights, lambda config: abstract_params(config, mesh))
    else:
        loaded, weights = foreign
    return Model(loaded.config, loaded.params, config_schedule(loaded.config), loaded.step, weights, mesh)


def make_network(config: Config) -> UNet:
    """The network of a config with data.image_shape."""
    diffusion = config.diffusion
    return make_unet(config.model, _image_shape(config)[-1], diffusion.variance == "learned_range", diffusion.num_steps)


def abstract_params(config: Config, mesh: Mesh) -> PyTree:
    """Shapes and dtypes of a config's weights, replicated over a mesh."""
    shape = _image_shape(config)
    unet = make_network(config)
    try:
        unet.check_resolution(*shape[:2])
    except ValueError as error:
        raise InputError(f"the stored data.image_shape = {list(shape)} doesn't fit its network: {error}") from error
    return abstract_like(jax.eval_shape(lambda: init_params(unet, 0, shape)), replicated(mesh))


def _image_shape(config: Config) -> tuple[int, int, int]:
    if config.data.image_shape is None:
        raise InputError("data.image_shape is not set: it is known once the data are loaded")
    return config.data.image_shape
