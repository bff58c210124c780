"""Prepared sets as training reads them: every pixel, any order, several threads, and whatever can be wrong with the files."""

import contextlib
import json
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ddpm_jax.config import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.data.preparation import prepare
from ddpm_jax.data.records import RecordImages, is_prepared, verify_records
from ddpm_jax.errors import InputError

COUNT, SHARDS = 53, 4
SHARD = "shard-00001-of-00004.array_record"


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def arrays(request):
    generator = np.random.default_rng(request.param)
    images = generator.integers(0, 256, (COUNT, 12, 10, request.param), np.uint8)
    return images, generator.integers(0, 3, COUNT).astype(np.int32)


@pytest.fixture(scope="module")
def whole(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    np.savez(folder / "set.npz", images=arrays[0], labels=arrays[1])
    prepare(DataConfig(source=str(folder / "set.npz"), class_names=("a", "b", "c")), folder / "out", SHARDS)
    return folder / "out"


@pytest.fixture
def out(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "out")


def load(path, **options):
    return load_images(DataConfig(source=str(path), **options))


def test_every_image_and_label_is_the_sources(whole, arrays):
    image_set = load(whole)
    assert isinstance(image_set.images, RecordImages)
    assert image_set.images.shape == arrays[0].shape and image_set.images.nbytes == arrays[0].nbytes
    np.testing.assert_array_equal(image_set.images[:], arrays[0])
    np.testing.assert_array_equal(image_set.labels, arrays[1])
    assert image_set.labels.dtype == np.int32 and image_set.class_names == ("a", "b", "c")


def test_images_come_in_the_order_asked_for(whole, arrays):
    indices = np.random.default_rng(0).integers(0, COUNT, 200)
    np.testing.assert_array_equal(load(whole).images.read(indices), arrays[0][indices])
    assert load(whole).images.read(indices[:0]).shape == (0, *arrays[0].shape[1:])


def test_eight_threads_read_one_set(whole, arrays):
    images = load(whole).images
    orders = [np.random.default_rng(seed).permutation(COUNT) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for order, read in zip(orders, pool.map(images.read, orders), strict=True):
            np.testing.assert_array_equal(read, arrays[0][order])


def test_the_middle_is_cut_out_and_averaged(whole, arrays):
    channels = arrays[0].shape[-1]
    images = load(whole, image_shape=(5, 5, channels)).images
    square = arrays[0][:, 1:11].astype(np.float64)  # of 12 rows and 10 columns
    means = square.reshape(COUNT, 5, 2, 5, 2, channels).mean(axis=(2, 4))
    assert images.shape == means.shape
    assert np.abs(images[:] - means).max() <= 1  # Pillow rounds to whole grey levels twice: along rows, then along columns


def test_random_crops_of_a_larger_set(whole, arrays):
    channels = arrays[0].shape[-1]
    images = load(whole, image_shape=(10, 10, channels), framing="random").images
    largest_at_bottom = np.array([[1.0, 1.0, 0.0]])  # a draw of 1 for the size is the largest square: 10 of 12 rows
    np.testing.assert_array_equal(images.read(np.array([30]), largest_at_bottom)[0], arrays[0][30, 2:12])
    draws = np.random.default_rng(0).random((COUNT, 3))
    crops = images.read(np.arange(COUNT), draws)
    np.testing.assert_array_equal(crops, images.read(np.arange(COUNT), draws))
    assert (crops != images[:]).any(axis=(1, 2, 3)).all()
    same_size = load(whole, framing="random").images
    assert same_size.shape == arrays[0].shape
    np.testing.assert_array_equal(same_size[:], arrays[0])  # without draws as they are


def test_grey_as_colour_and_colour_as_grey(whole, arrays):
    channels = arrays[0].shape[-1]
    if channels == 1:
        np.testing.assert_array_equal(load(whole, image_shape=(12, 10, 3)).images[:], np.repeat(arrays[0], 3, axis=-1))
    else:
        grey = arrays[0].astype(np.float64) @ [0.299, 0.587, 0.114]  # ITU-R 601-2, as Pillow documents it
        assert np.abs(load(whole, image_shape=(12, 10, 1)).images[:][..., 0] - grey).max() <= 1


def test_verify_names_every_damaged_file(out):
    assert verify_records(out).count == COUNT
    for name in (SHARD, "labels.npy"):
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"2 of 5 files .*{SHARD}, labels\.npy") as error:
        verify_records(out)
    assert "\n" not in str(error.value)


def test_a_changed_pixel_is_noticed_when_it_is_read(out, arrays):
    content = bytearray((out / SHARD).read_bytes())
    place = bytes(content).index(arrays[0][20].tobytes())
    content[place] ^= 1
    (out / SHARD).write_bytes(content)
    images = load(out).images
    np.testing.assert_array_equal(images[:20], arrays[0][:20])
    with pytest.raises(InputError, match=rf"{SHARD}: image 7 can't be read"):
        images.read(np.array([3, 20]))


@pytest.mark.parametrize("seed", range(50))
def test_no_flipped_bit_is_taken_for_a_pixel(out, arrays, seed):
    """Three bits anywhere in a shard: every image is refused, or is the one that was written."""
    generator = np.random.default_rng(seed)
    content = np.fromfile(out / SHARD, np.uint8)
    places = generator.integers(0, len(content) if seed % 2 else 8000, 3)  # the records come first, then mostly padding
    content[places] ^= 1 << generator.integers(0, 8, 3).astype(np.uint8)
    content.tofile(out / SHARD)
    try:
        images = load(out).images
    except InputError:
        return
    for index in range(13, 26):
        with contextlib.suppress(InputError):
            np.testing.assert_array_equal(images.read(np.array([index]))[0], arrays[0][index])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path):
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda path: path.unlink(), "missing"), (truncate, "damaged: .* bytes long"), (overwrite, "damaged: it holds 0 images")],
)
def test_damaged_shards_are_noticed_at_once(out, damage, message):
    damage(out / SHARD)
    with pytest.raises(InputError, match=f"{SHARD} is {message}"):
        load(out)


