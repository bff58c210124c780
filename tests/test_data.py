"""Images from files, and the order in which training sees them."""

import gzip
import hashlib
import struct
import sys
import zipfile

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import scipy.stats
from helpers import load_script
from hypothesis import given

from ddpm_jax import Config, DataConfig
from ddpm_jax.config import override
from ddpm_jax.data import ImageSet, batches, load_images
from ddpm_jax.data.arrays import load_arrays
from ddpm_jax.data.pipeline import epoch_order, make_order
from ddpm_jax.data.sources import load_packaged
from ddpm_jax.parallel import make_mesh

# Of the original IDX files: zcat t10k-images-idx3-ubyte.gz | tail -c +17 | sha256sum, and the labels' tail -c +9.
PIXELS_SHA256 = "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"
LABELS_SHA256 = "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (5, 8, 6, 3), np.uint8)
FLOATS = RANDOM.uniform(-1, 1, (5, 8, 6, 3)).astype(np.float32)


# The packaged set


def test_packaged_set_is_the_original():
    image_set = load_packaged("fashion_mnist")
    assert image_set.images.shape == (10_000, 28, 28, 1) and image_set.images.dtype == np.uint8
    assert image_set.image_shape == (28, 28, 1)
    assert hashlib.sha256(image_set.images.tobytes()).hexdigest() == PIXELS_SHA256
    assert image_set.labels.dtype == np.int32
    assert hashlib.sha256(image_set.labels.astype(np.uint8).tobytes()).hexdigest() == LABELS_SHA256


def test_packaged_set_is_balanced_and_named():
    image_set = load_images(DataConfig(source="fashion_mnist"))
    assert dict(zip(*np.unique(image_set.labels, return_counts=True), strict=True)) == dict.fromkeys(range(10), 1000)
    names = image_set.class_names
    assert len(set(names)) == 10
    # Zalando's table of labels: 0 T-shirt/top, 1 trouser, 7 sneaker, 9 ankle boot.
    assert names[0].startswith("t-shirt") and names[1] == "trouser" and names[7] == "sneaker" and names[9] == "ankle boot"
    # Trousers are a narrow, upright figure; bags are wide.
    inked = [(image_set.images[image_set.labels == label] > 50).mean(axis=(0, 3)) for label in (1, 8)]
    trouser, bag = (np.count_nonzero(share.max(axis=0) > 0.5) for share in inked)
    assert trouser < 16 < bag


def write_idx(path, array, mtime):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), mtime=mtime))


def test_make_fashion_mnist_round_trip(tmp_path, monkeypatch, capsys):
    script = load_script("scripts/make_fashion_mnist.py")
    images, labels = BYTES[..., 0], np.array([3, 0, 9, 1, 255], np.uint8)
    written = []
    for run, mtime in enumerate((1, 10**9)):  # the same arrays, packed at different times
        paths = [tmp_path / f"{name}{run}" for name in ("images.gz", "labels.gz", "out.npz")]
        write_idx(paths[0], images, mtime)
        write_idx(paths[1], labels, mtime)
        monkeypatch.setattr(sys, "argv", ["make_fashion_mnist.py", str(paths[0]), str(paths[1]), "--out", str(paths[2])])
        script.main()
        assert str(paths[2]) in capsys.readouterr().out
        written.append(paths[2])
    assert written[0].read_bytes() == written[1].read_bytes()
    with zipfile.ZipFile(written[0]) as archive:  # two runs within zip's two seconds would agree by chance
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(written[0], allow_pickle=False) as arrays:
        assert sorted(arrays) == ["images", "labels"]
        np.testing.assert_array_equal(arrays["images"], images, strict=True)
        np.testing.assert_array_equal(arrays["labels"], labels, strict=True)


def test_make_fashion_mnist_refuses_other_files(tmp_path):
    script = load_script("scripts/make_fashion_mnist.py")
    path = tmp_path / "floats.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 13, 1, 1) + bytes(4)))
    with pytest.raises(SystemExit, match=r"floats\.gz is not an IDX file"):
        script.read_idx(path)


# Order

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(0, 10**6), st.integers(1, 300))
def test_epoch_order_is_a_permutation(seed, epoch, num_images):
    assert sorted(epoch_order(seed, epoch, num_images).tolist()) == list(range(num_images))


@given(seeds, st.integers(1, 40), st.integers(1, 60))
def test_an_epoch_shows_each_image_once(seed, num_images, batch_size):
    """Also where the batch does not divide the set, or is larger than it."""
    indices = make_order(seed, num_images, batch_size)
    num_steps = -(-3 * num_images // batch_size)
    stream = np.concatenate([indices(step, 1)[0] for step in range(num_steps)])
    assert stream.dtype == np.int32 and len(stream) == num_steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * num_images : (epoch + 1) * num_images].tolist()) == list(range(num_images))


@given(seeds, st.integers(0, 9), st.integers(1, 6))
def test_many_steps_at_once_are_those_steps(seed, step, count):
    indices = make_order(seed, 20, 7)
    together = indices(step, count)
    assert together.shape == (count, 7) and together.dtype == np.int32
    np.testing.assert_array_equal(together, np.concatenate([indices(step + i, 1) for i in range(count)]))


