"""benchmarks/layers.py, which floor.py measures by: every weight lies in one layer, and every layer's programs can be made."""

import jax
import pytest
from helpers import load_script

from ddpm_jax import Config, DataConfig, ModelConfig, TrainConfig
from ddpm_jax.models import init_params, make_unet, num_params

layers = load_script("benchmarks/layers.py")
SHAPE = (8, 8, 1)
MODEL = ModelConfig(channels=8, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=0.1)
CONFIG = Config(data=DataConfig(image_shape=SHAPE), model=MODEL, train=TrainConfig(batch_size=2))


@pytest.fixture(scope="module")
def found():
    return layers.trace_layers(CONFIG, CONFIG.train.batch_size)


def test_every_weight_lies_in_one_layer(found):
    unet = make_unet(MODEL, SHAPE[2])
    whole = num_params(jax.eval_shape(lambda: init_params(unet, 0, SHAPE)))
    assert sum(num_params(layer.params) for layer in found if layer.kind != "dropout") == whole


def test_layers_by_their_kind(found):
    kinds = [layer.kind for layer in found]
    blocks = 2 + 2 + 2 * 2  # down, middle, up
    assert kinds.count("dropout") == blocks
    assert kinds.count("convolution") == 2 * blocks + 4  # in, out, down, up
    assert kinds.count("attention") == 1 + 1 + 2  # 4x4 on the way down, in the middle and on the way up


def test_programs_of_every_layer(found):
    for layer in found:
        phases = {
            name: jax.eval_shape(function, *shapes) for name, function, shapes, _, _ in layers.programs(layer, first=False)
        }
        for name, made in phases.items():
            expected = {"values": layer.output, "weight gradient": layer.params, "input gradient": layer.inputs}
            if name.startswith("convolutions"):
                made, wanted = jax.tree.leaves(made), jax.tree.leaves(expected[name.partition(", ")[2]])
                assert [leaf.shape for leaf in made] == [leaf.shape for leaf in wanted]
            else:
                assert made[0].shape == layer.output.shape


def test_nothing_asks_for_the_gradient_of_the_images(found):
    convolution = next(layer for layer in found if layer.kind == "convolution")
    names = [name for name, *_ in layers.programs(convolution, first=True)]
    assert names == ["convolutions, values", "convolutions, weight gradient"]
