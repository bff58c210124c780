"""Checksums: the sums in Python's own integers, on any topology; bits that change anywhere in a checkpoint's files."""

import gc
import shutil

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax.checksums import DamagedError, check, checksums, seal, unseal
from ddpm_jax.config import Config
from ddpm_jax.parallel import make_mesh
from ddpm_jax.saving import read_description, read_items, write_items

RANDOM = np.random.default_rng(0)
# Orbax drops the coroutines of a read that has failed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine '.*' was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def dropped_coroutines_end_here():
    yield
    gc.collect()


def by_hand(array):
    """The two sums over the bytes as they lie in memory, in integers of any size."""
    size = array.dtype.itemsize
    content = array.tobytes()
    words = [int.from_bytes(content[start : start + size], "little") for start in range(0, len(content), size)]
    plain, weighted = sum(words), sum((2 * place + 1) * word for place, word in enumerate(words))
    return f"{plain % 2**32:08x}{weighted % 2**32:08x}"


def random_bits(shape, dtype):
    return np.frombuffer(RANDOM.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def flipped(array, word, bit):
    words = array.copy().reshape(-1).view(np.uint32)
    words[word] ^= np.uint32(1) << np.uint32(bit)
    return words.view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint32, jnp.bfloat16, np.int8])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4, 5)])
def test_sums_are_those_of_plain_integers(shape, dtype):
    array = random_bits(shape, dtype)
    expected = {"item": {"a/0": by_hand(array)}}
    assert checksums({"item": {"a": [array]}}) == expected
    assert checksums({"item": {"a": [jnp.asarray(array)]}}) == expected


@pytest.mark.parametrize(
    "axes", [(), ("fsdp",), (None, "fsdp"), (None, None, "data"), (("data", "fsdp"),), ("data", None, "fsdp")]
)
@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_sums_do_not_depend_on_how_an_array_is_split(axes, fsdp):
    array = random_bits((8, 16, 24), np.float32)
    split = jax.device_put(array, NamedSharding(make_mesh(fsdp=fsdp), PartitionSpec(*axes)))
    assert checksums({"item": split}) == {"item": {"": by_hand(array)}}


def test_sums_of_an_array_that_is_not_contiguous():
    array = random_bits((6, 8), np.float32)
    assert checksums({"item": array.T}) == {"item": {"": by_hand(np.ascontiguousarray(array.T))}}


@given(st.integers(0, 4095), st.integers(0, 31))
def test_one_flipped_bit_changes_both_sums(word, bit):
    array = random_bits((4096,), np.float32)
    before, after = (checksums({"item": each})["item"][""] for each in (array, flipped(array, word, bit)))
    assert before[:8] != after[:8]
    assert before[8:] != after[8:]


def test_numbers_that_change_places_are_seen():
    array = np.arange(1, 9, dtype=np.float32)
    swapped = array[[0, 5, 2, 3, 4, 1, 6, 7]]
    saved = checksums({"params": {"kernel": array}})
    check({"params": {"kernel": array.copy()}}, saved)
    with pytest.raises(DamagedError, match="the checksum of params/kernel is not that of what was saved"):
        check({"params": {"kernel": swapped}}, saved)


def test_an_array_that_was_not_saved_is_seen():
    saved = checksums({"params": {"kernel": np.zeros(3, np.float32)}})
    for other in ({"params": {"bias": np.zeros(3, np.float32)}}, {"ema": {"kernel": np.zeros(3, np.float32)}}):
        with pytest.raises(DamagedError):
            check(other, saved)


def test_a_seal_holds_and_breaks():
    values = {"config": {"seed": 0, "name": "ä"}, "checksums": {}}
    assert unseal(seal(values)) == values
    assert unseal(values) == values  # of before there were seals
    for changed in ({"config": {"seed": 1, "name": "ä"}}, {"checksums": {"params": {}}}, {"crc32": 0}, {"more": 1}):
        with pytest.raises(DamagedError):
            unseal(seal(values) | changed)


# --- in files


ITEMS = {
    "params": {"conv": {"kernel": random_bits((3, 3, 16, 16), np.float32), "bias": np.zeros(16, np.float32)}},
    "training": {"step": np.asarray(7, np.int32), "mean": np.linspace(0, 1, 1000, dtype=np.float32)},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("flips") / "7"
    write_items(path, ITEMS, Config())()
    return path


def read(path):
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SHARDING), ITEMS)
    return jax.tree.map(np.asarray, read_items(path, abstract, read_description(path)))


SHARDING = NamedSharding(make_mesh(jax.devices()[:1]), PartitionSpec())


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all((x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()) for x, y in pairs)


@pytest.mark.parametrize("part", range(4))
def test_a_flipped_bit_in_any_file_gives_the_same_numbers_or_an_error(checkpoint, tmp_path, part):
    """60 random bits in files chosen with equal chance, so that descriptions are hit as often as arrays."""
    path = shutil.copytree(checkpoint, tmp_path / "7")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    random, noticed = np.random.default_rng(part), 0
    for _ in range(60):
        file = files[random.integers(len(files))]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        try:
            assert same_bits(read(path), ITEMS), f"other numbers by a bit of {file.name}"
        except AssertionError:
            raise
        except Exception:
            noticed += 1
        file.write_bytes(whole)
    assert same_bits(read(path), ITEMS)
    assert noticed > 10


def test_a_flipped_bit_of_the_numbers_themselves_is_noticed(checkpoint, tmp_path):
    """Written by Orbax with the sums of what it should have been: what a disk that lies would give."""
    path = tmp_path / "7"
    wrong = ITEMS | {"params": {"conv": ITEMS["params"]["conv"] | {"bias": flipped(np.zeros(16, np.float32), 3, 0)}}}
    write_items(path, wrong, Config())()
    shutil.copy(checkpoint / "_CHECKPOINT_METADATA", path / "_CHECKPOINT_METADATA")
    with pytest.raises(DamagedError, match="params/conv/bias"):
        read(path)
