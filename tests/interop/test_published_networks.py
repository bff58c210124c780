"""The networks that google/ddpm-cifar10-32 and google/ddpm-celebahq-256 publish, in files like those that they publish."""

import dataclasses
import json

import peers
from helpers import ROOT
from peers import check_same, diffusers, torch

import ddpm_jax as ddpm
from ddpm_jax.config import flatten
from ddpm_jax.interop.diffusers import write_folder
from ddpm_jax.models import num_params

pytestmark = peers.MARKS

HO = {
    "act_fn": "silu", "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "time_embedding_type": "positional",
}  # fmt: skip
CIFAR10 = HO | {
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "sample_size": 32,
}
CELEBAHQ = HO | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    "sample_size": 256,
}
PROCESS = {
    "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000,
    "trained_betas": None,
}  # fmt: skip


def publish(folder, network, settings, variance):
    """A repository of google/ddpm-*: all files in one folder, weights as a pickle with the old names of attention layers."""
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    parts = {
        "model_index": {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1", **index},
        "config": {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", **settings},
        "scheduler_config": {
            "_class_name": "DDPMScheduler",
            "_diffusers_version": "0.1.1",
            **PROCESS,
            "variance_type": variance,
        },
    }
    for name, values in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2))
    torch.save(peers.renamed(network.state_dict()), folder / "diffusion_pytorch_model.bin")


def compare(folder, description, variance, size, count):
    """Publish a network of theirs and compare it with what is read here; it, the model and the inputs."""
    theirs = peers.unet(description)
    publish(folder, theirs, description, variance)
    given = peers.inputs(size, size, 3, batch=1)
    model = peers.check_here(folder, theirs, given)
    assert num_params(model.params) == sum(weights.numel() for weights in theirs.parameters()) == count
    return theirs, model, given


def sections(config, *names):
    return {name: value for name, value in flatten(config).items() if name.partition(".")[0] in names}


def test_the_cifar10_network_is_the_same_here_and_there(tmp_path):
    """At its full width. Read from the files as they are published, it is the network and the process of configs/cifar10.py."""
    theirs, model, given = compare(tmp_path, CIFAR10, "fixed_large", 32, 35_746_307)

    ours = ddpm.load_config(ROOT / "configs" / "cifar10.py")
    expected = sections(ours, "model", "diffusion") | {"model.dropout": 0.0, "diffusion.label_dropout": 0.0}
    assert sections(model.config, "model", "diffusion") == expected
    assert model.config.sample == ours.sample and model.config.data.image_shape == (32, 32, 3)

    peers.check_there(tmp_path / "ours", model, given)
    theirs.save_pretrained(tmp_path / "theirs")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "ours" / "unet" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_cifar10_model_goes_to_diffusers_and_back_unchanged(tmp_path):
    """35.7M weights of configs/cifar10.py, written here, read and written there, read here again, have the same bits."""
    config = ddpm.load_config(ROOT / "configs" / "cifar10.py")
    model = peers.our_model(config)
    write_folder(tmp_path / "ours", config, model.params, "a card")
    diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = ddpm.load(tmp_path / folder)
        check_same(back.params, model.params)
        assert back.config.model == config.model and back.config.sample == config.sample
        assert sections(back.config, "diffusion") == sections(config, "diffusion") | {"diffusion.label_dropout": 0.0}


def test_the_256_pixel_network_is_the_same_here_and_there(tmp_path):
    """At its full width, of images of 256x256."""
    _, model, given = compare(tmp_path, CELEBAHQ, "fixed_small", 256, 113_673_219)

    full = ddpm.load_config(ROOT / "configs" / "celebahq256.py").model
    assert model.config.model == dataclasses.replace(full, dropout=0.0, remat=False)
    peers.check_there(tmp_path / "ours", model, given)
