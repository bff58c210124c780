"""Files as `torch.save` writes them, put together by hand: instructions of pickle's protocol 2, and a zip file around them.

tests/interop/test_diffusers_files.py has PyTorch read what this makes.
"""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage", "float16": "HalfStorage"}


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"J" + struct.pack("<i", value)


def name(module, what):
    return f"c{module}\n{what}\n".encode()


def numbers(values):
    """A tuple of whole numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key, array, shape=None, strides=None, offset=0):
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())."""
    shape = array.shape if shape is None else shape
    strides = [stride // array.itemsize for stride in array.strides] if strides is None else strides
    storage = b"(" + text("storage") + name("torch", STORAGES[array.dtype.name]) + text(key) + text("cpu") + number(array.size)
    arguments = b"(" + storage + b"tQ" + number(offset) + numbers(shape) + numbers(strides) + b"\x89"
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + name("collections", "OrderedDict") + b")RtR"


def dictionary(entries):
    """A dictionary of names and of what makes their values."""
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def pickled(instructions):
    return b"\x80\x02" + instructions + b"."


def archive(program, arrays=(), compression=zipfile.ZIP_STORED, order=b"little"):
    """The bytes of a zip file with a pickle and the arrays that are its storages 0, 1, ..."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as parts:
        parts.writestr("weights/data.pkl", program)
        parts.writestr("weights/byteorder", order)
        for key, array in enumerate(arrays):
            parts.writestr(f"weights/data/{key}", array.tobytes())
        parts.writestr("weights/version", "3\n")
    return file.getvalue()


def state_dict(tensors):
    """The bytes of the file of a state dict."""
    arrays = [np.asarray(array, order="C") for array in tensors.values()]
    entries = {key: tensor(str(index), arrays[index]) for index, key in enumerate(tensors)}
    return archive(pickled(dictionary(entries)), arrays)


class Executed:
    """What a hostile file asks for: a call that leaves a file behind."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def hostile(key, asks, protocol=2):
    """The pickle of a dictionary whose value is a call; that the call would leave its canary behind has been tried."""
    program = pickle.dumps({key: asks}, protocol)
    pickle.loads(program)
    assert asks.canary.exists()
    asks.canary.unlink()
    return program
