"""Images from .npy and .npz files and folders of them."""

import gc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import one_line_error
from hypothesis import given

from ddpm_jax import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.data.arrays import StoredArrays, load_arrays

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (5, 8, 6, 3), np.uint8)
FLOATS = RANDOM.uniform(-1, 1, (5, 8, 6, 3)).astype(np.float32)


@pytest.fixture
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


# One file


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


# A folder of shards

COUNTS = (4, 1, 7)
MANY = RANDOM.integers(0, 256, (sum(COUNTS), 8, 6, 3), np.uint8)
MANY_LABELS = np.arange(sum(COUNTS)) % 5


def write_shards(folder, images, labels=None, ending=".npy"):
    """The images in files of 4, 1 and 7, whose names are not written in their order."""
    starts = np.cumsum((0, *COUNTS[:-1]))
    for number in (2, 0, 1):
        part = slice(starts[number], starts[number] + COUNTS[number])
        path = folder / f"shard-{number}{ending}"
        if ending == ".npy":
            np.save(path, images[part])
        else:
            np.savez(path, images=images[part], **({} if labels is None else {"labels": labels[part]}))
    (folder / "notes.txt").write_text("other files are no images")
    (folder / ".hidden.npy").write_bytes(b"")
    return folder


@pytest.mark.parametrize("images", [MANY, (MANY / 127.5 - 1).astype(np.float32), MANY[..., 0]], ids=["bytes", "floats", "grey"])
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_shards_follow_each_other_by_name(tmp_path, images, ending):
    image_set = load_images(DataConfig(source=str(write_shards(tmp_path, images, ending=ending))))
    whole = images if images.ndim == 4 else images[..., None]
    assert image_set.images.shape == whole.shape and image_set.images.dtype == whole.dtype
    assert image_set.images.nbytes == whole.nbytes and image_set.image_shape == whole.shape[1:] and image_set.labels is None
    np.testing.assert_array_equal(image_set.images[:], whole, strict=True)
    np.testing.assert_array_equal(image_set.images[np.array([11, 0, 4, 4, 3])], whole[[11, 0, 4, 4, 3]], strict=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return load_arrays(write_shards(tmp_path_factory.mktemp("shards"), MANY)).images


@given(st.lists(st.integers(0, len(MANY) - 1), min_size=1, max_size=30))
def test_shards_are_read_in_any_order(sharded, indices):
    np.testing.assert_array_equal(sharded.read(np.array(indices)), MANY[indices], strict=True)


def test_shards_are_neither_joined_nor_read_whole(sharded):
    assert isinstance(sharded, StoredArrays) and [len(part) for part in sharded.parts] == list(COUNTS)
    assert all(isinstance(part, np.memmap) for part in sharded.parts)


def test_shards_are_read_from_several_threads(sharded):
    orders = [np.random.default_rng(seed).integers(0, len(MANY), 50) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for order, images in zip(orders, pool.map(sharded.read, orders), strict=True):
            np.testing.assert_array_equal(images, MANY[order])


def test_labels_of_shards(tmp_path):
    inside, beside = tmp_path / "inside", tmp_path / "beside"
    inside.mkdir()
    beside.mkdir()
    write_shards(inside, MANY, MANY_LABELS, ".npz")
    write_shards(beside, MANY)
    np.save(beside / "labels.npy", MANY_LABELS)
    for folder in (inside, beside):
        labels = load_images(DataConfig(source=str(folder))).labels
        np.testing.assert_array_equal(labels, MANY_LABELS.astype(np.int32), strict=True)


def test_one_shard_is_as_one_file(tmp_path):
    np.save(tmp_path / "images.npy", BYTES)
    np.save(tmp_path / "labels.npy", np.arange(5))
    image_set = load_images(DataConfig(source=str(tmp_path)))
    assert isinstance(image_set.images, np.memmap) and image_set.labels.tolist() == [0, 1, 2, 3, 4]


BAD_SHARDS = {
    "other height": (lambda folder: np.save(folder / "shard-3.npy", MANY[:, :4]), ["shard-3.npy", "(4, 6, 3)", "(8, 6, 3)"]),
    "other dtype": (lambda folder: np.save(folder / "shard-3.npy", FLOATS), ["shard-3.npy", "float32", "uint8"]),
    "damaged": (lambda folder: (folder / "shard-3.npy").write_bytes(b"hello"), ["shard-3.npy", "can't be read"]),
    "no images": (lambda folder: np.save(folder / "shard-3.npy", MANY[:0]), ["shard-3.npy", "no images"]),
    "some labels": (
        lambda folder: np.savez(folder / "shard-3.npz", images=MANY, labels=MANY_LABELS),
        ["1 of 4", "labels"],
    ),
    "too few labels": (lambda folder: np.save(folder / "labels.npy", MANY_LABELS[1:]), ["labels.npy", "12", "(11,)"]),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("spoil", "fragments"), BAD_SHARDS.values(), ids=list(BAD_SHARDS))
def test_bad_shards(tmp_path, spoil, fragments):
    spoil(write_shards(tmp_path, MANY))
    one_line_error(load_images, DataConfig(source=str(tmp_path)), fragments=[str(tmp_path), *fragments])


@pytest.mark.usefixtures("without_type_checks")
def test_labels_in_both_places(tmp_path):
    write_shards(tmp_path, MANY, MANY_LABELS, ".npz")
    np.save(tmp_path / "labels.npy", MANY_LABELS)
    one_line_error(load_images, DataConfig(source=str(tmp_path)), fragments=[str(tmp_path), "labels.npy", ".npz"])


@pytest.mark.usefixtures("without_type_checks")
def test_the_range_of_floats_is_that_of_all_shards(tmp_path):
    """A shard may well have no pixel below 0, if another has; one outside [-1, 1] is found in any."""
    bright = np.abs(FLOATS)
    np.save(tmp_path / "a.npy", bright)
    np.save(tmp_path / "b.npy", FLOATS)
    np.testing.assert_array_equal(load_arrays(tmp_path).images, np.concatenate([bright, FLOATS]), strict=True)
    np.save(tmp_path / "b.npy", bright)
    one_line_error(load_arrays, tmp_path, fragments=[str(tmp_path), "2 x - 1"])
    np.save(tmp_path / "b.npy", with_pixel(1.5))
    one_line_error(load_arrays, tmp_path, fragments=[str(tmp_path), "1.5"])


# Arrays of another size than the one that is asked for

RGBA = RANDOM.integers(0, 256, (5, 8, 6, 4), np.uint8)


def framed_set(folder, images, **values):
    np.savez(folder / "set.npz", images=images, labels=np.arange(len(images)))
    return load_images(DataConfig(source=str(folder / "set.npz"), **values))


def test_arrays_are_framed_by_area(tmp_path):
    """8x6 to 4x3 is the mean of 2x2 pixels, rounded; to 3x3, the middle 6x6 first."""
    half = framed_set(tmp_path, BYTES, image_shape=(4, 3, 3))
    assert half.images.shape == (5, 4, 3, 3) and half.labels.tolist() == [0, 1, 2, 3, 4]
    blocks = BYTES.astype(np.float64).reshape(5, 4, 2, 3, 2, 3).mean(axis=(2, 4))
    assert np.abs(half.images[:] - blocks).max() <= 1  # Pillow rounds after the rows and after the columns
    square = framed_set(tmp_path, BYTES, image_shape=(3, 3, 3))
    blocks = BYTES[:, 1:7].astype(np.float64).reshape(5, 3, 2, 3, 2, 3).mean(axis=(2, 4))
    assert np.abs(square.images[:] - blocks).max() <= 1


def test_shards_are_framed(tmp_path):
    image_set = load_images(DataConfig(source=str(write_shards(tmp_path, MANY)), image_shape=(4, 3, 3)))
    blocks = MANY.astype(np.float64).reshape(12, 4, 2, 3, 2, 3).mean(axis=(2, 4))
    order = np.array([11, 0, 4, 5, 3])
    assert np.abs(image_set.images.read(order) - blocks[order]).max() <= 1  # as above


def test_grey_and_rgb_become_each_other(tmp_path):
    rgb = framed_set(tmp_path, BYTES[..., :1], image_shape=(8, 6, 3)).images[:]
    np.testing.assert_array_equal(rgb, np.repeat(BYTES[..., :1], 3, axis=-1), strict=True)
    grey = framed_set(tmp_path, BYTES, image_shape=(8, 6, 1)).images[:]
    luma = BYTES.astype(np.float64) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert grey.shape == (5, 8, 6, 1) and np.abs(grey[..., 0] - luma).max() < 1


def test_random_crops_of_arrays(tmp_path):
    """Rows and columns of a ramp tell where a crop was taken: 0.8 of the height and width for a draw of size 0."""
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8) * 2, (2, 100, 100))
    images = framed_set(tmp_path, np.stack([ramp[0], ramp[0].T])[..., None], framing="random").images
    assert images.shape == (2, 100, 100, 1)
    np.testing.assert_array_equal(images[:][0, :, :, 0], ramp[0])  # no draws: the largest crop from the middle
    corner = images.read(np.array([0, 1]), np.zeros((2, 3)))[..., 0].astype(float)
    far = images.read(np.array([0, 1]), np.array([[0, 0, 1 - 1e-9], [0, 1 - 1e-9, 0]]))[..., 0].astype(float)
    for number in (0, 1):  # means of columns 0 ... 79 and 20 ... 99; a byte's rounding
        assert abs(corner[number].mean() - 2 * 39.5) < 0.5 and abs(far[number].mean() - 2 * 59.5) < 0.5


@pytest.mark.usefixtures("without_type_checks")
def test_what_cannot_be_framed(tmp_path):
    path = tmp_path / "set.npy"
    for images, values, fragments in [
        (FLOATS, {"image_shape": (4, 4, 3)}, ["float32", "uint8", "(4, 4, 3)"]),
        (FLOATS, {"framing": "random"}, ["float32", "random"]),
        (RGBA, {"image_shape": (4, 4, 3)}, ["(8, 6, 4)", "(4, 4, 3)", "1 (grey)", "3 channels"]),
        (BYTES, {"image_shape": (8, 6, 4)}, ["(8, 6, 3)", "(8, 6, 4)"]),
    ]:
        np.save(path, images)
        one_line_error(load_images, DataConfig(source=str(path), **values), fragments=[str(path), *fragments])


def test_four_channels_are_kept_where_nothing_is_framed(tmp_path):
    np.testing.assert_array_equal(framed_set(tmp_path, RGBA, image_shape=(8, 6, 4)).images, RGBA, strict=True)
