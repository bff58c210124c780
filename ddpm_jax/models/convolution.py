"""3x3 convolutions for CPUs, for values and both gradients; elsewhere XLA's own are left alone.

Two things are done differently from XLA's CPU compiler, which computes the same numbers up to rounding:

- Gradients are written as convolutions in the one layout that it has a fast routine for. It rewrites those of autodiff
  to that layout too, but not inside loops, where they would be tens of times slower.
- Wide convolutions use Winograd's F(2x2, 3x3) (Lavin & Gray 2016, arXiv:1509.09308): each 4x4 tile d of the input gives
  2x2 outputs  A^T [(G g G^T) * (B^T d B)] A,  which takes 16 multiplications for each pair of channels instead of 36. Over
  all tiles that is 16 matrix products.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
B = np.array([[1, 0, 0, 0], [0, 1, -1, 1], [-1, 1, 1, 0], [0, 0, 0, -1]])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])

WINOGRAD_CHANNELS = 64
"""Narrower convolutions are limited by memory, not by arithmetic, and don't gain."""
WINOGRAD_TILES = 64
"""With fewer tiles the transformed kernel costs more than is saved."""
CACHE_BYTES = 2**23
"""Images are transformed a few at a time, so that their transforms stay in the processor's cache."""

Padding = tuple[tuple[int, int], tuple[int, int]]


