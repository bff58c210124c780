"""A sampler as one StableHLO program with its weights beside it, for serving without this package (`jax.export`).

FOLDER/sampler.stablehlo    (weights, seed, first[, labels [B]]) -> images first ... first + B - 1 of the seed, uint8
FOLDER/weights.npz          the weights, in the program's order
FOLDER/sampler.json         what the program is: batch size, image shape, classes, sampler
FOLDER/load_sampler.py      the loader, which needs JAX, and flatbuffers for jax.export
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Int, UInt8, UInt32

from ddpm_jax.files import whole_file
from ddpm_jax.inference import Model, draw_function, image_keys
from ddpm_jax.interop import load_sampler
from ddpm_jax.interop.diffusers import check_empty

PLATFORMS = ("cpu", "cuda", "tpu")
"""What one program runs on. Layers are those of the machine that exports, so that on another kind they may be slower."""


def write_sampler(out: Path, model: Model, card: str) -> None:
    """Write the folder.

    Args:
        out: a folder that is empty or not there yet.
        model: its config.sample says which sampler it is, and how many images it draws at once.
        card: the text of its README.md.

    Raises:
        InputError: a folder that holds something already.
    """
    check_empty(out)
    config = model.config
    leaves = jax.device_get(jax.tree.leaves(model.params))
    program = export_program(model).serialize()
    with whole_file(out / "weights.npz") as file:
        np.savez(file, **{f"{number:05d}": leaf for number, leaf in enumerate(leaves)})
    with whole_file(out / "sampler.stablehlo") as file:
        file.write(program)
    settings = {
        "batch_size": config.sample.batch_size,
        "image_shape": list(model.image_shape),
        "num_classes": config.model.num_classes,
        "sampler": config.sample.sampler,
        "num_steps": config.sample.num_steps or model.schedule.num_steps,
        "weights": model.weights,
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
    }
    for name, text in {"README.md": card, "sampler.json": json.dumps(settings, indent=2) + "\n"}.items():
        with whole_file(out / name) as file:
            file.write(text.encode())
    shutil.copyfile(str(load_sampler.__file__), out / "load_sampler.py")


def export_program(model: Model) -> export.Exported:
    """The sampler of a model's config.sample as a program for config.sample.batch_size images."""
    draw, size = draw_function(model.config), model.config.sample.batch_size
    structure = jax.tree.structure(model.params)

    def program(
        weights: list[Array], seed: UInt32[Array, ""], first: UInt32[Array, ""], *labels: Int[Array, " B"]
    ) -> UInt8[Array, "B H W C"]:
        keys = image_keys(seed, first + jnp.arange(size, dtype=jnp.uint32))
        return draw(jax.tree.unflatten(structure, weights), keys, labels[0] if labels else None)

    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model.params)]
    number: Any = jax.ShapeDtypeStruct((), jnp.uint32)
    labels = [] if model.config.model.num_classes is None else [jax.ShapeDtypeStruct((size,), jnp.int32)]
    return export.export(jax.jit(program), platforms=PLATFORMS)(weights, number, number, *labels)
