"""Look at the data of a config as training sees them, and measure how fast they come.

    python -m ddpm_jax.data configs/fashion_mnist.py
    python -m ddpm_jax.data configs/cifar10.py --data.source pictures --data.image-shape 64 64 3 --out pictures.png

Prints counts, shapes and classes; writes the first batch, mirrored as the first step will see it, as a grid; and reads, frames
and sends images for some seconds, with nothing that uses them. Takes every option of train.py that is a config's.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import UInt8

from ddpm_jax import cli
from ddpm_jax.config import Config, flatten, load_config, override
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.data.pipeline import batches, stays_on_device
from ddpm_jax.data.sources import load_images
from ddpm_jax.errors import InputError
from ddpm_jax.images import check_output, save_grid
from ddpm_jax.inference import to_uint8
from ddpm_jax.parallel import check_batch_size, make_mesh
from ddpm_jax.training.loop import fit_to_data
from ddpm_jax.training.step import augment, split_step_key, step_key

CLASSES_SHOWN = 50


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of this command; those with a dot override the config."""

    config: tyro.conf.Positional[Path]
    """Python file that exports `config`."""
    run: Annotated[Config, tyro.conf.arg(name="")]
    out: Path = Path("data.png")
    """PNG file to write: the first batch."""
    seconds: float = 5.0
    """How long to measure; 0: not at all."""


def main(argv: Sequence[str]) -> None:
    """Parse the command line, look, measure and print."""
    if not argv or (argv[0].startswith("-") and "--help" not in argv):
        raise InputError("no config: give the path of one first, such as configs/fashion_mnist.py")
    shown = argv[0].startswith("-")  # nothing but --help
    path = Path("CONFIG") if shown else Path(argv[0])
    config = Config() if shown else load_config(path)
    args = cli.parse(Arguments, argv, Arguments(path, config), {"out", "seconds", *flatten(config)}, str(__doc__))
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: the first batch is written as .png")
    config = override(args.run, flatten(args.run))
    image_set, mesh = load_images(config.data), make_mesh()
    check_batch_size(config.train.batch_size, mesh, config.optim.accumulate_steps)
    check_output(args.out, image_set.image_shape[-1])
    print(describe(config, image_set))
    images, labels = first_batch(config, image_set, mesh)
    save_grid(args.out, images)
    print(f"first batch: {len(images)} images in {args.out}{_label_rows(config, image_set, labels)}")
    if args.seconds > 0:
        print(f"pipeline alone: {images_per_second(config, image_set, mesh, args.seconds):.0f} images/s")
    try:
        fit_to_data(config, image_set)
    except InputError as error:
        raise InputError(f"training would refuse this: {error}") from error


def describe(config: Config, image_set: ImageSet) -> str:
    """Counts, shapes, where the images will lie, and the classes."""
    images, (height, width, channels) = image_set.images, image_set.image_shape
    place = "kept on the device" if stays_on_device(config, image_set) else "sent batch by batch"
    lines = [
        f"{config.data.source}: {len(images)} images of {height}x{width}x{channels}, {images.dtype}, "
        f"{images.nbytes / 2**20:.1f} MiB, {place}",
        f"an epoch is {len(images) / config.train.batch_size:.1f} steps of {config.train.batch_size} images",
    ]
    if image_set.labels is None:
        return "\n".join([*lines, "no classes"])
    counts = sorted(Counter(image_set.labels.tolist()).items())
    lines.append(f"{len(counts)} classes, {min(n for _, n in counts)} to {max(n for _, n in counts)} images each")
    lines += [f"{label:6}  {class_name(config, image_set, label):24}  {count}" for label, count in counts[:CLASSES_SHOWN]]
    return "\n".join([*lines, *([f"   ...  {len(counts) - CLASSES_SHOWN} more"] if len(counts) > CLASSES_SHOWN else [])])


def class_name(config: Config, image_set: ImageSet, label: int) -> str:
    """The name of a class, or nothing."""
    names = config.data.class_names or image_set.class_names
    return names[label] if label < len(names) else ""


def first_batch(config: Config, image_set: ImageSet, mesh: Mesh) -> tuple[UInt8[np.ndarray, "B H W C"], np.ndarray | None]:
    """The images of step 0 as its network sees them, before noise, and their labels if there are any."""
    (batch,) = batches(_sent_as_in_training(config, image_set), image_set, mesh, [0])
    images = augment(config, split_step_key(step_key(config.seed, 0)).flip, jax.numpy.asarray(batch.images[0]))
    return np.asarray(to_uint8(images)), None if batch.labels is None else np.asarray(batch.labels[0])


def images_per_second(config: Config, image_set: ImageSet, mesh: Mesh, seconds: float) -> float:
    """How many images come to the devices when nothing holds them up, of a set that is sent batch by batch."""
    config = override(_sent_as_in_training(config, image_set), {"data.device_megabytes": 0})
    most = config.train.steps_per_dispatch
    stream = batches(config, image_set, mesh, range(0, config.train.num_steps, most))
    try:
        jax.block_until_ready(next(stream))
        began, count = time.perf_counter(), 0
        for batch in stream:
            jax.block_until_ready(batch)
            count += most * config.train.batch_size
            if time.perf_counter() - began > seconds:
                break
        return count / (time.perf_counter() - began)
    finally:
        stream.close()


def _sent_as_in_training(config: Config, image_set: ImageSet) -> Config:
    """The config with labels sent wherever there are some, for a long run."""
    classes = None if image_set.labels is None else max(int(image_set.labels.max()) + 1, config.model.num_classes or 0)
    steps = max(config.train.num_steps, 10**7)
    return override(config, {"model.num_classes": classes, "train.num_steps": steps, "sample.guidance": 1})


def _label_rows(config: Config, image_set: ImageSet, labels: np.ndarray | None) -> str:
    """The classes of the first batch in the grid's reading order."""
    if labels is None:
        return ""
    return ": " + ", ".join(class_name(config, image_set, label) or str(label) for label in labels.tolist())


if __name__ == "__main__":
    cli.run(main, joins=False)
