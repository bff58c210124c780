"""State split among devices: the same numbers on any topology, and no more of it on each device than its share."""

import dataclasses
import functools
import math
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from jax.sharding import PartitionSpec
from training.networks import WideNet

from ddpm_jax.checkpoint import abstract_like, restore_newest
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig, load_config
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.data.pipeline import batches
from ddpm_jax.diffusion.timesteps import empty_history
from ddpm_jax.errors import InputError
from ddpm_jax.inference import make_network
from ddpm_jax.parallel import SPLIT_SIZE, arrange, make_mesh, run_once, split_sharding
from ddpm_jax.saving import Checkpoints
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import TrainState, init_state, state_shardings
from ddpm_jax.training.step import make_train_step
from ddpm_jax.validation import config_schedule

RTOL, ATOL = 1e-5, 1e-6
QUICK = {"xla_backend_optimization_level": 0}
# All that is random at once: flips, t by importance, noise, dropped labels, dropout. On eps = 1e-2 see test_parallel.py.
CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1), flip=True),
    diffusion=DiffusionConfig(num_steps=50, timesteps="importance", label_dropout=0.3),
    model=ModelConfig(dropout=0.2, num_classes=3),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2, clip_norm=0.5, ema_decays=(0.5,)),
    train=TrainConfig(batch_size=16, num_steps=100),
)
IMAGES = ImageSet(
    np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8),
    np.random.default_rng(1).integers(0, 3, 40, dtype=np.int32),
)


NETWORK = WideNet(out_channels=1, dropout=0.2, num_classes=3)


def start(config):
    """The state before the first step. All labels are there from the start, as the network asks for."""
    params = NETWORK.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))[
        "params"
    ]
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    averages = {"decay:0.5": params}
    return TrainState(jnp.int32(0), params, params, optimizer.init(params), empty_history(config.diffusion.num_steps), averages)


@functools.cache
def run(devices=1, fsdp=1, parts=1):
    """Three steps: (metrics of each, the last state on the devices)."""
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, accumulate_steps=parts))
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    shardings = state_shardings(mesh, jax.eval_shape(lambda: start(config)))
    state = run_once(mesh, lambda: start(config), shardings)
    step = make_train_step(config, config_schedule(config), NETWORK, optimizer, mesh)
    train_step = jax.jit(step, out_shardings=(shardings, None), compiler_options=QUICK)
    metrics = []
    for stack in batches(config, IMAGES, mesh, range(3)):
        state, metric = train_step(state, jax.tree.map(lambda array: array[0], stack))
        metrics.append(jax.device_get(metric))
    return metrics, state


TOPOLOGIES = [
    {"devices": 4}, {"devices": 8}, {"devices": 4, "fsdp": 2}, {"devices": 4, "fsdp": 4}, {"devices": 8, "fsdp": 4},
    {"devices": 8, "fsdp": 8}, {"parts": 2}, {"devices": 8, "fsdp": 2, "parts": 2},
    {"devices": 4, "fsdp": 4, "parts": 2},
]  # fmt: skip


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_steps_are_those_of_one_device(topology):
    (metrics, state), (metrics_of_one, state_of_one) = run(**topology), run()
    np.testing.assert_allclose(metrics, metrics_of_one, rtol=RTOL)
    for leaf, leaf_of_one in zip(jax.tree.leaves(state), jax.tree.leaves(state_of_one), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(leaf_of_one), rtol=RTOL, atol=ATOL)


def test_the_steps_above_do_something():
    metrics, state = run()
    assert all(metric.grad_norm > CONFIG.optim.clip_norm for metric in metrics)  # so that clipping is part of them
    change = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), start(CONFIG).params, state.params)
    assert max(jax.tree.leaves(change)) > 1e-3


@pytest.mark.parametrize(("devices", "fsdp"), [(4, 2), (4, 4), (8, 4), (8, 8)])
def test_arrays_of_the_state_lie_in_pieces_after_steps(devices, fsdp):
    _, state = run(devices=devices, fsdp=fsdp)
    kernels = [state.params, state.ema, state.averages["decay:0.5"]]
    adam = [part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")]
    for tree in (*kernels, adam[0].mu, adam[0].nu):
        kernel = tree["wide1"]["kernel"]
        assert kernel.size >= SPLIT_SIZE
        assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // fsdp}


# --- the rule


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((3, 3, 64, 128), 4, (None, None, None, "fsdp")),
        ((3, 3, 128, 64), 4, (None, None, "fsdp")),
        ((3, 3, 64, 64), 4, (None, None, None, "fsdp")),  # the last of equally long ones
        ((2048,), 8, ("fsdp",)),
        ((3, 1024), 2, (None, "fsdp")),
        ((1024, 3), 2, ("fsdp",)),
        ((1020, 6), 4, ("fsdp",)),
        ((1021, 12), 4, (None, "fsdp")),  # the longest axis can't be divided
        ((1021, 7), 4, ()),  # none can
        ((512,), 4, ()),  # too small
        ((), 4, ()),
        ((4096, 4096), 1, ()),
    ],
)
def test_the_rule_by_which_an_array_is_split(shape, fsdp, expected):
    assert split_sharding(make_mesh(jax.devices(), fsdp), shape).spec == PartitionSpec(*expected)


@pytest.mark.parametrize("name", ["cifar10", "lsun256"])
@pytest.mark.parametrize("fsdp", [2, 4, 8])
def test_each_device_holds_its_share_of_a_large_state(name, fsdp):
    config = load_config(ROOT / f"configs/{name}.py", {"data.image_shape": (32, 32, 3) if name == "cifar10" else (256, 256, 3)})
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    state = jax.eval_shape(lambda: init_state(config, make_network(config), optimizer))
    shardings = state_shardings(make_mesh(jax.devices(), fsdp), state)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True))
    whole = sum(math.prod(leaf.shape) for leaf, _ in pairs)
    held = sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)
    assert 1 / fsdp <= held / whole < 1.02 / fsdp


def test_a_number_of_devices_that_fsdp_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"train\.fsdp = 3: 8 devices can't be divided so: use one of \[1, 2, 4, 8\]"):
        make_mesh(jax.devices(), 3)


@pytest.mark.parametrize(
    ("hosts", "each", "fsdp", "hosts_of_a_group"), [(2, 4, 4, 1), (2, 4, 2, 1), (4, 2, 4, 2), (2, 2, 1, 1), (1, 8, 8, 1)]
)
def test_devices_that_share_a_state_are_those_of_one_host_or_of_whole_hosts(hosts, each, fsdp, hosts_of_a_group):
    devices = [Mock(jax.Device, id=number, process_index=number % hosts) for number in range(hosts * each)]  # hosts by turns
    groups = arrange(devices, fsdp)
    assert groups.shape == (hosts * each // fsdp, fsdp)
    assert sorted(device.id for device in groups.flat) == list(range(hosts * each))
    for group in groups:
        assert len({device.process_index for device in group}) == hosts_of_a_group


# --- checkpoints from one topology on another


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 1), (8, 1), (8, 8)])
def test_a_checkpoint_of_eight_devices_with_fsdp_4_is_read_on_others_bit_by_bit(devices, fsdp, tmp_path):
    _, state = run(devices=8, fsdp=4)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state, 3)
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    shardings = state_shardings(mesh, state)
    restored = restore_newest(tmp_path, abstract_like(state, shardings))
    for leaf, expected, sharding in zip(*map(jax.tree.leaves, (restored, state, shardings)), strict=True):
        assert leaf.sharding == sharding
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()
