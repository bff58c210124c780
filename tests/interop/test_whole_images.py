"""Images that diffusers' pipelines draw with networks of ours, and ours from the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
from helpers import load_script
from peers import diffusers, torch

import ddpm_jax as ddpm
from ddpm_jax.inference import to_uint8
from ddpm_jax.interop.diffusers import write_folder

pytestmark = peers.MARKS


def test_fifty_steps_of_ddim_draw_the_same_image(tmp_path):
    """To one grey level. The pipeline clips x0 as ours does, and takes the eps that fits it where it is asked to.

    The network predicts v: of a random one that predicts eps nearly every pixel ends in black or white, and tells nothing.
    """
    given = peers.OUR_SMALL | {"diffusion.prediction": "v", "sample.spacing": "trailing"}
    model = peers.our_model(ddpm.config.override(ddpm.Config(), given))
    write_folder(tmp_path, model.config, model.params, "a card")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        4, torch.Generator().manual_seed(0), num_inference_steps=50, use_clipped_model_output=True, output_type="np"
    ).images

    x_init = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).permute(0, 2, 3, 1).numpy()
    denoiser = ddpm.make_denoiser(model.schedule, model.network_fn, "v")
    images = ddpm.sample(
        jax.random.key(0), model.schedule, denoiser, x_init.shape, "ddim", 50, spacing="trailing", x_init=jnp.asarray(x_init)
    )
    found, expected = np.asarray(to_uint8(images)).astype(int), np.round(expected * 255).astype(int)
    assert np.mean((expected > 5) & (expected < 250)) > 0.5
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found == expected) > 0.95


def test_sample_py_draws_from_a_folder_of_diffusers(tmp_path):
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    network = peers.unet(peers.SMALL | blocks | {"block_out_channels": [16]})
    folder = peers.save_pipeline(tmp_path / "theirs", network, prediction_type="v_prediction")
    options = ["--sampler", "dpmpp_2m", "--num-steps", "3", "--num-images", "2", "--seed", "5"]
    load_script("sample.py").main(["--ckpt", str(folder), "--out", str(tmp_path / "images.npz"), *options])
    with np.load(tmp_path / "images.npz") as file:
        np.testing.assert_array_equal(file["images"], ddpm.load(folder).sample(2, 5, "dpmpp_2m", 3))
