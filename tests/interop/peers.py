"""Networks of diffusers with random weights, their folders and their outputs, and ours beside them.

A module that imports this is skipped where PyTorch or diffusers is missing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax as ddpm
from ddpm_jax import inference
from ddpm_jax.interop.diffusers import write_folder
from ddpm_jax.parallel import put
from ddpm_jax.validation import config_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

MARKS = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # what PyTorch and diffusers say of themselves
]
CLOSE = 2e-5
"""How far outputs may differ, relative to the largest of them; float32."""
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

ATTENTION_BELOW = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SMALL = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1} | ATTENTION_BELOW
"""Settings of a small network, those of diffusers' defaults in its details."""
OUR_SMALL = {
    "data.image_shape": (8, 8, 3), "model.channels": 16, "model.multipliers": (1, 2), "model.num_groups": 8,
    "model.num_res_blocks": 1, "model.attention_resolutions": (4,),
}  # fmt: skip
"""Fields of the config of a small network of ours."""
OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def randomise(module, seed=0):
    """Random weights, none of them near 0: a layer that is left out, or at another place, shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in module.parameters():
            scale, shift = (weights[0].numel() ** -0.5, 0.0) if weights.ndim > 1 else (0.3, 0.5)
            weights.copy_(torch.randn(weights.shape, generator=generator) * scale + shift)
    return module.eval()


def unet(settings, seed=0):
    """A UNet2DModel with random weights."""
    torch.set_num_threads(1)
    return randomise(diffusers.UNet2DModel(**settings), seed)


def renamed(state):
    """A state dict with the names that attention layers had until 2023."""
    for new, old in OLD_NAMES.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


def save_pipeline(folder, network, **process):
    """Write a network's pipeline as diffusers does; `process` are settings of its DDPMScheduler."""
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**process)).save_pretrained(folder)
    return folder


def our_model(config, seed=0):
    """A model of ours with random weights, none of them near 0."""
    mesh, rng = inference.local_mesh(), np.random.default_rng(seed)

    def weights(leaf):
        numbers = rng.standard_normal(leaf.shape, np.float32)
        scaled = numbers * np.float32(np.prod(leaf.shape[:-1]) ** -0.5) if leaf.ndim > 1 else 0.3 * numbers + 0.5
        return put(np.asarray(scaled, np.float32), leaf.sharding)

    params = jax.tree.map(weights, inference.abstract_params(config, mesh))
    return inference.Model(config, params, config_schedule(config), 7, "ema", mesh)


def inputs(height, width, channels, num_classes=None, batch=2):
    """Noisy images, timesteps and classes: the same numbers for the same shapes."""
    rng = np.random.default_rng(0)
    xt = rng.standard_normal((batch, height, width, channels)).astype(np.float32)
    return xt, np.array([3, 977, 500])[:batch], None if num_classes is None else rng.integers(0, num_classes, batch)


def their_outputs(network, xt, t, labels=None):
    """[B, H, W, C] of a network of theirs."""
    labels = None if labels is None else torch.tensor(labels)
    with torch.no_grad():
        output = network(torch.tensor(xt).permute(0, 3, 1, 2), torch.tensor(t), labels)
    return getattr(output, "sample", output).permute(0, 2, 3, 1).numpy()


def our_outputs(model, xt, t, labels=None):
    """[B, H, W, C] of a model of ours."""
    labels = None if labels is None else jnp.asarray(labels, jnp.int32)
    return np.asarray(model.network_fn(jnp.asarray(xt), jnp.asarray(t, jnp.int32), labels))


def check_close(found, expected):
    """Whether outputs agree to CLOSE, and are not such that anything would."""
    assert found.shape == expected.shape
    assert np.isfinite(expected).all() and expected.std() > 0.1 * np.abs(expected).max() > 0
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def check_here(folder, theirs, given):
    """Whether the network of a folder gives here what it gives there; the model of it."""
    model = ddpm.load(folder)
    check_close(our_outputs(model, *given), their_outputs(theirs, *given))
    return model


def check_there(out, model, given):
    """Whether a model of ours, written into a folder, gives there what it gives here; the pipeline of that folder."""
    write_folder(out, model.config, model.params, "a card")
    pipeline = diffusers.DDPMPipeline.from_pretrained(out)
    check_close(their_outputs(pipeline.unet, *given), our_outputs(model, *given))
    return pipeline


def check_same(found, expected):
    """Whether two trees of weights are the same to the bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))
