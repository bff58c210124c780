"""A sampler as one program: it draws where ddpm_jax can't be imported, and draws the model's images. And the model card."""

import json
import os
import subprocess
import sys

import numpy as np
import peers
import pytest
from helpers import load_script, one_line_error

import ddpm_jax as ddpm
from ddpm_jax.config import override, to_json
from ddpm_jax.interop.diffusers import write_folder
from ddpm_jax.interop.model_card import model_card
from ddpm_jax.interop.serving import write_sampler
from ddpm_jax.models import num_params

pytestmark = peers.MARKS

SMALL = peers.OUR_SMALL | {"diffusion.prediction": "v"}
WITHOUT = """
import runpy, sys
sys.modules["ddpm_jax"] = None  # importing it raises ImportError
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def export(source, out, *options):
    load_script("export.py").main(["--ckpt", str(source), "--out", str(out), *options])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder that export.py takes: a network of ours, written for diffusers."""
    config = override(ddpm.Config(), SMALL)
    model, folder = peers.our_model(config), tmp_path_factory.mktemp("source")
    write_folder(folder, config, model.params, "a card")
    return folder


def draw_apart(folder, out, count, seed, cwd):
    """What load_sampler.py of a folder draws, in a process that has no ddpm_jax."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    command = [sys.executable, "-c", WITHOUT, folder / "load_sampler.py", str(count), out, str(seed)]
    ended = subprocess.run(command, cwd=cwd, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    with np.load(out) as file:
        return file["images"]


def test_a_program_draws_the_model_s_images_without_this_package(source, tmp_path):
    """To one grey level: seven of seed 3, three at a time, by another program in another process."""
    options = ["--format", "stablehlo", "--sampler", "unipc", "--num-steps", "6", "--batch-size", "3"]
    export(source, tmp_path / "served", *options)
    found = draw_apart(tmp_path / "served", tmp_path / "images.npz", 7, 3, tmp_path)
    expected = ddpm.load(source).sample(7, 3, "unipc", 6)
    assert (found.dtype, found.shape) == (np.uint8, (7, 8, 8, 3))
    assert len({image.tobytes() for image in found}) == 7 and found.std() > 30
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1

    settings = json.loads((tmp_path / "served" / "sampler.json").read_text())
    assert (settings["sampler"], settings["num_steps"], settings["batch_size"]) == ("unipc", 6, 3)
    assert settings["image_shape"] == [8, 8, 3] and settings["platforms"] == ["cpu", "cuda", "tpu"]


def test_classes_are_given_to_the_program(tmp_path):
    tiny = {"model.multipliers": (1,), "model.attention_resolutions": (), "model.middle_attention": False}
    few = {"model.num_classes": 4, "sample.num_steps": 2, "sample.batch_size": 4}
    config = override(ddpm.Config(), SMALL | tiny | few)
    model = peers.our_model(config)
    write_sampler(tmp_path / "served", model, "a card")
    sys.path.insert(0, str(tmp_path / "served"))
    try:
        import load_sampler
    finally:
        sys.path.pop(0)
    sample = load_sampler.load_sampler(tmp_path / "served")
    labels = np.array([3, 1, 1, 0, 2, 3])
    for given in (None, labels):
        found, expected = sample(6, 5, given), model.sample(6, 5, labels=given)
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert (sample(6, 5, labels) != sample(6, 5)).any()
    for wrong in ([0, 1, 4, 0, 0, 0], [0, -1, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 3"):
            sample(6, 5, wrong)


def test_options_of_a_sampler_are_of_no_use_to_diffusers(source, tmp_path):
    fragments = ["--num-steps", "leave it out"]
    one_line_error(export, source, tmp_path / "out", "--num-steps", "5", fragments=fragments)
    one_line_error(export, source, tmp_path / "out", *["--format", "stablehlo", "--sampler", "none"], fragments=["'none'"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["diffusers", "stablehlo"])
def test_the_model_card_says_what_the_model_is(form, tmp_path):
    config = override(ddpm.Config(), SMALL | {"sample.sampler": "ddim", "sample.num_steps": 25, "sample.batch_size": 9})
    model = peers.our_model(config)
    lines = []
    for step, weights, value in ((12e4, "ema", 14.5), (12e4, "ema", 12.5), (12e4, "raw", 99.5), (13e4, "ema", 88.5)):
        protocol = {"images": 10_000, "seeds": list(range(500))}
        measured = {"fd_efficientnet_lite0": {"value": value, "protocol": protocol}}
        lines.append(json.dumps({"step": step, "weights": weights} | measured))
    bound = {"step": 120_000, "weights": "ema", "bpd": {"bits_per_dim": 3.75}}
    (tmp_path / "evaluations.jsonl").write_text("\n".join([json.dumps(bound), *lines, '{"step": 120000, "wei']))
    card = model_card(config, model.params, "ema", 120_000, tmp_path, form)

    front, rest = card.split("---\n")[1:]
    assert f"library_name: {'diffusers' if form == 'diffusers' else 'jax'}" in front and "unconditional" in front
    headings = [line for line in rest.splitlines() if line.startswith("#")]
    assert headings == ["# A diffusion model of 8x8x3 images", "## Use", "## Data", "## Measured", "## Licence", "## Config"]
    sections = dict(zip(headings, ("# " + rest).split("\n# A diff")[-1].split("\n## "), strict=True))
    first, use, data, numbers, licence, settings = sections.values()
    assert f"{num_params(model.params):,} parameters" in first and "120,000 steps" in first and "`ema`" in first
    assert "from_pretrained" in use if form == "diffusers" else "25 steps of ddim, 9 at once" in use
    assert "`fashion_mnist`" in data
    quoted = json.loads(numbers.split("```json")[1].split("```")[0])  # the newest of these weights at this step
    value = {"value": 12.5, "protocol": {"images": 10_000}}
    assert quoted == {"bpd": {"bits_per_dim": 3.75}, "fd_efficientnet_lite0": value}
    assert "Fashion-MNIST, Zalando SE, MIT" in licence and "Weights: not stated" in licence
    told = json.loads(settings.split("```json")[1].split("```")[0])
    assert told == {name: value for name, value in to_json(config).items() if name != "data.class_names"}


def test_the_card_of_what_is_not_known(tmp_path):
    """Neither steps, nor data, nor numbers: an imported network, written again."""
    config = override(ddpm.Config(), SMALL | {"data.source": "unknown", "model.num_classes": 3})
    card = model_card(config, peers.our_model(config).params, "imported", 0, tmp_path, "diffusers")
    assert "a number of steps that isn't recorded" in card and "`imported`" in card
    assert "Nothing yet" in card and "that of its source" in card
    assert "tags: [ddpm]" in card and "3 classes" in card and "class_labels" in card


def test_the_card_is_in_the_folder(source, tmp_path):
    for form in ("diffusers", "stablehlo"):
        options = ["--format", form, *(() if form == "diffusers" else ("--num-steps", "2", "--batch-size", "1"))]
        export(source, tmp_path / form, *options)
        assert "# A diffusion model of 8x8x3 images" in (tmp_path / form / "README.md").read_text()
