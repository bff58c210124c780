"""Which source a config's name means, and what is imported for it."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, one_line_error

from ddpm_jax import DataConfig
from ddpm_jax.data import load_images
from ddpm_jax.data.sources import load_packaged


@pytest.fixture
def without_type_checks(monkeypatch):
    """What a user meets, who runs without the type checks of the tests."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.mark.usefixtures("without_type_checks")
def test_sources_that_are_nowhere(tmp_path):
    for source in ("no set of this kind", str(tmp_path / "missing.npy"), "runs/missing", "nothing.like.this"):
        fragments = ["data.source", repr(source), "fashion_mnist", ".npy", "folder", "tfds:NAME", "hf:NAME"]
        one_line_error(load_images, DataConfig(source=source), fragments=fragments)
    (tmp_path / "set.png").write_bytes(b"")
    one_line_error(
        load_images, DataConfig(source=str(tmp_path / "set.png")), fragments=[str(tmp_path / "set.png"), ".npy", ".npz"]
    )


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("source", "nearest"), [("fashion_mnits", "'fashion_mnist'"), ("minst", "'mnist'"), ("cifar", "'cifar10'")]
)
def test_the_nearest_name_is_offered(source, nearest):
    one_line_error(load_images, DataConfig(source=source), fragments=["data.source", repr(source), "did you mean", nearest])


def test_the_packaged_set_is_framed():
    assert len(load_images(DataConfig(source="fashion_mnist", image_shape=(28, 28, 1))).images) == 10_000
    images = load_images(DataConfig(source="fashion_mnist", image_shape=(14, 14, 1))).images
    assert images.shape == (10_000, 14, 14, 1)
    packaged = load_packaged("fashion_mnist").images[:20]
    blocks = packaged.astype(np.float64).reshape(20, 14, 2, 14, 2, 1).mean(axis=(2, 4))
    assert np.abs(images[:20] - blocks).max() <= 1  # Pillow rounds after the rows and after the columns
    rgb = load_images(DataConfig(source="fashion_mnist", image_shape=(28, 28, 3))).images[:20]
    np.testing.assert_array_equal(rgb, np.repeat(packaged, 3, axis=-1), strict=True)


SLOW_IMPORTS = ("tensorflow", "tensorflow_datasets", "datasets", "pyarrow", "grain", "pandas")


@pytest.mark.parametrize(
    "program",
    [
        "import ddpm_jax",
        "import ddpm_jax.data; ddpm_jax.data.load_images(ddpm_jax.DataConfig())",
        "import runpy; sys.argv = ['train.py', '--help']; runpy.run_path('train.py', run_name='__main__')",
    ],
    ids=["import", "packaged set", "help"],
)
def test_libraries_are_imported_by_those_who_use_them(program):
    """In a process of its own: neither the package nor a run on the packaged set needs any of them."""
    report = f"print(sorted(set({SLOW_IMPORTS}) & set(sys.modules)), file=sys.stderr)"
    code = f"import atexit, sys; atexit.register(lambda: {report}); {program}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert process.stderr.strip().splitlines()[-1] == "[]"
