"""DDPM on LSUN bedrooms at 256x256, the recipe of Ho et al. (2020), appendix B; lsun256_church.py and lsun256_cat.py follow it.

    python train.py --config configs/lsun256.py --workdir runs/bedroom

Data: lsun/bedroom of TensorFlow Datasets, about 3 million JPEG images whose shorter side has 256 pixels; squares are cut from
their middle. How to prepare it, and what for: docs/recipes.md. A folder with the images does as well: --data.source bedroom/.
Hardware in the paper: 8 cores of a TPU v3, 2.4M steps at 2.2 a second, 303 hours.
Network: 113.7M parameters.
Published result: FID 6.36; the paper's 4.90 is of a larger network. Nobody has trained this file to the end yet.
Differs from the paper: the moving average of the weights has a warm-up (docs/design.md), and images are mirrored, as in the
authors' scripts/run_lsun.py; appendix B says that bedrooms are not.
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:lsun/bedroom", image_shape=(256, 256, 3), flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, prediction="eps", variance="fixed_small"),
    model=ModelConfig(channels=128, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_resolutions=(16,), dropout=0.0),
    optim=OptimConfig(learning_rate=2e-5, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999),
    train=TrainConfig(batch_size=64, num_steps=2_400_000, preview_images=16),
    sample=SampleConfig(sampler="ddpm", num_steps=None, batch_size=16),
)
