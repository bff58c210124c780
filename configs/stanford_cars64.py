"""DDPM on Stanford Cars at 64x64 with T = 300 and batches of 128: a widely read tutorial's set-up, with Ho et al.'s method.

    python train.py --config configs/stanford_cars64.py --workdir runs/cars --data.source cars_train/

Data: the 8,144 training images, JPEG files of all sizes. A folder of them is framed as it is read: squares cut from the middle
and then shrunk, so that cars keep their shape. Without --data.source it is cars196 of TensorFlow Datasets, whose download was
gone when this was written: that only works where the set has been prepared before (docs/recipes.md).

What 300 steps need: betas 1000/300 times those of T = 1000, which schedule "linear" sees to, so that x_T is noise with 0.6 %
of the image in it; with the betas of T = 1000 it would be 22 %. The rest is Ho et al.'s CIFAR-10 recipe, with the network's
levels at 64, 32, 16 and 8 pixels.
Network: 35.7M parameters.
Steps: 100,000 show each image 1,570 times; Ho et al. show each of CIFAR-10's 2,050 times.
There is no published result to compare with, and nobody has trained this file to the end yet.
"""

from ddpm_jax import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:cars196", image_shape=(64, 64, 3), flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=300, prediction="eps", variance="fixed_large"),
    model=ModelConfig(channels=128, multipliers=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1),
    optim=OptimConfig(learning_rate=2e-4, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999),
    train=TrainConfig(batch_size=128, num_steps=100_000),
    sample=SampleConfig(sampler="ddpm", num_steps=None),
)
