"""Inversion of DDIM: there and back, and against the exact probability flow."""

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
import reference
from test_solvers import exact

from ddpm_jax import invert, make_schedule, sample

GREY_LEVEL = 1 / 127.5
BETAS = reference.cosine_betas(1000)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("cosine", 1000)


@pytest.fixture(scope="module")
def images():
    return mixture.draw(np.random.default_rng(0), 200)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_inversion_then_sampling_returns_the_image(schedule, images, spacing):
    """To 2 grey levels of 255, the largest error of all numbers of all images."""
    x0 = jnp.asarray(images, jnp.float32)

    def there_and_back(x0):
        noise = invert(schedule, exact(schedule), x0, 200, spacing)
        return sample(jax.random.key(0), schedule, exact(schedule), x0.shape, "ddim", 200, spacing=spacing, x_init=noise)

    assert jnp.abs(jax.jit(there_and_back)(x0) - x0).max() <= 2 * GREY_LEVEL


def test_more_iterations_come_nearer(schedule, images):
    x0 = jnp.asarray(images, jnp.float32)

    def error(iterations):
        noise = invert(schedule, exact(schedule), x0, 200, iterations=iterations)
        back = sample(jax.random.key(0), schedule, exact(schedule), x0.shape, "ddim", 200, x_init=noise)
        return jnp.sqrt(jnp.mean((back - x0) ** 2))

    errors = [float(error(iterations)) for iterations in (1, 2, 4)]
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1]


def test_the_noise_is_that_of_the_exact_flow(schedule, images):
    """The inverse of a first-order method: twice the steps, half the distance; and nearly normal noise."""
    a, v = (coefficient[-1] for coefficient in reference.forward_kernels(BETAS))
    expected = mixture.flow(images, 1.0, 1e-9, a, np.sqrt(v))
    x0 = jnp.asarray(images, jnp.float32)
    distances = [
        np.sqrt(np.mean((np.asarray(invert(schedule, exact(schedule), x0, num_steps), np.float64) - expected) ** 2))
        for num_steps in (50, 100, 200)
    ]
    assert distances[0] / distances[1] > 1.7
    assert distances[1] / distances[2] > 1.7


@pytest.mark.parametrize(
    ("arguments", "message"), [({"iterations": 0}, "iterations = 0"), ({"num_steps": 1001}, "choose 1 to 1000")]
)
def test_bad_arguments(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        invert(schedule, exact(schedule), jnp.zeros((1, 2)), **arguments)
