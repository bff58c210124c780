"""Averages and snapshots of whole runs: stopped, killed and gone on with; asked for by name; put together afterwards.

The network is PixelNet on one device, but for the real run at the end.
"""

import dataclasses
import logging
import shutil

import jax
import numpy as np
import pytest
from helpers import load_script, one_line_error
from orbax.checkpoint import v1 as ocp
from training.networks import make_pixel_net

import ddpm_jax as ddpm
from ddpm_jax import inference
from ddpm_jax.checkpoint import load_weights
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from ddpm_jax.models import make_unet
from ddpm_jax.parallel import make_mesh
from ddpm_jax.snapshots import reconstruct
from ddpm_jax.training import loop

NAMES = ["decay:0.5", "ema:0.05", "ema:0.1"]


def compile_for(mesh, function, **options):
    """Compiled quickly."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda fsdp: make_mesh(jax.devices()[:1], fsdp))
        patch.setattr(loop, "compile_for", compile_for)
        patch.setattr(loop, "make_unet", make_pixel_net)
        patch.setattr(inference, "make_unet", make_pixel_net)
        inference.make_draw.cache_clear()
        yield
        inference.make_draw.cache_clear()


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """What the package logs, even after a command line in this process has taken its logger away from the root."""
    monkeypatch.setattr(logging.getLogger("ddpm_jax"), "propagate", True)
    caplog.set_level(logging.INFO, logger="ddpm_jax")
    return caplog


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def config(images):
    """20 steps, a checkpoint after every 5 of them, a snapshot after every 3."""
    return Config(
        data=DataConfig(source=str(images)),
        diffusion=DiffusionConfig(num_steps=50),
        model=ModelConfig(multipliers=(1,), attention_resolutions=(), dropout=0.2),
        optim=OptimConfig(warmup_steps=0, learning_rate=1e-2, ema_decays=(0.5,), ema_lengths=(0.05, 0.1)),
        train=TrainConfig(
            batch_size=4, num_steps=20, log_every_steps=10, checkpoint_every_steps=5, keep_last=2, keep_every_steps=None,
            preview_every_steps=None, snapshot_every_steps=3,
        ),
        sample=SampleConfig(num_steps=3),
    )  # fmt: skip


def with_train(config, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def with_optim(config, **fields):
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **fields))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder and the last state of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, loop.train(config, workdir)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def items(folder):
    return {entry.name for entry in folder.iterdir() if entry.is_dir()}


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)


def read(folder, item, state):
    """One average of a snapshot, read alone."""
    return ocp.load_checkpointables(folder, {item: abstract_of(state)})[item]


SNAPSHOTS = ["12", "15", "18", "3", "6", "9"]


def assert_same_run(workdir, whole):
    """Every average of the last checkpoint, and every snapshot, bit by bit."""
    folder, state = whole
    assert names(workdir / "snapshots") == SNAPSHOTS
    for step in SNAPSHOTS:
        for item in ("ema-0.05", "ema-0.1"):
            found, expected = (read(each / "snapshots" / step, item, state) for each in (workdir, folder))
            assert_same_bits(found, expected)
    for name in NAMES:
        assert_same_bits(load_weights(workdir, name, lambda config: abstract_of(state)).params, state.averages[name])


# --- written, stopped, killed


def test_a_run_writes_its_averages_and_snapshots(whole):
    folder, state = whole
    assert list(state.averages) == NAMES
    assert names(folder / "snapshots") == SNAPSHOTS
    assert items(folder / "checkpoints" / "20") == {"params", "ema", "training", "decay-0.5", "ema-0.05", "ema-0.1"}
    assert_same_run(folder, whole)
    assert not np.array_equal(*(read(folder / "snapshots" / "18", f"ema-{x}", state)["Dense_0"]["kernel"] for x in (0.05, 0.1)))


def test_a_snapshot_holds_the_averages_of_its_step(config, whole, tmp_path):
    state = loop.train(with_train(config, num_steps=9), tmp_path)
    for length in (0.05, 0.1):
        assert_same_bits(read(whole[0] / "snapshots" / "9", f"ema-{length}", state), state.averages[f"ema:{length}"])


@pytest.mark.parametrize("together", [1, 4])
def test_stopping_and_going_on_loses_and_doubles_nothing(config, whole, tmp_path, together):
    """Steps dispatched together give the same up to rounding, and the same bits among themselves."""
    config = with_train(config, steps_per_dispatch=together)
    if together > 1:
        singly, whole = whole[1], (tmp_path / "whole", loop.train(config, tmp_path / "whole"))
        for a, b in zip(jax.tree.leaves(whole[1].averages), jax.tree.leaves(singly.averages), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    workdir = tmp_path / "run"
    for num_steps in (4, 6, 13):
        loop.train(with_train(config, num_steps=num_steps), workdir)
    state = loop.train(config, workdir)
    assert_same_bits(state, whole[1])
    assert_same_run(workdir, whole)


def killed(folder, target, checkpoints, snapshots):
    """A copy of a run as a kill leaves it, that has come as far as the given steps."""
    shutil.copytree(folder, target)
    for room, last in (("checkpoints", checkpoints), ("snapshots", snapshots)):
        for entry in (target / room).iterdir():
            if int(entry.name) > last:
                shutil.rmtree(entry)
    return target


@pytest.mark.parametrize(("checkpoints", "snapshots"), [(15, 18), (0, 3)])
def test_a_run_killed_after_a_snapshot_repeats_the_steps_but_not_the_snapshot(config, whole, tmp_path, checkpoints, snapshots):
    workdir = killed(whole[0], tmp_path / "run", checkpoints, snapshots)
    before = {entry.name: entry.stat().st_ino for entry in (workdir / "snapshots").iterdir()}
    assert_same_bits(loop.train(config, workdir), whole[1])
    assert_same_run(workdir, whole)
    assert before.items() <= {entry.name: entry.stat().st_ino for entry in (workdir / "snapshots").iterdir()}.items()


def test_a_run_killed_while_a_snapshot_is_written(config, whole, tmp_path):
    workdir = killed(whole[0], tmp_path / "run", 15, 15)
    shutil.copytree(workdir / "snapshots" / "15", workdir / "snapshots" / "18.orbax-checkpoint-tmp")
    shutil.rmtree(workdir / "snapshots" / "18.orbax-checkpoint-tmp" / "ema-0.1")
    assert_same_bits(loop.train(config, workdir), whole[1])
    assert_same_run(workdir, whole)


def test_snapshots_of_another_run_are_not_mixed_in(config, whole, tmp_path):
    """Killed before its first checkpoint, a run leaves snapshots alone: they too belong to one config."""
    workdir = killed(whole[0], tmp_path / "run", 0, 6)
    other = dataclasses.replace(config, seed=5)
    one_line_error(loop.train, other, workdir, fragments=["seed: 0 -> 5", "choose another --workdir"])
    (workdir / "config.json").unlink()
    one_line_error(loop.train, other, workdir, fragments=["seed: 0 -> 5"])
    assert names(workdir / "snapshots") == ["3", "6"]


@pytest.mark.parametrize("fields", [{"ema_decays": ()}, {"ema_lengths": (0.05,)}, {"ema_decays": (0.5, 0.9)}])
def test_what_a_run_follows_is_part_of_its_config(config, whole, fields):
    one_line_error(loop.train, with_optim(config, **fields), whole[0], fragments=[f"optim.{next(iter(fields))}: ("])


def test_snapshots_of_nothing(config, tmp_path):
    fragments = ["train.snapshot_every_steps", "optim.ema_lengths is empty"]
    one_line_error(loop.train, with_optim(config, ema_lengths=()), tmp_path / "run", fragments=fragments)
    assert not (tmp_path / "run").exists()


def test_a_run_without_them_has_neither(config, tmp_path):
    plain = with_train(with_optim(config, ema_decays=(), ema_lengths=()), num_steps=2, snapshot_every_steps=None)
    assert loop.train(plain, tmp_path).averages == {}
    assert not (tmp_path / "snapshots").exists()
    assert {entry.name for entry in (tmp_path / "checkpoints" / "2").iterdir() if entry.is_dir()} == {
        "params",
        "ema",
        "training",
    }
    fragments = ["no weights 'ema:0.08'", "choose ema or raw;", "optim.ema_lengths"]
    one_line_error(ddpm.load, tmp_path, "ema:0.08", fragments=fragments)


# --- asked for by name


@pytest.mark.parametrize("name", [*NAMES, "decay:0.50", "ema:5e-2", "ema:.10"])
def test_what_was_followed_is_read_as_it_is(whole, name, log):
    folder, state = whole
    kind, _, value = name.partition(":")
    model = ddpm.load(folder, weights=name)
    assert_same_bits(jax.device_get(model.params), jax.device_get(state.averages[f"{kind}:{float(value)}"]))
    assert (model.weights, model.step) == (name, 20)
    assert log.text == ""


@pytest.mark.parametrize("name", ["decay:0.9", "decay:0.05", "ema:0", "ema:0.3", "ema:-0.05", "ema:nan", "ema:inf"])
def test_what_was_not_followed_is_refused_with_what_there_is(whole, name, log):
    """From any of the checkpoints: none is passed over for it."""
    choices = "choose ema, raw, decay:0.5, ema:0.05, ema:0.1 or ema:LENGTH up to 0.2887"
    for path in (whole[0], whole[0] / "checkpoints" / "15"):
        one_line_error(ddpm.load, path, name, fragments=[f"no weights {name!r}", choices])
    assert log.text == ""


@pytest.mark.parametrize("name", ["", "best", "decay", "raw:0.5", "ema:", "ema:long", ":0.5", "EMA", "decay:0,5"])
def test_names_of_no_weights(whole, name):
    fragments = [f"unknown weights {name!r}", "choose ema, raw, decay:VALUE or ema:LENGTH"]
    one_line_error(ddpm.load, whole[0], name, fragments=fragments)


def test_too_few_averages_for_a_length(whole, tmp_path):
    """A short one, or without the run's snapshots."""
    one_line_error(ddpm.load, whole[0], "ema:0.005", fragments=["ema:0.005", "0.05, 0.1 at 7 steps", "%", "choose a length"])
    alone = shutil.copytree(whole[0] / "checkpoints" / "20", tmp_path / "20")
    one_line_error(ddpm.load, alone, "ema:0.2", fragments=["at 1 step give", "smaller train.snapshot_every_steps"])
    ddpm.load(alone, "ema:0.075")


