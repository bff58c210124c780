"""Scores of drawn images while a run goes on, to see where it stands: train.evaluate_every_steps.

Each is a line of scores.jsonl in the run folder, {"step": ..., "num_images": ..., "fd_efficientnet_lite0": ...}, and a curve in
TensorBoard, from the folder "scores". A run that goes on from a checkpoint repeats the steps after it: of the lines of a step
the newest counts. Of few images, they rank the steps of one run, and are too large to be compared with evaluate.py's.
"""

import logging
import weakref
from contextlib import suppress
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from ddpm_jax.config import Config
from ddpm_jax.data import ImageSet
from ddpm_jax.errors import InputError
from ddpm_jax.evaluation.features import collect, set_parts
from ddpm_jax.evaluation.samples import SampleOptions, wanted_outputs
from ddpm_jax.evaluation.scores import METRICS, Reference, score
from ddpm_jax.files import cache_folder
from ddpm_jax.inference import draw_images
from ddpm_jax.json_lines import append_record
from ddpm_jax.metrics import Events

logger = logging.getLogger("ddpm_jax")


class TrainingScores:
    """Measures the averaged weights of a run; knows the real images' features from its start on."""

    def __init__(self, config: Config, workdir: Path, image_set: ImageSet, mesh: Mesh) -> None:
        """Raises InputError for an unknown metric, too few images, weights that are not there, or several processes."""
        self._metrics = [name.strip() for name in config.train.evaluate_metrics.split(",")]
        count = min(len(image_set.images), config.train.evaluate_reference_images)
        _check(self._metrics, config.train.evaluate_images, count)
        if jax.process_count() > 1:
            raise InputError("train.evaluate_every_steps is for runs of one process: use evaluate.py on the checkpoints")
        self._config, self._workdir, self._mesh = config, workdir, mesh
        self._curves: Events | None = None  # made by the first scores: a run that has none left to make has no file of them
        self._wanted = wanted_outputs(self._metrics, SampleOptions())
        logger.info("features of %d images of %s", count, config.data.source)
        real = collect(set_parts(image_set, count), count, self._wanted, cache_folder("features"))
        self._reference = Reference({}, real, {})

    def measure(self, step: int, params: PyTree) -> dict[str, float]:
        """Draw train.evaluate_images images, the same noise every time, score them, write and return the scores.

        Raises:
            InputError: they can't be written.
        """
        config, count = self._config, self._config.train.evaluate_images
        images = draw_images(config, self._mesh, params, config.seed, count)
        outputs = {want.network.name: want.network.outputs(images) for want in self._wanted}
        found: dict[str, float] = {}
        for name in self._metrics:
            values = score(name, outputs[METRICS[name].network], self._reference)
            found |= {name: values["value"]} if "value" in values else {f"{name}_{key}": x for key, x in values.items()}
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        path = self._workdir / "scores.jsonl"
        try:
            append_record(path, {"step": step, "num_images": count} | found)
            self._draw_curves(step, found)
        except OSError as error:
            again = "the same command goes on from the last checkpoint"
            raise InputError(f"{path} can't be written: {error.strerror}; {again}") from error
        return found

    def _draw_curves(self, step: int, found: dict[str, float]) -> None:
        """Add a point to each; TensorBoard forgets those of this step and later ones that were made before a stop."""
        if self._curves is None:
            folder = self._workdir / "scores"  # TensorBoard may follow one file of a folder alone, and metrics have theirs
            folder.mkdir(exist_ok=True)
            self._curves = Events(folder, step - 1, flush_seconds=0.0)  # they come minutes apart: each is to be seen at once
            weakref.finalize(self, _close, self._curves)
        self._curves.write(step, found)


def _close(curves: Events) -> None:
    with suppress(OSError):  # of a point that could not be written, which was raised then
        curves.close()


def _check(metrics: list[str], num_drawn: int, num_real: int) -> None:
    """Raise InputError for a metric that is unknown, or can't be had of so many images."""
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"train.evaluate_metrics: unknown metric {name!r}: choose from {', '.join(METRICS)}")
        fewest = METRICS[name].fewest
        if num_drawn < fewest:
            raise InputError(f"train.evaluate_images = {num_drawn}: {name} needs {fewest} or more")
        if METRICS[name].needs != "nothing" and num_real < fewest:
            real = f"train.evaluate_reference_images and the data give {num_real}"
            raise InputError(f"{real}: {name} needs {fewest} or more real images")
