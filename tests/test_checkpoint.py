"""Checkpoints: what is saved comes back bit by bit, and damage costs no more than the damaged checkpoint."""

import dataclasses
import gc
import json
import logging
import os
import shutil

import jax
import numpy as np
import optax
import pytest
from helpers import replace_fields
from orbax.checkpoint import v1 as ocp

from ddpm_jax import checkpoint, saving
from ddpm_jax.checkpoint import (
    abstract_like,
    check_run_folder,
    load_weights,
    newest_step,
    read_config,
    restore_newest,
    run_folder,
    write_config,
)
from ddpm_jax.config import HARMLESS, Config, DataConfig, TrainConfig, override
from ddpm_jax.diffusion.timesteps import LossHistory
from ddpm_jax.errors import InputError
from ddpm_jax.parallel import make_mesh, put, replicated
from ddpm_jax.saving import Checkpoints
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import TrainState

CONFIG = Config(data=DataConfig(image_shape=(8, 8, 1)), train=TrainConfig(keep_last=3, keep_every_steps=None, num_steps=100))
OPTIMIZER = make_optimizer(CONFIG.optim, 100)
# Orbax starts reading one part of a checkpoint and drops the coroutine when another part can't be read.
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine '.*' was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def dropped_coroutines_end_here():
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """What the package logs, even after a command line in this process has taken its logger away from the root."""
    monkeypatch.setattr(logging.getLogger("ddpm_jax"), "propagate", True)
    return caplog


def mesh_of(count):
    return make_mesh(jax.devices()[:count])


def host_state(step):
    """A state of random bits in every place where the real one has numbers: 40,000 weights that no compressor can shrink."""
    generator = np.random.default_rng(step)

    def random(leaf):
        if leaf.ndim == 0:
            return np.asarray(step, leaf.dtype)
        return generator.standard_normal(leaf.shape).astype(leaf.dtype)

    shapes = {"conv": {"kernel": (3, 3, 64, 64), "bias": (64,)}, "dense": {"kernel": (7, 11)}}
    params = jax.tree.map(lambda shape: np.zeros(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    empty = TrainState(np.int32(0), params, params, jax.eval_shape(OPTIMIZER.init, params))
    return jax.tree.map(random, empty)


def make_state(step, count=1):
    """The state on devices, whole on each."""
    return put(host_state(step), replicated(mesh_of(count)))


def abstract(count=1):
    return abstract_like(make_state(0), replicated(mesh_of(count)))


def abstract_params(config):
    assert config == CONFIG
    return abstract().params


def write(workdir, steps, config=CONFIG, count=1):
    write_config(workdir, config)
    with Checkpoints(workdir, config) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step, count), step)
            checkpoints.wait()


