"""Sets of Hugging Face datasets: saved in the test, and read back."""

import builtins
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import one_line_error
from PIL import Image

from ddpm_jax import DataConfig
from ddpm_jax.data import load_images

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (40, 8, 12, 3), np.uint8)
GREY = RANDOM.integers(0, 256, (20, 9, 9), np.uint8)
CLASSES = ["cat", "dog", "old boat"]
LABELS = np.arange(40) % 3


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The library's cache; it would be in the home folder otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("huggingface"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def encoded(array, form="png"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return {"bytes": buffer.getvalue(), "path": None}


def make(images, labels=None, image="image", label="label", **columns):
    """A dataset of encoded images and other columns."""
    features = {image: datasets.Image()} | {name: datasets.Value("int64") for name in columns}
    values = {image: [encoded(each) if isinstance(each, np.ndarray) else each for each in images]} | columns
    if labels is not None:
        features[label], values[label] = datasets.ClassLabel(names=CLASSES), list(labels)
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def load(folder, **values):
    return load_images(DataConfig(source=f"hf:{folder}", **values))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three folders of the same set: without splits, with splits, and as parquet files."""
    folder, whole = tmp_path_factory.mktemp("sets"), make(COLOUR, LABELS, number=list(range(40)))
    whole.save_to_disk(folder / "plain")
    test = make(COLOUR[:10], LABELS[:10], number=list(range(10)))
    datasets.DatasetDict(train=whole, test=test).save_to_disk(folder / "splits", num_shards={"train": 3, "test": 1})
    (folder / "parquet" / "data").mkdir(parents=True)
    whole.select(range(25)).to_parquet(folder / "parquet" / "data" / "train-00000-of-00002.parquet")
    whole.select(range(25, 40)).to_parquet(folder / "parquet" / "data" / "train-00001-of-00002.parquet")
    test.to_parquet(folder / "parquet" / "data" / "test-00000-of-00001.parquet")
    (folder / "parquet" / "README.md").write_text("# A set\n")
    return folder


@pytest.mark.parametrize("name", ["plain", "splits", "parquet"])
def test_every_pixel_and_label(saved, name):
    image_set = load(saved / name)
    assert image_set.images.shape == COLOUR.shape and image_set.images.dtype == np.uint8
    np.testing.assert_array_equal(image_set.images[:], COLOUR, strict=True)
    np.testing.assert_array_equal(image_set.labels, LABELS.astype(np.int32), strict=True)
    assert image_set.class_names == tuple(CLASSES)


@pytest.mark.parametrize("name", ["splits", "parquet"])
def test_splits(saved, name):
    np.testing.assert_array_equal(load(saved / name, split="test").images[:], COLOUR[:10])
    np.testing.assert_array_equal(load(saved / name, split="train[25%:50%]").images[:], COLOUR[10:20])
    both = load(saved / name, split="test[:3]+train[-2:]")
    np.testing.assert_array_equal(both.images[:], np.concatenate([COLOUR[:3], COLOUR[-2:]]))
    assert both.labels.tolist() == [0, 1, 2, 2, 0]


def test_images_are_read_in_any_order_and_from_several_threads(saved):
    images = load(saved / "splits").images
    orders = [np.random.default_rng(seed).integers(0, 40, 30) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for order, read in zip(orders, pool.map(images.read, orders), strict=True):
            np.testing.assert_array_equal(read, COLOUR[order])


def test_columns_of_other_names(tmp_path):
    make(GREY, np.arange(20) % 3, image="picture", label="kind").save_to_disk(tmp_path)
    image_set = load(tmp_path)
    np.testing.assert_array_equal(image_set.images[:], GREY[..., None], strict=True)
    assert image_set.labels.tolist() == [number % 3 for number in range(20)] and image_set.class_names == tuple(CLASSES)


def test_images_without_class_have_no_labels(tmp_path):
    """-1 is the library's mark for them."""
    make(COLOUR[:3], [0, -1, 2]).save_to_disk(tmp_path / "marked")
    make(COLOUR[:3], image="img").save_to_disk(tmp_path / "none")
    for name in ("marked", "none"):
        image_set = load(tmp_path / name)
        assert image_set.labels is None and image_set.class_names == ()


