"""The mathematics is tested under strict dtype promotion; Flax and Optax themselves can't be."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield
