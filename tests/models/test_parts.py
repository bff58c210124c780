"""Into how many parts a CPU divides a batch."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.config import ModelConfig
from ddpm_jax.models import count_parts, init_params, make_unet, parts

MIB = 2**20


def weights(mib):
    """The shape of an array of so many MiB."""
    return {"kernel": jax.ShapeDtypeStruct((round(mib * MIB / 4),), jnp.float32)}


@pytest.mark.parametrize(
    ("channels", "size", "options", "mib", "batch", "expected"),
    [
        (32, 32, {}, 6, 64, 8),  # 128 KiB an image: eight take 1 MiB
        (32, 32, {}, 6, 20, 2),  # of 10 images; 4 parts of 5 would be too small
        (32, 32, {}, 6, 67, 1),  # a prime number can't be divided
        (32, 32, {"dtype": "bfloat16"}, 6, 64, 4),
        (32, 28, {"space_to_depth": 2}, 2.5, 16, 1),  # 24.5 KiB an image: all sixteen take less than 1 MiB
        (32, 28, {"space_to_depth": 2}, 2.5, 128, 2),
        (128, 32, {}, 136, 8, 1),  # 512 KiB an image, and the weights ask for 3.4 MiB: seven images
        (128, 32, {}, 136, 128, 16),
        (128, 256, {}, 434, 4, 4),  # 32 MiB an image
        (32, 32, {}, 6, 1, 1),
    ],
)
def test_number_of_parts(channels, size, options, mib, batch, expected):
    assert count_parts(ModelConfig(channels=channels, **options), weights(mib), (size, size, 3), batch) == expected


def test_the_weights_are_those_of_a_network():
    config = ModelConfig()  # 35.7 million: 136 MiB
    params = jax.eval_shape(lambda: init_params(make_unet(config, 3), 0, (32, 32, 3)))
    assert count_parts(config, params, (32, 32, 3), 128) == 16


def test_accelerators_take_a_batch_as_a_whole(monkeypatch):
    monkeypatch.setattr(parts, "on_cpu", lambda: False)
    assert count_parts(ModelConfig(), weights(1), (64, 64, 3), 128) == 1


@given(st.integers(1, 300), st.sampled_from([8, 16, 32, 64]), st.sampled_from([8, 32, 128]), st.sampled_from([0.1, 10, 500]))
def test_parts_are_the_smallest_that_are_large_enough(batch, size, channels, mib):
    """Divisors tried one by one, the parts' sizes in MiB."""
    count = count_parts(ModelConfig(channels=channels), weights(mib), (size, size, 3), batch)

    def enough(number):
        taken = batch / number * size * size * channels * 4 / MIB
        return taken >= 1 and taken * 40 >= mib

    larger = [number for number in range(count + 1, batch + 1) if batch % number == 0]
    assert batch % count == 0
    assert count == 1 or enough(count)
    assert not any(enough(number) for number in larger)
