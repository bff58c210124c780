"""DDPM on CelebA-HQ at 256x256, the recipe of Ho et al. (2020), appendix B.

    python train.py --config configs/celebahq256.py --workdir runs/celebahq256

Data: celeb_a_hq/256 of TensorFlow Datasets, 30,000 images, to be prepared from data256x256.tar, a file that you make yourself
(docs/recipes.md). A folder with the images does as well: --data.source celebahq/.
Hardware in the paper: 8 cores of a TPU v3, 500,000 steps at 2.2 a second, 63 hours.
Network: 113.7M parameters.
Published result: samples (figure 3); no FID is given. Nobody has trained this file to the end yet.
Differs from the paper: the moving average of the weights has a warm-up (docs/design.md).
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:celeb_a_hq/256", image_shape=(256, 256, 3), flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, prediction="eps", variance="fixed_small"),
    model=ModelConfig(channels=128, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_resolutions=(16,), dropout=0.0),
    optim=OptimConfig(learning_rate=2e-5, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999),
    train=TrainConfig(batch_size=64, num_steps=500_000, preview_images=16),
    sample=SampleConfig(sampler="ddpm", num_steps=None, batch_size=16),
)
