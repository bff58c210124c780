"""What devices send each other in a training step, counted in the compiled program."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from training.networks import WideNet

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.models import UNet, make_unet
from ddpm_jax.parallel import batch_sharding, make_mesh
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import TrainState, state_shardings
from ddpm_jax.training.step import make_train_step
from ddpm_jax.validation import config_schedule

CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1), flip=True),
    diffusion=DiffusionConfig(num_steps=50),
    model=ModelConfig(
        channels=16, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), dropout=0.2, num_groups=4, num_classes=3
    ),
    train=TrainConfig(batch_size=32, num_steps=100),
)
# A CPU's compiler drops the barrier that keeps the second gather from being taken for the first; those of TPU and GPU keep it.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "cse_barrier_expander"}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective operation makes."""

    kind: str
    size: int
    in_loop: bool


def collectives(text):
    """Those of a compiled program; an operation that makes several arrays counts for each of them."""
    loops = set(re.findall(r"while\(.*body=%?([\w.\-]+)", text)) | set(re.findall(r"while\(.*condition=%?([\w.\-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = (re.match(r"(?:ENTRY )?%?([\w.\-]+)", line) or [None, ""])[1]
        match = COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [math.prod(map(int, shape.split(","))) if shape else 1 for shape in shapes]
            found += [Collective(match[2], size, computation in loops) for size in sizes]
    return found


@functools.cache
def compiled(devices, fsdp=1, parts=1, network=WideNet):
    """The step's compiled program, and the shapes of its weights."""
    config = dataclasses.replace(CONFIG, optim=OptimConfig(accumulate_steps=parts))
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    unet = WideNet(out_channels=1, dropout=0.2, num_classes=3) if network is WideNet else make_unet(config.model, 1)
    optimizer = make_optimizer(config.optim, config.train.num_steps)

    def start():
        images, one = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32)
        params = unet.init(jax.random.key(0), images, one, one)["params"]
        return TrainState(jnp.int32(0), params, params, optimizer.init(params), None, {})

    state = jax.eval_shape(start)
    shardings = state_shardings(mesh, state)
    rows = batch_sharding(mesh)
    batch = Batch(
        jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.uint8, sharding=rows), jax.ShapeDtypeStruct((32,), jnp.int32, sharding=rows)
    )
    placed = jax.tree.map(lambda leaf, each: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each), state, shardings)
    step = make_train_step(config, config_schedule(config), unet, optimizer, mesh)
    program = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=OPTIONS)
    return program.lower(placed, batch).compile(), state.params, shardings.params


def sizes(leaves):
    return collections.Counter(math.prod(leaf.shape) for leaf in leaves)


def split_and_whole(params, shardings):
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True))
    return [p for p, s in pairs if "fsdp" in s.spec], [p for p, s in pairs if "fsdp" not in s.spec]


def test_one_device_sends_nothing():
    assert collectives(compiled(1)[0].as_text()) == []


@pytest.mark.parametrize("parts", [1, 2])
def test_data_parallelism_sums_the_gradient_and_the_loss_and_nothing_else(parts):
    program, params, _ = compiled(4, 1, parts)
    found = collectives(program.as_text())
    assert {each.kind for each in found} == {"all-reduce"}
    assert not any(each.in_loop for each in found)  # parts of a batch are added up first
    total = sum(each.size for each in found)
    assert total <= sum(sizes(jax.tree.leaves(params)).elements()) + 1  # equal gradients may be sent once
    large = sizes(leaf for leaf in jax.tree.leaves(params) if math.prod(leaf.shape) >= 1024)
    assert collections.Counter(each.size for each in found if each.size >= 1024) == large


@pytest.mark.parametrize(
    ("devices", "fsdp", "network"),
    [(4, 2, WideNet), (4, 4, WideNet), (8, 4, WideNet), pytest.param(8, 4, UNet, marks=pytest.mark.scale)],
)
def test_a_split_state_is_gathered_array_by_array_and_its_gradient_scattered(devices, fsdp, network):
    program, params, shardings = compiled(devices, fsdp, network=network)
    split, whole = split_and_whole(params, shardings)
    found = collectives(program.as_text())
    of_kind = {kind: [each for each in found if each.kind == kind] for kind in KINDS}
    assert not any(of_kind[kind] for kind in ("all-to-all", "collective-permute", "collective-broadcast"))

    gathered, once = collections.Counter(each.size for each in of_kind["all-gather"]), sizes(split)
    assert set(gathered) == set(once)  # no array of another size: never the whole state
    assert all(once[size] <= gathered[size] <= 2 * once[size] for size in once)
    # The first dense layer of the time embedding needs no gradient by its input, so its weights aren't gathered again.
    assert gathered.total() >= 2 * once.total() - 1

    scattered = collections.Counter(each.size * fsdp for each in of_kind["reduce-scatter"])
    assert scattered == once

    summed = sum(each.size for each in of_kind["all-reduce"])
    pieces = sum(size * count for size, count in once.items()) // fsdp if devices > fsdp else 0
    assert summed <= pieces + sum(size * count for size, count in sizes(whole).items()) + 2  # the loss, the squares of the norm
    assert summed >= pieces


def test_with_a_split_state_and_parts_the_sum_over_data_comes_once_after_them():
    program, params, shardings = compiled(8, 4, 2)
    split, _ = split_and_whole(params, shardings)
    reduces = [each for each in collectives(program.as_text()) if each.kind == "all-reduce"]
    assert not any(each.in_loop for each in reduces)
    assert sum(each.size for each in reduces) >= sum(math.prod(leaf.shape) for leaf in split) // 4


def test_memory_of_a_device_falls_with_its_share():
    """By the compiler's own analysis: arguments are the state and the batch, and all but the small arrays are split."""
    _, params, shardings = compiled(4, 4)
    _, whole = split_and_whole(params, shardings)
    small = 4 * 4 * sum(sizes(whole).elements())  # weights, average, two moments; float32
    batch = 32 * (64 + 4)
    sizes_of = {fsdp: compiled(4, fsdp)[0].memory_analysis().argument_size_in_bytes for fsdp in (1, 2, 4)}
    for fsdp in (2, 4):
        assert sizes_of[fsdp] - small - batch <= 1.02 * (sizes_of[1] - small - batch) / fsdp
        assert sizes_of[fsdp] < sizes_of[1] / fsdp + small + batch


# --- the counting itself


HLO = """
%body.1 (p: (f32[8,4])) -> (f32[8,4]) {
  %all-reduce.7 = f32[8,4]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
}

ENTRY %main.9 (a: f32[2,4]) -> f32[8,4] {
  %all-gather.1 = f32[8,4]{1,0} all-gather(%a), channel_id=2, dimensions={0}
  %all-reduce.2 = (f32[3]{0}, f32[]) all-reduce(%b, %c), channel_id=3, to_apply=%add
  %while.3 = (f32[8,4]) while(%t), condition=%cond.1, body=%body.1
  %fusion.4 = f32[8,4]{1,0} fusion(%all-gather.1), kind=kLoop, calls=%f
}
"""


def test_collectives_are_counted_by_what_they_make():
    expected = [
        Collective("all-reduce", 32, in_loop=True),
        Collective("all-gather", 32, in_loop=False),
        Collective("all-reduce", 3, in_loop=False),
        Collective("all-reduce", 1, in_loop=False),
    ]
    assert collectives(HLO) == expected
