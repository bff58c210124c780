"""DDPM on LSUN cats at 256x256: configs/lsun256.py with the other data, fewer steps, and no mirroring.

    python train.py --config configs/lsun256_cat.py --workdir runs/cat

Data: lsun/cat of TensorFlow Datasets, or a folder; see docs/recipes.md.
Hardware in the paper: 8 cores of a TPU v3, 1.8M steps, 227 hours.
Published result: FID 19.75 (Ho et al. 2020, table 3). Nobody has trained this file to the end yet.
Mirroring is as in the authors' scripts/run_lsun.py, see docs/recipes.md.
"""

from pathlib import Path

from ddpm_jax import load_config

config = load_config(
    Path(__file__).with_name("lsun256.py"),
    {"data.source": "tfds:lsun/cat", "data.flip": False, "train.num_steps": 1_800_000},
)
