"""3x3 convolutions for CPUs, for values and both gradients; elsewhere XLA's own are left alone.

Large convolutions of stride 1 are computed by algorithms that XLA's CPU compiler doesn't know. They give the same numbers
up to rounding:

- Values, and the gradient by the input, by Winograd's F(4, 3) along each row: with the matrices below, 6 pixels d of the
  input give 4 of the output,  y = A^T [(G g) * (B^T d)],  so a 3x3 kernel becomes six of 3x1 that work on a quarter of the
  pixels each, with half the multiplications (Winograd 1980; Lavin & Gray 2016, arXiv:1509.09308). In one dimension
  it moves less memory than in two, and the rounding stays below 1e-5 of the largest value.
- The gradient by the kernel, g[k, l] = sum over pixels of x shifted by (k, l) times dy, as one matrix product of x in its
  three horizontal shifts with dy in its three vertical ones; by F(2x2, 3x3) in two dimensions where channels are many.
  Both work on a few images at a time, so that what they write stays in the processor's cache.

The others are written as convolutions in the one layout that the compiler has a fast routine for. It rewrites those of
autodiff to that layout too, but not inside loops, where they would be tens of times slower.

`jax.jit` here marks what is traced once for each shape.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def toom_cook(num_outputs: int, points: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [P, outputs], G [P, 3], B [inputs, P] with  y[k] = sum over r of d[k + r] g[r] = A^T [(G g) * (B^T d)].

    G and A evaluate polynomials at P points, the last at infinity. B follows: its column p is all that is left to choose
    in  sum over p of A[p, k] G[p, r] B[m, p] = 1 where m = k + r, else 0.
    """
    a, g = (np.vstack([np.vander(points, n, increasing=True), np.eye(n)[-1:]]) for n in (num_outputs, 3))
    products = np.einsum("pk,pr->krp", a, g).reshape(-1, len(a))
    shifts = np.array([np.eye(num_outputs + 2)[k + r] for k in range(num_outputs) for r in range(3)])
    return a, g, np.linalg.lstsq(products, shifts)[0].round(12).T


A1, G1, B1 = toom_cook(4, (0.0, 0.75, -0.75, 1.5, -1.5))  # these points round half as much as 0, +-1, +-2
A2, G2, B2 = toom_cook(2, (0.0, 1.0, -1.0))

LARGE = 2e8
"""Operations above which the algorithms pay: below, XLA's own routine has its data in the cache anyway."""
MANY_CHANNELS = 128
"""Channels from which arithmetic, not memory, limits the gradient by the kernel, so that two dimensions pay."""
CACHE_BYTES = 2**22
"""What may be written between two passes over some images."""

SAME = ((1, 1), (1, 1))
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
        dx = _input_gradient(dy, kernel, (x.shape[1], x.shape[2]), padding, stride)
        # The rows and columns that dy covers once its pixels stand `stride` apart, and what is padded around x.
        spans = [(n - 1) * stride + 1 for n in dy.shape[1:3]]
        around_x = tuple(
            (low, 2 + span - size - low) for size, span, (low, _) in zip(x.shape[1:3], spans, padding, strict=True)
        )
        return dx, _kernel_gradient(x, dy, around_x, stride)

    conv.defvjp(forward, backward)
    return conv(x, kernel)


def _conv(x: Array, kernel: Array, padding: Any, stride: int = 1) -> Array:
    """The convolution of images with a kernel of 3x3 pixels or fewer."""
    is_same = stride == 1 and padding == SAME and kernel.shape[:2] == (3, 3)
    if is_same and x.shape[2] % 4 == 0 and _is_large(x, kernel.shape[3]):
        return _winograd(x, kernel)
    return _direct(x, kernel, padding, (stride, stride))


