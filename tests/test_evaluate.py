"""evaluate.py as a user meets it: help, one line and exit status 2 for bad input, what it prints and writes, and a kill."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import jaxtyping
import numpy as np
import pytest
from helpers import load_script, one_line_error, start_script

from ddpm_jax import load
from ddpm_jax.checkpoint import write_config
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SampleConfig
from ddpm_jax.data import load_images
from ddpm_jax.evaluation.bits_per_dim import Scoring, evaluate_bits_per_dim
from ddpm_jax.models import make_unet
from ddpm_jax.parallel import make_mesh, put, replicated, run_once
from ddpm_jax.saving import Checkpoints
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state

evaluate = load_script("evaluate.py")


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run folder whose network was never trained, but whose raw and averaged weights differ."""
    config = Config(
        data=DataConfig(source=str(images), image_shape=(8, 8, 1)),
        diffusion=DiffusionConfig(schedule="cosine", num_steps=20),
        model=ModelConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4),
        sample=SampleConfig(num_steps=5, batch_size=4),
    )
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    unet, optimizer = make_unet(config.model, 1), make_optimizer(config.optim, 10)
    mesh = make_mesh(jax.devices()[:1])
    state = run_once(mesh, lambda: init_state(config, unet, optimizer))
    generator = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + generator.normal(0, 0.1, x.shape).astype(np.float32), jax.device_get(state.ema))
    write_config(workdir, config)
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(state._replace(ema=put(moved, replicated(mesh))), 3)
        checkpoints.wait()
    return workdir


@pytest.fixture
def fresh(run, tmp_path):
    """A copy of the run that nothing was measured of."""
    return shutil.copytree(run, tmp_path / "run")


def test_what_is_printed_and_written(fresh, images, capsys):
    evaluate.main(["--ckpt", str(fresh), "--metrics", "bpd,bpd_ode", "--num-images", "9", "--first-image", "2", "--seed", "3"])
    printed, written = json.loads(capsys.readouterr().out), json.loads((fresh / "evaluation.json").read_text())
    assert [json.loads(line) for line in (fresh / "evaluations.jsonl").read_text().splitlines()] == [written]
    about = {
        "ckpt": str(fresh), "step": 3, "weights": "ema", "data": str(images), "first_image": 2, "num_images": 9, "seed": 3,
    }  # fmt: skip
    assert {name: written[name] for name in about} == about
    assert written.keys() == {*about, "bpd", "bpd_ode"}
    assert len(written["bpd"].pop("L_t")) == 19
    assert printed == written
    decisive = {"data": str(images), "split": "train", "first_image": 2, "num_images": 9, "seed": 3}
    assert written["bpd"]["protocol"] == decisive | {"variance": "fixed_large", "evaluations": 20}
    assert written["bpd_ode"]["protocol"] == decisive | {"ode_steps": 20, "ode_probes": 1}
    model, image_set = load(fresh), load_images(DataConfig(source=str(images)))
    for metric in ("bpd", "bpd_ode"):
        expected = evaluate_bits_per_dim(model, image_set, fresh / "bits_per_dim.jsonl", Scoring(metric, seed=3), 2, 9)
        assert written[metric]["bits_per_dim"] == expected["bits_per_dim"]


def test_the_number_of_images_defaults_to_all_that_are_left(fresh, capsys):
    evaluate.main(["--ckpt", str(fresh), "--first-image", "35"])
    assert json.loads(capsys.readouterr().out)["num_images"] == 5


