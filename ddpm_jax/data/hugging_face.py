"""Sets of Hugging Face datasets: saved to disk, as parquet files, or by name from the hub."""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.encoded import EncodedImages, class_labels, find_frame
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.errors import InputError, joined_lines

IMAGE_COLUMNS = ("image", "img")
SPLIT_FILE = re.compile(r"(\w+)-\d+-of-\d+(?:-\w+)?|train|test|validation")  # as the hub names files
SAVED = ("state.json", "dataset_dict.json")  # one of them is in what save_to_disk writes


def load_hugging_face(name: str, config: DataConfig) -> ImageSet:
    """The split data.split of a folder that save_to_disk has written, of one with parquet files, or of "NAME" or "NAME:CONFIG".

    Sets by name are downloaded by the library, which runs no code that comes with them. Labels are those of the column
    "label", or of the only column that holds classes; names of classes are the set's.

    Raises:
        InputError: the library is missing; no such set, split or image column; images that aren't within the set.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"data.source = 'hf:{name}' needs a library: pip install datasets") from error

    dataset = _open(name, config.split)
    image, label = _image_column(name, dataset), _label_column(dataset)
    if len(dataset) == 0:
        raise InputError(f"data.split = {config.split!r} of hf:{name} holds no images")
    encoded = dataset.select_columns([image]).with_format(None).cast_column(image, datasets.Image(decode=False))

    def fetch(places: Sequence[int]) -> list[bytes]:
        return [_bytes(name, place, cell) for place, cell in zip(places, encoded[list(places)][image], strict=True)]

    images = EncodedImages(f"hf:{name}", len(dataset), fetch, find_frame(config, len(dataset), fetch))
    if label is None:
        return ImageSet(images)
    labels = class_labels(np.asarray(dataset.with_format("numpy")[label][:], np.int64))
    return ImageSet(images, labels, () if labels is None else tuple(dataset.features[label].names))


def _open(name: str, split: str) -> Any:
    """The datasets.Dataset of a split. Raises InputError."""
    import datasets

    folder = Path(name).expanduser()
    try:
        with _quiet():
            if any((folder / file).is_file() for file in SAVED):
                return _pick(name, datasets.load_from_disk(str(folder)), split)
            if folder.is_dir():
                return datasets.load_dataset("parquet", data_files=_parquet_files(name, folder), split=split)
            path, _, config_name = name.partition(":")
            return datasets.load_dataset(path, config_name or None, split=split)
    except InputError:
        raise
    except Exception as error:  # the library raises what it meets: network, unknown names and splits, damaged files
        reason = joined_lines(error.__cause__ or error)[:300]
        raise InputError(f"hf:{name}, split {split!r}, can't be opened: {reason}") from error


def _parquet_files(name: str, folder: Path) -> dict[str, list[str]]:
    """The .parquet files of each split; those that are named for none are of "train"."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        match = SPLIT_FILE.fullmatch(path.stem)
        files.setdefault((match[1] or match[0]) if match else "train", []).append(str(path))
    if not files:
        raise InputError(f"hf:{name} is a folder with neither .parquet files nor what save_to_disk writes")
    return files


def _pick(name: str, saved: Any, split: str) -> Any:
    """The split of what save_to_disk has written, where that has splits; "train" is also one that has none."""
    import datasets

    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    lengths = {key: len(part) for key, part in saved.items()}
    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise InputError(f"data.split = {split!r} of hf:{name} can't be opened: its splits are {lengths}") from error
    chosen = [saved[piece.splitname].select(range(piece.from_, piece.to)) for piece in pieces]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _image_column(name: str, dataset: Any) -> str:
    """The name of the column that holds the image."""
    import datasets

    of_images = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for key in (*IMAGE_COLUMNS, *of_images):
        if key in of_images and (key in IMAGE_COLUMNS or len(of_images) == 1):
            return key
    found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in dataset.features.items())
    raise InputError(f"hf:{name} has no column 'image', and not just one that holds images: its columns are {found}")


def _label_column(dataset: Any) -> str | None:
    import datasets

    classes = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if "label" in classes:
        return "label"
    return classes[0] if len(classes) == 1 else None


def _bytes(name: str, place: int, cell: Any) -> bytes:
    """The encoded image. A path instead of it is followed into what the library has downloaded, and nowhere else."""
    import datasets

    if cell and cell["bytes"] is not None:
        return cell["bytes"]
    path = Path(cell["path"] if cell and cell["path"] else "").resolve()
    if path.is_relative_to(Path(datasets.config.HF_CACHE_HOME).expanduser().resolve()) and path.is_file():
        return path.read_bytes()
    raise InputError(f"hf:{name} doesn't hold image {place}, but {cell}: save the set again, with its images in it")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' logs, which say again what is raised, stay out of the terminal."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
