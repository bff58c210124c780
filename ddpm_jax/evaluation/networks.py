"""Feature networks: what turns images into the numbers that sets of images are compared by.

    inception_v3         FID's network. Its weights are fetched once, or given as a file.
    dinov2_vitl14        FD-DINOv2's network. Its weights are given as a file.
    efficientnet_lite0   small, and in a Python package: works without a network connection. Its scores are nobody else's FID.

Each runs as one program in float32, its batches split over all devices. Grey images are seen as three equal channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

from ddpm_jax.errors import InputError
from ddpm_jax.evaluation import weights
from ddpm_jax.evaluation.resizing import resize_bicubic, resize_bilinear_tf1
from ddpm_jax.models.dinov2 import DINOv2
from ddpm_jax.models.efficientnet import EfficientNetLite0
from ddpm_jax.models.inception import InceptionV3
from ddpm_jax.parallel import batch_sharding, compile_for, local_mesh, put, replicated, round_up
from ddpm_jax.ranges import one_behind

NetworkName = Literal["inception_v3", "dinov2_vitl14", "efficientnet_lite0"]
Outputs = dict[str, Float[np.ndarray, "N F"]]
"""Features of images by name: "pool", and of inception_v3 also "spatial" and "logits"."""

BATCH_SIZE = 50
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_FEATURES = 1024  # of ViT-L/14, the one that FD-DINOv2 is defined by
DINOV2_SIDE = 224
EFFICIENTNET_SIDE = 112  # half of what it was trained with: a quarter of the time


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network with its weights and its way of seeing images; made by `load_network`."""

    name: NetworkName
    """Which one."""
    resize: str
    """How images reach the size that it sees, for the protocol."""
    sha256: str
    """Of the file of its weights."""
    params: PyTree
    """Its weights."""
    apply: Callable[[PyTree, Array], dict[str, Array]]
    """(params, images uint8 [B, H, W, 3]) -> outputs [B, F]."""
    prepare: Callable[[UInt8[np.ndarray, "N H W C"]], UInt8[np.ndarray, "N H2 W2 C"]] = lambda images: images
    """What the host does with images before."""

    def outputs(self, images: UInt8[np.ndarray, "N H W C"]) -> Outputs:
        """Outputs of uint8 images of 1 or 3 channels, batch by batch; an image's numbers don't depend on the others.

        Raises:
            InputError: images of another number of channels.
        """
        if images.shape[-1] not in (1, 3):
            raise InputError(f"feature networks see images of 1 or 3 channels, not {images.shape[-1]}")
        pieces = list(self._batches(images))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _batches(self, images: UInt8[np.ndarray, "N H W C"]) -> Iterator[Outputs]:
        size = round_up(BATCH_SIZE, self._mesh)

        def running() -> Iterator[tuple[int, dict[str, Array]]]:
            for start in range(0, len(images), size):
                batch = self.prepare(images[start : start + size])
                missing = size - len(batch)  # filled up, so that all batches run one program
                filled = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
                yield len(batch), self._program(self._placed, put(filled, batch_sharding(self._mesh)))

        for count, found in one_behind(running()):  # fetched while the devices work on the next batch
            yield {name: output[:count] for name, output in jax.device_get(found).items()}

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return local_mesh()

    @functools.cached_property
    def _placed(self) -> PyTree:
        return put(self.params, replicated(self._mesh))

    @functools.cached_property
    def _program(self) -> Callable[..., Any]:
        def program(params: PyTree, images: UInt8[Array, "B H W C"]) -> dict[str, Array]:
            colour = jnp.broadcast_to(images, (*images.shape[:3], 3)) if images.shape[-1] == 1 else images
            with jax.default_matmul_precision("highest"):  # TPUs would round to bfloat16 otherwise, and recent GPUs to TF32
                return self.apply(params, colour.astype(jnp.float32))

        return compile_for(self._mesh, program)


def load_network(name: NetworkName, path: Path | None = None) -> FeatureNetwork:
    """A feature network with its weights.

    Args:
        name: which one.
        path: file of its weights; None: inception_v3's are fetched, efficientnet_lite0's are those of a Python package.

    Raises:
        InputError: weights that are not there, or another network's.
    """
    return {"inception_v3": _inception, "dinov2_vitl14": _dinov2, "efficientnet_lite0": _efficientnet}[name](path)


def _inception(path: Path | None) -> FeatureNetwork:
    path = weights.inception_file() if path is None else path
    tensors, sha256 = weights.read_weights(path)
    network, name = InceptionV3(), "FID's Inception network"
    params = weights.check_params(weights.inception_params(tensors, path), _abstract(network, 299), path, name)

    def apply(params: PyTree, images: Float[Array, "B H W 3"]) -> dict[str, Array]:
        pixels = (resize_bilinear_tf1(images, 299) - 128.0) / 128.0
        return network.apply({"params": params}, pixels)._asdict()  # type: ignore[union-attr]

    return FeatureNetwork("inception_v3", "bilinear as in TensorFlow 1, to 299x299", sha256, params, apply)


def _dinov2(path: Path | None) -> FeatureNetwork:
    if path is None:
        raise InputError("FD-DINOv2 needs the weights of ViT-L/14: give dinov2_vitl14_pretrain.pth with --dinov2")
    tensors, sha256 = weights.read_weights(path)
    network, name = DINOv2(DINOV2_FEATURES), "DINOv2's ViT-L/14"
    params = weights.check_params(weights.dinov2_params(tensors, path), _abstract(network, DINOV2_SIDE), path, name)

    def apply(params: PyTree, images: Float[Array, "B H W 3"]) -> dict[str, Array]:
        mean, deviation = (jnp.asarray(v).reshape(1, 1, 1, 3) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (images / 255.0 - mean) / deviation
        return {"pool": network.apply({"params": params}, pixels)}  # type: ignore[dict-item]

    return _with_bicubic("dinov2_vitl14", DINOV2_SIDE, sha256, params, apply)


def _efficientnet(path: Path | None) -> FeatureNetwork:
    path = weights.efficientnet_file() if path is None else path
    tensors, sha256 = weights.read_weights(path)
    network, name = EfficientNetLite0(), "EfficientNet-lite0"
    params = weights.check_params(weights.efficientnet_params(tensors, path), _abstract(network, EFFICIENTNET_SIDE), path, name)

    def apply(params: PyTree, images: Float[Array, "B H W 3"]) -> dict[str, Array]:
        return {"pool": network.apply({"params": params}, (images - 127.0) / 128.0)}  # type: ignore[dict-item]

    return _with_bicubic("efficientnet_lite0", EFFICIENTNET_SIDE, sha256, params, apply)


def _with_bicubic(name: NetworkName, side: int, sha256: str, params: PyTree, apply: Callable[..., Any]) -> FeatureNetwork:
    resize = f"Pillow's bicubic, to {side}x{side}, in uint8"
    return FeatureNetwork(name, resize, sha256, params, apply, lambda images: resize_bicubic(images, side))


def _abstract(network: Any, side: int) -> PyTree:
    """Shapes of a network's parameters."""
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
