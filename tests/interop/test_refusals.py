"""What can't be represented, read or trusted in a folder of diffusers is refused in one line that names it."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
import safetensors.numpy
import torch_writer
from helpers import load_script, one_line_error
from peers import diffusers

import ddpm_jax as ddpm
from ddpm_jax import cli
from ddpm_jax.config import override
from ddpm_jax.interop.diffusers import write_folder

pytestmark = peers.MARKS

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return peers.save_pipeline(tmp_path_factory.mktemp("good"), peers.unet(peers.SMALL))


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def change(path, values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"time_embedding_type": "fourier"}, ["time_embedding_type = fourier", "positional"]),
        ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, ["time_embedding_type = learned"]),
        ({"time_embedding_dim": 100}, ["time_embedding_dim = 100", "64"]),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, ["down_block_types", "SkipDownBlock2D"]),
        ({"down_block_types": ["DownBlock2D", "AttnSkipDownBlock2D"]}, ["down_block_types", "AttnSkipDownBlock2D"]),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, ["ResnetDownsampleBlock2D has no counterpart"]),
        ({"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"]}, ["up_block_types", "ResnetUpsampleBlock2D"]),
        ({"up_block_types": ["DownBlock2D", "UpBlock2D"]}, ["up_block_types", "DownBlock2D has no counterpart"]),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, ["up_block_types", "at the levels at which down_block_types"]),
        ({"down_block_types": ["DownBlock2D"]}, ["down_block_types", "one for each of block_out_channels"]),
        ({"down_block_types": None}, ["down_block_types = None"]),
        ({"downsample_type": "resnet"}, ["downsample_type = resnet", "only conv"]),
        ({"upsample_type": "resnet"}, ["upsample_type = resnet", "only conv"]),
        ({"downsample_padding": 2}, ["downsample_padding = 2", "0 and 1"]),
        ({"center_input_sample": True}, ["center_input_sample = True"]),
        ({"act_fn": "gelu"}, ["act_fn = gelu", "silu"]),
        ({"mid_block_type": None}, ["mid_block_type = None", "UNetMidBlock2D"]),
        ({"mid_block_scale_factor": 1.4}, ["mid_block_scale_factor = 1.4"]),
        ({"resnet_time_scale_shift": "spatial"}, ["resnet_time_scale_shift = spatial"]),
        ({"resnet_time_scale_shift": "scale_shift"}, ["attn_norm_num_groups = None", "without its norm"]),
        ({"attn_norm_num_groups": 4}, ["attn_norm_num_groups = 4", "8"]),
        ({"class_embed_type": "timestep"}, ["class_embed_type = timestep"]),
        ({"num_class_embeds": 3}, ["'class_embedding.weight' is missing"]),
        ({"num_class_embeds": -3}, ["num_class_embeds = -3"]),
        ({"num_class_embeds": 2**70}, ["num_class_embeds = 1180591620717411303424"]),
        ({"block_out_channels": [16, 24]}, ["block_out_channels = [16, 24]", "multiples"]),
        ({"block_out_channels": [16, 64]}, ["has the shape", "doesn't fit its config"]),
        ({"block_out_channels": [16.0, 32]}, ["block_out_channels = 16.0", "whole number"]),
        ({"block_out_channels": []}, ["block_out_channels = []"]),
        ({"out_channels": 4}, ["out_channels = 4", "in_channels = 3"]),
        ({"out_channels": 6}, ["out_channels = 6", "variance_type"]),
        ({"in_channels": True}, ["in_channels = True"]),
        ({"attention_head_dim": 5}, ["head_channels = 5 doesn't divide the 32 channels"]),
        ({"attention_head_dim": "8"}, ["attention_head_dim = 8", "whole number"]),
        ({"norm_num_groups": None}, ["norm_num_groups = None"]),
        ({"norm_eps": float("nan")}, ["model.norm_eps = nan"]),
        ({"freq_shift": 0.5}, ["model.frequency_shift = 0.5"]),
        ({"freq_shift": 8}, ["model.frequency_shift = 8"]),
        ({"dropout": "a little"}, ["model.dropout = 'a little'"]),
        ({"layers_per_block": 2}, ["is missing"]),
        ({"layers_per_block": 10**6}, ["fewer than its config has blocks"]),
        ({"sample_size": None}, ["sample_size = None", "height"]),
        ({"sample_size": [8, 8, 8]}, ["sample_size = [8, 8, 8]"]),
        ({"sample_size": 9}, ["9x9", "halved"]),
        ({"sample_size": 2**70}, ["sample_size = 1180591620717411303424"]),
        ({"a_new_setting": 3}, ["a_new_setting = 3", "no such setting is known"]),
        ({"_class_name": "UNet2DConditionModel"}, ["only a UNet2DModel", "UNet2DConditionModel"]),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_networks_without_a_counterpart(folder, values, fragments):
    change(folder / UNET, values)
    one_line_error(ddpm.load, folder, fragments=[str(folder), *fragments])


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"_class_name": "PNDMScheduler"}, ["_class_name = PNDMScheduler", "DDIMScheduler"]),
        ({"_class_name": ["DDPMScheduler"]}, ["scheduler_config.json", "a type that it can't have"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule = sigmoid", "squaredcos_cap_v2"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas"]),
        ({"trained_betas": "many"}, ["trained_betas"]),
        ({"beta_start": "0.0001"}, ["beta_start = 0.0001", "a number"]),
        ({"beta_end": 2.0}, ["diffusion.beta_end = 2.0"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps = 0"]),
        ({"num_train_timesteps": 10**12}, ["num_train_timesteps = 1000000000000"]),
        ({"prediction_type": "flow_prediction"}, ["prediction_type = flow_prediction", "epsilon"]),
        ({"variance_type": "learned"}, ["variance_type = learned", "learned_range"]),
        ({"variance_type": "learned_range"}, ["out_channels = 3", "twice as many"]),
        ({"thresholding": True, "sample_max_value": 1.5}, ["sample_max_value = 1.5"]),
        ({"clip_sample_range": 2.0}, ["clip_sample_range = 2.0"]),
        ({"timestep_spacing": "quadratic"}, ["timestep_spacing = quadratic"]),
        ({"rescale_betas_zero_snr": True}, ["zero_terminal_snr"]),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False}, ["set_alpha_to_one = False"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, ["solver_order = 3", "only 2"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, ["algorithm_type"]),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, ["use_karras_sigmas = True"]),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, ["solver_type = bh1"]),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, ["disable_corrector = [0]"]),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_processes_without_a_counterpart(folder, values, fragments):
    change(folder / SCHEDULER, values)
    one_line_error(ddpm.load, folder, fragments=[str(folder), *fragments])


def test_a_pipeline_that_has_more_than_a_network(folder):
    """Such as one of latent diffusion, whose network is a UNet2DModel too."""
    change(folder / INDEX, {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]})
    one_line_error(ddpm.load, folder, fragments=["model_index.json", "'vqvae'"])


@pytest.mark.parametrize("name", [UNET, SCHEDULER, INDEX])
@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'{"a": 1,}', b"[]", b"3", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\x80\x04K\x01."],
    ids=["empty", "open", "comma", "list", "number", "bytes", "deep", "long", "pickle"],
)
def test_json_that_is_none(folder, name, text):
    (folder / name).write_bytes(text)
    one_line_error(ddpm.load, folder, fragments=[Path(name).name, "can't be read"])


@pytest.mark.parametrize("name", [UNET, SCHEDULER, "unet", "scheduler", peers.WEIGHTS])
def test_what_is_not_there(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    fragments = ["no weights in"] if name == peers.WEIGHTS else ["config.json can't be read", "No such file"]
    one_line_error(ddpm.load, folder, fragments=fragments)


def test_neither_a_folder_of_diffusers_nor_a_run(tmp_path):
    one_line_error(ddpm.load, tmp_path / "none", fragments=["no checkpoint", "no such folder"])
    one_line_error(ddpm.load, tmp_path, fragments=["no checkpoint"])


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_weights(folder, share):
    data = (folder / peers.WEIGHTS).read_bytes()
    (folder / peers.WEIGHTS).write_bytes(data[: int(share * len(data))])
    one_line_error(ddpm.load, folder, fragments=["safetensors can't be read"])


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}."],
    ids=["bytes", "huge header", "pointer", "pickle"],
)
def test_weights_that_are_none(folder, data):
    (folder / peers.WEIGHTS).write_bytes(data)
    one_line_error(ddpm.load, folder, fragments=["safetensors can't be read"])


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), "'conv_in.bias' is missing"),
        (lambda tensors: tensors.update(more=np.zeros(3, np.float32)), "'more' has no place"),
        (lambda tensors: tensors.update({"conv_in.bias": np.zeros(3, np.float32)}), "'conv_in.bias' has the shape (3,)"),
        (lambda tensors: tensors.update({"conv_in.bias": np.zeros(16, np.int32)}), "'conv_in.bias' holds int32"),
        (lambda tensors: tensors.update({"conv_in.weight": np.zeros((), np.float32)}), "'conv_in.weight' has the shape ()"),
    ],
    ids=["missing", "more", "shape", "type", "scalar"],
)
def test_tensors_that_do_not_fit(folder, alter, reason):
    tensors = safetensors.numpy.load_file(folder / peers.WEIGHTS)
    alter(tensors)
    safetensors.numpy.save_file(tensors, folder / peers.WEIGHTS)
    one_line_error(ddpm.load, folder, fragments=["safetensors", reason])


def plant(folder):
    """Put a program in the place of the weights; the file that would be there, had it run."""
    canary = folder / "canary"
    program = torch_writer.hostile("conv_in.weight", torch_writer.Executed(canary))
    (folder / peers.WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(torch_writer.archive(program))
    return canary


def spoil(folder, how):
    if how == "network":
        change(folder / UNET, {"time_embedding_type": "fourier"})
    elif how == "json":
        (folder / UNET).write_text("{")
    elif how == "truncated":
        (folder / peers.WEIGHTS).write_bytes((folder / peers.WEIGHTS).read_bytes()[:1000])
    elif how == "missing":
        (folder / peers.WEIGHTS).unlink()


@pytest.fixture
def program(monkeypatch, capsys):
    """A command line of ours, by which its exit status and what it writes to stderr are known."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "log_to_terminal", lambda: None)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run(load_script(name).main)
        return end.value.code, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("how", ["network", "json", "truncated", "missing", "hostile"])
