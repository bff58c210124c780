"""What ddpm_jax does when it is its turn; run by speed.py.

python benchmarks/worker_jax.py ddpm_jax CASE TASK BATCH
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from cases import CASES, DDIM_STEPS, Case
from jax.sharding import Mesh
from turns import serve

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from ddpm_jax.data import ImageSet, batches
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.inference import make_draw
from ddpm_jax.models import bind, init_params, make_unet, num_params
from ddpm_jax.parallel import compile_at_first_call, compile_for, keep_compiled, make_mesh, put, replicated, run_once
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import TrainState, init_state
from ddpm_jax.training.step import make_train_step, make_train_steps
from ddpm_jax.validation import config_schedule

Run = Callable[[], int]


def make_config(case: Case, batch_size: int) -> Config:
    """The case as a config."""
    return Config(
        data=DataConfig(image_shape=case.image_shape),
        diffusion=DiffusionConfig(),
        model=ModelConfig(
            channels=case.channels, multipliers=case.multipliers, num_res_blocks=case.num_res_blocks,
            attention_resolutions=case.attention_resolutions, dropout=case.dropout, num_groups=case.num_groups,
            space_to_depth=case.space_to_depth,
        ),
        optim=OptimConfig(learning_rate=case.learning_rate),
        train=TrainConfig(batch_size=batch_size, steps_per_dispatch=case.steps_per_dispatch),
        sample=SampleConfig(sampler="ddim", num_steps=DDIM_STEPS),
    )  # fmt: skip


class Training(NamedTuple):
    """What the training loop sets up before its first step."""

    steps: Any
    """The jitted function (state, batches [K, B, ...], count) -> (state, metrics [K])."""
    state: TrainState
    source: Iterator[Batch]
    mesh: Mesh
    config: Config


def start_training(config: Config, images: np.ndarray | None = None) -> Training:
    """The training of a config with data.image_shape, on the given images or on random ones."""
    assert config.data.image_shape is not None
    mesh, unet = make_mesh(), make_unet(config.model, config.data.image_shape[2])
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    state = run_once(mesh, lambda: init_state(config, unet, optimizer))
    train_step = make_train_step(config, config_schedule(config), unet, optimizer, mesh)
    steps = make_train_steps(train_step, config.train.steps_per_dispatch)
    steps = compile_for(mesh, steps, donate_argnums=0, out_shardings=replicated(mesh))
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (1000, *config.data.image_shape), np.uint8)
    return Training(steps, state, batches(config, ImageSet(images), mesh, range(10**9)), mesh, config)


def make_run(training: Training) -> Run:
    """Training as the loop does it: one step at first, then as many as are dispatched together."""
    steps, state, source, mesh, config = training
    made = 0

    def run() -> int:
        nonlocal state, made
        number = config.train.steps_per_dispatch if made else 1
        state, metrics = steps(state, next(source), put(np.int32(number), replicated(mesh)))
        jax.device_get(metrics)
        made += number
        return number * config.train.batch_size

    return run


def make_train(case: Case, batch_size: int) -> tuple[Run, int]:
    """Training steps; and the number of parameters."""
    training = start_training(make_config(case, batch_size))
    count = num_params(training.state.params)
    return make_run(training._replace(steps=compile_at_first_call(training.steps))), count


def make_forward(case: Case, batch_size: int) -> tuple[Run, int]:
    """One denoising pass."""
    config, mesh = make_config(case, batch_size), make_mesh()
    unet = make_unet(config.model, case.image_shape[2])
    params = run_once(mesh, lambda: init_params(unet, 0, case.image_shape))
    forward = compile_for(mesh, lambda params, x, t: bind(unet, params)(x, t))
    x, t = jax.random.normal(jax.random.key(1), (batch_size, *case.image_shape)), jnp.full((batch_size,), 500)

    def run() -> int:
        forward(params, x, t).block_until_ready()
        return batch_size

    return run, num_params(params)


def make_ddim(case: Case, batch_size: int) -> tuple[Run, int]:
    """DDIM from noise to uint8 images on the host."""
    config, mesh = make_config(case, batch_size), make_mesh()
    unet = make_unet(config.model, case.image_shape[2])
    params = run_once(mesh, lambda: init_params(unet, 0, case.image_shape))
    draw, keys = make_draw(config, mesh), jax.random.split(jax.random.key(0), batch_size)

    def run() -> int:
        jax.device_get(draw(params, keys, None))
        return batch_size

    return run, num_params(params)


def main(peer: str, case_name: str, task: str, batch: str) -> None:
    """Build what the task needs and take turns."""
    keep_compiled()
    case, make = CASES[case_name], {"train": make_train, "forward": make_forward, "ddim": make_ddim}[task]
    run, count = make(case, int(batch))
    serve(run, count, {"jax": jax.__version__, "flax": flax.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:])
