"""Preparing: the same bytes whatever happens on the way, and refusals that lose nothing."""

import fcntl
import json
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from helpers import load_script, one_line_error, start_script

from ddpm_jax.config import DataConfig
from ddpm_jax.data import ImageSet, StoredImages, load_images, preparation
from ddpm_jax.data.preparation import prepare
from ddpm_jax.errors import InputError


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (101, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=generator.integers(0, 5, 101))
    return DataConfig(source=str(tmp_path / "set.npz"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_shards", [1, 2, 7, 101])
def test_workers_make_no_difference(source, tmp_path, num_shards):
    for workers in (1, 2, 5):
        config = DataConfig(source=source.source, num_workers=workers)
        prepare(config, tmp_path / str(workers), num_shards)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")
    assert len(contents(tmp_path / "1")) == num_shards + 2
    with np.load(source.source) as arrays:
        image_set = load_images(DataConfig(source=str(tmp_path / "2")))
        np.testing.assert_array_equal(image_set.images[:], arrays["images"])
        np.testing.assert_array_equal(image_set.labels, arrays["labels"])


def test_sets_smaller_than_the_shards(tmp_path):
    np.save(tmp_path / "three.npy", np.zeros((3, 4, 4, 1), np.uint8))
    manifest = prepare(DataConfig(source=str(tmp_path / "three.npy")), tmp_path / "out")
    assert [shard.count for shard in manifest.shards] == [1, 1, 1] and manifest.labels is None
    assert load_images(DataConfig(source=str(tmp_path / "out"))).labels is None


def test_the_manifest_counts_and_sums(source, tmp_path):
    prepare(source, tmp_path / "out", 3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["count"] == 101 and manifest["image_shape"] == [8, 8, 3] and manifest["source"] == source.source
    names = [file["name"] for file in (*manifest["shards"], manifest["labels"])]
    sums = subprocess.run(["sha256sum", *names], cwd=tmp_path / "out", capture_output=True, text=True, check=True).stdout
    assert dict(reversed(line.split()) for line in sums.splitlines()) == {
        file["name"]: file["sha256"] for file in (*manifest["shards"], manifest["labels"])
    }


def test_floats_become_grey_levels(tmp_path):
    levels = np.arange(256, dtype=np.float64)
    floats = np.float32(levels / 127.5 - 1).reshape(4, 8, 8, 1)
    np.save(tmp_path / "floats.npy", floats)
    prepare(DataConfig(source=str(tmp_path / "floats.npy")), tmp_path / "out")
    np.testing.assert_array_equal(load_images(DataConfig(source=str(tmp_path / "out"))).images[:].ravel(), levels)


def test_prepared_sets_can_be_prepared_again(source, tmp_path):
    prepare(source, tmp_path / "one", 3)
    prepare(DataConfig(source=str(tmp_path / "one"), image_shape=(4, 4, 1)), tmp_path / "two", 2)
    image_set = load_images(DataConfig(source=str(tmp_path / "two")))
    assert image_set.images.shape == (101, 4, 4, 1)
    np.testing.assert_array_equal(image_set.labels, np.load(tmp_path / "one" / "labels.npy"))


def test_the_same_command_again_changes_nothing(source, tmp_path, caplog):
    prepare(source, tmp_path / "out", 3)
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    prepare(source, tmp_path / "out", 3)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


@pytest.mark.parametrize(
    ("change", "field"),
    [({"num_shards": 4}, "shards"), ({"framing": "pad"}, "framing"), ({"class_names": tuple("abcde")}, "class_names"),
     ({"split": "test"}, "split")],
)  # fmt: skip
@pytest.mark.parametrize("finished", [True, False])
def test_another_preparation_is_refused(source, tmp_path, change, field, finished):
    out = tmp_path / "out"
    prepare(source, out, 3)
    if not finished:
        stop_after(out, source, 3, 1)
    before = contents(out)
    num_shards = change.pop("num_shards", 3)
    with pytest.raises(InputError, match=rf"another preparation \({field}: "):
        prepare(DataConfig(source=source.source, **change), out, num_shards)
    assert contents(out) == before
    change["num_shards"] = num_shards


def stop_after(out, config, num_shards, shards):
    """Leave the folder as a process leaves it that was killed after some shards."""
    for path in out.iterdir():
        path.unlink()
    calls = []
    write_shard = preparation._write_shard

    def write(*args):
        if len(calls) == shards:
            raise KeyboardInterrupt
        calls.append(args)
        return write_shard(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            prepare(DataConfig(source=config.source, num_workers=1), out, num_shards)
    assert not (out / "manifest.json").exists()


def test_finished_shards_are_kept(source, tmp_path):
    out = tmp_path / "out"
    prepare(source, out, 5)
    undisturbed = contents(out)
    stop_after(out, source, 5, 3)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert len(kept) == 3
    prepare(source, out, 5)
    assert contents(out) == undisturbed
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_shards_lost_since_are_written_again(source, tmp_path):
    out = tmp_path / "out"
    prepare(source, out, 5)
    undisturbed = contents(out)
    stop_after(out, source, 5, 4)
    flipped = bytearray(undisturbed["shard-00000-of-00005.array_record"])
    flipped[flipped.index(load_images(source).images[0].tobytes())] ^= 1
    (out / "shard-00000-of-00005.array_record").write_bytes(flipped)
    (out / "shard-00001-of-00005.array_record").unlink()
    (out / "shard-00002-of-00005.array_record").write_bytes(undisturbed["shard-00002-of-00005.array_record"][:1000])
    (out / ".shard-00004-of-00005.array_record.partial").write_bytes(b"x" * 100)
    journal = (out / "preparation.jsonl").read_bytes()
    (out / "preparation.jsonl").write_bytes(journal + b'{"name": "shard-00004-of')  # killed within a line
    prepare(source, out, 5)
    assert contents(out) == undisturbed


def test_a_source_that_has_changed_is_noticed(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    stop_after(out, source, 5, 2)
    with np.load(source.source) as arrays:
        changed = dict(arrays)
    changed["images"] = changed["images"][::-1]
    np.savez(source.source, **changed)
    with pytest.raises(InputError, match="the images have changed since"):
        prepare(source, out, 5)


def test_a_folder_with_other_files_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("important")
    with pytest.raises(InputError, match=r"holds other files, such as thesis\.tex"):
        prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.tex": b"important"}
    with pytest.raises(InputError, match="is a file"):
        prepare(source, tmp_path / "out" / "thesis.tex")


def test_two_at_once_are_refused(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / "preparation.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is preparing"):
            prepare(source, out)
    prepare(source, out)


def test_names_that_don_t_fit_the_labels(source, tmp_path):
    with pytest.raises(InputError, match="label 4, but there are 2 class names"):
        prepare(DataConfig(source=source.source, class_names=("a", "b")), tmp_path / "out")
    with pytest.raises(InputError, match="num_shards = 0"):
        prepare(source, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


class Failing(StoredImages):
    """Images of which one can't be read."""

    def read(self, indices, draws=None):
        if (indices == 70).any():
            raise InputError("photos/70.png can't be read: no such file")
        return np.zeros((len(indices), *self.shape[1:]), np.uint8)


def test_an_image_that_fails_ends_it_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "load_images", lambda config: ImageSet(Failing(100, (4, 4, 1))))
    with pytest.raises(InputError, match=r"photos/70\.png"):
        prepare(DataConfig(), tmp_path / "out", 10)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob(".*"))


class Counting(StoredImages):
    """Images made when asked for; notes the threads and the most images asked for at once."""

    def __init__(self, *args):
        super().__init__(*args)
        self.largest, self.threads = 0, set()

    def read(self, indices, draws=None):
        self.largest = max(self.largest, len(indices))
        self.threads.add(threading.get_ident())
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        images[:] = indices.astype(np.uint8)[:, None, None, None]
        return images


def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    images = Counting(2000, (128, 128, 3))  # 98 MB
    monkeypatch.setattr(preparation, "load_images", lambda config: ImageSet(images))
    tracemalloc.start()
    prepare(DataConfig(num_workers=2), tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert images.largest * 128 * 128 * 3 <= 4 * 2**20 and len(images.threads) == 2
    assert peak < 24 * 2**20
    assert (load_images(DataConfig(source=str(tmp_path / "out"))).images[1500:1501] == 1500 % 256).all()


def test_command_line(source, tmp_path):
    arguments = ("prepare.py", "--data.source", source.source, "--out", "out", "--num-shards", "2")
    output, errors = start_script(*arguments, cwd=tmp_path).communicate(timeout=120)
    assert "101 images of 8x8x3" in output, errors
    (tmp_path / "out" / "labels.npy").write_bytes(b"")
    failed = start_script("prepare.py", "--verify", "out", cwd=tmp_path)
    _, errors = failed.communicate(timeout=120)
    assert failed.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1


def test_verify_says_what_it_has_read(source, tmp_path, capsys):
    prepare(source, tmp_path / "out", 2)
    load_script("prepare.py").main(["--verify", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 101 images in 2 shards, all as they were written\n"


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """Files can't grow beyond 100,000 bytes: the second shard would."""
    images = np.random.default_rng(0).integers(0, 256, (700, 16, 16, 3), np.uint8)
    np.save(tmp_path / "set.npy", images)
    config, out = DataConfig(source=str(tmp_path / "set.npy")), tmp_path / "out"
    out.mkdir()
    stop_after(out, config, 2, 1)
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        one_line_error(prepare, config, out, 2, fragments=["shard-00001-of-00002", "can't be written", "File too large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(out) == before
    prepare(config, out, 2)
    np.testing.assert_array_equal(load_images(DataConfig(source=str(out))).images[:], images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "--data.source is missing"), (("--data.source", "fashion_mnist"), "--out is missing"),
     (("--data.source", "fashion_mnist", "--out", "x", "--channels", "1"), "needs --resolution"),
     (("--data.source", "fashion_mnist", "--out", "x", "--resolution", "0"), "must be 1 or more"),
     (("--data.flip",), "unknown option"), (("--verify", "nowhere"), "not prepared to its end")],
)  # fmt: skip
def test_wrong_command_lines(arguments, message):
    one_line_error(load_script("prepare.py").main, arguments, fragments=[message])


@pytest.mark.heavy
def test_killed_at_any_instant(tmp_path):
    """kill -9 at random times, often; what is left never passes for a set, and the end is an undisturbed run's."""
    images = np.random.default_rng(0).integers(0, 256, (6000, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(6000) % 7)
    config = DataConfig(source=str(tmp_path / "set.npz"))
    prepare(config, tmp_path / "undisturbed", 40)
    expected = contents(tmp_path / "undisturbed")
    program = (
        "import sys; from pathlib import Path; from ddpm_jax.config import DataConfig;"
        "from ddpm_jax.data.preparation import prepare; print('ready', flush=True);"
        "prepare(DataConfig(source=sys.argv[1]), Path(sys.argv[2]), 40)"
    )
    randomly = random.Random(0)
    kills, stages = 0, set()
    for attempt in range(8):
        out = tmp_path / f"out{attempt}"
        while True:
            command = [sys.executable, "-c", program, config.source, str(out)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            assert process.stdout.readline() == b"ready\n"
            time.sleep(randomly.uniform(0, 0.12))
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            kills += process.returncode != 0
            if (out / "manifest.json").exists():
                break
            stages.add(len(list(out.glob("*.array_record"))) if out.exists() else -1)
        prepare(config, out, 40)
        assert contents(out) == expected
    assert kills >= 8 and len(stages) >= 4, (kills, stages)
