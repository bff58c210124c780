"""PyTorch's files: what they hold is read, and nothing that they ask for is done."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch_writer as w
from helpers import one_line_error

from ddpm_jax.interop.torch_files import read_torch_file

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.array(7, np.int64)
GOOD = w.state_dict({"a.weight": A, "b": B})


def written(folder, data):
    path = folder / "weights.pt"
    path.write_bytes(data)
    return path


def test_a_state_dict_is_read(tmp_path):
    tensors = read_torch_file(written(tmp_path, GOOD))
    assert list(tensors) == ["a.weight", "b"]
    for name, expected in {"a.weight": A, "b": B}.items():
        assert (tensors[name].dtype, tensors[name].shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(tensors[name], expected)


def test_tensors_are_views_of_shared_storages(tmp_path):
    entries = {
        "whole": w.tensor("0", A),
        "transposed": w.tensor("0", A, (4, 3), (1, 4)),
        "row": w.tensor("0", A, (4,), (1,), offset=8),
        "empty": w.tensor("0", A, (0, 5), (5, 1)),
    }
    tensors = read_torch_file(written(tmp_path, w.archive(w.pickled(w.dictionary(entries)), [A])))
    expected = {"whole": A, "transposed": A.T, "row": A[2], "empty": np.zeros((0, 5))}
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)


def test_a_state_dict_in_a_training_program_s_dictionary(tmp_path):
    program = w.pickled(w.dictionary({"epoch": w.number(3), "state_dict": w.dictionary({"a": w.tensor("0", A)})}))
    np.testing.assert_array_equal(read_torch_file(written(tmp_path, w.archive(program, [A])))["a"], A)


def old_format(program, keys, arrays):
    """The five pickles and the storages of torch < 1.6."""
    heads = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    storages = b"".join(array.size.to_bytes(8, "little") + array.tobytes() for array in arrays)
    return b"".join(heads) + program + pickle.dumps(keys, 2) + storages


def test_the_older_format_is_read(tmp_path):
    program = w.pickled(w.dictionary({"a": w.tensor("0", A), "b": w.tensor("1", B)}))
    tensors = read_torch_file(written(tmp_path, old_format(program, ["1", "0"], [B, A])))
    np.testing.assert_array_equal(tensors["a"], A)
    np.testing.assert_array_equal(tensors["b"], B)


class Command(w.Executed):
    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", [w.Executed, Command])
@pytest.mark.parametrize("frame", ["bare", "zip", "old", "beside tensors"])
def test_a_file_that_is_a_program_is_refused_and_not_executed(tmp_path, protocol, kind, frame):
    canary = tmp_path / "canary"
    hostile = w.hostile("a", kind(canary), protocol)
    data = {
        "bare": hostile,
        "zip": w.archive(hostile, [A]),
        "old": old_format(hostile, ["0"], [A]),
        "beside tensors": w.archive(
            w.pickled(w.dictionary({"a": w.tensor("0", A), "b": w.name("posix", "system") + b"(" + w.text("true") + b"tR"})),
            [A],
        ),
    }[frame]
    one_line_error(read_torch_file, written(tmp_path, data), fragments=["weights.pt can't be read"])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (w.name("builtins", "eval") + b"(" + w.text("1") + b"tR", "'builtins.eval'"),
        (w.name("torch._utils", "_rebuild_tensor_v2.__globals__"), "__globals__"),
        (w.name("collections", "OrderedDict.__subclasses__"), "__subclasses__"),
        (w.name("torch", "load") + b"(" + w.text("x") + b"tR", "'torch.load'"),
        (w.dictionary({"a": w.number(1)}), "'a' is a int, not a tensor"),
        (w.numbers([1, 2]), "a tuple, not a dictionary"),
        (b"}", "a dict, not a dictionary of tensors"),
        (w.dictionary({"a": w.tensor("9", A)}), "'9' is missing"),
        (w.dictionary({"a": w.tensor("0", A, (5, 4), (4, 1))}), "'a' of shape (5, 4) has more numbers"),
        (w.dictionary({"a": w.tensor("0", A, (100, 100), (0, 0))}), "has more numbers"),
        (w.dictionary({"a": w.tensor("0", A, (4,), (1,), offset=9)}), "has more numbers"),
        (w.dictionary({"a": w.tensor("0", A, (4,), (-1,), offset=3)}), "strides that can't be"),
        (w.dictionary({"a": w.tensor("0", A, (2, 2), (1,))}), "strides that can't be"),
        (b"r\xff\xff\xff\xffN0", "higher than there can be"),
        (b"\x8c\x04abcd", "SHORT_BINUNICODE"),
    ],
    ids=range(15),
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, program, reason):
    fragments = ["weights.pt can't be read as weights of PyTorch", reason]
    one_line_error(read_torch_file, written(tmp_path, w.archive(w.pickled(program), [A])), fragments=fragments)


def test_instructions_change_nothing_of_the_reader(tmp_path):
    """BUILD sets attributes, also of functions that a pickle may name."""
    spoilt = w.name("torch._utils", "_rebuild_tensor_v2") + w.dictionary({"x": w.number(1)}) + b"b"
    one_line_error(read_torch_file, written(tmp_path, w.archive(w.pickled(spoilt), [A])), fragments=["can't be read"])
    assert list(read_torch_file(written(tmp_path, GOOD))) == ["a.weight", "b"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    old = old_format(w.pickled(w.dictionary({"a": w.tensor("0", A)})), ["0"], [A])
    for data in (GOOD, old):
        one_line_error(
            read_torch_file, written(tmp_path, data[: int(share * len(data))]), fragments=["weights.pt can't be read"]
        )


def test_changed_bytes_are_noticed_in_a_zip_file(tmp_path):
    place = GOOD.index(A.tobytes()) + 5
    data = GOOD[:place] + bytes([GOOD[place] ^ 1]) + GOOD[place + 1 :]
    one_line_error(read_torch_file, written(tmp_path, data), fragments=["CRC-32"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8\xff\xe0 an image", "can't be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "can't be read"),
        (w.archive(w.pickled(b"}"), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (w.archive(w.pickled(b"}"), order=b"big"), "big-endian"),
        (pickle.dumps([1, 2], 2), "neither of the formats"),
    ],
    ids=["image", "pointer", "compressed", "big-endian", "pickle"],
)
def test_other_files_are_refused(tmp_path, data, reason):
    one_line_error(read_torch_file, written(tmp_path, data), fragments=[reason])


def test_other_zip_files_are_refused(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("a.txt", "b")
    one_line_error(read_torch_file, written(tmp_path, file.getvalue()), fragments=["without one data.pkl"])


def test_a_file_that_is_not_there(tmp_path):
    one_line_error(read_torch_file, tmp_path / "none.pt", fragments=["none.pt can't be read", "No such file"])