def test_records_of_another_size_are_refused(out):
    writer = ArrayRecordWriter(str(out / SHARD), "group_size:1,uncompressed")
    for _ in range(13):
        writer.write(bytes(1000))
    writer.close()
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] = (out / SHARD).stat().st_size
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="image 0 can't be read"):
        load(out).images.read(np.array([13]))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), truncate, overwrite])
def test_damaged_labels(out, damage):
    damage(out / "labels.npy")
    with pytest.raises(InputError, match=r"labels\.npy"):
        load(out)


def test_labels_that_promise_more_than_they_hold(out):
    labels = (out / "labels.npy").read_bytes()
    hostile = labels.replace(b"(53,), }        ", b"(9999999999,), }")
    assert hostile != labels
    (out / "labels.npy").write_bytes(hostile)
    with pytest.raises(InputError, match=r"labels\.npy"):
        load(out)


def test_a_set_without_manifest_is_not_finished(out):
    (out / "manifest.json").rename(out / "preparation.jsonl")
    with pytest.raises(InputError, match="not prepared to its end"):
        load(out)


def test_a_manifest_of_something_else(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_prepared(tmp_path)


HOSTILE = {
    "format_version": [None, 2, "1"],
    "dtype": [None, "float32"],
    "count": [None, 0, -1, 52, True, 1e3, "53", 10**30],
    "image_shape": [None, [], [12, 10], [12, 10, 0], [12, 10, -1], [12.0, 10, 1], [2**40, 2**40, 3], [10**6, 10**6, 3], "abc"],
    "source": [None, 1, []],
    "framing": [None, "fill", []],
    "class_names": [None, "abc", [1, 2, 3], ["a", "b"]],
    "labels": ["labels.npy", {}, {"name": "../labels.npy", "count": COUNT, "bytes": 10, "sha256": "0" * 64}],
    "shards": [None, [], {}, [[]], [{}], "abc"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in HOSTILE.items() for value in values])
def test_hostile_manifests(out, field, value):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest[field] = value
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError) as error:
        load(out)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "../" + SHARD), ("name", "/etc/passwd"), ("name", "shard-00000-of-00004.array_record"), ("name", None),
     ("count", 0), ("count", 10**9), ("bytes", -1), ("bytes", 2**50), ("sha256", None), ("sha256", "0"), ("extra", 1)],
)  # fmt: skip
def test_hostile_shards(out, field, value):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][1][field] = value
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"shard|count"):
        load(out)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"format_version": 1}'])
def test_a_manifest_that_is_none(out, content):
    (out / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json is not a manifest"):
        load(out)


def test_more_shards_than_files_may_be_open(whole):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, limits[1]))  # room for two of the four
    try:
        with pytest.raises(InputError, match="can't be opened: Too many open files"):
            load(whole)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_can_be_framed(tmp_path):
    np.save(tmp_path / "four.npy", np.zeros((3, 8, 8, 4), np.uint8))
    prepare(DataConfig(source=str(tmp_path / "four.npy")), tmp_path / "out")
    assert load(tmp_path / "out").images[:].shape == (3, 8, 8, 4)
    with pytest.raises(InputError, match="can't be framed"):
        load(tmp_path / "out", image_shape=(4, 4, 3))


def test_padding(tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((2, 4, 8, 1), np.uint8))
    prepare(DataConfig(source=str(tmp_path / "wide.npy")), tmp_path / "out")
    image = load(tmp_path / "out", image_shape=(8, 8, 1), framing="pad").images[:1][0, :, :, 0]
    np.testing.assert_array_equal(image, np.repeat([255, 0, 255], [2, 4, 2])[:, None].repeat(8, 1))