def test_options_reach_what_they_name(fresh, tmp_path, capsys, monkeypatch):
    """--out names the file, and a checkpoint's folder stands for its run."""
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return {"bits_per_dim": 4.5, "L_t": [0.5]}

    monkeypatch.setattr(evaluate, "evaluate_bits_per_dim", spy)
    other, out = tmp_path / "other.npz", tmp_path / "deep" / "out.json"
    np.savez(other, images=np.random.default_rng(1).integers(0, 256, (6, 8, 8), dtype=np.uint8))
    options = (
        f"--weights raw --data {other} --first-image 1 --num-images 3 --seed 4 --batch-size 2 --ode-steps 7 --ode-probes 5"
    )
    base = ["--ckpt", str(fresh / "checkpoints" / "3"), "--out", str(out)]
    evaluate.main([*base, "--metrics", "bpd_ode, bpd", *options.split()])
    for metric, (model, image_set, path, scoring, *rest) in zip(("bpd_ode", "bpd"), calls, strict=True):
        assert model.weights == "raw"
        np.testing.assert_array_equal(image_set.images[..., 0], np.load(other)["images"])
        assert path == fresh / "bits_per_dim.jsonl"
        assert scoring == Scoring(metric, seed=4, ode_steps=7, ode_probes=5)
        assert rest == [1, 3, 2]
    written, printed = json.loads(out.read_text()), json.loads(capsys.readouterr().out)
    assert written["bpd_ode"]["protocol"].items() >= {"data": str(other), "ode_steps": 7, "ode_probes": 5, "seed": 4}.items()
    assert printed["bpd"] == {"bits_per_dim": 4.5, "protocol": written["bpd"]["protocol"]}
    assert written["bpd"] == printed["bpd"] | {"L_t": [0.5]}
    assert not (fresh / "evaluation.json").exists()
    assert json.loads((fresh / "evaluations.jsonl").read_text()) == written


def scores(monkeypatch, *values):
    """evaluate.py finds these bits/dim, one after the other."""
    found = iter(values)
    monkeypatch.setattr(evaluate, "evaluate_bits_per_dim", lambda *arguments: {"bits_per_dim": next(found)})


def test_no_result_is_lost_to_a_later_one(fresh, tmp_path, capsys, monkeypatch):
    """Nor to a line that was torn in between; evaluation.json is the newest that --out doesn't take."""
    scores(monkeypatch, 4.0, 5.0, 6.0)
    evaluate.main(["--ckpt", str(fresh)])
    evaluate.main(["--ckpt", str(fresh), "--weights", "raw"])
    path = fresh / "evaluations.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "wei')
    evaluate.main(["--ckpt", str(fresh), "--out", str(tmp_path / "out.json")])
    first, second, torn, third = path.read_text().splitlines()
    kept = [json.loads(line) for line in (first, second, third)]
    assert torn == '{"step": 3, "wei'
    assert [(each["weights"], each["bpd"]["bits_per_dim"]) for each in kept] == [("ema", 4.0), ("raw", 5.0), ("ema", 6.0)]
    assert json.loads((fresh / "evaluation.json").read_text()) == kept[1]
    assert json.loads((tmp_path / "out.json").read_text()) == kept[2]


def test_a_result_that_can_not_be_written_is_printed_and_kept(fresh, tmp_path, capsys, monkeypatch):
    scores(monkeypatch, 4.0)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate.main(["--ckpt", str(fresh), "--out", str(tmp_path / "file" / "out.json")])
    printed = json.loads(capsys.readouterr().out)
    assert printed["bpd"]["bits_per_dim"] == 4.0
    assert json.loads((fresh / "evaluations.jsonl").read_text()) == printed


def test_another_part_of_a_set():
    """--split is that of --data, or of what the run was trained with."""
    run, other = DataConfig(source="tfds:cifar10"), DataConfig(source="hf:digits")
    for options, source, split in (
        ({}, "tfds:cifar10", "train"),
        ({"split": "test"}, "tfds:cifar10", "test"),
        ({"split": "test", "data": "hf:digits"}, "hf:digits", "test"),
    ):
        found = evaluate._data(run, evaluate.Arguments(**options))
        assert (found.source, found.split) == (source, split)
    assert evaluate._data(other, evaluate.Arguments()) == other


