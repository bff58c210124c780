"""train.py as one run of several processes: the same numbers in any topology, stopped, killed, refused, and gone on with."""

import itertools
import json
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from runs import Running, free_port, start, start_together, wait_all

from ddpm_jax.checkpoint import abstract_like, read_config, restore_newest
from ddpm_jax.models import make_unet
from ddpm_jax.parallel import make_mesh, replicated
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state

pytestmark = pytest.mark.scale

STEPS = 20
MANY = 100_000  # more steps than any run makes before it is stopped
TIMEOUT = 8  # seconds after which a process that is not heard of is lost
SPARE = 5  # seconds that a survivor may take besides
OPTIONS = {
    "data.flip": True, "diffusion.num-steps": 50, "diffusion.schedule": "linear", "model.channels": 8,
    "model.multipliers": 1, "model.num-res-blocks": 1, "model.attention-resolutions": "", "model.dropout": 0.1,
    "model.num-groups": 4, "model.space-to-depth": 1, "optim.warmup-steps": 5, "optim.decay": "constant", "train.batch-size": 8,
    "train.num-steps": STEPS, "train.log-every-steps": 1, "train.checkpoint-every-steps": 10, "train.keep-last": 3,
    "train.keep-every-steps": "None", "train.preview-every-steps": 20, "train.preview-images": 4, "optim.ema-decays": 0.9,
    "sample.num-steps": 5, "train.steps-per-dispatch": 1,
}  # fmt: skip
TOPOLOGIES = {"1x1": (1, 1, 1), "1x4": (1, 4, 1), "2x2": (2, 2, 1), "2x2 fsdp 2": (2, 2, 2)}


def quick(devices):
    """Variables with which programs are compiled quickly; what is compiled is kept for the session, see conftest.py."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {"XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


LOST = "error: another process of {} was lost; the same command, in all of them, goes on from the newest checkpoint"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (22, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def words(images):
    """The command line of a run: words(workdir, {"train.num-steps": 5})."""

    def line(workdir: Path, changes=()) -> list[str | Path]:
        options = {"workdir": workdir, "data.source": images} | OPTIONS | dict(changes)
        each = [[f"--{name}"] if value is True else [f"--{name}", *str(value).split()] for name, value in options.items()]
        return list(itertools.chain(*each))

    return line


@pytest.fixture(scope="module")
def train(words, tmp_path_factory):
    """Start a run: train(workdir, "2x2", {"train.num-steps": 5}) -> its processes. None is left running."""
    started: list[Running] = []

    def begin(workdir, topology, changes=()):
        count, devices, fsdp = TOPOLOGIES[topology]
        line = words(workdir, {"train.fsdp": fsdp} | dict(changes))
        logs = tmp_path_factory.mktemp("logs")
        running = start_together("train.py", line, logs, count=count, devices=devices, timeout=TIMEOUT, env=quick(devices))
        started.extend(running)
        return running

    yield begin
    for each in started:
        each.kill()


def finish(running, status=0):
    statuses = wait_all(running)
    assert statuses == [status] * len(running), "\n".join(each.errors for each in running)


def errors_of(running):
    """The one line that each process has ended with; there is no other, and no traceback."""
    lines = [[line for line in each.errors.splitlines() if line.startswith("error: ")] for each in running]
    assert [len(each) for each in lines] == [1] * len(running), "\n".join(each.errors for each in running)
    assert not [each.errors for each in running if "Traceback" in each.errors]
    return [line for (line,) in lines]


def losses(workdir):
    """The loss of each step; a run that goes on writes the records after its checkpoint again."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: (record["loss"], record["grad_norm"]) for record in records}
    return np.array([found[step] for step in range(1, STEPS + 1)])


def last_state(workdir):
    """Everything in the newest checkpoint, as bytes by name, and its step."""
    config = read_config(workdir / "config.json")
    make = lambda: init_state(config, make_unet(config.model, 1), make_optimizer(config.optim, config.train.num_steps))  # noqa: E731
    state = restore_newest(workdir, abstract_like(jax.eval_shape(make), replicated(make_mesh(jax.devices()[:1]))))
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}, int(state.step)


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """The folders of whole runs by topology."""
    folders = {}
    for topology in TOPOLOGIES:
        folders[topology] = tmp_path_factory.mktemp("whole") / "run"
        finish(train(folders[topology], topology))
    return folders


OTHERS = [topology for topology in TOPOLOGIES if topology != "1x1"]


@pytest.mark.parametrize("topology", OTHERS)
def test_losses_are_the_same_in_any_topology(finished, topology):
    np.testing.assert_allclose(losses(finished[topology]), losses(finished["1x1"]), rtol=1e-5)


@pytest.mark.parametrize("topology", OTHERS)
def test_previews_are_the_same_to_one_grey_level(finished, topology):
    one, other = (
        np.asarray(Image.open(finished[each] / "samples" / f"{STEPS:08d}.png"), np.int32) for each in ("1x1", topology)
    )
    assert one.std() > 10
    assert np.abs(one - other).max() <= 1


def test_one_process_writes_and_speaks(train, finished, tmp_path):
    names = {entry.name.partition(".out")[0] for entry in finished["2x2"].iterdir() if not entry.name.startswith(".")}
    assert names >= {"config.json", "metrics.jsonl", "events", "checkpoints", "samples", "loss.png"}
    assert len(list(finished["2x2"].glob("events.*"))) == 1
    assert len((finished["2x2"] / "metrics.jsonl").read_text().splitlines()) == STEPS
    first, second = train(finished["2x2"], "2x2")  # nothing is left to do
    finish([first, second])
    assert f"trained {STEPS} steps" in first.errors
    assert second.errors == ""
    assert not [line for each in (first, second) for line in each.output.splitlines() if line and "[Gloo]" not in line]


