"""All of Fashion-MNIST, from Debian's package to a trained step: the images arrive as they are in the original files."""

import gzip
import json
import shutil
import subprocess

import numpy as np
import pytest
from helpers import load_script, run_script

from ddpm_jax.config import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.data.records import verify_records
from ddpm_jax.data.sources import FASHION_MNIST_CLASSES

pytestmark = pytest.mark.packages

PACKAGE = "dataset-fashion-mnist"


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    """The package's folder of IDX files."""
    folder = tmp_path_factory.mktemp("package")
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here to get {PACKAGE}")
    got = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    files = list(folder.glob("*.deb"))
    if got.returncode or not files:
        pytest.skip(f"apt-get download {PACKAGE} failed: {got.stderr.strip().splitlines()[-1:]}")
    subprocess.run(["dpkg-deb", "-x", files[0].name, "."], cwd=folder, check=True)
    return folder / "usr" / "share" / "datasets" / "fashion-mnist"


def test_sixty_thousand_images_from_the_package_to_training(idx, tmp_path):
    read_idx = load_script("scripts/make_fashion_mnist.py").read_idx
    images, labels = (read_idx(idx / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    np.savez(tmp_path / "fashion.npz", images=images, labels=labels)
    run_script("prepare.py", "--data.source", "fashion.npz", "--out", "fashion", "--data.class-names", *FASHION_MNIST_CLASSES,
               cwd=tmp_path)  # fmt: skip

    image_set = load_images(DataConfig(source=str(tmp_path / "fashion")))
    assert verify_records(tmp_path / "fashion").count == 60_000 and image_set.images.shape == (60_000, 28, 28, 1)
    assert image_set.class_names == FASHION_MNIST_CLASSES
    with gzip.open(idx / "train-images-idx3-ubyte.gz") as file:  # the bytes after the header of four numbers
        assert image_set.images[:].tobytes() == file.read()[16:]
    with gzip.open(idx / "train-labels-idx1-ubyte.gz") as file:
        assert image_set.labels.astype(np.uint8).tobytes() == file.read()[8:]
    assert (np.bincount(image_set.labels) == 6000).all()

    for megabytes in (512, 0):  # on the device whole, and sent batch by batch
        workdir = tmp_path / f"run{megabytes}"
        run_script("train.py", "--data.source", "fashion", "--workdir", workdir, "--data.device-megabytes", str(megabytes),
                   "--train.num-steps", "20", "--train.log-every-steps", "10", "--train.preview-every-steps", "None",
                   "--model.num-classes", "10", cwd=tmp_path)  # fmt: skip
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [10, 20]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / f"run{megabytes}" / "metrics.jsonl").read_text().splitlines()]
        for megabytes in (512, 0)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-6)  # the same images in the same order