def names(workdir):
    return sorted(entry.name for entry in (workdir / "checkpoints").iterdir())


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run folder with the checkpoints 10, 20 and 30."""
    workdir = tmp_path_factory.mktemp("pristine") / "run"
    write(workdir, [10, 20, 30])
    return workdir


@pytest.fixture
def run(pristine, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "run")


# --- there and back


def test_a_state_comes_back_bit_by_bit(pristine):
    state = make_state(30)
    restored = restore_newest(pristine, abstract())
    assert_same_bits(restored, state)
    assert int(restored.step) == 30
    assert int(optax.tree.get(restored.opt_state, "count", filtering=lambda path, _: "Adam" in str(path))) == 30
    assert np.any(optax.tree.get(restored.opt_state, "nu")["conv"]["kernel"])


def test_what_a_run_has_none_of_is_not_stored(pristine):
    """So a checkpoint of before there were loss histories is one of a run without."""
    stored = ocp.checkpointables_metadata(pristine / "checkpoints" / "30").metadata["training"]
    assert set(stored) == {"step", "opt_state"}


def test_a_loss_history_comes_back_bit_by_bit(tmp_path):
    losses = np.random.default_rng(3).standard_normal((5, 10)).astype(np.float32)
    history = put(LossHistory(losses, np.arange(5, dtype=np.int32)), replicated(mesh_of(1)))
    state = make_state(1)._replace(loss_history=history)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state, 1)
        checkpoints.wait()
    assert_same_bits(restore_newest(tmp_path, abstract_like(state, replicated(mesh_of(1)))), state)


@pytest.mark.parametrize(("written_on", "read_on"), [(8, 1), (1, 8), (2, 4)])
def test_a_checkpoint_can_be_read_on_another_number_of_devices(tmp_path, written_on, read_on):
    write(tmp_path, [1], count=written_on)
    restored = restore_newest(tmp_path, abstract(read_on))
    assert_same_bits(restored, make_state(1))
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.devices()[:read_on])


def test_special_numbers_survive(tmp_path):
    state = make_state(1)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, np.finfo(np.float32).max] + [0.0] * 58, np.float32)
    state.params["conv"]["bias"] = put(special, replicated(mesh_of(1)))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state, 1)
    assert np.asarray(restore_newest(tmp_path, abstract()).params["conv"]["bias"]).tobytes() == special.tobytes()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    """Steps that are free to overwrite the state which is being saved do not reach the file.

    Whether they do is the runtime's affair: buffers that the writer still reads on a CPU are copied instead.
    """
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = make_state(5)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state, 5)
        for _ in range(20):
            state = step(state)
    assert_same_bits(restore_newest(tmp_path, abstract()), make_state(5))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_are_read_with_their_config(pristine, weights):
    for path, step in [(pristine, 30), (pristine / "checkpoints" / "20", 20), (str(pristine), 30)]:
        loaded = load_weights(path, weights, abstract_params)
        state = make_state(step)
        assert_same_bits(loaded.params, state.ema if weights == "ema" else state.params)
        assert (loaded.step, loaded.config) == (step, CONFIG)


def test_nothing_to_restore(tmp_path):
    assert restore_newest(tmp_path, abstract()) is None
    (tmp_path / "checkpoints").mkdir()
    assert restore_newest(tmp_path, abstract()) is None
    assert newest_step(tmp_path) is None


# --- which are kept


def with_train(**fields):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **fields))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [(1, None, [9]), (3, None, [7, 8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9])],
)
def test_the_newest_and_the_multiples_stay(tmp_path, keep_last, keep_every, expected):
    write(tmp_path, range(1, 10), with_train(keep_last=keep_last, keep_every_steps=keep_every))
    assert names(tmp_path) == [str(step) for step in expected]


def test_what_stays_is_decided_anew_after_a_restart(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [4], with_train(keep_last=2))
    assert names(tmp_path) == ["3", "4"]


def test_order_is_by_number_not_by_name(tmp_path):
    write(tmp_path, [9, 10])
    assert newest_step(tmp_path) == 10
    assert int(restore_newest(tmp_path, abstract()).step) == 10
    assert load_weights(tmp_path, "raw", abstract_params).step == 10


# --- damage


def biggest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "biggest file cut in half": lambda folder: truncate(biggest(folder)),
    "biggest file empty": lambda folder: os.truncate(biggest(folder), 0),
    "biggest file gone": lambda folder: biggest(folder).unlink(),
    "zeros": lambda folder: biggest(folder).write_bytes(bytes(biggest(folder).stat().st_size)),
    "no _METADATA": lambda folder: next(folder.rglob("_METADATA")).unlink(),
}
DAMAGES = [pytest.param(damage, id=name) for name, damage in DAMAGE.items()]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["params", "ema", "training"])
def test_training_falls_back_to_the_checkpoint_before(run, log, damage, part):
    damage(run / "checkpoints" / "30" / part)
    assert_same_bits(restore_newest(run, abstract()), make_state(20))
    assert names(run) == ["10", "20", "30.damaged"]
    assert f"checkpoint {run / 'checkpoints' / '30'} can't be read" in log.text
    assert "put aside as 30.damaged" in log.text
    # What an earlier test's damage left to the garbage collector, asyncio reports whenever that comes round.
    assert len([record for record in log.records if record.name == "ddpm_jax"]) == 1
    # The next checkpoint of that step has the place free, and what was put aside stays.
    write(run, [30])
    assert names(run) == ["10", "20", "30", "30.damaged"]
    assert_same_bits(restore_newest(run, abstract()), make_state(30))


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_fall_back_to_the_checkpoint_before(run, log, damage):
    damage(run / "checkpoints" / "30" / "ema")
    loaded = load_weights(run, "ema", abstract_params)
    assert loaded.step == 20
    assert_same_bits(loaded.params, make_state(20).ema)
    assert f"checkpoint {run / 'checkpoints' / '30'} can't be read" in log.text
    assert "falling back to the checkpoint before" in log.text
    assert names(run) == ["10", "20", "30"]  # a reader changes nothing
    # The other weights of the same checkpoint are whole, and so is the checkpoint before.
    assert load_weights(run, "raw", abstract_params).step == 30
    with pytest.raises(InputError, match=r"checkpoint .*30 can't be read") as caught:
        load_weights(run / "checkpoints" / "30", "ema", abstract_params)
    assert "\n" not in str(caught.value)


def test_two_damaged_checkpoints_in_a_row(run, log):
    for step in ("30", "20"):
        truncate(biggest(run / "checkpoints" / step))
    assert_same_bits(restore_newest(run, abstract()), make_state(10))
    assert names(run) == ["10", "20.damaged", "30.damaged"]


def test_an_empty_folder_with_the_name_of_a_step(run, log):
    (run / "checkpoints" / "40").mkdir()
    assert load_weights(run, "ema", abstract_params).step == 30
    assert int(restore_newest(run, abstract()).step) == 30
    assert names(run) == ["10", "20", "30", "40.damaged"]


def test_the_same_step_damaged_again(run):
    for _ in range(3):
        truncate(biggest(run / "checkpoints" / "30"))
        assert int(restore_newest(run, abstract()).step) == 20
        write(run, [30])
    assert int(restore_newest(run, abstract()).step) == 30
    assert len([name for name in names(run) if name.startswith("30.damaged")]) == 3


def test_a_run_whose_checkpoints_are_all_unreadable_does_not_start_again(run):
    """Such as one of another version of the network: every checkpoint is whole, and none fits."""
    other = abstract()._replace(params={"another": abstract().params["conv"]})
    with pytest.raises(InputError, match=r"none of the 3 checkpoints of .* can be read; 30: ") as caught:
        restore_newest(run, other)
    assert "\n" not in str(caught.value)
    assert names(run) == ["10", "20", "30"]


def test_arrays_are_read_only_where_every_process_has_the_description(run, monkeypatch, log):
    """Another process, which is played here, can't read that of the newest checkpoint."""
    asked, read = [], []

    def anywhere(flag):
        asked.append(flag)
        return flag or len(asked) == 1

    def read_items(path, *rest):
        read.append(path.name)
        return saving.read_items(path, *rest)

    monkeypatch.setattr(checkpoint, "anywhere", anywhere)
    monkeypatch.setattr(checkpoint, "read_items", read_items)
    assert_same_bits(restore_newest(run, abstract()), make_state(20))
    assert asked == [False] * 3 and read == ["20"]
    assert "30 can't be read (another process can't read it): put aside as 30.damaged" in log.text


