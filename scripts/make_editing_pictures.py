"""Draw the pictures of docs/editing.md with a trained default model, by the command lines that stand there.

python scripts/make_editing_pictures.py runs/demo docs
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ddpm_jax.data.sources import load_packaged
from ddpm_jax.images import make_grid, to_pil

ROOT = Path(__file__).parents[1]
INPUTS = {"bag": 30, "shirt": 17, "shoe": 0, "trousers": 3, "boot": 23}
"""Packaged images that are edited."""


def main(run: str, out: str) -> None:
    """Make the inputs, call sample.py, and put the rows together."""
    packaged = load_packaged("fashion_mnist").images
    images = {name: packaged[index : index + 1][0] for name, index in INPUTS.items()}
    lower, square = np.zeros((2, 28, 28, 1), np.uint8)
    lower[14:], square[8:20, 8:20] = 255, 255
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for file, image in {**images, "lower": lower, "square": square}.items():
            to_pil(image).save(folder / f"{file}.png")

        def draw(*options: str | int) -> UInt8[np.ndarray, "N 28 28 1"]:
            command = [
                sys.executable,
                ROOT / "sample.py",
                "--ckpt",
                Path(run).absolute(),
                "--out",
                folder / "out.npz",
                *options,
            ]
            subprocess.run([str(part) for part in command], check=True, cwd=folder)
            return np.load(folder / "out.npz")["images"]

        ways = [draw("--interpolate", first, first + 1, "--num-images", 10) for first in (0, 8, 10, 12)]
        weak = [
            np.stack([images[file], *draw("--init", f"{file}.png", "--strength", strength, "--num-images", 8)])
            for file, strength in (("bag", "0.3"), ("bag", "0.5"), ("bag", "0.7"), ("shirt", "0.5"), ("shoe", "0.5"))
        ]
        painted = [
            np.stack([images[file], mask, *draw("--init", f"{file}.png", "--mask", f"{shape}.png", "--num-images", 7)])
            for file, shape, mask in (
                ("bag", "lower", lower), ("trousers", "lower", lower), ("boot", "square", square), ("shoe", "square", square),
            )
        ]  # fmt: skip
    for title, rows in {"interpolation": ways, "image_to_image": weak, "inpainting": painted}.items():
        to_pil(make_grid(np.concatenate(rows), columns=len(rows[0]))).save(Path(out) / f"{title}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
