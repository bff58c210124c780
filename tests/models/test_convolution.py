"""The convolutions for CPUs against the sum that defines a convolution, in float64, and against the compiler's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import convolution
from ddpm_jax.models.convolution import conv3x3_cpu, conv_general_dilated_cpu, toom_cook
from ddpm_jax.parallel import batch_sharding, make_mesh, replicated

SAME, LOW = ((1, 1), (1, 1)), ((0, 1), (0, 1))

# (batch, height, width, channels, features): direct, rows by Winograd, also both axes, in parts, odd, narrow, single images
SHAPES = [(2, 6, 4, 3, 5), (4, 8, 8, 32, 64), (4, 8, 8, 128, 128), (6, 7, 12, 64, 32), (2, 7, 9, 64, 64), (1, 16, 16, 64, 64)]


def draw(shape, seed=0):
    batch, height, width, channels, features = shape
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (batch, height, width, channels))
    return x, jax.random.normal(keys[1], (3, 3, channels, features))


def reference(x, kernel, stride, padding):
    """y[b, i, j, o] = sum over k, l, c of x[b, s i + k - p, s j + l - p, c] kernel[k, l, c, o], and its gradients by dy = y."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((n - 3) // stride + 1 for n in padded.shape[1:3])
    windows = {}
    for k in range(3):
        for i in range(3):
            last_row, last_column = k + stride * (rows - 1) + 1, i + stride * (columns - 1) + 1
            windows[k, i] = (slice(None), slice(k, last_row, stride), slice(i, last_column, stride))
    y = sum(padded[window] @ kernel[place] for place, window in windows.items())
    dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for place, window in windows.items():
        dx[window] += y @ kernel[place].T
        dkernel[place] = np.einsum("bijc,bijo->co", padded[window], y)
    (top, _), (left, _) = padding
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def results(conv, x, kernel):
    """Value, and the gradients of half its square."""
    y, vjp = jax.vjp(conv, x, kernel)
    return y, *vjp(y)


def assert_close(got, expected):
    """Relative 1e-5 of the largest entry: sums of terms of both signs are as precise as their terms, not as their result."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    """What is kept for large convolutions is tried on small ones, in parts."""
    monkeypatch.setattr(convolution, "LARGE", 1e5)
    set_parts(monkeypatch, 2**18)


def set_parts(monkeypatch, limit):
    """Parts of so many bytes; what was traced with others is forgotten."""
    monkeypatch.setattr(convolution, "CACHE_BYTES", limit)
    jax.clear_caches()


@pytest.mark.parametrize(("stride", "padding"), [(1, SAME), (2, LOW), (2, SAME), (1, LOW)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_both_gradients(shape, stride, padding):
    x, kernel = draw(shape)
    got = results(lambda x, kernel: conv3x3_cpu(x, kernel, stride, padding), x, kernel)
    assert all(array.dtype == jnp.float32 for array in got)
    assert_close(got, reference(x, kernel, stride, padding))


ALGORITHMS = ("_direct", "_winograd", "_kernel_gradient_shifts", "_kernel_gradient_winograd")


def test_the_shapes_cover_every_algorithm_and_parts(monkeypatch):
    used = set()

    def spy(name, function):
        def call(*args, **options):
            used.add(name)
            return function(*args, **options)

        return call

    for name in ALGORITHMS:
        monkeypatch.setattr(convolution, name, spy(name, getattr(convolution, name)))
    monkeypatch.setattr(jax.lax, "fori_loop", spy("parts", jax.lax.fori_loop))
    for shape in SHAPES:
        x, kernel = draw(shape)
        jax.eval_shape(lambda x, kernel: results(lambda x, kernel: conv3x3_cpu(x, kernel, 1, SAME), x, kernel), x, kernel)
    assert used == {*ALGORITHMS, "parts"}


@pytest.mark.parametrize("points", [(0.0, 1.0, -1.0), (0.0, 0.75, -0.75, 1.5, -1.5)], ids=str)
def test_toom_cook_correlates(points):
    a, g, b = toom_cook(len(points) - 1, points)
    rng = np.random.default_rng(0)
    d, kernel = rng.normal(size=len(points) + 1), rng.normal(size=3)
    assert np.allclose(a.T @ ((g @ kernel) * (b.T @ d)), np.correlate(d, kernel, "valid"), rtol=0, atol=1e-10)


def test_the_same_numbers_as_the_compilers_own():
    x, kernel = draw((8, 16, 16, 128, 128))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}
    plain = results(lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), SAME, **options), x, kernel)
    ours = results(lambda x, kernel: conv_general_dilated_cpu(x, kernel, (1, 1), SAME, **options), x, kernel)
    assert_close(ours, plain)


@pytest.mark.parametrize("channels", [32, 128])
def test_devices_are_summed_over_once(channels, monkeypatch):
    """A sum over devices within the loop over parts would come once for every part, and two loops could wait for each other."""
    set_parts(monkeypatch, 2**16)
    mesh = make_mesh(jax.devices()[:8])
    x = jax.ShapeDtypeStruct((32, 8, 8, channels), jnp.float32, sharding=batch_sharding(mesh))
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32, sharding=replicated(mesh))
    gradient = jax.grad(lambda kernel, x: jnp.sum(conv3x3_cpu(x, kernel, 1, SAME) ** 2))
    computations = jax.jit(gradient).lower(kernel, x).compile().as_text().split("\n\n")
    assert sum(" while(" in text for text in computations) > 0
    assert ["ENTRY" in text for text in computations if " all-reduce(" in text] == [True]
    assert sum(text.count(" all-reduce(") for text in computations) == 1


def test_bfloat16_is_left_to_the_compiler():
    x, kernel = (array.astype(jnp.bfloat16) for array in draw((4, 8, 8, 64, 64)))
    got = results(lambda x, kernel: conv3x3_cpu(x, kernel, 1, SAME), x, kernel)
    assert all(array.dtype == jnp.bfloat16 for array in got)
    expected = reference(x, kernel, 1, SAME)[0]
    assert np.abs(np.asarray(got[0], np.float64) - expected).max() <= 2**-7 * np.abs(expected).max()


def test_under_vmap_and_in_a_loop():
    """Autodiff's own convolutions are slow in loops on a CPU; these are made to be used there."""
    x, kernel = draw((4, 8, 8, 64, 64))

    def gradient(kernel):
        return jax.grad(lambda kernel: jnp.sum(jnp.square(conv3x3_cpu(x, kernel, 1, SAME))) / 2)(kernel)

    expected = reference(x, kernel, 1, SAME)[2]
    kernels = jnp.stack([kernel, kernel])
    assert_close([jax.lax.map(gradient, kernels)[1], jax.vmap(gradient)(kernels)[0]], [expected, expected])