# --- interrupted saves


def test_leftovers_of_an_interrupted_save_are_ignored_and_cleared(run, log):
    """The name is the one that Orbax writes to before it renames; see test_runs.py for real ones."""
    leftover = run / "checkpoints" / "35.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "30", leftover)
    truncate(biggest(leftover))
    assert newest_step(run) == 30
    assert int(restore_newest(run, abstract()).step) == 30
    assert load_weights(run, "ema", abstract_params).step == 30
    assert log.text == ""
    write(run, [40])
    assert names(run) == ["20", "30", "40"]
    assert_same_bits(restore_newest(run, abstract()), make_state(40))


def test_a_checkpoint_appears_whole_under_its_name(tmp_path, monkeypatch):
    """Until everything is written, the folder has another name."""
    seen = []
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), step)
            while not (tmp_path / "checkpoints" / str(step)).exists():
                seen += names(tmp_path)
            assert int(restore_newest(tmp_path, abstract()).step) == step
    assert "2.orbax-checkpoint-tmp" in seen


# --- what is no checkpoint


def test_weights_that_are_not_there(pristine, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "7").mkdir()
    for path, message in [
        (tmp_path / "nowhere", r"no checkpoint at .*nowhere: there is no such folder"),
        (tmp_path / "file", "no checkpoint at .*file: give a run folder"),
        (tmp_path, "no checkpoint at .*: give a run folder"),
        (tmp_path / "7", "checkpoint .*7 can't be read"),
    ]:
        with pytest.raises(InputError, match=message):
            load_weights(path, "ema", abstract_params)
    with pytest.raises(InputError, match="unknown weights 'average': choose ema, raw, decay:VALUE or ema:LENGTH"):
        load_weights(pristine, "average", abstract_params)


