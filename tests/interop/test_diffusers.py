"""Networks of diffusers here and ours there: the same outputs, and the same bytes after going there and back."""

import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax as ddpm
from ddpm_jax.interop.diffusers import write_folder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # what PyTorch and diffusers say of themselves
]

ATTENTION_BELOW = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
NETWORKS = {
    "diffusers' defaults": {"sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8} | ATTENTION_BELOW,
    "Ho et al.": {
        "sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "freq_shift": 1,
        "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None, "norm_eps": 1e-6,
    } | ATTENTION_BELOW,
}  # fmt: skip


@pytest.fixture(scope="module", params=NETWORKS)
def peer(request, tmp_path_factory):
    """A network with random weights, none of them near 0, and the folder of its pipeline."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = diffusers.UNet2DModel(**NETWORKS[request.param]).eval()
    with torch.no_grad():
        for weights in network.parameters():
            scale, shift = (weights[0].numel() ** -0.5, 0.0) if weights.ndim > 1 else (0.3, 0.5)
            weights.copy_(torch.randn_like(weights) * scale + shift)
    folder = tmp_path_factory.mktemp("peer")
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder)
    return network, folder


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32), np.array([3, 977])


def outputs(network, images):
    xt, t = images
    with torch.no_grad():
        return network(torch.tensor(xt).permute(0, 3, 1, 2), torch.tensor(t)).sample.permute(0, 2, 3, 1).numpy()


def test_their_network_gives_the_same_outputs_here(peer, images):
    network, folder = peer
    expected = outputs(network, images)
    model = ddpm.load(folder)
    found = np.asarray(model.network_fn(jnp.asarray(images[0]), jnp.asarray(images[1], jnp.int32)))
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_there_and_back_again_it_is_the_same_to_the_byte(peer, images, tmp_path):
    network, folder = peer
    model = ddpm.load(folder)
    write_folder(tmp_path / "ours", model.config, model.params, "a card")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes()
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(outputs(pipeline.unet, images), outputs(network, images))
