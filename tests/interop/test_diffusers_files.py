"""What lies in a folder of diffusers: names old and new, pickles, moving averages, parts that are missing, and the process."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peers
import pytest
import safetensors.torch
import torch_writer
from diffusers.training_utils import EMAModel
from helpers import one_line_error
from peers import check_same, diffusers, torch

import ddpm_jax as ddpm
from ddpm_jax.config import override
from ddpm_jax.interop.schedulers import read_scheduler_config, write_scheduler_config
from ddpm_jax.validation import config_schedule

pytestmark = peers.MARKS

NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small network, the folder of its pipeline, and what is read from that."""
    network = peers.unet(peers.SMALL)
    folder = peers.save_pipeline(tmp_path_factory.mktemp("original"), network)
    return network, folder, ddpm.load(folder)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original[1], tmp_path / "copy")


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "older bin"])
def test_names_and_forms_of_weights(original, folder, names, form):
    network, _, model = original
    state = peers.renamed(network.state_dict()) if names == "old" else dict(network.state_dict())
    assert any("query" in name for name in state) == (names == "old")
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    if form == "safetensors":
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in state.items()}, folder / "unet" / f"{NAME}.safetensors"
        )
    else:
        torch.save(state, folder / "unet" / f"{NAME}.bin", _use_new_zipfile_serialization=form == "bin")
    check_same(ddpm.load(folder).params, model.params)


def test_pytorch_reads_what_the_tests_of_our_reader_are_made_of(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1.5], np.float16), "c": np.array(7)}
    (tmp_path / "a.pt").write_bytes(torch_writer.state_dict(arrays))
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(read) == list(arrays)
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name], strict=True)


def test_safetensors_go_before_a_pickle(original, folder):
    (folder / "unet" / f"{NAME}.bin").write_bytes(b"something else")
    check_same(ddpm.load(folder).params, original[2].params)


def test_half_precision_is_read_as_what_it_is(original, folder):
    network, _, model = original
    half = {name: tensor.half() for name, tensor in network.state_dict().items()}
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    torch.save(half, folder / "unet" / f"{NAME}.bin")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32), model.params)
    check_same(ddpm.load(folder).params, rounded)


@pytest.fixture(params=["pipeline", "checkpoint"])
def averaged(original, folder, request):
    """A folder with a moving average beside the weights: a pipeline's, or a checkpoint of diffusers' own training program."""
    other = peers.unet(peers.SMALL, seed=1)
    average = EMAModel(other.parameters(), decay=0.99, model_cls=diffusers.UNet2DModel, model_config=other.config)
    average.save_pretrained(folder / "unet_ema")
    if request.param == "checkpoint":
        (folder / "model_index.json").unlink()
        shutil.rmtree(folder / "scheduler")
    return folder, peers.save_pipeline(folder / "other", other)


def test_a_moving_average_beside_the_weights(original, averaged):
    folder, other = averaged
    raw, ema = ddpm.load(folder, "raw"), ddpm.load(folder)
    assert (raw.weights, ema.weights) == ("raw", "ema")
    check_same(raw.params, original[2].params)
    check_same(ema.params, ddpm.load(other).params)
    one_line_error(ddpm.load, folder, "ema:0.05", fragments=["'ema:0.05'", "ema and raw"])


def test_one_set_of_weights_is_both(original):
    _, folder, model = original
    for weights in ("ema", "raw"):
        again = ddpm.load(folder, weights)
        assert (again.weights, again.step) == ("imported", 0)
        check_same(again.params, model.params)


def test_a_network_alone_has_the_process_of_ho_et_al(original, folder, caplog):
    alone = ddpm.load(folder / "unet")
    check_same(alone.params, original[2].params)
    assert "no scheduler beside it" in caplog.text
    assert alone.config.diffusion == dataclasses.replace(ddpm.DiffusionConfig(), label_dropout=0.0)


def test_a_network_and_its_scheduler_in_one_folder(original, folder):
    diffusers.DDIMScheduler(500, beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "unet")
    config = ddpm.load(folder / "unet").config
    assert (config.diffusion.schedule, config.diffusion.num_steps, config.sample.sampler) == ("cosine", 500, "ddim")


PROCESSES = {
    "DDPM": (diffusers.DDPMScheduler(), {"sample.sampler": "ddpm", "sample.num_steps": None, "sample.threshold": "static",
                                         "diffusion.variance": "fixed_small", "diffusion.prediction": "eps"}),
    "DDPM, learned": (
        diffusers.DDPMScheduler(400, beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False),
        {"diffusion.schedule": "cosine", "diffusion.num_steps": 400, "diffusion.variance": "learned_range",
         "diffusion.loss": "hybrid", "sample.threshold": "none"},
    ),
    "DDPM, short": (diffusers.DDPMScheduler(300, variance_type="fixed_large", prediction_type="sample"),
                    {"diffusion.beta_start": 3e-5, "diffusion.beta_end": 6e-3, "diffusion.variance": "fixed_large",
                     "diffusion.prediction": "x0"}),
    "DDPM, betas": (diffusers.DDPMScheduler(200, trained_betas=np.asarray(ddpm.make_schedule("sigmoid", 200).beta).tolist()),
                    {"diffusion.schedule": "sigmoid", "diffusion.num_steps": 200}),
    "DDIM": (
        diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        {"sample.sampler": "ddim", "sample.num_steps": 50, "sample.spacing": "trailing", "diffusion.zero_terminal_snr": True,
         "diffusion.prediction": "v", "diffusion.schedule": "scaled_linear", "diffusion.beta_end": 0.012,
         "sample.threshold": "none"},
    ),
    "DPM-Solver": (diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1e6),
                   {"sample.sampler": "dpmpp_2m", "sample.num_steps": 50, "sample.threshold": "dynamic"}),
    "UniPC": (diffusers.UniPCMultistepScheduler(20, thresholding=True, beta_end=0.2),
              {"sample.sampler": "unipc", "sample.num_steps": 20, "sample.threshold": "static", "diffusion.beta_end": 0.004}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSES)
def test_what_a_scheduler_says(name):
    """As diffusers writes it; and the noise of every timestep is the same."""
    scheduler, expected = PROCESSES[name]
    values = read_scheduler_config(json.loads(scheduler.to_json_string()), name)
    assert {name: values[name] for name in expected} == expected
    alpha_bar = np.asarray(config_schedule(override(ddpm.Config(), values)).alpha_bar)
    np.testing.assert_allclose(alpha_bar, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid", "scaled_linear"])
@pytest.mark.parametrize("num_steps", [1000, 300])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_what_is_written_of_a_process(kind, num_steps, zero_terminal_snr):
    """diffusers makes the same noise of it, and it is read as what it was."""
    given = {
        "diffusion.schedule": kind, "diffusion.num_steps": num_steps, "diffusion.zero_terminal_snr": zero_terminal_snr,
        "diffusion.prediction": "v", "diffusion.variance": "fixed_large", "sample.sampler": "ddpm", "sample.num_steps": None,
        "sample.spacing": "trailing", "sample.threshold": "dynamic",
    }  # fmt: skip
    config = override(ddpm.Config(), given)
    written = write_scheduler_config(config)
    scheduler = diffusers.DDPMScheduler.from_config(written)
    # Of float32 betas; beta = .999 at the end of the cosine leaves 1 - beta five digits.
    np.testing.assert_allclose(scheduler.alphas_cumprod, config_schedule(config).alpha_bar, rtol=1e-4, atol=1e-9)
    read = read_scheduler_config(json.loads(json.dumps(written)), "written")
    assert override(ddpm.Config(), read) == config
