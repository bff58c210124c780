"""Images from files."""

import gzip
import hashlib
import struct
import sys
import zipfile

import numpy as np
import pytest
from helpers import load_script

from ddpm_jax import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.data.sources import load_packaged

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
