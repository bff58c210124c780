"""Sets of TensorFlow Datasets, read from array_record (or TFRecord files, where there are such already) without TensorFlow.

The library is imported where a set of it is asked for, and TensorFlow never: what needs it, preparing a set, is done once
and in a process of its own.
"""

import contextlib
import difflib
import functools
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ddpm_jax.config import DataConfig
from ddpm_jax.data.encoded import EncodedImages, class_labels, find_frame
from ddpm_jax.data.framing import Frame
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.data.tfrecords import Part, TfRecords
from ddpm_jax.errors import InputError, joined_lines
from ddpm_jax.lock import hold

FORMAT, OLDER_FORMAT = "array_record", "tfrecord"
COMMAND = "python -m ddpm_jax.data.tfds_preparation"
RECORDS_AT_ONCE = 1024  # when labels are read
# The name of a builder, its config and its version.
NAME = re.compile(r"(?P<builder>[a-z]\w*)(?:/(?P<config>[\w+.-]+))?(?::(?P<version>[\d*]+\.[\d*]+\.[\d*]+))?")

logger = logging.getLogger("ddpm_jax")


def load_tfds(name: str, config: DataConfig) -> ImageSet:
    """The split data.split of the set "NAME", "NAME/CONFIG" or "NAME/CONFIG:VERSION" of TensorFlow Datasets.

    A set that isn't in TFDS_DATA_DIR (~/tensorflow_datasets) is downloaded and prepared first, if TensorFlow is installed.
    Labels are those of the feature "label", or of the only feature that holds classes; names of classes are the set's.

    Raises:
        InputError: no such set, split or image feature; a set that isn't prepared, and can't be here.
    """
    with _quiet():
        builder = _on_disk(name)
        if builder is None:
            builder = _prepared(name)
        image, label = _image_feature(name, builder), _label_feature(builder)
        records = _open_split(name, builder, config.split)

    read = functools.partial(_read, name, records)

    def fetch(places: Sequence[int]) -> list[bytes]:
        # One by one, since reading many at once starts a thread for each file: half as fast for a batch in any order.
        return [read([place])[0][image].bytes_list.value[0] for place in places]

    features = builder.info.features
    frame = _frame(config, features[image].shape, len(records), fetch)
    images = EncodedImages(f"tfds:{name}", len(records), fetch, frame)
    labels = class_labels(_read_labels(read, len(records), label)) if label else None
    return ImageSet(images, labels, _class_names(features[label]) if label and labels is not None else ())


def known_to_tfds(name: str) -> bool:
    """Whether TensorFlow Datasets has a set of this name, with or without its data."""
    match = NAME.fullmatch(name)
    with _quiet():
        return match is not None and (match["builder"] in _builders() or _on_disk(name) is not None)


def nearest_in_tfds(name: str) -> list[str]:
    """The names of sets that are most like this one."""
    return difflib.get_close_matches(re.split("[/:]", name)[0], _builders(), n=3)


def data_folder() -> Path:
    """Where the library keeps what is prepared."""
    from tensorflow_datasets.core import constants

    return Path(constants.DATA_DIR).expanduser()


def _builders() -> list[str]:
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)  # the list of the others would be asked for by network


def _on_disk(name: str) -> Any:
    """The builder of what has been prepared, from its files alone; None where there is nothing. Raises InputError."""
    from tensorflow_datasets.core import read_only_builder, registered

    if not NAME.fullmatch(name):
        raise InputError(f"tfds:{name} is no name of a set: use one such as tfds:cifar10 or tfds:imagenet_resized/64x64")
    try:
        builder = read_only_builder.builder_from_files(name)
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:  # the library raises what it meets in files that are damaged or not its own
        raise InputError(f"tfds:{name} in {data_folder()} can't be read: {joined_lines(error)[:300]}") from error
    formats = [each.value for each in (builder.info.file_format, *builder.info.alternative_file_formats)]
    if FORMAT in formats[1:]:
        return read_only_builder.builder_from_files(name, file_format=FORMAT)
    if formats[0] not in (FORMAT, OLDER_FORMAT):
        here = f"tfds:{name} is prepared as {formats[0]} in {builder.data_dir}, not as {FORMAT}"
        raise InputError(f"{here}: move that folder away, or set TFDS_DATA_DIR to another, and give the same command again")
    return builder


def _prepared(name: str) -> Any:
    """The builder of a set that is prepared here and now, unless another process has just done so. Raises InputError."""
    _check_name(name)
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f"tfds:{name} isn't prepared in {data_folder()}: `pip install tensorflow` and give the same command again, or copy"
            f" there what `{COMMAND} {name}` has written on another machine"
        )
    with _alone(name):
        builder = _on_disk(name)
        if builder is None:
            _prepare(name)
            builder = _on_disk(name)
    if builder is None:
        raise InputError(f"tfds:{name} was prepared, but can't be found in {data_folder()}")
    return builder


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """While no other process prepares the set, in whichever config: others are waited for. Raises InputError."""
    path = data_folder() / f".{re.split('[/:]', name)[0]}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        what = f"tfds:{name} can't be prepared in {path.parent}: {error.strerror}"
        raise InputError(f"{what}: set TFDS_DATA_DIR to another folder") from error
    with file:
        if not hold(file.fileno(), path.parent):
            logger.info("waiting for another process, which prepares tfds:%s", name)
            hold(file.fileno(), path.parent, wait=True)
        yield


