"""The memory of a process that reads 60,000 images twenty times over stays what it was."""

import gc
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax import Config
from ddpm_jax.config import override
from ddpm_jax.data import ImageSet, StoredImages, batches
from ddpm_jax.data.arrays import load_arrays
from ddpm_jax.parallel import make_mesh

NUM_IMAGES, EPOCHS, BATCH_SIZE = 60_000, 20, 256
MIB = 2**20
GROWTH = 20 * MIB  # from the second epoch on, which has every page of the file and every worker's buffers in memory


class Decoded(StoredImages):
    """Images that are made when they are asked for."""

    def __init__(self):
        super().__init__(NUM_IMAGES, (28, 28, 1))

    def read(self, indices, draws=None):
        return np.tile((indices % 251).astype(np.uint8)[:, None, None, None], (1, *self.shape[1:]))


def resident_bytes():
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["array", "stored", "balanced"])
def test_memory_is_flat(tmp_path, kind):
    if kind == "stored":
        images = Decoded()
    else:
        np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 28, 28, 1), np.uint8))
        images = load_arrays(tmp_path / "images.npy").images
    labels = np.arange(NUM_IMAGES, dtype=np.int32) % 10
    sampling = "balanced" if kind == "balanced" else "natural"
    values = {"train.batch_size": BATCH_SIZE, "data.device_megabytes": 0, "data.sampling": sampling, "model.num_classes": 10}
    steps = -(-EPOCHS * NUM_IMAGES // BATCH_SIZE)
    config, mesh = override(Config(), values | {"train.num_steps": steps}), make_mesh(jax.devices()[:1])
    sizes, seen = [], 0
    for batch in batches(config, ImageSet(images, labels), mesh, range(steps)):
        jax.block_until_ready(batch)
        seen += BATCH_SIZE
        if seen // NUM_IMAGES > len(sizes):
            gc.collect()
            sizes.append(resident_bytes())
    print(kind, [round(size / MIB, 1) for size in sizes])
    assert len(sizes) == EPOCHS
    assert max(sizes[1:]) - sizes[1] < GROWTH
