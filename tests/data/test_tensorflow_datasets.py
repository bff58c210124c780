"""Sets of TensorFlow Datasets: written by its own writer without TensorFlow, and read back."""

import io
import itertools
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from helpers import ROOT, one_line_error
from PIL import Image

from ddpm_jax import DataConfig, InputError
from ddpm_jax.data import load_images, tfds_preparation
from ddpm_jax.data import tensorflow_datasets as library

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (50, 8, 12, 3), np.uint8)
GREY = RANDOM.integers(0, 256, (20, 9, 9, 1), np.uint8)
DEEP = RANDOM.integers(0, 2**16, (6, 5, 5), np.uint16)
CLASSES = ("cat", "dog", "old boat")
# Nothing is listened to there, and nothing outside this machine is asked.
NO_PROXY = dict.fromkeys(("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "https_proxy"), "")


def encoded(array, form="png"):
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array).save(buffer, form)
    return buffer.getvalue()


JPEGS = [encoded(RANDOM.integers(0, 256, size, np.uint8), "jpeg") for size in ((20, 30, 3), (31, 19, 3), (16, 16, 3))]


def make_builder(set_name, features, examples, configs=()):
    """A builder class like those of the library: `examples` maps splits to lists of examples."""

    class LocalSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config) for config in configs]  # noqa: RUF012

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in examples}

        def _generate_examples(self, split):
            yield from enumerate(examples[split])

    return LocalSet


def classes(names=CLASSES):
    return tfds.features.ClassLabel(names=names)


def image(*shape):
    return tfds.features.Image(shape=shape)


def labelled(images):
    return [{"image": encoded(each), "label": number % 3, "id": number} for number, each in enumerate(images)]