def _input_gradient(
    dy: Float[Array, "B H2 W2 O"], kernel: Float[Array, "3 3 C O"], size: tuple[int, int], padding: Padding, stride: int
) -> Float[Array, "B H W C"]:
    """dx[i] = sum of dy[j] kernel[k] where i = stride j + k - low, in rows and columns alike; size is (H, W).

    The pixels i = stride m + phase see every stride-th row k of the kernel, so those of each phase are a convolution of
    their own with a smaller kernel, and no zeros are multiplied.
    """
    kernel = _swap_channels(kernel)

    def phases(axis: int) -> list[tuple[slice, tuple[int, int]]]:
        """For each phase, its rows of the kernel from the last to the first, and the padding of dy."""
        found, (low, _) = [], padding[axis]
        length, covered = -(-size[axis] // stride), dy.shape[1 + axis]
        for phase in range(stride):
            rows = range((phase + low) % stride, 3, stride)
            before = (rows[-1] - phase - low) // stride  # from m to the first pixel of dy that it sees
            found.append((slice(rows[-1], None, -stride), (before, length - covered - before + len(rows) - 1)))
        return found

    pixels = [[_conv(dy, kernel[rows, columns], (y, x)) for columns, x in phases(1)] for rows, y in phases(0)]
    if stride == 1:
        return pixels[0][0]
    dx = jnp.stack([jnp.stack(row, axis=3) for row in pixels], axis=2)
    return dx.reshape(len(dy), dx.shape[1] * stride, dx.shape[3] * stride, -1)[:, : size[0], : size[1]]


def _swap_channels(kernel: Float[Array, "R 3 C O"]) -> Float[Array, "R 3 O C"]:
    """The kernel with its channels swapped; a wide one in a loop over its rows of pixels.

    Reading across an array's lines is slow, and what uses a loop's result is not fused with it: Winograd's sums would read
    every value so some five times, where the loop does it once.
    """
    if min(kernel.shape[2:]) < MANY_CHANNELS:
        return kernel.swapaxes(2, 3)
    return jax.lax.map(lambda row: row.swapaxes(1, 2), kernel)


def _kernel_gradient(x: Array, dy: Array, padding: Any, stride: int) -> Array:
    if stride == 1 and padding == SAME and _is_large(x, dy.shape[3]):
        even = x.shape[1] % 2 == x.shape[2] % 2 == 0
        wide = min(x.shape[3], dy.shape[3]) >= MANY_CHANNELS
        return _kernel_gradient_winograd(x, dy) if even and wide else _kernel_gradient_shifts(x, dy)
    images, kernel = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)  # channels as batch, batch as channels
    return _direct(images, kernel, padding, (1, 1), rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)


def _direct(x: Array, kernel: Array, padding: Any, strides: tuple[int, int], **dilation: Any) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilation)


def _is_large(x: Float[Array, "B H W C"], features: int) -> bool:
    return 18 * x.size * features >= LARGE and min(x.shape[3], features) >= 32 and x.dtype == jnp.float32


