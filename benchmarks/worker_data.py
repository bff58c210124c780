"""What reads images when it is its turn: this project's pipeline, or Pillow alone; run by data.py.

python benchmarks/worker_data.py CANDIDATE SOURCE SIZE BATCH WORKERS

A turn is whole epochs, from nothing read ahead to the last batch: uint8 [BATCH, SIZE, SIZE, 3], squares from the middle.
"""

import concurrent.futures
import io
import itertools
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from turns import serve

FAST_EPOCHS = 20  # of a set that is read in a moment, so that a turn isn't all beginnings and ends

Run = Callable[[], int]


def make_ours(candidate: str, source: str, size: int, batch_size: int, workers: int) -> tuple[Run, dict[str, str]]:
    """Batches on the device, in the order of training: streamed, or for "resident" from a set that lies there whole."""
    import jax

    from ddpm_jax import Config, DataConfig, TrainConfig
    from ddpm_jax.data import batches, load_images
    from ddpm_jax.parallel import make_mesh

    resident = candidate.endswith("resident")
    epochs = 1 if candidate == "folder" else FAST_EPOCHS
    data = DataConfig(source=source, image_shape=(size, size, 3), device_megabytes=4096 if resident else 0, num_workers=workers)
    image_set, mesh = load_images(data), make_mesh()
    num_steps = epochs * len(image_set.images) // batch_size
    train = TrainConfig(batch_size=batch_size, num_steps=num_steps, steps_per_dispatch=1)
    config = Config(data=data, train=train)
    endless = batches(config, image_set, mesh, itertools.count()) if resident else None  # nothing of it is read ahead

    def run() -> int:
        stream = batches(config, image_set, mesh, range(num_steps)) if endless is None else endless
        for batch in itertools.islice(stream, num_steps):
            jax.block_until_ready(batch)
        return num_steps * batch_size

    return run, {"jax": jax.__version__, "Pillow": PIL.__version__}


def make_bare(candidate: str, source: str, size: int, batch_size: int, workers: int) -> tuple[Run, dict[str, str]]:
    """Pillow in a pool of threads or processes, a batch for each task, which is all that comes back."""
    files = [str(path) for path in sorted(Path(source).rglob("*")) if path.suffix in (".png", ".jpg")]
    num_steps = len(files) // batch_size
    shuffled = np.random.default_rng(0).permutation(files)[: num_steps * batch_size].reshape(num_steps, batch_size)
    tasks = [(paths.tolist(), size) for paths in shuffled]
    pools = {"threads": concurrent.futures.ThreadPoolExecutor, "processes": concurrent.futures.ProcessPoolExecutor}
    pool = pools[candidate.removeprefix("pillow-")](workers)

    def run() -> int:
        return sum(len(batch) for batch in pool.map(read_batch, tasks))

    return run, {"Pillow": PIL.__version__}


def read_batch(task: tuple[list[str], int]) -> np.ndarray:
    """The images of some files, uint8 [B, size, size, 3]."""
    paths, size = task
    return np.stack([read(path, size) for path in paths])


def read(path: str, size: int) -> np.ndarray:
    """The square in the middle of an image, by area; a JPEG is decoded at the smallest size that is no smaller than asked."""
    image = Image.open(io.BytesIO(Path(path).read_bytes()))
    scale = size / min(image.size)
    image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
    image = image.convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BOX, box=(left, top, left + edge, top + edge))
    return np.asarray(image)


def main(candidate: str, source: str, size: str, batch_size: str, workers: str) -> None:
    """Build what reads and take turns."""
    make = make_bare if candidate.startswith("pillow") else make_ours
    run, versions = make(candidate, source, int(size), int(batch_size), int(workers))
    serve(run, 0, {"Python": platform.python_version()} | versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
