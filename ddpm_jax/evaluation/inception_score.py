"""The Inception Score: how surely images are of a class, and how evenly the classes occur; needs no reference."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax.errors import InputError


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the parts of a set."""

    value: float
    deviation: float


def inception_score(logits: Float[np.ndarray, "N K"], num_parts: int = 10, seed: int = 2020) -> InceptionScore:
    """exp(mean over images of KL(p(class | image) || p(class))), Salimans et al. (2016), arXiv:1606.03498, in float64.

    Parts and their shuffling are those of torch-fidelity.

    Args:
        logits: of every image; those of FID's Inception network without their bias.
        num_parts: equal parts into which the shuffled images are divided, each with a score of its own.
        seed: of the shuffling.

    Raises:
        InputError: fewer images than parts.
    """
    count = len(logits)
    if count < num_parts:
        raise InputError(f"the Inception Score of {num_parts} parts needs as many images, not {count}")
    shuffled = logits[np.random.RandomState(seed).permutation(count)].astype(np.float64)
    log_p = shuffled - shuffled.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    for part in range(num_parts):
        log_each = log_p[part * count // num_parts : (part + 1) * count // num_parts]
        each = np.exp(log_each)
        divergence = (each * (log_each - np.log(each.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
