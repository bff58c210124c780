"""DDPM on CIFAR-10 with its ten classes: the recipe of configs/cifar10.py with labels, for classifier-free guidance.

    python train.py --config configs/cifar10_cond.py --workdir runs/cifar10_cond
    python sample.py --ckpt runs/cifar10_cond --labels cat --guidance 2

Data: that of the unconditional recipe, with its labels: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck.
Hardware: that of the unconditional recipe, 8 cores of a TPU v3, 800,000 steps.
Published result: none for this network; Ho et al. (2020) is unconditional.
Differs from configs/cifar10.py: classes, of which one label in ten is left open (Ho & Salimans 2022, section 4, found 0.1 and
0.2 to do equally well). Without guidance (the default, 1) it draws from the classes as they are.
"""

from pathlib import Path

from ddpm_jax import load_config

config = load_config(Path(__file__).with_name("cifar10.py"), {"model.num_classes": 10, "diffusion.label_dropout": 0.1})
