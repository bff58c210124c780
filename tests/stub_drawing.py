"""Drawings whose images cost nothing, for tests of what happens to their files; as a program, one that is killed.

python stub_drawing.py FOLDER NAME    draws FOLDER/*/NAME again and again, each killed at another access to files
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from ddpm_jax import drawing
from ddpm_jax.config import Config, SampleConfig
from ddpm_jax.images import check_output
from ddpm_jax.ranges import batches

SHAPE = (8, 8, 3)
NUM_IMAGES = 22
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir")


def stub_image(number, shape=SHAPE, seed=0):
    """Image `number` of a seed."""
    return np.random.default_rng([seed, number]).integers(0, 256, shape, dtype=np.uint8)


def stub_model(batch_size=4, devices=2, shape=SHAPE, **fields):
    """What draw_in_parts needs of a model."""
    config = Config(sample=SampleConfig(batch_size=batch_size))
    model = {"image_shape": shape, "step": 7, "weights": "ema", "fingerprint": "abc", "params": None, "config": config}
    labels_of = {"settle": lambda settings, num_images, seed, labels: (config, labels)}
    return SimpleNamespace(**{**model, **labels_of, "mesh": SimpleNamespace(size=devices), **fields})


def stub_draw_ranges(drawn, shape=SHAPE):
    """In the place of draw_ranges; the ranges that are drawn are added to `drawn`."""

    def draw_ranges(config, mesh, params, seed, ranges, rows, labels):
        for batch, _ in batches(ranges, rows, mesh.size):
            drawn.extend(batch)
            yield {(start, stop): np.stack([stub_image(i, shape, seed) for i in range(start, stop)]) for start, stop in batch}

    return draw_ranges


def run(out):
    """What sample.py does of OUT."""
    kind = check_output(out, SHAPE[-1], begun=drawing.parts_folder(out).is_dir())
    drawing.draw_in_parts(stub_model(), out, kind, NUM_IMAGES, 0, None, {})


def killed_at(out, event):
    """Whether a child that draws is killed just before so many accesses to files below OUT's folder, or ends before."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(name, arguments):
            nonlocal count
            if name in FILE_EVENTS and str(arguments[0]).startswith(str(out.parent)):
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        status = 1
        try:
            run(out)
            status = 0
        finally:
            os._exit(status)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def content(folder):
    """The bytes of all files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main(folder, name):
    """Kill a drawing at each of its accesses to files, and see that the next one ends as if nothing had been."""
    jax.process_count, jax.process_index = (lambda: 1), (lambda: 0)  # no backend, whose threads a fork would lose
    drawing.draw_ranges = stub_draw_ranges([])
    os.sync = lambda: None
    run(folder / "undisturbed" / name)
    expected = content(folder / "undisturbed")
    event = 1
    while killed_at(folder / f"event{event}" / name, event):
        run(folder / f"event{event}" / name)
        found = content(folder / f"event{event}")
        assert found == expected, (event, found.keys())
        event += 1
    print(event - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