COLOUR_FEATURES = {"image": image(8, 12, 3), "label": classes(), "id": np.int32}
SETS = {
    "colour_set": (COLOUR_FEATURES, {"train": labelled(COLOUR[:40]), "test": labelled(COLOUR[40:])}),
    "grey_set": (
        {"picture": image(9, 9, 1), "kind": tfds.features.ClassLabel(num_classes=7)},
        {"train": [{"picture": encoded(each), "kind": number % 7} for number, each in enumerate(GREY)]},
    ),
    "sized_set": ({"image": image(None, None, 3)}, {"train": [{"image": data} for data in JPEGS]}),
    "even_set": ({"image": image(None, None, 3)}, {"train": [{"image": encoded(each)} for each in COLOUR[:5]]}),
    "deep_set": (
        {"image": tfds.features.Image(shape=(5, 5, 1), dtype=np.uint16, encoding_format="png")},
        {"train": [{"image": encoded(each)} for each in DEEP]},
    ),
    "unknown_classes": (
        {"image": image(8, 12, 3), "label": classes()},
        {"train": [{"image": encoded(COLOUR[0]), "label": -1}, {"image": encoded(COLOUR[1]), "label": 2}]},
    ),
    "many_classes": (
        {"image": image(8, 12, 3), "coarse_label": classes(["one", "other"]), "label": classes()},
        {"train": [{"image": encoded(COLOUR[0]), "coarse_label": 0, "label": 2}]},
    ),
    "damaged_set": (
        {"image": image(8, 12, 3)},
        {"train": [{"image": data} for data in (encoded(COLOUR[0]), encoded(COLOUR[1])[:60], b"no image")]},
    ),
    "two_images": (
        {"left": image(8, 12, 3), "right": image(8, 12, 3)},
        {"train": [{"left": encoded(COLOUR[0]), "right": encoded(COLOUR[1])}]},
    ),
    "no_images": ({"id": np.int32, "text": tfds.features.Text()}, {"train": [{"id": 1, "text": "hello"}]}),
    "with_mask": (
        {"image": image(8, 12, 3), "mask": image(9, 9, 1)},
        {"train": [{"image": encoded(COLOUR[0]), "mask": encoded(GREY[0])}]},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory):
    """TFDS_DATA_DIR with all sets in it, prepared as array_record."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(folder))
        for name, (features, examples) in SETS.items():
            prepare(make_builder(name, features, examples), folder)
        for config, images in {"small": COLOUR[:3], "large": COLOUR[3:8]}.items():
            builder = make_builder("with_configs", COLOUR_FEATURES, {"train": labelled(images)}, ("small", "large"))
            prepare(builder, folder, config=config)
        yield folder


def prepare(builder, folder, **options):
    settings = tfds.download.DownloadConfig(num_shards=3 if builder.name == "colour_set" else 1)
    builder(data_dir=folder, file_format="array_record", **options).download_and_prepare(download_config=settings)
    assert "tensorflow" not in sys.modules


@pytest.fixture
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def load(name, **values):
    return load_images(DataConfig(source=name, **values))


def by_pixels(images, labels):
    """The set without its order, which is the library's own: (pixels, label) of each image."""
    return sorted((each.tobytes(), int(label)) for each, label in zip(images, labels, strict=True))


# What is read


@pytest.mark.parametrize("source", ["tfds:colour_set", "colour_set", "tfds:colour_set:1.2.0", "colour_set:1.*.*"])
def test_every_pixel_and_label(source):
    image_set = load(source)
    assert image_set.images.shape == (40, 8, 12, 3) and image_set.images.dtype == np.uint8
    assert image_set.labels.dtype == np.int32 and image_set.class_names == CLASSES
    assert by_pixels(image_set.images[:], image_set.labels) == by_pixels(COLOUR[:40], np.arange(40) % 3)
    assert "tensorflow" not in sys.modules


def test_splits():
    test = load("tfds:colour_set", split="test")
    assert by_pixels(test.images[:], test.labels) == by_pixels(COLOUR[40:], np.arange(10) % 3)
    parts = [load("tfds:colour_set", split=split) for split in ("train[:25%]", "train[25%:]")]
    assert [len(part.images) for part in parts] == [10, 30]
    whole = load("tfds:colour_set")
    np.testing.assert_array_equal(np.concatenate([part.images[:] for part in parts]), whole.images[:])
    np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
    assert len(load("tfds:colour_set", split="train+test").images) == 50


def test_images_are_read_in_any_order():
    images = load("tfds:colour_set").images
    whole, order = images[:], np.array([39, 0, 17, 17, 1])
    np.testing.assert_array_equal(images.read(order), whole[order], strict=True)
    np.testing.assert_array_equal(images[5:9], whole[5:9], strict=True)


def test_images_are_read_from_several_threads():
    images = load("tfds:colour_set").images
    whole = images[:]
    images = load("tfds:colour_set").images  # whose files are not open yet
    orders = [np.random.default_rng(seed).integers(0, 40, 30) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for order, read in zip(orders, pool.map(images.read, orders), strict=True):
            np.testing.assert_array_equal(read, whole[order])


def test_features_of_other_names():
    """The only image and the only classes, whatever they are called; classes that are but numbers have no names."""
    image_set = load("tfds:grey_set")
    assert image_set.image_shape == (9, 9, 1) and image_set.class_names == ()
    assert by_pixels(image_set.images[:], image_set.labels) == by_pixels(GREY, np.arange(20) % 7)


def test_the_feature_called_label_comes_first():
    image_set = load("tfds:many_classes")
    assert image_set.labels.tolist() == [2] and image_set.class_names == CLASSES


def test_the_feature_called_image_comes_first():
    np.testing.assert_array_equal(load("tfds:with_mask").images[:], COLOUR[:1])


def test_images_without_class_have_no_labels():
    """-1 is the library's mark for them."""
    assert load("tfds:unknown_classes").labels is None and load("tfds:even_set").labels is None


def test_configs():
    assert len(load("tfds:with_configs/large").images) == 5 and len(load("with_configs/small:1.2.0").images) == 3
    assert len(load("tfds:with_configs").images) == 3  # the first is the default


def test_sixteen_bits_become_eight():
    images = load("tfds:deep_set").images
    assert images.shape == (6, 5, 5, 1)
    read = sorted(images[:].reshape(6, -1).tolist())
    deep = sorted((DEEP / 257.0).reshape(6, -1).tolist())  # 65535 / 257 = 255
    assert np.abs(np.array(read) - deep).max() <= 1


def test_images_of_one_size_that_the_set_does_not_state():
    assert load("tfds:even_set").image_shape == (8, 12, 3)


@pytest.mark.usefixtures("without_type_checks")
def test_images_of_several_sizes():
    one_line_error(load, "tfds:sized_set", fragments=["tfds:sized_set", "several sizes", "data.image-shape"])
    image_set = load("tfds:sized_set", image_shape=(16, 16, 3))
    assert image_set.images.shape == (3, 16, 16, 3)
    square = np.asarray(Image.open(io.BytesIO(JPEGS[2])))  # one of them has the shape that is asked for
    assert any((each == square).all() for each in image_set.images[:])


def test_images_are_framed():
    grey = load("tfds:colour_set", image_shape=(4, 6, 1)).images
    assert grey.shape == (40, 4, 6, 1)
    blocks = load("tfds:colour_set").images[:].astype(float).reshape(40, 4, 2, 6, 2, 3).mean(axis=(2, 4))
    luma = blocks @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(grey[:][..., 0] - luma).max() < 2  # rounded to bytes three times on the way


def test_random_crops():
    images = load("tfds:colour_set", framing="random").images
    np.testing.assert_array_equal(images[:], load("tfds:colour_set").images[:])  # the largest, without draws
    places, draws = np.array([3, 3, 3]), np.array([[0, 0, 0], [0, 0.9, 0.9], [0, 0, 0]])
    one, other, again = images.read(places, draws)
    assert (one == again).all() and (one != other).any()


# What is refused


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("source", "values", "fragments"),
    [
        ("tfds:colour_set", {"split": "valid"}, ["data.split", "'valid'", "train (40 images)", "test (10 images)"]),
        ("tfds:colour_set", {"split": "train[:0]"}, ["data.split", "'train[:0]'"]),
        ("tfds:colour_set", {"split": "train["}, ["data.split", "'train['"]),
        ("tfds:colour_set", {"image_shape": (8, 8, 4)}, ["data.image_shape", "(8, 8, 4)"]),
        ("tfds:two_images", {}, ["two_images", "left (Image)", "right (Image)"]),
        ("tfds:no_images", {}, ["no_images", "id (", "text (Text)"]),
        ("tfds:minst", {}, ["tfds:minst", "did you mean 'mnist'"]),
        ("tfds:imagenet_resized/64", {}, ["tfds:imagenet_resized/64", "64x64"]),
        ("tfds:mnist/large", {}, ["tfds:mnist/large", "none"]),
        ("tfds:No Set", {}, ["tfds:No Set", "tfds:cifar10"]),
        ("tfds:../../etc/passwd", {}, ["tfds:../../etc/passwd", "no name"]),
        ("tfds:", {}, ["no name"]),
        ("tfds:mnist", {}, ["tfds:mnist", "isn't prepared", "pip install tensorflow", "tfds_preparation mnist"]),
        ("celeb_a_hq/256", {}, ["tfds:celeb_a_hq/256", "isn't prepared", "pip install tensorflow"]),
    ],
)
def test_refused(source, values, fragments):
    one_line_error(lambda: load(source, **values), fragments=fragments)


@pytest.mark.usefixtures("without_type_checks")
def test_damaged_images_are_named_when_they_are_read():
    images = load("tfds:damaged_set").images
    read = [read_or_message(images, place) for place in range(3)]
    whole = [each for each in read if isinstance(each, np.ndarray)]
    assert len(whole) == 1 and (whole[0] == COLOUR[0]).all()
    for place, message in enumerate(read):
        if isinstance(message, str):
            assert message.startswith(f"tfds:damaged_set: image {place} can't be used") and "\n" not in message


def read_or_message(images, place):
    try:
        return images.read(np.array([place]))[0]
    except InputError as error:
        return str(error)


@pytest.mark.usefixtures("without_type_checks")
def test_damaged_metadata_and_other_formats(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    prepare(make_builder("other_set", *SETS["even_set"]), tmp_path)
    path = tmp_path / "other_set" / "1.2.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    one_line_error(load, "tfds:other_set", fragments=["tfds:other_set", "riegeli", "array_record", str(path.parent)])
    path.write_text("{")
    one_line_error(load, "tfds:other_set", fragments=["tfds:other_set", "can't be read"])
    path.write_text(json.dumps(info))
    next(path.parent.glob("*array_record*")).unlink()
    one_line_error(load, "tfds:other_set", fragments=["tfds:other_set"])


# TFRecord files, as those have who used the library with TensorFlow


def as_tfrecords(folder):
    """A prepared set with its records in TFRecord files: length, checksum, data, checksum; the checksums are left 0."""
    for path in folder.glob("*.array_record-*"):
        records = list(ArrayRecordDataSource(str(path)))
        framed = b"".join(struct.pack("<Q", len(data)) + bytes(4) + data + bytes(4) for data in records)
        (folder / path.name.replace("array_record", "tfrecord")).write_bytes(framed)
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


@pytest.fixture
def older(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    prepare(make_builder("colour_set", *SETS["colour_set"]), tmp_path)
    as_tfrecords(tmp_path / "colour_set" / "1.2.0")
    return tmp_path / "colour_set" / "1.2.0"


@pytest.mark.usefixtures("older")
def test_tfrecord_files_are_read_as_well():
    whole = load("tfds:colour_set")
    assert by_pixels(whole.images[:], whole.labels) == by_pixels(COLOUR[:40], np.arange(40) % 3)
    part = load("tfds:colour_set", split="train[20%:80%]")
    np.testing.assert_array_equal(part.images[:], whole.images[8:32])
    np.testing.assert_array_equal(part.labels, whole.labels[8:32])
    order = np.array([23, 0, 5, 5, 12])
    np.testing.assert_array_equal(part.images.read(order), whole.images[8 + order])
    one_line_error(lambda: load("tfds:colour_set", split="valid"), fragments=["data.split", "'valid'", "train (40 images)"])


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_tfrecord_files_that_are_cut_short(older, share):
    path = sorted(older.glob("*train*"))[1]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    one_line_error(load, "tfds:colour_set", fragments=[str(path), "prepare the set again"])


# A process without TensorFlow, and one that prepares


def test_a_process_of_its_own_imports_no_tensorflow(data_folder):
    code = (
        "import sys, numpy, ddpm_jax; from ddpm_jax.data import load_images;"
        "images = load_images(ddpm_jax.DataConfig(source='colour_set')).images; images.read(numpy.arange(40));"
        "print('tensorflow' in sys.modules, 'tensorflow_datasets' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TFDS_DATA_DIR": str(data_folder)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert process.stdout == "False True\n" and process.stderr == ""


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path, monkeypatch, capsys):
    """It accepts connections and never answers; the library would wait without end, ten times."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds_preparation, "READ_SECONDS", 0.2)
    for name, value in NO_PROXY.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(SystemExit):
            tfds_preparation.main("mnist")
        assert time.monotonic() - began < 20
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("https://") and "mnist" in line and "can't be reached" in line


@pytest.mark.usefixtures("without_type_checks")
def test_what_a_preparation_fails_of_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorflow")
    for name, value in NO_PROXY.items() | {("HTTPS_PROXY", "http://127.0.0.1:1"), ("TFDS_DATA_DIR", str(tmp_path))}:
        monkeypatch.setenv(name, value)
    one_line_error(load, "tfds:mnist", fragments=["tfds:mnist can't be prepared", "https://", "can't be reached"])


def test_two_that_find_nothing_prepare_it_once(data_folder, tmp_path, monkeypatch):
    """Both have looked before either begins; a slow copy takes the place of the preparation."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorflow")
    monkeypatch.setattr(logging.getLogger("absl"), "level", logging.CRITICAL)  # which two threads at once may leave so
    on_disk, looks, both, prepared = library._on_disk, itertools.count(), threading.Barrier(2, timeout=60), []

    def look(name):
        builder = on_disk(name)
        if next(looks) < 2:
            both.wait()
        return builder

    def copy(name):
        prepared.append(name)
        time.sleep(0.3)
        shutil.copytree(data_folder / name, tmp_path / name)

    for name, function in {"_on_disk": look, "_check_name": lambda name: None, "_prepare": copy}.items():
        monkeypatch.setattr(library, name, function)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(load, ["tfds:even_set"] * 2))
    assert prepared == ["even_set"]
    assert [image_set.images.shape for image_set in found] == [(5, 8, 12, 3)] * 2