@pytest.mark.parametrize(("begun", "goes_on"), [("2x2 fsdp 2", "1x1"), ("1x1", "2x2")])
def test_a_run_goes_on_in_another_topology(train, finished, tmp_path, begun, goes_on):
    workdir = tmp_path / "run"
    finish(train(workdir, begun, {"train.num-steps": 13}))
    running = train(workdir, goes_on)
    finish(running)
    assert f"resuming {workdir} from step 13" in running[0].errors
    np.testing.assert_allclose(losses(workdir), losses(finished["1x1"]), rtol=1e-5)


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(train, finished, tmp_path, number, to):
    """And the run that goes on ends in the bits of one that nothing has disturbed."""
    workdir, topology = tmp_path / "run", "2x2 fsdp 2"
    running = train(workdir, topology)
    running[0].wait_for(f"step 3/{STEPS}")
    running[to].send(number)
    finish(running)
    stopped = re.search(rf"stopped at step (\d+) of {STEPS} and saved", running[0].errors)
    assert stopped and last_state(workdir)[1] == int(stopped[1]) >= 3
    finish(train(workdir, topology))
    (state, step), (other, _) = last_state(workdir), last_state(finished[topology])
    assert step == STEPS and state.keys() == other.keys()
    assert [name for name in state if state[name] != other[name]] == []


@pytest.mark.parametrize("killed", [0, 1])
def test_the_survivor_of_a_kill_ends_in_time_and_the_same_command_goes_on(train, tmp_path, killed):
    workdir = tmp_path / "run"
    running = train(workdir, "2x2", {"train.num-steps": MANY})
    running[0].wait_for(f"step 15/{MANY}")
    running[killed].kill()
    began = time.monotonic()
    survivor = running[1 - killed]
    status = survivor.wait(limit=60)
    assert time.monotonic() - began < TIMEOUT + SPARE
    assert status not in (0, 2)
    survivor.wait_for("error: ", limit=2)  # JAX's abort comes a moment before the last words
    last = survivor.errors.splitlines()[-1]
    assert last.startswith(LOST.format(workdir)) and "Traceback" not in survivor.errors
    running = train(workdir, "2x2", {"train.num-steps": MANY})
    running[0].wait_for(f"resuming {workdir} from step ")
    running[0].wait_for(f"/{MANY}")  # the first record
    running[1].send(signal.SIGTERM)
    finish(running)
    assert int(re.search(r"resuming .* from step (\d+)", running[0].errors)[1]) >= 10


def start_two(words, logs, lines, devices=1, timeout=TIMEOUT):
    port = free_port()
    return [
        start("train.py", line, logs, index=index, count=2, port=port, timeout=timeout, devices=devices)
        for index, line in enumerate(lines)
    ]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [({"optim.learning-rate": 0.5}, "process 1 has optim.learning_rate = 0.5, but process 0 has optim.learning_rate = "),
     ({"data.source": "nowhere.npy"}, "nowhere.npy"),
     ({"model.chanels": 8}, "unknown option"),
     ({"workdir": "elsewhere"}, "is another folder in process 0 than in process 1 on ")],
    ids=["config", "data", "option", "folder"],
)  # fmt: skip
def test_processes_that_don_t_fit_together_all_end_in_one_line(words, tmp_path, changes, fragment):
    if "workdir" in changes:
        changes = {"workdir": tmp_path / "elsewhere"}
    lines = [words(tmp_path / "run"), words(tmp_path / "run", changes)]
    running = start_two(words, tmp_path / "logs", lines)
    finish(running, status=2)
    assert all(fragment in line for line in errors_of(running))
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_folder_of_a_run_that_can_t_be_used_ends_both(words, finished, tmp_path):
    """The first process alone could tell; the second is somewhere else by then."""
    lines = [words(finished["1x1"], {"seed": 3})] * 2
    running = start_two(words, tmp_path / "logs", lines)
    finish(running, status=2)
    assert all("seed: 0 -> 3" in line for line in errors_of(running))


@pytest.mark.parametrize("index", [0, 1])
def test_others_that_don_t_come_are_named_in_time(words, tmp_path, index):
    began = time.monotonic()
    alone = start("train.py", words(tmp_path / "run"), tmp_path / "logs", index=index, count=2, port=free_port(), timeout=3)
    assert alone.wait(limit=60) == 2
    assert time.monotonic() - began < 3 + 20  # Python's own start included, on a busy machine
    assert "within --processes.timeout = 3 s" in errors_of([alone])[0]
    assert len(alone.errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_image_that_one_process_can_t_read_ends_both(images, words, tmp_path):
    """The other one waits for it, in the middle of a step."""
    prepared, logs = tmp_path / "prepared", tmp_path / "logs"
    finish([start("prepare.py", ["--data.source", images, "--out", prepared], logs)])
    shard = max(prepared.rglob("*.array_record"), key=lambda path: path.stat().st_size)
    held = bytearray(shard.read_bytes())
    held[len(held) // 2] ^= 1
    shard.write_bytes(held)
    changes = {"data.source": prepared, "data.device-megabytes": 0, "train.num-steps": MANY}
    running = start_two(words, logs, [words(tmp_path / "run", changes)] * 2)
    finish(running, status=2)
    lines = errors_of(running)
    assert sum(line.startswith("error: process ") for line in lines) == 1
    assert all(shard.name in line for line in lines)