def test_weights_that_do_not_fit_the_network(pristine):
    def wrong_shape(config):
        params = dict(abstract().params)
        return params | {"dense": {"kernel": jax.ShapeDtypeStruct((7, 12), np.float32, sharding=replicated(mesh_of(1)))}}

    def wrong_names(config):
        return {"another": abstract().params["conv"]}

    for make_abstract in (wrong_shape, wrong_names):
        with pytest.raises(InputError, match="holds another network than its config describes") as caught:
            load_weights(pristine / "checkpoints" / "30", "ema", make_abstract)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_program(tmp_path):
    ocp.save_checkpointables(tmp_path / "checkpoints" / "3", {"params": make_state(3).params})
    with pytest.raises(InputError, match="3 holds no config: it was not written by ddpm_jax"):
        load_weights(tmp_path, "raw", abstract_params)


# --- the run folder


def test_a_config_is_written_and_read_back(tmp_path):
    workdir = tmp_path / "deep" / "run"
    check_run_folder(workdir, CONFIG)
    write_config(workdir, CONFIG)
    assert [entry.name for entry in workdir.iterdir()] == ["config.json"]
    assert json.loads((workdir / "config.json").read_text())["train.num_steps"] == 100
    assert read_config(workdir / "config.json") == CONFIG


OTHERS = {"data.max_unusable": 0.5, "train.non_finite": "skip", "train.evaluate_metrics": "fid", "sample.sampler": "ddpm",
          "sample.spacing": "trailing", "sample.threshold": "none", "sample.eta": 0.5,
          "sample.guidance": 2.0, "sample.guidance_interval": (0.1, 2.0), "sample.guidance_rescale": 0.5}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_changes_pass(pristine, name):
    changed = replace_fields(CONFIG, {name: OTHERS.get(name, 17)})  # unchecked: guidance needs classes, which CONFIG hasn't
    assert changed != CONFIG
    check_run_folder(pristine, changed)


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_of_another_config_is_refused(run, lost):
    """Every field that differs is named; where config.json is lost, the newest checkpoint knows."""
    if lost:
        (run / "config.json").unlink()
    changed = override(CONFIG, {"model.channels": 64, "optim.learning_rate": 1e-3, "seed": 3, "train.num_steps": 7})
    with pytest.raises(InputError) as caught:
        check_run_folder(run, changed)
    message = str(caught.value)
    for difference in ("model.channels: 128 -> 64", "optim.learning_rate: 0.0002 -> 0.001", "seed: 0 -> 3"):
        assert difference in message
    assert "num_steps" not in message  # harmless
    assert str(run) in message
    assert "\n" not in message


def test_a_folder_without_checkpoints_is_free(tmp_path):
    """A run that never got as far as a checkpoint leaves nothing to protect."""
    write_config(tmp_path, CONFIG)
    check_run_folder(tmp_path, override(CONFIG, {"model.channels": 64}))


def test_the_length_of_a_cosine_run_is_part_of_its_config(tmp_path):
    cosine = override(CONFIG, {"optim.decay": "cosine"})
    write(tmp_path, [1], cosine)
    with pytest.raises(InputError, match=r"train\.num_steps: 100 -> 200"):
        check_run_folder(tmp_path, override(cosine, {"train.num_steps": 200}))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"no.such": 1}', b'{"seed": "x"}', b"\xff\xfe\x00"])
def test_a_config_that_cannot_be_read(run, content):
    (run / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_run_folder(run, CONFIG)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"can't write to run folder .*: choose another --workdir"):
            write_config(workdir, CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


def test_where_the_config_is_lost_and_the_newest_checkpoint_damaged_the_one_before_knows(run):
    (run / "config.json").unlink()
    for step in ("30", "20"):
        truncate(run / "checkpoints" / step / "_CHECKPOINT_METADATA")
        check_run_folder(run, CONFIG)
        with pytest.raises(InputError, match="seed: 0 -> 3"):
            check_run_folder(run, override(CONFIG, {"seed": 3}))
    truncate(run / "checkpoints" / "10" / "_CHECKPOINT_METADATA")
    with pytest.raises(InputError, match=r"checkpoint .*30 (can't be read|holds no config)") as caught:
        check_run_folder(run, CONFIG)
    assert "\n" not in str(caught.value)


def test_what_is_written_beside_weights_lies_in_the_run_folder_or_beside_a_file(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    assert run_folder(file) == tmp_path
    assert run_folder(tmp_path) == run_folder(tmp_path / "checkpoints" / "20") == tmp_path
