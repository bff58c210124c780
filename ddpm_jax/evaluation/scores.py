"""The metrics of drawn images by name: which network's features they compare, and how."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ddpm_jax.errors import InputError
from ddpm_jax.evaluation.distance import Moments, moments, moments_distance
from ddpm_jax.evaluation.inception_score import inception_score
from ddpm_jax.evaluation.kernel_distance import kernel_distance
from ddpm_jax.evaluation.networks import NetworkName, Outputs
from ddpm_jax.evaluation.precision_recall import precision_recall


class Reference(NamedTuple):
    """What real images are known by: their features, or moments from a file."""

    about: dict[str, Any]
    """For the protocol."""
    features: dict[NetworkName, Outputs]
    """By network; none where there are moments."""
    moments: dict[NetworkName, dict[str, Moments]]
    """By network and output."""


class Metric(NamedTuple):
    """How a score is made."""

    network: NetworkName
    """Whose features."""
    output: str
    """Which of its outputs."""
    score: Callable[["Metric", Outputs, Reference], dict[str, Any]]
    """(metric, outputs of the drawn images, reference) -> numbers by name."""
    needs: str
    """What of the reference: "moments", "features" or "nothing"."""
    fewest: int
    """How few images it can be made of, drawn ones and real ones alike."""


def score(name: str, drawn: Outputs, reference: Reference) -> dict[str, Any]:
    """The numbers of a metric, "value" first where there is one that it is known by.

    Raises:
        InputError: too few images, or a reference that doesn't hold what is needed.
    """
    metric = METRICS[name]
    return metric.score(metric, drawn, reference)


def reference_moments(metric: Metric, reference: Reference) -> Moments:
    """Moments of real images, from a file or from features.

    Raises:
        InputError: a file without those of this output.
    """
    if reference.features:
        return moments(reference.features[metric.network][metric.output])
    known = reference.moments[metric.network]
    if metric.output not in known:
        raise InputError(f"{reference.about['statistics']} holds no moments of {metric.output} features: give --data")
    return known[metric.output]


def _frechet(metric: Metric, drawn: Outputs, reference: Reference) -> dict[str, Any]:
    return {"value": moments_distance(moments(drawn[metric.output]), reference_moments(metric, reference))}


def _kernel(metric: Metric, drawn: Outputs, reference: Reference) -> dict[str, Any]:
    return kernel_distance(drawn[metric.output], reference.features[metric.network][metric.output])._asdict()


def _inception(metric: Metric, drawn: Outputs, reference: Reference) -> dict[str, Any]:
    return inception_score(drawn[metric.output])._asdict()


def _manifolds(metric: Metric, drawn: Outputs, reference: Reference) -> dict[str, Any]:
    return precision_recall(drawn[metric.output], reference.features[metric.network][metric.output])._asdict()


METRICS: dict[str, Metric] = {
    "fid": Metric("inception_v3", "pool", _frechet, "moments", 2),
    "sfid": Metric("inception_v3", "spatial", _frechet, "moments", 2),
    "kid": Metric("inception_v3", "pool", _kernel, "features", 2),
    "is": Metric("inception_v3", "logits", _inception, "nothing", 10),
    "pr": Metric("inception_v3", "pool", _manifolds, "features", 4),
    "fd_dinov2": Metric("dinov2_vitl14", "pool", _frechet, "moments", 2),
    "fd_efficientnet_lite0": Metric("efficientnet_lite0", "pool", _frechet, "moments", 2),
    "kid_efficientnet_lite0": Metric("efficientnet_lite0", "pool", _kernel, "features", 2),
    "pr_efficientnet_lite0": Metric("efficientnet_lite0", "pool", _manifolds, "features", 4),
}
"""By the names of evaluate.py."""