def conv_general_dilated_cpu(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> Array:
    """`conv3x3_cpu`, as `flax.linen.Conv` calls `jax.lax.conv_general_dilated`; its other options are the defaults."""
    (top, bottom), (left, right) = padding
    return conv3x3_cpu(lhs, rhs, window_strides[0], ((top, bottom), (left, right)))


def conv3x3_cpu(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"], stride: int, padding: Padding
) -> Float[Array, "B H2 W2 O"]:
    """The convolution of images with a 3x3 kernel, and its gradients, for a CPU."""

    @jax.custom_vjp
    def conv(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"]) -> Array:
        return _conv(x, kernel, padding, stride=stride)

    def forward(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"]) -> tuple[Array, tuple[Array, Array]]:
        return conv(x, kernel), (x, kernel)

    def backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        x, kernel = residuals
        # The rows and columns that dy covers once its pixels stand `stride` apart, and what is padded around it.
        spans = [(n - 1) * stride + 1 for n in dy.shape[1:3]]
        around_dy = tuple(
            (2 - low, size - span + low) for size, span, (low, _) in zip(x.shape[1:3], spans, padding, strict=True)
        )
        around_x = tuple(
            (low, 2 + span - size - low) for size, span, (low, _) in zip(x.shape[1:3], spans, padding, strict=True)
        )
        dx = _conv(dy, kernel[::-1, ::-1].swapaxes(2, 3), around_dy, spread=stride)
        return dx, _kernel_gradient(x, dy, around_x, stride)

    conv.defvjp(forward, backward)
    return conv(x, kernel)


def _conv(x: Array, kernel: Array, padding: Any, stride: int = 1, spread: int = 1) -> Array:
    """The convolution, with the pixels of x set `spread` apart; by Winograd's algorithm where that pays."""
    if stride == spread == 1 and padding == ((1, 1), (1, 1)) and _winograd_pays(x.shape, kernel.shape[3], x.dtype):
        return _winograd(x, kernel)
    return _direct(x, kernel, padding, (stride, stride), lhs_dilation=(spread, spread))


def _kernel_gradient(x: Array, dy: Array, padding: Any, stride: int) -> Array:
    if stride == 1 and padding == ((1, 1), (1, 1)) and _winograd_pays(x.shape, dy.shape[3], x.dtype):
        return _winograd_kernel_gradient(x, dy)
    images, kernel = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)  # channels as batch, batch as channels
    return _direct(images, kernel, padding, (1, 1), rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)


def _direct(x: Array, kernel: Array, padding: Any, strides: tuple[int, int], **dilation: Any) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilation)


def _winograd_pays(shape: tuple[int, ...], features: int, dtype: Any) -> bool:
    batch, height, width, channels = shape
    even = height % 2 == width % 2 == 0
    wide = min(channels, features) >= WINOGRAD_CHANNELS and batch * height * width // 4 >= WINOGRAD_TILES
    return even and wide and dtype == jnp.float32


def _winograd(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"]) -> Float[Array, "B H W O"]:
    """The convolution of stride 1 that keeps the resolution."""
    height, width = x.shape[1:3]
    features = kernel.shape[3]
    rows = _combine(G.T, list(kernel))
    products = jnp.stack([product for row in rows for product in _combine(G.T, list(row))])  # [16, C, O]

    def convolve(images: Float[Array, "N H W C"]) -> Float[Array, "N H W O"]:
        tiles = jnp.einsum("ptc,pco->pto", _tiles(images), products)
        grid = tiles.reshape(4, 4, len(images), height // 2, width // 2, features)
        rows = _combine(A, [grid[i] for i in range(4)])
        pixels = [jnp.stack(_combine(A, [row[j] for j in range(4)]), axis=3) for row in rows]
        return jnp.stack(pixels, axis=2).reshape(len(images), height, width, features)

    parts = _parts(x, features)
    if parts == 1:
        return convolve(x)
    pieces = x.reshape(-1, parts, *x.shape[1:])  # every part with its share of each device's images

    def fill(i: Array, y: Array) -> Array:
        return y.at[:, i].set(convolve(pieces[:, i]))

    empty = jnp.zeros((*pieces.shape[:-1], features), x.dtype)
    return jax.lax.fori_loop(0, parts, fill, empty).reshape(*x.shape[:-1], features)


def _winograd_kernel_gradient(x: Float[Array, "B H W C"], dy: Float[Array, "B H W O"]) -> Float[Array, "3 3 C O"]:
    """Gradient of a function of `_winograd(x, kernel)` by the kernel."""
    channels, features = x.shape[3], dy.shape[3]

    def products(images: Array, dy: Array) -> Float[Array, "16 C O"]:
        rows = _combine(A.T, [dy[:, i::2] for i in range(2)])
        spread = [column for row in rows for column in _combine(A.T, [row[:, :, j::2] for j in range(2)])]
        return jnp.einsum("ptc,pto->pco", _tiles(images), jnp.stack(spread).reshape(16, -1, features))

    parts = _parts(x, features)
    if parts == 1:
        total = products(x, dy)
    else:
        x, dy = (array.reshape(-1, parts, *array.shape[1:]) for array in (x, dy))
        zero = jnp.zeros((16, channels, features), x.dtype)
        total = jax.lax.fori_loop(0, parts, lambda i, total: total + products(x[:, i], dy[:, i]), zero)
    rows = _combine(G, list(total.reshape(4, 4, channels, features)))
    return jnp.stack([jnp.stack(_combine(G, list(row))) for row in rows])


def _tiles(x: Float[Array, "B H W C"]) -> Float[Array, "16 T C"]:
    """B^T d B of every 4x4 tile d; tiles overlap by two pixels."""
    height, width, channels = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _combine(B, [x[:, i : i + height - 1 : 2] for i in range(4)])
    tiles = [tile for row in rows for tile in _combine(B, [row[:, :, j : j + width - 1 : 2] for j in range(4)])]
    return jnp.stack(tiles).reshape(16, -1, channels)


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """matrix^T parts, written out as sums, which are fused."""
    sums: list[Array] = []
    for column in matrix.T:
        terms = [part if factor == 1 else float(factor) * part for factor, part in zip(column, parts, strict=True) if factor]
        sums.append(sum(terms[1:], terms[0]))
    return sums


def _parts(x: Float[Array, "B H W C"], features: int) -> int:
    """Into how many parts to split the batch; a divisor of it."""
    batch, height, width, channels = x.shape
    image_bytes = 4 * height * width * (channels + features) * x.dtype.itemsize  # 16 values for each tile of 4 pixels
    return next(n for n in range(1, batch + 1) if batch % n == 0 and (batch // n * image_bytes <= CACHE_BYTES or n == batch))
