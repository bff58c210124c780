"""Feature networks: as many parameters as are published of them, and the details that set FID's Inception apart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models.dinov2 import DINOv2
from ddpm_jax.models.efficientnet import Depthwise, EfficientNetLite0, same_padding
from ddpm_jax.models.inception import InceptionV3, mean3x3


def parameters(network, side):
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def count(tree, twice=()):
    """Numbers in a tree; biases that stand for scale and shift of a batch norm count twice."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(leaf.size * (2 if place[-1].key in twice else 1) for place, leaf in leaves)


def test_inception():
    """23,834,568 parameters in torchvision (without the auxiliary classifier), 2,049,000 of them in its last layer."""
    params = parameters(InceptionV3(), 299)
    classes = params.pop("fc")
    assert count(params, twice=("bias",)) == 23_834_568 - 2_049_000
    assert classes["kernel"].shape == (2048, 1008)


def test_efficientnet():
    """4,652,008 parameters, 1,281,000 of them in the classifier that is left out."""
    assert count(parameters(EfficientNetLite0(), 112), twice=("bias",)) == 4_652_008 - 1_281_000


def test_dinov2():
    """304,368,640 parameters for images of 518x518, with 37x37 + 1 positions and a token for masks."""
    assert count(parameters(DINOv2(), 224)) == 304_368_640 - (37 * 37 - 16 * 16) * 1024 - 1024


def test_what_inception_gives():
    images = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    params = {"params": parameters(InceptionV3(), 299)}
    found = jax.eval_shape(InceptionV3().apply, params, images)
    assert {name: output.shape for name, output in found._asdict().items()} == {
        "pool": (2, 2048), "spatial": (2, 17 * 17 * 7), "logits": (2, 1008),
    }  # fmt: skip


def test_means_count_pixels_of_the_image_alone():
    image = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    found = mean3x3(jnp.asarray(image))
    for i in range(4):
        for j in range(5):
            window = image[0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            np.testing.assert_allclose(found[0, i, j], window.mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 8), (14, 5)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_is_a_grouped_convolution(shape, size, stride):
    """Against XLA's, with TensorFlow's own padding."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape, 6)), jnp.float32)
    network = Depthwise(size, stride)
    variables = network.init(jax.random.key(0), x)
    peer = nn.Conv(6, (size, size), stride, "SAME", feature_group_count=6)
    np.testing.assert_allclose(network.apply(variables, x), peer.apply(variables, x), rtol=1e-5, atol=1e-6)
    assert same_padding(x, size, stride) == tuple(jax.lax.padtype_to_pads(shape, (size, size), (stride, stride), "SAME"))
