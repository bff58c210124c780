"""Images from files, and the order in which training sees them."""

import gc
import gzip
import hashlib
import struct
import sys
import warnings
import zipfile

import hypothesis.strategies as st
import jax
import jaxtyping
import numpy as np
import pytest
import scipy.stats
from helpers import load_script, one_line_error
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


@pytest.fixture
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


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


# Arrays in files


@pytest.mark.parametrize("images", [BYTES, FLOATS, BYTES[..., :1], BYTES[:1, :2, :1, :2], np.asfortranarray(FLOATS)])
@pytest.mark.parametrize("kind", [".npy", ".npz", "compressed"])
def test_load_arrays(tmp_path, images, kind):
    path = tmp_path / f"set{kind if kind[0] == '.' else '.npz'}"
    if kind == ".npy":
        np.save(path, images)
    else:
        (np.savez if kind == ".npz" else np.savez_compressed)(path, images=images)
    image_set = load_arrays(path)
    np.testing.assert_array_equal(image_set.images, images, strict=True)
    assert image_set.image_shape == images.shape[1:]
    assert image_set.labels is None and image_set.class_names == ()


@pytest.mark.parametrize("images", [BYTES[..., 0], FLOATS[..., 0]])
def test_three_axes_are_one_channel(tmp_path, images):
    np.save(tmp_path / "set.npy", images)
    np.testing.assert_array_equal(load_arrays(tmp_path / "set.npy").images, images.reshape(5, 8, 6, 1), strict=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_labels(tmp_path, dtype):
    np.savez(tmp_path / "set.npz", images=BYTES, labels=np.array([4, 0, 2, 7, 7], dtype))
    labels = load_arrays(tmp_path / "set.npz").labels
    assert labels.dtype == np.int32 and labels.tolist() == [4, 0, 2, 7, 7]


def test_npy_files_are_not_read_whole(tmp_path):
    np.save(tmp_path / "set.npy", BYTES)
    images = load_arrays(tmp_path / "set.npy").images
    while images.base is not None and not isinstance(images, np.memmap):
        images = images.base
    assert isinstance(images, np.memmap) and not images.flags.writeable


def with_pixel(value):
    images = FLOATS.copy()
    images[3, 7, 5, 2] = value
    return images


BAD_ARRAYS = {
    "float64": (FLOATS.astype(np.float64), ["float64", "float32", "uint8"]),
    "float16": (FLOATS.astype(np.float16), ["float16"]),
    "int32": (BYTES.astype(np.int32), ["int32"]),
    "bool": (BYTES > 100, ["bool"]),
    "complex64": (FLOATS.astype(np.complex64), ["complex64"]),
    "big endian": (FLOATS.astype(">f4"), [">f4"]),
    "text": (np.full((5, 8, 6, 3), "a"), ["<U1"]),
    "two axes": (BYTES[0, :, :, 0], ["(8, 6)"]),
    "five axes": (BYTES[None], ["(1, 5, 8, 6, 3)"]),
    "a scalar": (np.uint8(1), ["()"]),
    "channels first": (BYTES.transpose(0, 3, 1, 2), ["(5, 3, 8, 6)", "channels"]),
    "no images": (BYTES[:0], ["no images"]),
    "no images of three axes": (BYTES[:0, ..., 0], ["no images"]),
    "no height": (BYTES[:, :0], ["(5, 0, 6, 3)"]),
    "no channels": (BYTES[..., :0], ["(5, 8, 6, 0)"]),
    "NaN": (with_pixel(np.nan), ["NaN"]),
    "infinity": (with_pixel(np.inf), ["infinite"]),
    "minus infinity": (with_pixel(-np.inf), ["infinite"]),
    "above 1": (with_pixel(1.5), ["[-1, 1]", "1.5"]),
    "below -1": (with_pixel(-1.25), ["[-1, 1]", "-1.25"]),
    "0 to 255": (BYTES.astype(np.float32), ["[-1, 1]", "255"]),
    "0 to 1": (np.abs(FLOATS), ["[-1, 1]", "2 x - 1"]),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize(("images", "fragments"), BAD_ARRAYS.values(), ids=list(BAD_ARRAYS))
def test_bad_arrays(tmp_path, images, fragments, ending):
    path = tmp_path / f"set{ending}"
    if ending == ".npy":
        np.save(path, images)
    else:
        np.savez(path, images=images)
    one_line_error(load_arrays, path, fragments=[str(path), *fragments])


@pytest.mark.usefixtures("without_type_checks")
def test_a_bad_pixel_in_the_last_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_jax.data.arrays.CHUNK_ELEMENTS", 300)  # two images at a time
    images = FLOATS.copy()
    images[4, 7, 5, 2] = 1.5
    np.save(tmp_path / "set.npy", images)
    one_line_error(load_arrays, tmp_path / "set.npy", fragments=["1.5"])


BAD_LABELS = {
    "too few": np.arange(4),
    "too many": np.arange(6),
    "two axes": np.zeros((5, 1), int),
    "a scalar": np.int64(0),
    "floats": np.zeros(5),
    "bools": np.zeros(5, bool),
    "negative": np.array([0, 1, -1, 2, 3]),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=list(BAD_LABELS))
def test_bad_labels(tmp_path, labels):
    np.savez(tmp_path / "set.npz", images=BYTES, labels=labels)
    one_line_error(load_arrays, tmp_path / "set.npz", fragments=[str(tmp_path / "set.npz"), "labels"])


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("labels", [np.array([0, 1, 2**33, 2, 3]), np.array([0, 1, 2**63, 2, 3], np.uint64)])
def test_labels_wider_than_int32(tmp_path, labels):
    np.savez(tmp_path / "set.npz", images=BYTES, labels=labels)
    one_line_error(load_arrays, tmp_path / "set.npz", fragments=[str(tmp_path / "set.npz"), "labels"])


class Trap:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("ending", [".npy", ".npz", "labels.npz"])
def test_pickled_objects_are_refused(tmp_path, ending):
    path, sprung = tmp_path / f"set{ending}", tmp_path / "sprung"
    objects = np.array([Trap(sprung)], object)
    if ending == ".npy":
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, **({"images": objects} if ending == ".npz" else {"images": BYTES, "labels": objects}))
    one_line_error(load_arrays, path, fragments=[str(path)])
    assert not sprung.exists()


def whole_file(folder, ending):
    path = folder / f"whole{ending}"
    if ending == ".npy":
        np.save(path, BYTES)
    else:
        np.savez_compressed(path, images=BYTES)
    return path.read_bytes()


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.98])
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_truncated_files(tmp_path, ending, share):
    whole = whole_file(tmp_path, ending)
    path = tmp_path / f"set{ending}"
    path.write_bytes(whole[: int(share * len(whole))])
    one_line_error(load_arrays, path, fragments=[str(path), "can't be read"])


