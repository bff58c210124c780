"""Improved DDPM on CIFAR-10, the recipe of Nichol & Dhariwal (2021) with learned variances and the cosine schedule.

    python train.py --config configs/cifar10_improved.py --workdir runs/cifar10_improved

Data: the 50,000 training images of cifar10 of TensorFlow Datasets; preparing them needs TensorFlow once (docs/recipes.md).
Network: 52.5M parameters.
Published result: 2.94 bits/dim by training on the bound alone; table 2 of the paper has the numbers for this loss, after
500,000 steps, with EMA weights and 4000 steps of ddpm. Nobody has trained this file to the end yet.
Differs from the paper: the moving average of the weights has a warm-up (docs/design.md), and layers that don't start at zero
start as Ho et al.'s.
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:cifar10", image_shape=(32, 32, 3), flip=False),
    diffusion=DiffusionConfig(schedule="cosine", num_steps=4000, prediction="eps", variance="learned_range", loss="hybrid"),
    model=ModelConfig(
        channels=128,
        multipliers=(1, 2, 2, 2),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
        dropout=0.3,
        style="improved",
    ),
    optim=OptimConfig(
        optimizer="adamw", learning_rate=1e-4, weight_decay=0.0, warmup_steps=0, clip_norm=None, ema_decay=0.9999
    ),
    train=TrainConfig(batch_size=128, num_steps=500_000),
    sample=SampleConfig(sampler="ddpm", num_steps=None),
)
