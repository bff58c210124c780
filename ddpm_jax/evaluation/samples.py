"""How good drawn images are beside real ones: the metrics that evaluate.py shares with nobody, and the protocol of each number.

Drawing and features go on where they were stopped: those of a run lie in its folder "evaluation", those of other images in the
user's cache folder.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.config import Config, DataConfig, Framing, SampleConfig, Threshold
from ddpm_jax.data import ImageSet, load_images
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.diffusion.schedule import Spacing
from ddpm_jax.errors import InputError
from ddpm_jax.evaluation.features import Wanted, collect, drawing_key, drawn_parts, set_parts
from ddpm_jax.evaluation.networks import NetworkName, Outputs, load_network
from ddpm_jax.evaluation.scores import METRICS, Reference, reference_moments, score
from ddpm_jax.evaluation.statistics import read_statistics, save_statistics
from ddpm_jax.evaluation.weights import INCEPTION_SHA256
from ddpm_jax.files import cache_folder
from ddpm_jax.inference import Model
from ddpm_jax.processes import is_first

MOST_IMAGES = 50_000  # drawn where no number is given and there are more real ones; what FID is usually reported of
FEW_IMAGES = 10_000  # fewer make a Frechet distance so much too large that it is worth a word
ROUNDING = "round((x + 1) 127.5) to uint8"

logger = logging.getLogger("ddpm_jax")


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Options of evaluate.py for the metrics of drawn images; those of drawing left at None are the run's own."""

    images: Path | None = None
    """Images to measure in place of a run's: a folder, an .npy or .npz file."""
    stats: Path | None = None
    """An .npz file with mean and covariance of real images' features (mu, sigma) to measure against, in place of --data."""
    save_stats: Path | None = None
    """File to write the real images' mean and covariance to, for --stats."""
    inception: Path | None = None
    """Weights of FID's Inception network (pt_inception-2015-12-05-6726825d.pth); None: fetched once."""
    dinov2: Path | None = None
    """Weights of DINOv2's ViT-L/14 (dinov2_vitl14_pretrain.pth), for fd_dinov2."""
    sampler: str | None = None
    """Sampling algorithm; python sample.py --list-samplers shows them."""
    num_steps: int | None = None
    """Steps from noise to image."""
    eta: float | None = None
    """Noise of ddim, 0 to 1."""
    spacing: Spacing | None = None
    """Which timesteps are visited."""
    threshold: Threshold | None = None
    """What is done with an x0 outside [-1, 1]."""
    guidance: float | None = None
    """How strongly images follow their class: 1 as learnt, above 1 more strongly, 0 not at all."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels sigma between which guidance acts, low and high."""
    guidance_rescale: float | None = None
    """How far guided outputs are brought back to the standard deviation of unguided ones, 0 to 1."""


DRAWING_OPTIONS = tuple(field.name for field in dataclasses.fields(SampleConfig) if field.name != "batch_size")
"""Those of SampleOptions that say how a run's images are drawn."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What a run's images are drawn with."""

    model: Model
    config: Config
    seed: int
    folder: Path
    """The run's."""

    @classmethod
    def of(cls, model: Model, folder: Path, options: SampleOptions, seed: int, batch_size: int | None) -> "Drawing":
        """The run's own settings, but for those that the options give."""
        given = {name: getattr(options, name) for name in DRAWING_OPTIONS}
        config, _ = model.settle(given | {"batch_size": batch_size}, 1, seed, None)
        return cls(model, config, seed, folder)

    def about(self) -> dict[str, Any]:
        """For the protocol."""
        settings, num_classes = self.config.sample, self.config.model.num_classes
        steps = settings.num_steps or self.model.schedule.num_steps
        guided = num_classes is not None and settings.guidance not in (0.0, 1.0)
        about = {
            "step": self.model.step, "weights": self.model.weights, "seed": self.seed, "sampler": settings.sampler,
            "num_steps": steps, "evaluations": steps * SAMPLERS[settings.sampler].evaluations * (2 if guided else 1),
            "eta": settings.eta, "spacing": settings.spacing, "threshold": settings.threshold, "rounding": ROUNDING,
        }  # fmt: skip
        if num_classes is not None:
            guidance = {name: getattr(settings, name) for name in ("guidance", "guidance_interval", "guidance_rescale")}
            about |= {"labels": f"i mod {num_classes}"} | guidance
        return about


