"""Scores of drawn images while a run goes on, to see where it stands: train.evaluate_every_steps.

Each is a line of scores.jsonl in the run folder, {"step": ..., "num_images": ..., "fd_efficientnet_lite0": ...}, and a curve in
TensorBoard. Of few images, they rank the steps of one run, and are too large to be compared with evaluate.py's.
"""

import json
import logging
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from tensorboardX import SummaryWriter

from ddpm_jax.config import Config
from ddpm_jax.data import ImageSet
from ddpm_jax.errors import InputError
from ddpm_jax.evaluation.features import collect, set_parts
from ddpm_jax.evaluation.samples import SampleOptions, wanted_outputs
from ddpm_jax.evaluation.scores import METRICS, Reference, score
from ddpm_jax.files import cache_folder
from ddpm_jax.inference import draw_images

logger = logging.getLogger("ddpm_jax")


class TrainingScores:
    """Measures the averaged weights of a run; knows the real images' features from its start on."""

    def __init__(self, config: Config, workdir: Path, image_set: ImageSet, mesh: Mesh) -> None:
        """Raises InputError for an unknown metric, weights that are not there, or several processes."""
        self._metrics = [name.strip() for name in config.train.evaluate_metrics.split(",")]
        for name in self._metrics:
            if name not in METRICS:
                raise InputError(f"train.evaluate_metrics: unknown metric {name!r}: choose from {', '.join(METRICS)}")
        if jax.process_count() > 1:
            raise InputError("train.evaluate_every_steps is for runs of one process: use evaluate.py on the checkpoints")
        self._config, self._workdir, self._mesh = config, workdir, mesh
        self._wanted = wanted_outputs(self._metrics, SampleOptions())
        count = min(len(image_set.images), config.train.evaluate_reference_images)
        logger.info("features of %d images of %s", count, config.data.source)
        real = collect(set_parts(image_set, count), count, self._wanted, cache_folder("features"))
        self._reference = Reference({}, real, {})

    def measure(self, step: int, params: PyTree) -> dict[str, float]:
        """Draw train.evaluate_images images, the same noise every time, score them, write and return the scores."""
        config, count = self._config, self._config.train.evaluate_images
        images = draw_images(config, self._mesh, params, config.seed, count)
        outputs = {want.network.name: want.network.outputs(images) for want in self._wanted}
        found: dict[str, float] = {}
        for name in self._metrics:
            values = score(name, outputs[METRICS[name].network], self._reference)
            found |= {name: values["value"]} if "value" in values else {f"{name}_{key}": x for key, x in values.items()}
        with (self._workdir / "scores.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "num_images": count} | found) + "\n")
        with SummaryWriter(str(self._workdir)) as events:
            for name, value in found.items():
                events.add_scalar(name, value, step)
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return found
