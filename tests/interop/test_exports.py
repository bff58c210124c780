"""export.py of a run folder: diffusers computes with the weights that were asked for, and they come back as they went."""

import json

import peers
import pytest
from helpers import load_script
from test_evaluate import images, run  # noqa: F401

import ddpm_jax as ddpm

pytestmark = peers.MARKS


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_weights_of_a_run(run, tmp_path, weights):  # noqa: F811
    load_script("export.py").main(["--ckpt", str(run), "--out", str(tmp_path / "out"), "--weights", weights])
    model = ddpm.load(run, weights)
    given = peers.inputs(8, 8, 1)
    pipeline = peers.diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    peers.check_close(peers.their_outputs(pipeline.unet, *given), peers.our_outputs(model, *given))
    assert pipeline.scheduler.config.num_train_timesteps == 20
    peers.check_same(ddpm.load(tmp_path / "out").params, model.params)


def test_the_two_kinds_of_weights_differ(run):  # noqa: F811
    """Or the test above would not tell one from the other."""
    given = peers.inputs(8, 8, 1)
    averaged, raw = (peers.our_outputs(ddpm.load(run, weights), *given) for weights in ("ema", "raw"))
    with pytest.raises(AssertionError):
        peers.check_close(averaged, raw)


def test_the_card_tells_of_the_run(run, tmp_path):  # noqa: F811
    load_script("export.py").main(["--ckpt", str(run), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 steps" in card and "`ema`" in card
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