def test_help_names_every_option_and_metric(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(evaluate.Arguments):
        assert f"--{field.name.replace('_', '-')}" in text
    for metric in evaluate.METRICS:
        assert re.search(rf"\b{metric}\b", text)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--metrics", "bdp"], ["'bdp'", "bpd, bpd_ode"]),
        (["--metrics", ""], ["''", "bpd"]),
        (["--num-images", "0"], ["num_images = 0"]),
        (["--num-images", "41"], ["images 0 ... 40", "0 ... 39"]),
        (["--first-image", "40"], ["0 ... 39"]),
        (["--seed", "-1"], ["seed = -1"]),
        (["--batch-size", "0"], ["batch_size = 0"]),
        (["--metrics", "bpd_ode", "--ode-steps", "21"], ["ode_steps = 21", "2 ... 20"]),
        (["--metrics", "bpd_ode", "--ode-probes", "0"], ["ode_probes = 0"]),
        (["--data", "nowhere.npz"], ["nowhere.npz"]),
        (["--split", "test"], ["split = 'test'", "no splits"]),
        (["--data", "fashion_mnist", "--split", "test"], ["split = 'test'", "fashion_mnist has no splits"]),
        (["--out", "."], ["--out", "folder"]),
        (["--weights", "best"], ["best"]),
        (["--weights", "decay:0.5"], ["decay:0.5", "ema or raw"]),
        (["--metrics", "bpd,fid", "--first-image", "3"], ["first_image = 3", "fid"]),
        (["--data", "real.npz", "--stats", "stats.npz"], ["--data", "--stats", "one of them"]),
        (["--num-image", "3"], ["num-image", "num-images"]),
    ],
)
def test_bad_input_is_one_line(run, options, fragments):
    one_line_error(evaluate.main, ["--ckpt", str(run), *options], fragments=fragments)
    assert not (run / "evaluation.json").exists() and not (run / "evaluations.jsonl").exists()


def test_data_that_are_not_known_must_be_named(run, images, monkeypatch):
    """Of a model that another program has trained."""
    model = load(run)
    config = dataclasses.replace(model.config, data=dataclasses.replace(model.config.data, source="unknown"))
    monkeypatch.setattr(evaluate, "load", lambda path, weights: dataclasses.replace(model, config=config))
    for metrics in ("bpd", "fd_efficientnet_lite0", "fid,is"):
        one_line_error(evaluate.main, ["--ckpt", str(run), "--metrics", metrics], fragments=["--data is missing", str(run)])
    one_line_error(evaluate.main, ["--ckpt", str(run), "--data", str(images), "--num-images", "41"], fragments=["0 ... 39"])


def test_there_must_be_a_run(tmp_path):
    one_line_error(evaluate.main, [], fragments=["--ckpt is missing"])
    one_line_error(evaluate.main, ["--ckpt", str(tmp_path)], fragments=["no checkpoint", str(tmp_path)])


def test_the_exit_status_of_bad_input(tmp_path):
    process = start_script("evaluate.py", "--ckpt", "nowhere", cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("error: ") and len(errors.splitlines()) == 1


@pytest.mark.heavy
def test_after_a_kill_the_same_command_goes_on(fresh, tmp_path):
    """SIGKILL once two batches are in the file, again after five; the number is that of a run that nothing disturbed."""
    options = ["--num-images", "40", "--batch-size", "4"]
    undisturbed = shutil.copytree(fresh, tmp_path / "undisturbed")
    process = start_script("evaluate.py", "--ckpt", undisturbed, *options, cwd=tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    expected = json.loads(output)["bpd"]

    path, killed = fresh / "bits_per_dim.jsonl", 0
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as start_script has
    for lines in (2, 5):
        # A network that takes its time: the process sleeps at every batch, so that a kill comes in between.
        slow = f"import time, runpy, sys; sys.argv = {['evaluate.py', '--ckpt', str(fresh), *options]!r}\n"
        slow += "from ddpm_jax.evaluation import bits_per_dim as b; record = b._record\n"
        slow += "b._record = lambda *a: (time.sleep(0.3), record(*a))[1]\n"
        slow += f"runpy.run_path({str(evaluate.__file__)!r}, run_name='__main__')"
        process = subprocess.Popen([sys.executable, "-c", slow], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while not path.exists() or path.read_text().count("\n") < lines:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.communicate()
        killed += process.returncode == -9
    assert killed == 2
    kept = path.read_text().splitlines()
    assert 5 <= len(kept) < 10
    process = start_script("evaluate.py", "--ckpt", fresh, *options, cwd=tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert re.search(r"holds \d+ of the 40 images already", errors)
    assert json.loads(output)["bpd"] == expected
    assert path.read_text().splitlines()[: len(kept)] == kept
    assert path.read_text().count("\n") == 10