@pytest.mark.parametrize("name", ["export.py", "sample.py"])
def test_the_command_lines_end_with_one_line(folder, tmp_path, program, name, how):
    canary = plant(folder) if how == "hostile" else spoil(folder, how)
    status, errors = program(name, "--ckpt", folder, "--out", tmp_path / "out")
    assert status == 2
    assert re.fullmatch(r"error: [^\n]+\n", errors) and "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert how != "hostile" or not canary.exists()


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"model.space_to_depth": 2}, ["model.space_to_depth = 2"]),
        ({"model.multipliers": (2, 2)}, ["model.multipliers = [2, 2]", "first level"]),
        ({"model.style": "improved", "diffusion.num_steps": 500}, ["diffusion.num_steps = 500"]),
        ({"model.num_groups": 12, "model.multipliers": (1, 3)}, ["model.num_groups = 12", "[4, 12]"]),
        ({"model.num_heads": 2, "model.attention_resolutions": (8, 4)}, ["model.num_heads = 2", "[16, 32]"]),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_networks_of_ours_that_diffusers_has_no_settings_for(tmp_path, values, fragments):
    config = override(ddpm.Config(), peers.OUR_SMALL | values)
    params = ddpm.inference.abstract_params(config, ddpm.inference.local_mesh())
    one_line_error(write_folder, tmp_path / "out", config, params, "a card", fragments=["export", "can't be", *fragments])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(good, folder, program):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for form in ("diffusers", "stablehlo"):
        status, errors = program("export.py", "--ckpt", good, "--out", folder, "--format", form)
        assert status == 2 and "is there already" in errors
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_good_folder_is_read(good):
    assert ddpm.load(good).weights == "imported"
    assert diffusers.DDPMPipeline.from_pretrained(good) is not None
