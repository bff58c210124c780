"""DDPM on CIFAR-10 with its ten classes: the recipe of configs/cifar10.py with labels, for classifier-free guidance.

    python train.py --config configs/cifar10_cond.py --workdir runs/cifar10_cond --data.source cifar10_train.npz
    python sample.py --ckpt runs/cifar10_cond --label 3 --guidance 2

Data: an .npz file with the 50,000 training images as "images", uint8 [50000, 32, 32, 3], and their classes as "labels".
Hardware: that of the unconditional recipe, 8 cores of a TPU v3, 800,000 steps.
Published result: none for this network; Ho et al. (2020) is unconditional.
Differs from configs/cifar10.py: classes, of which one label in ten is left open (Ho & Salimans 2022, section 4, found 0.1 and
0.2 to do equally well). Without guidance (the default, 1) it draws from the classes as they are.
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="cifar10_train.npz", image_shape=(32, 32, 3), flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, prediction="eps", variance="fixed_large", label_dropout=0.1),
    model=ModelConfig(
        channels=128, multipliers=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1, num_classes=10
    ),
    optim=OptimConfig(learning_rate=2e-4, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999),
    train=TrainConfig(batch_size=128, num_steps=800_000),
    sample=SampleConfig(sampler="ddpm", num_steps=None),
)