@pytest.mark.usefixtures("without_type_checks")
def test_truncated_archive_is_closed(tmp_path):
    path = tmp_path / "set.npz"
    path.write_bytes(whole_file(tmp_path, ".npz")[:300])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one_line_error(load_arrays, path, fragments=[str(path)])
        gc.collect()  # a file that was left open tells now
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize("content", [b"hello, world\n", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04."])
def test_files_that_are_something_else(tmp_path, content, ending):
    path = tmp_path / f"set{ending}"
    path.write_bytes(content)
    one_line_error(load_arrays, path, fragments=[str(path), "can't be read"])


@pytest.mark.parametrize(("content", "ending"), [(".npz", ".npy"), (".npy", ".npz")])
def test_files_with_the_other_ending(tmp_path, content, ending):
    """NumPy looks into the file, so they can be read all the same."""
    path = tmp_path / f"set{ending}"
    path.write_bytes(whole_file(tmp_path, content))
    np.testing.assert_array_equal(load_arrays(path).images, BYTES, strict=True)


@pytest.mark.usefixtures("without_type_checks")
def test_damaged_archive(tmp_path):
    content = bytearray(whole_file(tmp_path, ".npz"))
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(byte ^ 0xFF for byte in content[middle : middle + 100])
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    one_line_error(load_arrays, path, fragments=[str(path), "can't be read"])


@pytest.mark.usefixtures("without_type_checks")
def test_archives_without_images(tmp_path):
    np.savez(tmp_path / "other.npz", pixels=BYTES, y=np.arange(5))
    one_line_error(load_arrays, tmp_path / "other.npz", fragments=["pixels", "y", "'images'"])
    np.savez(tmp_path / "nothing.npz")
    one_line_error(load_arrays, tmp_path / "nothing.npz", fragments=["'images'"])


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ["images", "labels"])
def test_archive_members_that_are_no_arrays(tmp_path, name):
    np.savez(tmp_path / "set.npz", **({"images": BYTES} if name == "labels" else {"other": BYTES}))
    with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        archive.writestr(name, "hello")
    one_line_error(load_arrays, tmp_path / "set.npz", fragments=[str(tmp_path / "set.npz")])


@pytest.mark.usefixtures("without_type_checks")
def test_sources_that_are_no_file(tmp_path):
    for source in ("fashion_mnits", str(tmp_path / "missing.npy"), ""):
        one_line_error(load_images, DataConfig(source=source), fragments=["data.source", source, "fashion_mnist", ".npy"])
    (tmp_path / "set.png").write_bytes(b"")
    one_line_error(
        load_images, DataConfig(source=str(tmp_path / "set.png")), fragments=[str(tmp_path / "set.png"), ".npy", ".npz"]
    )


@pytest.mark.usefixtures("without_type_checks")
def test_image_shape_is_checked():
    fits = DataConfig(source="fashion_mnist", image_shape=(28, 28, 1))
    assert len(load_images(fits).images) == 10_000
    wrong = DataConfig(source="fashion_mnist", image_shape=(32, 32, 3))
    one_line_error(load_images, wrong, fragments=["fashion_mnist", "(28, 28, 1)", "(32, 32, 3)"])


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
