"""DDPM on LSUN churches at 256x256: configs/lsun256.py with the other data and half the steps.

    python train.py --config configs/lsun256_church.py --workdir runs/church

Data: lsun/church_outdoor of TensorFlow Datasets, or a folder; see docs/recipes.md.
Hardware in the paper: 8 cores of a TPU v3, 1.2M steps, 152 hours.
Published result: FID 7.89 (Ho et al. 2020, table 3). Nobody has trained this file to the end yet.
"""

from pathlib import Path

from ddpm_jax import load_config

config = load_config(
    Path(__file__).with_name("lsun256.py"), {"data.source": "tfds:lsun/church_outdoor", "train.num_steps": 1_200_000}
)