def test_a_damaged_snapshot(whole, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    good = ddpm.load(workdir, "ema:0.075").params
    damaged = workdir / "snapshots" / "18"
    shutil.rmtree(damaged / "ema-0.1")
    one_line_error(ddpm.load, workdir, "ema:0.075", fragments=[f"snapshot {damaged} can't be read", "move it away"])
    damaged.rename(workdir / "18")
    without = ddpm.load(workdir, "ema:0.075").params
    for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)  # one snapshot fewer: nearly the same average


def test_samples_of_other_weights(whole, tmp_path, log):
    """The command line takes the same names."""
    sample, drawn = load_script("sample.py"), {}
    for name in ("ema", "raw", "decay:0.5", "ema:0.1", "ema:0.08"):
        out = tmp_path / "out.npz"
        sample.main(["--ckpt", str(whole[0]), "--num-images", "2", "--weights", name, "--out", str(out)])
        assert f"from the {name} weights of step 20" in log.messages[-1]
        drawn[name] = np.load(out)["images"].tobytes()
    assert "weights ema:0.08 of step 20 from the averages of lengths 0.05, 0.1 at 7 steps" in log.text
    assert len(set(drawn.values())) == len(drawn)


# --- put together


def relative(a, b):
    """|a - b| / |b| over all weights, in float64."""
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """640 steps of a small UNet on the packaged images, with 16 snapshots; five lengths followed, of which two are used."""
    workdir = tmp_path_factory.mktemp("real")
    config = Config(
        diffusion=DiffusionConfig(schedule="cosine", num_steps=100),
        model=ModelConfig(
            channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, space_to_depth=4
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=50, ema_lengths=(0.03, 0.05, 0.075, 0.1, 0.15)),
        train=TrainConfig(
            batch_size=8, num_steps=640, steps_per_dispatch=20, checkpoint_every_steps=320, keep_last=2, keep_every_steps=None,
            preview_every_steps=None, snapshot_every_steps=40,
        ),
        sample=SampleConfig(num_steps=10),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, inference):
            patch.setattr(module, "make_unet", make_unet)
        return workdir, config, loop.train(config, workdir)


@pytest.mark.parametrize("length", [0.03, 0.075, 0.15])
def test_a_length_put_together_is_the_one_followed(real_run, length):
    """To a relative 1e-3, from the lengths 0.05 and 0.1 alone, whose own averages are farther off than that."""
    workdir, config, state = real_run
    two = with_optim(config, ema_lengths=(0.05, 0.1))
    found = reconstruct(workdir / "checkpoints" / "640", length, two, abstract_of(state))
    errors = {name: relative(state.averages[f"ema:{name}"], state.averages[f"ema:{length}"]) for name in (0.05, 0.1)}
    error = relative(found, state.averages[f"ema:{length}"])
    print(f"ema:{length} put together to {error:.2g}; the stored averages are {errors} off")
    assert error < 1e-3 < min(errors.values())
