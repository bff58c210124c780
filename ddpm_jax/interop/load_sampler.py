"""Draw images with an exported sampler: sampler.stablehlo, weights.npz, sampler.json in one folder. JAX and flatbuffers do.

python load_sampler.py 16 images.npz                     16 images of seed 0, an array "images", uint8 [N, H, W, C]
python load_sampler.py 16 images.npz 7                   of seed 7

from load_sampler import load_sampler
sample = load_sampler("folder")
images = sample(num_images=16, seed=7)
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export


def load_sampler(folder: str | Path) -> Callable[..., Any]:
    """The function (num_images, seed=0, labels=None) -> images, uint8 [N, H, W, C], of an exported folder.

    Image i of a seed is the same whatever the number of images. Labels are class indices int32 [N], for networks with classes;
    where not given, image i shows class i mod num_classes.
    """
    folder = Path(folder)
    settings = json.loads((folder / "sampler.json").read_text())
    program = jax.jit(export.deserialize(bytearray((folder / "sampler.stablehlo").read_bytes())).call)
    with np.load(folder / "weights.npz") as file:
        weights = jax.device_put([file[name] for name in file.files])
    size, num_classes = settings["batch_size"], settings["num_classes"]

    def sample(num_images: int, seed: int = 0, labels: Any = None) -> Any:
        if num_classes is None and labels is not None:
            raise ValueError("labels were given, but the network has no classes")
        pieces = []
        for first in range(0, num_images, size):
            numbers = np.minimum(np.arange(first, first + size), num_images - 1)
            given = () if num_classes is None else (_classes(numbers, labels, num_classes),)
            pieces.append(np.asarray(program(weights, np.uint32(seed), np.uint32(first), *given)))
        return np.concatenate(pieces)[:num_images]

    return sample


def _classes(numbers: Any, labels: Any, num_classes: int) -> Any:
    classes = numbers % num_classes if labels is None else np.asarray(labels)[numbers]
    if classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(f"labels must lie in 0 ... {num_classes - 1}")
    return classes.astype(np.int32)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    seed = int(sys.argv[3]) if len(sys.argv) == 4 else 0
    np.savez(sys.argv[2], images=load_sampler(Path(__file__).parent)(int(sys.argv[1]), seed))
