"""Statistics in files: what is written is read again, files of others are read, and what can't be used is named."""

import zipfile

import jaxtyping
import numpy as np
import pytest
from helpers import one_line_error

from ddpm_jax.evaluation.distance import moments
from ddpm_jax.evaluation.statistics import read_statistics, save_statistics


@pytest.fixture
def found():
    return {"pool": moments(np.random.default_rng(0).normal(size=(30, 6)))}


def test_what_is_written_is_read_again(found, tmp_path):
    save_statistics(tmp_path / "stats.npz", "inception_v3", found)
    again = read_statistics(tmp_path / "stats.npz", "inception_v3")
    assert again.keys() == {"pool"} and again["pool"].count == 30
    np.testing.assert_array_equal(again["pool"].mean, found["pool"].mean)
    np.testing.assert_array_equal(again["pool"].covariance, found["pool"].covariance)
    one_line_error(read_statistics, tmp_path / "stats.npz", "dinov2_vitl14", fragments=["inception_v3", "dinov2_vitl14"])


def test_files_of_pytorch_fid_and_guided_diffusion(tmp_path):
    arrays = {"mu": np.ones(3, np.float32), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2), "arr_0": np.zeros(9)}
    np.savez(tmp_path / "both.npz", **arrays)
    both = read_statistics(tmp_path / "both.npz", "inception_v3")
    assert both.keys() == {"pool", "spatial"}
    assert both["pool"].mean.dtype == np.float64 and both["pool"].count is None
    np.testing.assert_array_equal(both["spatial"].covariance, np.eye(2))


@pytest.mark.parametrize(
    ("arrays", "fragments"),
    [
        ({"mu": np.zeros(3)}, ["no arrays mu and sigma"]),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, ["(3,)", "(3, 2)"]),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, ["[F]"]),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, ["not finite"]),
        ({"mu": np.array([{}], object), "sigma": np.eye(1)}, ["can't be read"]),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, ["mu must be an array of numbers"]),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "count": np.array([5, 6])}, ["count must be one whole number"]),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "count": np.array("many")}, ["count must be one whole number"]),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "count": np.array(0)}, ["count = 0"]),
        ({"mu": np.zeros(1), "sigma": np.eye(1, dtype=complex)}, ["sigma must be an array of numbers, not complex128"]),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "network": np.array(7)}, ["network must be one name"]),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "network": np.array("two\nlines")}, ["'two\\nlines'", "inception_v3"]),
    ],
)
def test_arrays_that_are_no_statistics(arrays, fragments, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user meets
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    one_line_error(read_statistics, path, "inception_v3", fragments=["stats.npz", *fragments])


def test_an_entry_that_is_no_array(tmp_path):
    """NumPy gives the bytes of an entry that doesn't begin as its arrays do."""
    path = tmp_path / "stats.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("mu.npy", b"hello")
        file.writestr("sigma.npy", b"hello")
    one_line_error(read_statistics, path, "inception_v3", fragments=["stats.npz", "mu must be an array of numbers, not bytes"])


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 77)], ids=["encrypted", "compression"])
def test_an_entry_that_zipfile_can_not_read(place, value, tmp_path):
    """Its flags and its method stand in the directory at the end of the file."""
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + place] = value
    path.write_bytes(content)
    one_line_error(read_statistics, path, "inception_v3", fragments=["stats.npz can't be read as statistics", "mu and sigma"])


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 truncated"])
def test_files_that_are_no_arrays(content, tmp_path):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    one_line_error(read_statistics, path, "inception_v3", fragments=["stats.npz", "mu and sigma"])
    one_line_error(read_statistics, tmp_path / "none.npz", "inception_v3", fragments=["none.npz"])
