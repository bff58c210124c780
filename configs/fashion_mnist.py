"""The packaged 10,000 Fashion-MNIST images, 28x28, sized for a laptop.

python train.py
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="fashion_mnist", flip=True),
    diffusion=DiffusionConfig(schedule="linear", prediction="v", timesteps="stratified"),
    model=ModelConfig(
        channels=32, multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(7,), dropout=0.0, space_to_depth=2
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, decay="cosine", ema_decay=0.995),
    train=TrainConfig(
        batch_size=32,
        num_steps=1200,
        log_every_steps=50,
        checkpoint_every_steps=300,
        keep_every_steps=None,
        preview_every_steps=300,
    ),
    sample=SampleConfig(sampler="ddim", num_steps=50),
)