def _prepare(name: str) -> None:
    """Download and prepare a set in a process of its own, whose progress is shown. Raises InputError."""
    # No accelerator for it, no search for Google's metadata servers, no word of TensorFlow.
    settings = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "NO_GCE_CHECK": "true", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, *COMMAND.split()[1:], name]
    child = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        reason = child.stdout.strip().rpartition("\n")[2] or f"the process ended with status {child.returncode}"
        raise InputError(f"tfds:{name} can't be prepared: {reason}")


def _check_name(name: str) -> None:
    """Raise InputError where the library has no such builder or config."""
    import tensorflow_datasets as tfds

    match = NAME.fullmatch(name)
    assert match is not None
    if match["builder"] not in _builders():
        nearest = " or ".join(map(repr, nearest_in_tfds(name)))
        raise InputError(f"unknown set tfds:{name}" + (f": did you mean {nearest}?" if nearest else ""))
    try:
        configs = list(tfds.builder_cls(match["builder"]).builder_configs)
    except ImportError:  # a builder that needs TensorFlow, or another library, to be looked at
        return
    if match["config"] is not None and match["config"] not in configs:
        some = ", ".join(difflib.get_close_matches(match["config"], configs, n=5, cutoff=0.3) or configs[:5])
        raise InputError(f"unknown config tfds:{name}" + (f": there are {some}" if some else ": this set has none"))


def _image_feature(name: str, builder: Any) -> str:
    """The name of the feature that holds the image."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    of_images = {
        key: feature
        for key, feature in (features.items() if isinstance(features, tfds.features.FeaturesDict) else ())
        if type(feature) is tfds.features.Image and len(feature.shape) == 3 and feature.np_dtype in (np.uint8, np.uint16)
    }
    for key in ("image", *of_images):
        if key in of_images and (key == "image" or len(of_images) == 1):
            return key
    found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    raise InputError(f"tfds:{name} has no feature 'image', and not just one that holds an image: its features are {found}")


def _label_feature(builder: Any) -> str | None:
    import tensorflow_datasets as tfds

    classes = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if "label" in classes:
        return "label"
    return classes[0] if len(classes) == 1 else None


def _class_names(feature: Any) -> tuple[str, ...]:
    """The names of classes; none where they are but numbers."""
    names = tuple(feature.names) if feature.num_classes else ()
    return () if names == tuple(map(str, range(len(names)))) else names


def _open_split(name: str, builder: Any, split: str) -> Any:
    """The records of a split, each the bytes of a tf.train.Example."""
    import tensorflow_datasets as tfds

    try:
        if builder.info.file_format.value == OLDER_FORMAT:
            parts = builder.info.splits[split].file_instructions
            return TfRecords([Part(Path(part.filename), part.skip, part.take) for part in parts])
        return builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except (ValueError, AssertionError, KeyError, OSError) as error:
        if isinstance(error, InputError):
            raise
        known = ", ".join(f"{key} ({info.num_examples} images)" for key, info in builder.info.splits.items())
        raise InputError(f"data.split = {split!r} of tfds:{name} can't be opened: its splits are {known}") from error


def _read(name: str, records: Any, places: Sequence[int]) -> list[Any]:
    """The features by name of some records, each a tf.train.Example by the library's own definition. Raises InputError."""
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return [tf_example_pb2.Example.FromString(record).features.feature for record in _raw(records, places)]
    except Exception as error:  # files that are missing or damaged, each with an exception of its own
        raise InputError(f"tfds:{name} can't be read: {joined_lines(error)[:300]}") from error


def _raw(records: Any, places: Sequence[int]) -> Sequence[bytes]:
    return [records[places[0]]] if len(places) == 1 else records.__getitems__(places)


def _read_labels(read: Callable[[Sequence[int]], list[Any]], num_images: int, label: str) -> Int[np.ndarray, "N"]:
    """The labels, for which every record is read, but no image decoded: some 10 microseconds each."""
    labels = np.empty(num_images, np.int64)
    for start in range(0, num_images, RECORDS_AT_ONCE):
        places = range(start, min(start + RECORDS_AT_ONCE, num_images))
        labels[places.start : places.stop] = [feature[label].int64_list.value[0] for feature in read(places)]
    return labels


def _frame(config: DataConfig, shape: tuple[int | None, ...], num_images: int, fetch: Any) -> Frame:
    """The frame of data.image_shape, else of the size that the set states, else of the size of its images."""
    height, width, channels = shape
    if config.image_shape is None and height and width and channels in (1, 3):
        return Frame(height, width, channels, config.framing)
    return find_frame(config, num_images, fetch)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library's log, which says again what is raised, stays out of the terminal."""
    absl = logging.getLogger("absl")
    before, absl.level = absl.level, logging.CRITICAL
    try:
        yield
    finally:
        absl.level = before
