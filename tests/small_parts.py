"""evaluate.py with parts of ten images, of which several processes get their share in a test of few images."""

import evaluate
from ddpm_jax import cli
from ddpm_jax.evaluation import features

if __name__ == "__main__":
    features.PART_IMAGES = 10
    cli.run(evaluate.main)
