"""One of several processes that train together: what its devices get, as JSON. Started by test_processes.py.

python read_as_process.py ADDRESS NUM_PROCESSES PROCESS NUM_IMAGES FIRST_STEP LAST_STEP OUT
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from ddpm_jax import Config
from ddpm_jax.config import override
from ddpm_jax.data import ImageSet, StoredImages, batches
from ddpm_jax.parallel import make_mesh

BATCH_SIZE, TOGETHER, SEED = 12, 2, 5


class Drawn(StoredImages):
    """Image i is all i, but for its corner, which tells the crop's first number."""

    def __init__(self, num_images):
        super().__init__(num_images, (2, 2, 1))
        self.read_here = 0

    def read(self, indices, draws=None):
        self.read_here += len(indices)
        images = np.tile(indices.astype(np.uint8)[:, None, None, None], (1, 2, 2, 1))
        if draws is not None:
            images[:, 0, 0, 0] = draws[:, 0] * 256
        return images


def main(address, num_processes, process, num_images, first, last, out):
    """Go through the steps in three ways and write {way: {step: {row: [label, pixel, corner]}}}."""
    jax.distributed.initialize(address, int(num_processes), int(process))
    mesh = make_mesh()
    assert jax.process_count() == int(num_processes) and mesh.size == 6
    labels = np.arange(int(num_images), dtype=np.int32)
    array = Drawn(int(num_images)).read(labels)
    ways = {"resident": (512, "center", array), "array": (0, "center", array), "random": (0, "random", Drawn(int(num_images)))}
    result = {}
    for way, (megabytes, framing, images) in ways.items():
        values = {
            "seed": SEED, "train.batch_size": BATCH_SIZE, "train.steps_per_dispatch": TOGETHER, "train.num_steps": int(last),
            "data.device_megabytes": megabytes, "data.framing": framing, "model.num_classes": 200,
        }  # fmt: skip
        starts = range(int(first), int(last), TOGETHER)
        config = override(Config(), values)
        result[way] = {}
        for start, batch in zip(starts, batches(config, ImageSet(images, labels), mesh, starts), strict=True):
            assert batch.images.shape == (TOGETHER, BATCH_SIZE, 2, 2, 1)
            for step in range(start, min(start + TOGETHER, int(last))):
                result[way][step] = rows_of(batch, step - start)
    result["read_here"] = ways["random"][2].read_here
    Path(out).write_text(json.dumps(result))
    jax.distributed.shutdown()


def rows_of(batch, place):
    """{row: [label, pixel, corner]} of what this process's devices hold of one step."""
    rows = {}
    for labels, images in zip(batch.labels.addressable_shards, batch.images.addressable_shards, strict=True):
        assert labels.index == images.index[:2]
        local_labels, local_images = np.asarray(labels.data)[place], np.asarray(images.data)[place]
        for row, label, image in zip(range(BATCH_SIZE)[labels.index[1]], local_labels, local_images, strict=True):
            rows[row] = [int(label), int(image[1, 1, 0]), int(image[0, 0, 0])]
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
