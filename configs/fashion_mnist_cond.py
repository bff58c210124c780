"""The packaged 10,000 Fashion-MNIST images in their ten classes: configs/fashion_mnist.py with labels, for guidance.

    python train.py --config configs/fashion_mnist_cond.py
    python sample.py --ckpt runs/fashion_mnist_cond --num-images 100 --out classes.png
    python sample.py --ckpt runs/fashion_mnist_cond --labels sneaker --guidance 3

Image i shows class i mod 10, so that a grid of 100 has a column for each class: t-shirt, trouser, pullover, dress, coat,
sandal, shirt, sneaker, bag, ankle boot. --guidance 0 leaves the class open.
Hardware: two CPU cores, five minutes, as for the default.
Result: 93 % of 1000 images are of the class asked for, by a small classifier (docs/guidance.md); 80 % with --guidance 1.
"""

from pathlib import Path

from ddpm_jax import load_config

config = load_config(
    Path(__file__).with_name("fashion_mnist.py"),
    {"model.num_classes": 10, "diffusion.label_dropout": 0.1, "sample.guidance": 2.0, "train.preview_images": 100},
)
