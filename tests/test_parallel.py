"""Devices: the same numbers on one device and on eight, and jax.pmap as a witness for the sharded program."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from training.networks import PixelNet

from ddpm_jax import parallel
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.data.pipeline import Batch, batches
from ddpm_jax.diffusion.losses import simple_loss
from ddpm_jax.errors import InputError
from ddpm_jax.models import make_unet
from ddpm_jax.parallel import batch_sharding, check_batch_size, compile_for, make_mesh, put, replicated, round_up, run_once
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import make_loss_and_grad, make_train_step
from ddpm_jax.validation import config_schedule

RTOL, ATOL = 1e-5, 1e-6
QUICK = {"xla_backend_optimization_level": 0}
# The gradients of this network are between 1e-6 and 1. Adam divides each by its own size, so where it is near 0, float32
# noise alone would decide the update: eps = 1e-2 keeps updates of small gradients small.
CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 1), flip=True),
    diffusion=DiffusionConfig(num_steps=50),
    model=ModelConfig(
        channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.2, num_groups=4, num_classes=3
    ),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2),
    train=TrainConfig(batch_size=16, num_steps=100),
)
UNET = make_unet(CONFIG.model, 1)
OPTIMIZER = make_optimizer(CONFIG.optim, CONFIG.train.num_steps)
IMAGES = ImageSet(
    np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8),
    np.random.default_rng(1).integers(0, 3, 40, dtype=np.int32),
)


def mesh_of(count):
    return make_mesh(jax.devices()[:count])


def assert_trees_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=RTOL, atol=ATOL), a, b)


# --- the mesh and its small functions


def test_mesh_of_all_devices_and_of_some():
    assert make_mesh().size == len(jax.devices()) == 8
    mesh = mesh_of(2)
    assert mesh.axis_names == ("data", "fsdp")
    assert list(mesh.devices.flat) == jax.devices()[:2]


def test_shardings_split_the_first_axis_or_nothing():
    mesh = mesh_of(4)
    array = np.arange(24, dtype=np.float32).reshape(8, 3)
    split, whole = put(array, batch_sharding(mesh)), put(array, replicated(mesh))
    assert split.sharding.spec == PartitionSpec(("data", "fsdp"))
    for index, shard in enumerate(sorted(split.addressable_shards, key=lambda shard: shard.device.id)):
        np.testing.assert_array_equal(shard.data, array[2 * index : 2 * index + 2])
    assert len(whole.addressable_shards) == 4
    for shard in whole.addressable_shards:
        np.testing.assert_array_equal(shard.data, array)


@pytest.mark.parametrize(
    ("batch_size", "devices", "expected"), [(1, 1, 1), (7, 1, 7), (1, 8, 8), (8, 8, 8), (9, 8, 16), (64, 8, 64)]
)
def test_round_up(batch_size, devices, expected):
    assert round_up(batch_size, mesh_of(devices)) == expected


@pytest.mark.parametrize(
    ("batch_size", "devices", "parts", "message"),
    [
        (12, 8, 1, "train.batch_size = 12 can't be divided among 8 devices: use 8 or 16"),
        (3, 8, 1, "train.batch_size = 3 can't be divided among 8 devices: use 8"),
        (24, 8, 2, "train.batch_size = 24 can't be divided among 8 devices x 2 accumulation steps: use 16 or 32"),
        (6, 1, 4, "train.batch_size = 6 can't be divided among 1 devices x 4 accumulation steps: use 4 or 8"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_the_nearest_that_can(batch_size, devices, parts, message):
    with pytest.raises(InputError) as caught:
        check_batch_size(batch_size, mesh_of(devices), parts)
    assert str(caught.value) == message
    for choice in message.partition("use ")[2].split(" or "):
        check_batch_size(int(choice), mesh_of(devices), parts)


@pytest.mark.parametrize(("batch_size", "devices", "parts"), [(1, 1, 1), (8, 8, 1), (128, 8, 4), (5, 1, 5)])
def test_a_batch_that_can_be_shared_passes(batch_size, devices, parts):
    check_batch_size(batch_size, mesh_of(devices), parts)


@pytest.fixture
def fresh_options():
    parallel._compiler_options.cache_clear()
    yield
    parallel._compiler_options.cache_clear()


def test_unknown_compiler_options_are_left_out(monkeypatch, fresh_options):
    unknown = {"xla_cpu_option_that_no_jaxlib_knows": "LIBRARY"}
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: 2 * x, compiler_options=unknown)(jnp.float32(1))
    monkeypatch.setattr(parallel, "CPU_OPTIONS", unknown)
    assert float(compile_for(mesh_of(1), lambda x: 2 * x)(jnp.float32(21))) == 42


def test_a_value_that_the_option_does_not_know_is_left_out(monkeypatch, fresh_options):
    monkeypatch.setattr(parallel, "CPU_OPTIONS", dict.fromkeys(parallel.CPU_OPTIONS, "NO_SUCH_VALUE"))
    assert float(compile_for(mesh_of(1), lambda x: 2 * x)(jnp.float32(21))) == 42


def test_this_jaxlib_knows_the_options(fresh_options):
    assert parallel._compiler_options("cpu") == parallel.CPU_OPTIONS


def test_other_platforms_get_no_cpu_options(fresh_options):
    assert parallel._compiler_options("gpu") is None
    assert parallel._compiler_options("tpu") is None


def test_compile_for_passes_the_options_of_jit():
    double = compile_for(mesh_of(1), lambda x: 2 * x, donate_argnums=0)
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(double(x), [0, 2, 4, 6])
    assert x.is_deleted()


# --- the same run on one device, two and eight


@dataclasses.dataclass
class Run:
    initial: object  # on the host
    states: list  # after each of three steps
    metrics: list
    batch: Batch  # the last


@pytest.fixture(scope="module")
def runs():
    """Three train steps on 1, 2 and 8 devices, dropout and flips included."""

    def run(count):
        mesh = mesh_of(count)
        state = run_once(mesh, lambda: init_state(CONFIG, UNET, OPTIMIZER))
        initial, states, metrics = jax.device_get(state), [], []
        step = make_train_step(CONFIG, config_schedule(CONFIG), UNET, OPTIMIZER, mesh)
        train_step = jax.jit(step, compiler_options=QUICK)
        for stack in batches(CONFIG, IMAGES, mesh, range(3)):
            batch = jax.tree.map(lambda array: array[0], stack)
            state, metric = train_step(state, batch)
            states.append(state)
            metrics.append(jax.device_get(metric))
        return Run(initial, states, metrics, batch)

    return {count: run(count) for count in (1, 2, 8)}


@pytest.mark.parametrize("count", [2, 8])
def test_initial_weights_are_the_same_bit_by_bit(runs, count):
    for one, many in zip(jax.tree.leaves(runs[1].initial), jax.tree.leaves(runs[count].initial), strict=True):
        assert one.tobytes() == many.tobytes()


@pytest.mark.parametrize("count", [2, 8])
def test_batches_are_the_same_and_split(runs, count):
    for one, many in zip(runs[1].batch, runs[count].batch, strict=True):
        np.testing.assert_array_equal(one, many)
        assert [shard.data.shape[0] for shard in many.addressable_shards] == [16 // count] * count


@pytest.mark.parametrize("count", [2, 8])
def test_steps_are_the_same_on_more_devices(runs, count):
    for one, many in zip(runs[1].metrics, runs[count].metrics, strict=True):
        np.testing.assert_allclose(one, many, rtol=RTOL)
    for one, many in zip(runs[1].states, runs[count].states, strict=True):
        assert_trees_close(one.params, many.params)
        assert_trees_close(one.ema, many.ema)
        assert_trees_close(one.opt_state, many.opt_state)
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), runs[1].initial.params, runs[1].states[-1].params)
    assert max(jax.tree.leaves(change)) > 1e-3  # the steps did something


@pytest.mark.parametrize("count", [2, 8])
def test_every_device_holds_the_same_state(runs, count):
    for leaf in jax.tree.leaves(runs[count].states[-1]):
        assert leaf.sharding.is_fully_replicated
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == count
        assert all(shard.tobytes() == shards[0].tobytes() for shard in shards)


@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_in_parts_on_several_devices_has_the_gradient_of_the_whole(count):
    """Parts are cut so that no image changes its device: the result is that of one device and one part."""
    unet = PixelNet(out_channels=1, dropout=0.0, num_classes=3)
    params = jax.jit(unet.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,), jnp.int32))["params"]

    def gradient(parts, count):
        config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, accumulate_steps=parts))
        mesh = mesh_of(count)
        function = make_loss_and_grad(config, config_schedule(config), unet, mesh)
        batch = put(Batch(IMAGES.images[:16], IMAGES.labels[:16]), batch_sharding(mesh))
        return jax.jit(function, compiler_options=QUICK)(*put((jax.random.key(3), params), replicated(mesh)), batch)

    (loss, grads, _), (whole_loss, whole_grads, _) = gradient(4, count), gradient(1, 1)
    np.testing.assert_allclose(loss, whole_loss, rtol=RTOL)
    assert_trees_close(grads, whole_grads)


# --- pmap


def test_pmap_of_the_gradient_agrees_with_the_sharded_program(runs):
    """pmap hands each device its images and averages the gradients by hand; t and eps are given, so nothing is random."""
    schedule, mesh = config_schedule(CONFIG), mesh_of(8)
    # Weights after some steps: at first the last layer is all but 0 and hides the gradients of the others.
    params = jax.device_get(runs[1].states[-1].params)
    generator = np.random.default_rng(2)
    x0 = generator.uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32)
    eps = generator.standard_normal(x0.shape).astype(np.float32)
    t = generator.integers(0, 50, 16).astype(np.int32)
    labels = generator.integers(0, 3, 16).astype(np.int32)

    def loss(params, x0, t, eps, labels):
        def network_fn(xt, t):
            return UNET.apply({"params": params}, xt, t, labels)

        return jnp.mean(simple_loss(schedule, network_fn, x0, t, eps, "eps"))

    def on_each_device(params, *arrays):
        return jax.lax.pmean(jax.value_and_grad(loss)(params, *arrays), "devices")

    arrays = x0, t, eps, labels
    shards = [array.reshape(8, -1, *array.shape[1:]) for array in arrays]
    pmapped = jax.pmap(on_each_device, "devices", in_axes=(None, 0, 0, 0, 0))
    by_pmap = jax.tree.map(lambda x: np.asarray(x)[0], pmapped(params, *shards))
    sharded = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    by_jit = sharded(put(params, replicated(mesh)), *put(arrays, batch_sharding(mesh)))
    np.testing.assert_allclose(by_pmap[0], by_jit[0], rtol=RTOL)
    assert_trees_close(by_pmap[1], by_jit[1])
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(by_jit[1])) > 0.01


# --- compiled programs kept in the user's cache folder

COMPILES = """
import jax
from ddpm_jax.parallel import keep_compiled
keep_compiled()
jax.jit(lambda x: x * 3)(1.0)
"""


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "home/ddpm_jax/compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": "other"}, "other"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
    ],
    ids=["default", "elsewhere", "off"],
)
def test_compiled_programs_are_kept(tmp_path, variables, folder):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables
    subprocess.run([sys.executable, "-c", COMPILES], cwd=tmp_path, env=env, check=True)
    kept = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*-cache")}
    assert kept == ({folder} if folder else set())