@given(seeds, st.permutations(range(12)))
def test_order_depends_on_seed_and_step_alone(seed, steps):
    """Not on the steps that were asked for before."""
    forwards, shuffled = make_order(seed, 20, 7), make_order(seed, 20, 7)
    expected = [forwards(step, 1).tolist() for step in range(12)]
    assert [shuffled(step, 1).tolist() for step in steps] == [expected[step] for step in steps]


def test_orders_of_other_seeds_and_epochs_differ():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == 400


def test_every_order_is_as_likely():
    """All 24 orders of 4 images over 4,800 epochs, and over as many seeds: chi-squared, 23 degrees of freedom."""
    for orders in ([epoch_order(0, n, 4) for n in range(4800)], [epoch_order(n, 0, 4) for n in range(4800)]):
        _, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(counts) == 24
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


# Batches

NUM_IMAGES = 21  # the batch of 8 does not divide it


@pytest.fixture(scope="module")
def numbered():
    """Images whose pixels all hold the image's number, and whose labels are that number plus 100."""
    numbers = np.arange(NUM_IMAGES)
    return ImageSet(
        np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (NUM_IMAGES, 4, 4, 3)).copy(),
        numbers.astype(np.int32) + 100,
    )


def batch_config(megabytes, **values):
    return override(Config(), {"train.batch_size": 8, "model.num_classes": 200, "data.device_megabytes": megabytes} | values)


def drawn(config, image_set, start, stop):
    stacks = batches(config, image_set, make_mesh(), range(start, stop))
    return [jax.tree.map(lambda array: np.asarray(array)[0], stack) for stack in stacks]


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
def test_batches_hold_each_image_once_with_its_label(numbered, megabytes):
    got = drawn(batch_config(megabytes), numbered, 0, NUM_IMAGES)  # 8 epochs
    for batch in got:
        assert batch.images.shape == (8, 4, 4, 3) and batch.images.dtype == np.uint8 and batch.labels.dtype == np.int32
        assert (batch.images == batch.images[:, :1, :1, :1]).all()
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0] + 100, batch.labels)
    stream = np.concatenate([batch.labels for batch in got]).reshape(8, NUM_IMAGES)
    assert all(sorted(epoch.tolist()) == list(range(100, 100 + NUM_IMAGES)) for epoch in stream)


@pytest.mark.parametrize("images", [BYTES, FLOATS])
def test_device_and_host_give_equal_batches(images):
    image_set = ImageSet(images)
    pairs = zip(drawn(batch_config(512, **{"model.num_classes": None}), image_set, 3, 9),
                drawn(batch_config(0, **{"model.num_classes": None}), image_set, 3, 9), strict=True)  # fmt: skip
    for device, host in pairs:
        assert device.labels is None and host.labels is None
        np.testing.assert_array_equal(device.images, host.images, strict=True)


def test_memory_mapped_images_give_equal_batches(tmp_path, numbered):
    np.save(tmp_path / "set.npy", numbered.images)
    config = batch_config(0, **{"model.num_classes": None})
    mapped = drawn(config, load_arrays(tmp_path / "set.npy"), 0, 4)
    for batch, expected in zip(mapped, drawn(config, numbered, 0, 4), strict=True):
        np.testing.assert_array_equal(batch.images, expected.images, strict=True)


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
def test_a_resumed_run_sees_what_it_would_have_seen(numbered, megabytes):
    config = batch_config(megabytes)
    straight, resumed = drawn(config, numbered, 0, 12), drawn(config, numbered, 5, 12)
    assert len(straight) == 12 and len(resumed) == 7
    for expected, batch in zip(straight[5:], resumed, strict=True):
        np.testing.assert_array_equal(batch.labels, expected.labels)
        np.testing.assert_array_equal(batch.images, expected.images)


def test_another_seed_gives_another_order(numbered):
    one, other = (np.concatenate([b.labels for b in drawn(batch_config(512, seed=seed), numbered, 0, 5)]) for seed in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
def test_batches_are_split_over_the_devices(numbered, megabytes):
    assert jax.device_count() == 8
    config = batch_config(megabytes, **{"train.batch_size": 16, "train.steps_per_dispatch": 3})
    (batch,) = batches(config, numbered, make_mesh(), [2])
    whole = make_order(config.seed, NUM_IMAGES, 16)(2, 3)
    for array, expected in ((batch.images[..., 0, 0, 0], whole), (batch.labels, whole + 100)):
        assert len(array.sharding.device_set) == 8
        for shard in array.addressable_shards:
            place = 2 * jax.devices().index(shard.device)
            np.testing.assert_array_equal(np.asarray(shard.data), expected[:, place : place + 2])


def test_labels_stay_at_home_where_the_network_has_no_classes(numbered):
    (batch,) = drawn(batch_config(512, **{"model.num_classes": None}), numbered, 0, 1)
    assert batch.labels is None