def test_images_are_framed(saved):
    grey = load(saved / "plain", image_shape=(4, 6, 1)).images
    assert grey.shape == (40, 4, 6, 1)
    luma = COLOUR.astype(float).reshape(40, 4, 2, 6, 2, 3).mean(axis=(2, 4)) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(grey[:][..., 0] - luma).max() < 2  # rounded to bytes three times on the way


@pytest.mark.usefixtures("without_type_checks")
def test_images_of_several_sizes(tmp_path):
    make([COLOUR[0], COLOUR[1, :7], GREY[0]]).save_to_disk(tmp_path)
    one_line_error(load, tmp_path, fragments=["several sizes", "height 7 width 12", "height 9 width 9", "data.image-shape"])
    assert load(tmp_path, image_shape=(8, 8, 3)).images[:].shape == (3, 8, 8, 3)


@pytest.mark.usefixtures("without_type_checks")
def test_refused(saved, tmp_path):
    two = [make(COLOUR[:2], image=name) for name in ("left", "right")]
    datasets.concatenate_datasets(two, axis=1).save_to_disk(tmp_path / "two")
    make(COLOUR[:2], number=[1, 2]).remove_columns("image").save_to_disk(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    for source, values, fragments in [
        (saved / "splits", {"split": "valid"}, ["data.split", "'valid'", "'train': 40", "'test': 10"]),
        (saved / "parquet", {"split": "valid"}, ["'valid'", "train", "test"]),
        (saved / "plain", {"split": "test"}, ["data.split", "'test'", "'train': 40"]),
        (saved / "plain", {"split": "train["}, ["data.split", "'train['"]),
        (saved / "plain", {"split": "train[:0]"}, ["'train[:0]'", "no images"]),
        (saved / "plain", {"image_shape": (8, 8, 2)}, ["data.image_shape", "(8, 8, 2)"]),
        (tmp_path / "two", {}, ["left (Image)", "right (Image)"]),
        (tmp_path / "none", {}, ["number (Value)"]),
        (tmp_path / "empty", {}, [".parquet", "save_to_disk"]),
        (tmp_path / "missing", {}, ["missing", "can't be opened"]),
    ]:
        one_line_error(lambda s=source, v=values: load(s, **v), fragments=[str(source) if not values else "", *fragments])


@pytest.mark.usefixtures("without_type_checks")
def test_images_outside_the_set_are_not_followed(tmp_path):
    Image.fromarray(COLOUR[0]).save(tmp_path / "secret.png")
    outside = {"bytes": None, "path": str(tmp_path / "secret.png")}
    parquet.write_table(make([outside, None]).data.table, tmp_path / "set.parquet")
    for place, told in ((0, "secret.png"), (1, "None")):
        images = load(tmp_path, image_shape=(8, 12, 3)).images
        one_line_error(images.read, np.array([place]), fragments=[f"image {place}", told])


@pytest.mark.usefixtures("without_type_checks")
def test_damaged_sets(saved, tmp_path):
    make([encoded(COLOUR[0]), {"bytes": b"no image", "path": None}]).save_to_disk(tmp_path / "image")
    images = load(tmp_path / "image", image_shape=(8, 12, 3)).images
    np.testing.assert_array_equal(images.read(np.array([0]))[0], COLOUR[0])
    one_line_error(images.read, np.array([1]), fragments=["hf:", "image 1 can't be used"])
    (tmp_path / "set.parquet").write_bytes((saved / "parquet" / "data" / "test-00000-of-00001.parquet").read_bytes()[:-50])
    one_line_error(load, tmp_path, fragments=[str(tmp_path), "can't be opened"])
    make(COLOUR[:2]).save_to_disk(tmp_path / "state")
    (tmp_path / "state" / "state.json").write_text("{")
    one_line_error(load, tmp_path / "state", fragments=["state", "can't be opened"])


@pytest.mark.usefixtures("without_type_checks")
def test_code_that_comes_with_a_set_is_not_run(tmp_path):
    (tmp_path / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    make(COLOUR[:3]).to_parquet(tmp_path / "set.parquet")
    assert len(load(tmp_path).images) == 3
    one_line_error(load, tmp_path / "set.py", fragments=["can't be opened"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("without_type_checks")
def test_without_the_library(monkeypatch):
    load_module = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "datasets":
            raise ImportError(name)
        return load_module(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    one_line_error(load, "some/set", fragments=["hf:some/set", "pip install datasets"])