@jax.jit
def _winograd(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C O"]) -> Float[Array, "B H W O"]:
    """F(4, 3) along each row."""
    width = x.shape[2]
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    tiles = _combine(B1, [padded[:, :, i : i + width - 3 : 4] for i in range(6)])
    kernels = _combine(G1.T, [kernel[:, i] for i in range(3)])
    above_and_below = ((1, 1), (0, 0))
    products = [_direct(d, g[:, None], above_and_below, (1, 1)) for d, g in zip(tiles, kernels, strict=True)]
    return _combine_at_once(A1, products, axis=3).reshape(*x.shape[:3], -1)  # the four pixels of a tile beside each other


@jax.jit
def _kernel_gradient_shifts(x: Float[Array, "B H W C"], dy: Float[Array, "B H W O"]) -> Float[Array, "3 3 C O"]:
    (_, height, width, channels), features = x.shape, dy.shape[3]

    def products(x: Array, dy: Array) -> Float[Array, "3 3 C O"]:
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
        dy = jnp.pad(dy, ((0, 0), (1, 1), (0, 0), (0, 0)))
        columns = jnp.concatenate([x[:, :, i : i + width] for i in range(3)], axis=3)
        rows = jnp.concatenate([dy[:, 2 - i : 2 - i + height] for i in range(3)], axis=3)
        return jnp.einsum("bhwc,bhwo->co", columns, rows).reshape(3, channels, 3, features).transpose(2, 0, 1, 3)

    return _sum_over_parts(products, x, dy, 3 * height * width * (channels + features))


@jax.jit
def _kernel_gradient_winograd(x: Float[Array, "B H W C"], dy: Float[Array, "B H W O"]) -> Float[Array, "3 3 C O"]:
    """F(2x2, 3x3), transposed: G^T [(B^T d B) * (A dy A^T)] G, the tiles d of 4x4 pixels 2 apart."""
    (_, height, width, channels), features = x.shape, dy.shape[3]

    def products(x: Array, dy: Array) -> Float[Array, "16 C O"]:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = _combine_at_once(B2, [x[:, i : i + height - 1 : 2] for i in range(4)])
        tiles = _combine_at_once(B2, [rows[..., j : j + width - 1 : 2, :] for j in range(4)])
        rows = _combine_at_once(A2.T, [dy[:, i::2] for i in range(2)])
        spread = _combine_at_once(A2.T, [rows[..., j::2, :] for j in range(2)])
        return jnp.einsum("ptc,pto->pco", *(a.reshape(16, -1, a.shape[-1]) for a in (tiles, spread)))

    total = _sum_over_parts(products, x, dy, 2 * height * width * (channels + features))
    both = np.einsum("ik,jl->klji", G2, G2).reshape(9, 16)  # columns of pixels first, as in `tiles`
    return jnp.tensordot(jnp.asarray(both, x.dtype), total, 1).reshape(3, 3, channels, features)


def _sum_over_parts(
    function: Callable[[Array, Array], Array], x: Float[Array, "B H W C"], dy: Float[Array, "B H W O"], image_values: int
) -> Array:
    """function(x, dy), a sum over images, in as many parts of the batch as keep image_values each below CACHE_BYTES."""
    batch, image_bytes = len(x), image_values * x.dtype.itemsize
    # Each device sums over its own images; within the loop a sum over devices would be one for every part.
    shares = math.gcd(batch, jax.device_count())
    share = batch // shares
    parts = next(n for n in range(1, share + 1) if share % n == 0 and (share // n * image_bytes <= CACHE_BYTES or n == share))
    if parts == 1:
        return function(x, dy)
    x, dy = (array.reshape(shares, parts, share // parts, *array.shape[1:]) for array in (x, dy))
    by_share = jax.vmap(function)
    zero = jnp.zeros(jax.eval_shape(by_share, x[:, 0], dy[:, 0]).shape, x.dtype)
    return jax.lax.fori_loop(0, parts, lambda i, total: total + by_share(x[:, i], dy[:, i]), zero).sum(0)


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """matrix^T parts, written out as sums, which are fused."""
    sums: list[Array] = []
    for column in matrix.T:
        terms = [part if factor == 1 else float(factor) * part for factor, part in zip(column, parts, strict=True) if factor]
        sums.append(sum(terms[1:], terms[0]))
    return sums


def _combine_at_once(matrix: np.ndarray, parts: Sequence[Float[Array, "..."]], axis: int = 0) -> Float[Array, "..."]:
    """matrix^T parts along a new axis, as one sum, zeros too.

    It is a fraction of the code, to compile and to hold as long as the program, and is vectorised, which a fusion with a
    concatenation in it is not.
    """
    factors = [jnp.expand_dims(row, [n for n in range(parts[0].ndim + 1) if n != axis]) for row in matrix]
    terms = [jnp.expand_dims(part, axis) * factor.astype(part.dtype) for part, factor in zip(parts, factors, strict=True)]
    return sum(terms[1:], terms[0])
