"""train.py as a process of its own: killed, stopped, gone on with, diverged.

Every comparison is with run A, which nothing disturbs: a resumed run must end in the same bits.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from ddpm_jax.checkpoint import abstract_like, read_config, restore_newest
from ddpm_jax.models import make_unet
from ddpm_jax.parallel import make_mesh, replicated
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state

pytestmark = pytest.mark.heavy

TRAIN = Path(__file__).parents[1] / "train.py"
STEPS = 120
EVERY = 10  # steps between checkpoints: a kill falls into the writing of one as often as not
SNAPSHOT = 4  # steps between snapshots
LIMIT = 300.0  # seconds that nothing here takes, even on a busy machine
OPTIONS = {
    "data.flip": True, "diffusion.num-steps": 50, "diffusion.schedule": "linear", "model.channels": 8, "model.multipliers": 1,
    "model.num-res-blocks": 1, "model.attention-resolutions": "", "model.dropout": 0.1, "model.num-groups": 4,
    "model.space-to-depth": 1, "optim.warmup-steps": 20, "optim.decay": "constant", "train.batch-size": 4,
    "train.num-steps": STEPS, "train.log-every-steps": 1, "train.checkpoint-every-steps": EVERY, "train.keep-last": 3,
    "train.keep-every-steps": "None", "train.preview-every-steps": "None", "optim.ema-decays": 0.9,
    "optim.ema-lengths": "0.05 0.1", "train.snapshot-every-steps": SNAPSHOT,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (22, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def train(images, tmp_path_factory):
    """Start train.py on one device: train(workdir, {"train.num-steps": 5}) -> Popen.

    All but run A share a cache of compiled programs, to save time; A compiles its own.
    """
    started, cache = [], tmp_path_factory.mktemp("cache")

    def start(workdir, changes=(), cached=True):
        words = [TRAIN, "--workdir", workdir, "--data.source", images]
        for name, value in (OPTIONS | dict(changes)).items():
            words += [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        if cached:
            env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process, status=0):
    """What the process wrote to stderr, once it has ended with the given status."""
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == status, errors
    assert output == ""
    assert "Traceback" not in errors
    return errors


def steps_logged(workdir):
    """The last step that metrics.jsonl tells of so far."""
    path = workdir / "metrics.jsonl"
    found = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
    return int(found[-1]) if found else 0


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + LIMIT
    while steps_logged(workdir) < step:
        assert process.poll() is None, f"ended before step {step}: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def init_state_of(config):
    return init_state(config, make_unet(config.model, 1), make_optimizer(config.optim, config.train.num_steps))


def last_state(workdir):
    """Everything in the newest checkpoint, as bytes by name."""
    shapes = jax.eval_shape(lambda: init_state_of(read_config(workdir / "config.json")))
    state = restore_newest(workdir, abstract_like(shapes, replicated(make_mesh(jax.devices()[:1]))))
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def metrics(workdir):
    """The last record of each step, without the speed; lines that a kill has torn are left out."""
    records = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        record.pop("images_per_second", None)
        record.pop("data_wait", None)
        records[record["step"]] = record
    return records


def snapshots(workdir):
    """Everything in the snapshots, as bytes by step and name."""
    state = jax.eval_shape(lambda: init_state_of(read_config(workdir / "config.json")))
    abstract = abstract_like(state.params, replicated(make_mesh(jax.devices()[:1])))
    found = {}
    for folder in (workdir / "snapshots").iterdir():
        for item, tree in ocp.load_checkpointables(folder, dict.fromkeys(("ema-0.05", "ema-0.1"), abstract)).items():
            for path, leaf in jax.tree.flatten_with_path(tree)[0]:
                found[folder.name, item, jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return found


@dataclasses.dataclass
class Finished:
    workdir: Path
    state: dict
    metrics: dict
    snapshots: dict


@pytest.fixture(scope="module")
def run_a(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("a") / "run"
    errors = finish(train(workdir, cached=False))
    assert f"trained {STEPS} steps; next: python sample.py --ckpt {workdir}" in errors
    assert checkpoints(workdir) == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
    return Finished(workdir, last_state(workdir), metrics(workdir), snapshots(workdir))


def assert_same_run(workdir, run_a):
    assert checkpoints(workdir)[-1] == STEPS
    state = last_state(workdir)
    assert state.keys() == run_a.state.keys()
    assert [name for name in state if state[name] != run_a.state[name]] == []
    assert metrics(workdir) == run_a.metrics
    assert snapshots(workdir) == run_a.snapshots


def test_the_reference_run_is_complete(run_a):
    assert sorted(run_a.metrics) == list(range(1, STEPS + 1))
    assert int(np.frombuffer(run_a.state[".step"], np.int32)[0]) == STEPS
    assert any(name.startswith(".opt_state") for name in run_a.state)
    assert {step for step, _, _ in run_a.snapshots} == {str(step) for step in range(SNAPSHOT, STEPS + 1, SNAPSHOT)}
    ema, params = (b"".join(v for k, v in run_a.state.items() if k.startswith(part)) for part in (".ema", ".params"))
    assert len(ema) == len(params) > 4 * 1000
    assert ema != params


def test_a_run_killed_again_and_again_ends_in_the_same_bits(train, run_a, tmp_path):
    """SIGKILL before the first checkpoint, then twice at moments of chance; the same command each time."""
    workdir, chance = tmp_path / "run", random.Random(0)
    for low, high in [(2, EVERY - 2), (EVERY + 1, STEPS // 2), (STEPS // 2 + 1, STEPS - EVERY)]:
        process = train(workdir)
        wait_for_step(process, workdir, chance.randint(low, high))
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    errors = finish(train(workdir))
    assert f"resuming {workdir} from step" in errors
    assert_same_run(workdir, run_a)
    # Nothing is left of what was being written when the run was killed.
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {str(step) for step in checkpoints(run_a.workdir)}


@pytest.mark.parametrize("place", ["checkpoints", "snapshots"])
def test_a_run_killed_while_a_checkpoint_is_written(train, run_a, tmp_path, place):
    """Or a snapshot: the kill comes as soon as its temporary folder shows."""
    workdir = tmp_path / "run"
    process = train(workdir)
    wait_for_step(process, workdir, EVERY + 5)
    folder, deadline = workdir / place, time.monotonic() + LIMIT
    while not (being_written := [path.name for path in folder.iterdir() if "tmp" in path.name]):
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in folder.iterdir() if not path.name.isdigit()]
    assert left == being_written[:1] or left == []  # it may have been finished a moment before
    finish(train(workdir))
    assert_same_run(workdir, run_a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_on_request_saves_and_goes_on(train, run_a, tmp_path, number):
    workdir = tmp_path / "run"
    process = train(workdir)
    wait_for_step(process, workdir, 33)
    process.send_signal(number)
    errors = finish(process, status=0)
    assert f"{number.name}: stopping after this step" in errors
    stopped = re.search(rf"stopped at step (\d+) of {STEPS} and saved; the same command goes on from there", errors)
    assert stopped, errors
    step = int(stopped[1])
    assert 33 <= step < STEPS
    assert checkpoints(workdir)[-1] == step
    errors = finish(train(workdir))
    assert f"resuming {workdir} from step {step}" in errors
    assert_same_run(workdir, run_a)


def digests(workdir):
    """Contents of all files but the ones that every start writes: TensorBoard's events, the plot, and who holds the lock."""
    files = (path for path in workdir.rglob("*") if path.is_file() and "events." not in path.name)
    files = (path for path in files if path.name not in ("loss.png", ".lock"))
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_finished_run_is_left_alone_and_can_be_given_more_steps(train, run_a):
    before = digests(run_a.workdir)
    errors = finish(train(run_a.workdir))
    assert f"trained {STEPS} steps" in errors
    assert digests(run_a.workdir) == before

    errors = finish(train(run_a.workdir, {"model.channels": 16}), status=2)
    assert len(errors.splitlines()) == 1
    assert errors.startswith("error: ")
    assert "model.channels: 8 -> 16" in errors
    assert digests(run_a.workdir) == before

    errors = finish(train(run_a.workdir, {"train.num-steps": STEPS + 5}))
    assert f"resuming {run_a.workdir} from step {STEPS}" in errors
    assert f"trained {STEPS + 5} steps" in errors
    assert checkpoints(run_a.workdir)[-1] == STEPS + 5
    assert sorted(metrics(run_a.workdir)) == list(range(1, STEPS + 6))


DIVERGING = {"optim.learning-rate": 1e30, "optim.clip-norm": "None"}


def test_a_diverging_run_ends_with_one_line(train, tmp_path):
    """The first update throws the weights to 1e30; the second loss can't be a number."""
    errors = finish(train(tmp_path / "run", DIVERGING | {"optim.warmup-steps": 0}), status=1)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(r"\b(nan|inf)\b.* at step 2; there is no checkpoint yet;", lines[0])


def test_a_diverging_run_names_the_last_good_checkpoint(train, tmp_path):
    """With warm-up, update 1 has rate 0 and update 2 throws the weights away: the loss of step 3 shows it."""
    workdir, changes = tmp_path / "run", DIVERGING | {"optim.warmup-steps": 1000}
    finish(train(workdir, changes | {"train.num-steps": 1}))
    errors = finish(train(workdir, changes), status=1)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"at step 3; the last good checkpoint is {workdir / 'checkpoints' / '1'}" in lines[0]
    assert checkpoints(workdir) == [1]
