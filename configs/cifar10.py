"""DDPM on CIFAR-10, the recipe of Ho et al. (2020), appendix B.

    python train.py --config configs/cifar10.py --workdir runs/cifar10

Data: the 50,000 training images of cifar10 of TensorFlow Datasets; preparing them needs TensorFlow once (docs/recipes.md).
Hardware in the paper: 8 cores of a TPU v3, 800,000 steps at 21 a second, 10.6 hours.
Published result: FID 3.17, Inception score 9.46 (50,000 samples of 1000 ddpm steps, EMA weights).
Network: 35.7M parameters. Nobody has trained this file to the end yet.
Differs from the paper: the moving average of the weights has a warm-up (docs/design.md).
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:cifar10", image_shape=(32, 32, 3), flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, prediction="eps", variance="fixed_large"),
    model=ModelConfig(channels=128, multipliers=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1),
    optim=OptimConfig(learning_rate=2e-4, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999),
    train=TrainConfig(batch_size=128, num_steps=800_000),
    sample=SampleConfig(sampler="ddpm", num_steps=None),
)