def evaluate_samples(
    metrics: Sequence[str],
    drawn: Drawing | ImageSet,
    options: SampleOptions,
    data: DataConfig | None,
    num_images: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The numbers of each metric, and under "protocol" how they were made; nothing in all processes but the first.

    Args:
        metrics: names in `METRICS`.
        drawn: a run's images, or those of options.images.
        options: the command line's.
        data: real images; without effect where options.stats is given.
        num_images: how many drawn ones; None: as many as there are real ones, or as there are in options.images.

    Raises:
        InputError: a reference that a metric can't use, too few images, or weights that are not there.
    """
    _check(metrics, options, data)
    wanted = wanted_outputs(metrics, options)
    reference = _reference(metrics, wanted, drawn, options, data)
    count, outputs, about = _drawn(wanted, drawn, options, reference, num_images)
    if not is_first():
        return {}
    fewest = min(count, reference.about.get("num_images") or count)
    if fewest < FEW_IMAGES and any(METRICS[name].needs == "moments" for name in metrics):
        logger.warning("a Frechet distance of %d images is too large: compare it only with those of as many images", fewest)
    found: dict[str, dict[str, Any]] = {}
    for name in metrics:
        network = next(want.network for want in wanted if want.network.name == METRICS[name].network)
        protocol = {
            "network": network.name, "network_sha256": network.sha256, "resize": network.resize,
            "images": {"num_images": count} | about,
        }  # fmt: skip
        if METRICS[name].needs != "nothing":
            protocol["reference"] = reference.about
        found[name] = score(name, outputs[network.name], reference) | {"protocol": protocol}
    return found


def _check(metrics: Sequence[str], options: SampleOptions, data: DataConfig | None) -> None:
    if options.stats is None:
        if data is None and any(METRICS[name].needs != "nothing" for name in metrics):
            raise InputError("real images are missing: give them with --data, or their statistics with --stats")
    else:
        for name in metrics:
            if METRICS[name].needs == "features":
                raise InputError(f"{name} compares images one by one, which --stats doesn't hold: give --data")
        if len({METRICS[name].network for name in metrics}) > 1:
            raise InputError("--stats are those of one network: measure the metrics of each by themselves")
    if options.save_stats is not None:
        if options.stats is not None or data is None:
            raise InputError("--save-stats needs real images: give them with --data")
        if not any(METRICS[name].needs == "moments" for name in metrics):
            raise InputError("--save-stats writes what a Frechet distance compares: measure one as well, such as fid")
        if len({METRICS[name].network for name in metrics}) > 1:
            raise InputError("--save-stats writes those of one network: measure the metrics of each by themselves")


def needed_outputs(metrics: Sequence[str]) -> dict[NetworkName, frozenset[str]]:
    """The outputs that metrics are made from, by network."""
    needed: dict[NetworkName, frozenset[str]] = {}
    for metric in (METRICS[name] for name in metrics):
        needed[metric.network] = needed.get(metric.network, frozenset()) | {metric.output}
    return needed


def wanted_outputs(metrics: Sequence[str], options: SampleOptions) -> list[Wanted]:
    """The networks of the metrics, loaded, with the outputs that these need."""
    files: dict[NetworkName, Path | None] = {"inception_v3": options.inception, "dinov2_vitl14": options.dinov2}
    wanted = [Wanted(load_network(name, files.get(name)), outputs) for name, outputs in needed_outputs(metrics).items()]
    for want in wanted:
        if want.network.name == "inception_v3" and want.network.sha256 != INCEPTION_SHA256:
            logger.warning("%s is not the published file of FID's network: the scores can't be compared", options.inception)
    return wanted


def _reference(
    metrics: Sequence[str], wanted: list[Wanted], drawn: Drawing | ImageSet, options: SampleOptions, data: DataConfig | None
) -> Reference:
    if options.stats is not None:
        network = wanted[0].network.name
        found = read_statistics(options.stats, network)
        count = next(iter(found.values())).count
        reference = Reference({"statistics": str(options.stats), "num_images": count}, {}, {network: found})
        for metric in (METRICS[name] for name in metrics if METRICS[name].needs == "moments"):
            reference_moments(metric, reference)  # what isn't there is named before images are drawn
        return reference
    needed = [name for name in metrics if METRICS[name].needs != "nothing"]
    if data is None or not needed:
        return Reference({}, {}, {})
    networks = {want.network.name: want.network for want in wanted}
    of_real = [Wanted(networks[name], outputs) for name, outputs in needed_outputs(needed).items()]
    shape = drawn.config.data.image_shape if isinstance(drawn, Drawing) else drawn.image_shape
    framing: Framing = "center" if data.framing == "random" else data.framing
    real = load_images(dataclasses.replace(data, image_shape=shape, framing=framing))
    count = len(real.images)
    logger.info("features of the %d images of %s", count, data.source)
    outputs = collect(set_parts(real, count), count, of_real, cache_folder("features"))
    about: dict[str, Any] = {"data": data.source, "split": data.split, "num_images": count}
    about |= {"image_shape": list(real.image_shape), "framing": framing}
    reference = Reference(about, outputs, {})
    if options.save_stats is not None and is_first():
        measured = {METRICS[name].output: METRICS[name] for name in metrics if METRICS[name].needs == "moments"}
        found = {output: reference_moments(metric, reference) for output, metric in measured.items()}
        save_statistics(options.save_stats, wanted[0].network.name, found)
    return reference


def _drawn(
    wanted: list[Wanted], drawn: Drawing | ImageSet, options: SampleOptions, reference: Reference, num_images: int | None
) -> tuple[int, dict[NetworkName, Outputs], dict[str, Any]]:
    """Number of the drawn images, their outputs, and what they are."""
    if isinstance(drawn, Drawing):
        count = num_images or min(reference.about.get("num_images") or MOST_IMAGES, MOST_IMAGES)
        folder = drawn.folder / "evaluation" / drawing_key(drawn.model, drawn.config, drawn.seed)
        logger.info("drawing %d images", count)
        parts = drawn_parts(drawn.model, drawn.config, drawn.seed, count)
        return count, collect(parts, count, wanted, folder), drawn.about()
    count = len(drawn.images) if num_images is None else num_images
    if count > len(drawn.images):
        raise InputError(f"num_images = {count}: {options.images} holds {len(drawn.images)}")
    logger.info("features of %d images of %s", count, options.images)
    about = {"source": str(options.images), "image_shape": list(drawn.image_shape)}
    return count, collect(set_parts(drawn, count), count, wanted, cache_folder("features")), about
