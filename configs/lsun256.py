r"""DDPM on LSUN at 256x256, the recipe of Ho et al. (2020), appendix B.

    python train.py --config configs/lsun256.py --workdir runs/bedroom --data.source bedroom256.npy
    python train.py --config configs/lsun256.py --workdir runs/church --data.source church256.npy --train.num-steps 1200000
    python train.py --config configs/lsun256.py --workdir runs/cat --data.source cat256.npy --train.num-steps 1800000 \
        --data.no-flip

Data: an .npy file with the images of one category, uint8 [N, 256, 256, 3]; it is memory-mapped.
Hardware in the paper: 8 cores of a TPU v3; 2.4M steps for bedroom, 1.8M for cat, 1.2M for church.
Published result: FID 6.36 for bedroom, 7.89 for church, 19.75 for cat.
Differs from the paper: the moving average of the weights has a warm-up (docs/design.md).
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="bedroom256.npy", image_shape=(256, 256, 3), flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, prediction="eps", variance="fixed_small"),
    model=ModelConfig(channels=128, multipliers=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_resolutions=(16,), dropout=0.0),
    optim=OptimConfig(learning_rate=2e-5, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999),
    train=TrainConfig(batch_size=64, num_steps=2_400_000, preview_images=16),
    sample=SampleConfig(sampler="ddpm", num_steps=None, batch_size=16),
)
