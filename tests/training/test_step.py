"""The train step: its arithmetic by hand, its randomness, and how it runs."""

import dataclasses
import itertools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from networks import OnePicture, PixelNet

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig
from ddpm_jax.data.image_set import ImageSet
from ddpm_jax.data.pipeline import Batch, batches
from ddpm_jax.diffusion.timesteps import draw_by_loss, draw_timesteps, empty_history
from ddpm_jax.inference import make_network
from ddpm_jax.models import make_unet, parts
from ddpm_jax.parallel import batch_sharding, compile_for, make_mesh, put, replicated, run_once
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state
from ddpm_jax.training.step import make_loss_and_grad, make_train_step, make_train_steps, random_flip, to_float
from ddpm_jax.validation import config_schedule

RTOL, ATOL = 1e-5, 1e-6
ONE_DEVICE = make_mesh(jax.devices()[:1])
CONFIG = Config(
    data=DataConfig(image_shape=(8, 8, 2)),
    diffusion=DiffusionConfig(num_steps=50),
    model=ModelConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.0, num_groups=4),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=0),
    train=TrainConfig(batch_size=8, num_steps=100),
)


def changed(**sections):
    """CONFIG with fields of its sections replaced: changed(optim={"eps": 1}, seed=3)."""
    values = {
        name: dataclasses.replace(getattr(CONFIG, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(CONFIG, **values)


def network(kind, config):
    return kind(out_channels=config.data.image_shape[-1], dropout=config.model.dropout, num_classes=config.model.num_classes)


def prepare(config, unet, mesh):
    """The state before the first step, and the step, still to be compiled."""
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    state = run_once(mesh, lambda: init_state(config, unet, optimizer))
    return state, make_train_step(config, config_schedule(config), unet, optimizer, mesh)


def quick(function):
    """Compiled in half the time; what a step computes is the same."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def one_device():
    return ONE_DEVICE


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 2), dtype=np.uint8)


# --- arithmetic


def plain_training(config, pictures):
    """Train OnePicture by hand in float64; one list of images for each step."""
    o = config.optim
    c = np.zeros(pictures[0].shape[1:])
    ema, m, v = c.copy(), np.zeros_like(c), np.zeros_like(c)
    for n, images in enumerate(pictures):
        x0 = images.astype(np.float64) / 255 * 2 - 1
        loss, gradient = np.mean((x0 - c) ** 2), 2 * (c - x0.mean(axis=0)) / c.size
        norm = np.linalg.norm(gradient)
        clipped = gradient * min(1.0, o.clip_norm / norm)
        m, v = o.b1 * m + (1 - o.b1) * clipped, o.b2 * v + (1 - o.b2) * clipped**2
        rate = o.learning_rate * min(1.0, n / o.warmup_steps)
        c = c - rate * (m / (1 - o.b1 ** (n + 1))) / (np.sqrt(v / (1 - o.b2 ** (n + 1))) + o.eps)
        decay = min(o.ema_decay, (1 + n) / (10 + n)) if o.ema_warmup else o.ema_decay
        ema = decay * ema + (1 - decay) * c
        yield {"loss": loss, "norm": norm, "rate": rate, "params": c, "ema": ema, "mu": m, "nu": v}


@pytest.mark.parametrize("ema_warmup", [False, True])
def test_steps_by_hand(one_device, ema_warmup):
    """Every number of the state and the metrics over 12 steps, for a network whose gradient is known by hand.

    eps = 1e-3 is not small against the gradients (about 1e-2), or float32 noise in a gradient near 0 would decide its update.
    """
    config = changed(
        diffusion={"prediction": "x0"},
        optim={"eps": 1e-3, "clip_norm": 0.07, "warmup_steps": 4, "ema_decay": 0.5, "ema_warmup": ema_warmup},
    )
    state, train_step = prepare(config, network(OnePicture, config), one_device)
    train_step = quick(train_step)
    pictures = [random_images(8, seed) for seed in range(12)]
    pictures[5] = np.full_like(pictures[5], 255)  # a longer gradient
    expected = list(plain_training(config, pictures))
    norms = [e["norm"] for e in expected]
    assert min(norms) < config.optim.clip_norm < max(norms)  # both branches of the clip are taken
    for n, (images, e) in enumerate(zip(pictures, expected, strict=True)):
        state, metrics = train_step(state, Batch(jnp.asarray(images)))
        assert int(state.step) == n + 1
        moments = (optax.tree.get(state.opt_state, name)["picture"] for name in ("mu", "nu"))
        got = [*metrics[:3], state.params["picture"], state.ema["picture"], *moments]
        for name, value in zip(("loss", "norm", "rate", "params", "ema", "mu", "nu"), got, strict=True):
            atol = {"norm": 1e-9, "rate": 1e-9, "mu": 1e-8, "nu": 1e-10}.get(name, ATOL)  # these are small numbers
            np.testing.assert_allclose(value, e[name], rtol=RTOL, atol=atol, err_msg=f"{name} of update {n}")


def test_average_over_a_real_run_is_the_plain_loop(one_device):
    """The recurrence over the parameters that training really visits, in float64."""
    config = changed(optim={"ema_decay": 0.7, "ema_warmup": True})
    state, train_step = prepare(config, network(PixelNet, config), one_device)
    train_step = quick(train_step)
    plain = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    for n in range(30):
        state, _ = train_step(state, Batch(jnp.asarray(random_images(8, n))))
        decay = min(0.7, (1 + n) / (10 + n))
        plain = jax.tree.map(lambda average, x: decay * average + (1 - decay) * np.asarray(x, np.float64), plain, state.params)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), state.ema, plain)
    assert not np.allclose(state.ema["Dense_0"]["kernel"], state.params["Dense_0"]["kernel"], atol=1e-3)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(parts, num_classes):
    config = changed(model={"num_classes": num_classes})
    unet = network(PixelNet, config)
    labels = None if num_classes is None else jnp.asarray([0, 1, 2, 2, 1, 0, 0, 2], jnp.int32)
    batch = Batch(jnp.asarray(random_images(8)), labels)
    params = jax.jit(unet.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 2)), jnp.zeros((1,), jnp.int32))["params"]

    def run(accumulate_steps):
        these = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate_steps=accumulate_steps))
        return quick(make_loss_and_grad(these, config_schedule(these), unet, ONE_DEVICE))(jax.random.key(5), params, batch)

    (loss, grads, _), (whole_loss, whole_grads, _) = run(parts), run(1)
    np.testing.assert_allclose(loss, whole_loss, rtol=RTOL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), grads, whole_grads)


# --- objectives


def grey_levels(images):
    return images.astype(np.float64) / 255 * 2 - 1


@pytest.mark.parametrize(("weight", "prediction"), [("min_snr", "x0"), ("truncated_snr", "x0"), ("min_snr", "v")])
def test_the_loss_is_weighted_by_timestep(weight, prediction):
    """OnePicture answers 0, so the loss of an image is its weight times the mean square of its target."""
    config = changed(diffusion={"prediction": prediction, "loss_weight": weight, "min_snr_gamma": 2.0})
    schedule, images = config_schedule(config), random_images(8)
    function = quick(make_loss_and_grad(config, schedule, network(OnePicture, config), ONE_DEVICE))
    loss, _, _ = function(jax.random.key(5), {"picture": jnp.zeros((8, 8, 2))}, Batch(jnp.asarray(images)))
    _, t_key, eps_key, _ = jax.random.split(jax.random.key(5), 4)
    t = np.asarray(draw_timesteps(t_key, 8, 50))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4 * 20, 0.02 * 20, 50))[t].reshape(-1, 1, 1, 1)
    snr = alpha_bar / (1 - alpha_bar)
    of_x0 = np.minimum(snr, 2) if weight == "min_snr" else np.maximum(snr, 1)
    eps, x0 = np.asarray(jax.random.normal(eps_key, images.shape), np.float64), grey_levels(images)
    target = x0 if prediction == "x0" else np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0
    expected = np.mean(of_x0 / (1 if prediction == "x0" else snr + 1) * target**2)
    np.testing.assert_allclose(loss, expected, rtol=RTOL)


@pytest.mark.parametrize(("loss", "variance"), [("hybrid", "learned_range"), ("vlb", "learned_range"), ("vlb", "fixed_small")])
def test_the_bound_of_a_constant_picture(loss, variance):
    """OnePicture with prediction x0 answers the picture c and, learned, the place r of the log variance, for every pixel.

    The gradient of the picture is checked against the difference quotient of the float64 loss, where it is the bound's; in
    the hybrid it is 2 (c - mean x0) / P as without the bound.
    """
    config = changed(diffusion={"prediction": "x0", "loss": loss, "variance": variance})
    images, learned = random_images(8), variance == "learned_range"
    unet = OnePicture(out_channels=2 * (1 + learned), dropout=0.0)
    rng = np.random.default_rng(1)
    picture = rng.uniform(-0.5, 0.5, (8, 8, 2 * (1 + learned))).astype(np.float32)
    function = quick(make_loss_and_grad(config, config_schedule(config), unet, ONE_DEVICE))
    got, grads, _ = function(jax.random.key(6), {"picture": jnp.asarray(picture)}, Batch(jnp.asarray(images)))
    t = np.asarray(draw_timesteps(jax.random.split(jax.random.key(6), 4)[1], 8, 50))
    betas, x0 = np.linspace(1e-4 * 20, 0.02 * 20, 50), grey_levels(images)

    def plain(picture):
        place = picture[..., 2:] if learned else None
        terms = [reference.vlb_term(betas, x0[i], picture[..., :2], t[i], variance, place) for i in range(8)]
        share = 0.001 if loss == "hybrid" else 1
        return share * 50 * np.mean(terms) + (np.mean((x0 - picture[..., :2]) ** 2) if loss == "hybrid" else 0)

    wide = picture.astype(np.float64)
    np.testing.assert_allclose(got, plain(wide), rtol=2e-5)  # float32's log variances, up to 6, are off by 2e-7
    for channel in range(picture.shape[-1]):
        step = np.zeros_like(wide)
        step[3, 4, channel] = 1e-5
        quotient = (plain(wide + step) - plain(wide - step)) / 2e-5
        if loss == "hybrid" and channel < 2:
            quotient = 2 * (wide[..., :2] - x0.mean(axis=0))[3, 4, channel] / 128
        # The gradient is a mean over eight images of either sign, each with float32's error of x0 - c over the variance.
        np.testing.assert_allclose(grads["picture"][3, 4, channel], quotient, rtol=1e-4, atol=1e-7)


def importance(accumulate_steps=1, **diffusion):
    return changed(
        diffusion={"timesteps": "importance", "num_steps": 4, "schedule": "cosine"} | diffusion,
        optim={"accumulate_steps": accumulate_steps}, train={"batch_size": 16},
    )  # fmt: skip


@pytest.mark.parametrize("parts", [1, 4])
def test_importance_sampling_records_the_loss_of_each_image(parts):
    """And goes on to draw by it: with prediction x0 and a picture of zeros, the loss of an image is its mean square."""
    config = importance(parts, prediction="x0")
    function = quick(make_loss_and_grad(config, config_schedule(config), network(OnePicture, config), ONE_DEVICE))
    params, images = {"picture": jnp.zeros((8, 8, 2))}, random_images(16)
    square = np.mean(grey_levels(images) ** 2, axis=(1, 2, 3))
    history, queues = empty_history(4), [deque(maxlen=10) for _ in range(4)]
    for number in range(8):
        key = jax.random.key(number)
        t, share = draw_by_loss(jax.random.split(key, 4)[1], history, 16)
        loss, grads, history = function(key, params, Batch(jnp.asarray(images)), history)
        np.testing.assert_allclose(loss, np.mean(np.asarray(share, np.float64) * square), rtol=RTOL)
        expected = np.mean(np.asarray(share, np.float64)[:, None, None, None] * -2 * grey_levels(images), axis=0) / 128
        np.testing.assert_allclose(grads["picture"], expected, rtol=RTOL, atol=1e-7)
        for step, value in zip(np.asarray(t), square, strict=True):
            queues[step].append(value)
        for step, queue in enumerate(queues):
            np.testing.assert_allclose(np.sort(history.losses[step, : len(queue)]), np.sort(queue), rtol=RTOL)
    assert all(len(queue) == 10 for queue in queues)
    assert len(set(np.asarray(share).tolist())) > 1  # no longer uniform


def test_importance_sampling_on_eight_devices_is_that_on_one():
    """Twelve steps: the batch is split, the history whole on each device and the same bits on all."""
    config = importance()
    stream = [random_images(16, seed) for seed in range(12)]

    def run(count):
        mesh = make_mesh(jax.devices()[:count])
        state, train_step = prepare(config, network(PixelNet, config), mesh)
        train_step = compile_for(mesh, train_step, out_shardings=replicated(mesh))
        for images in stream:
            state, metrics = train_step(state, put(Batch(images), batch_sharding(mesh)))
        return state, metrics

    (one, one_metrics), (eight, eight_metrics) = run(1), run(8)
    np.testing.assert_array_equal(one.loss_history.seen, eight.loss_history.seen)
    np.testing.assert_allclose(one.loss_history.losses, eight.loss_history.losses, rtol=1e-4)  # twelve steps of float32
    np.testing.assert_allclose(one_metrics.loss, eight_metrics.loss, rtol=1e-4)
    assert (np.asarray(one.loss_history.seen) >= 10).all()
    for leaf in eight.loss_history:
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 8 and all(shard.tobytes() == shards[0].tobytes() for shard in shards)


# --- randomness


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_randomness_is_the_seed_and_the_step(one_device):
    config = changed(model={"dropout": 0.3}, data={"flip": True})
    batch = Batch(jnp.asarray(random_images(8)))
    unet = network(PixelNet, config)
    state, _ = prepare(config, unet, one_device)
    optimizer = make_optimizer(config.optim, config.train.num_steps)

    def compiled(seed):
        other = dataclasses.replace(config, seed=seed)
        return quick(make_train_step(other, config_schedule(other), unet, optimizer, ONE_DEVICE))

    train_step = compiled(0)
    first = train_step(state, batch)
    assert leaves_equal(first, train_step(state, batch))
    later = state._replace(step=state.step + 1)
    assert float(train_step(later, batch)[1].loss) != float(first[1].loss)
    assert float(compiled(1)(state, batch)[1].loss) != float(first[1].loss)
    # What went before counts through the state alone: step 3 after 0, 1, 2 is step 3 of a state that was put together.
    for _ in range(3):
        state, _ = train_step(state, batch)
    jumped = type(state)(jnp.int32(3), state.params, state.ema, state.opt_state)
    assert leaves_equal(train_step(state, batch), train_step(jumped, batch))


def test_step_key_is_fold_in_of_seed_and_step(one_device):
    config = changed(seed=11)
    unet, batch = network(PixelNet, config), Batch(jnp.asarray(random_images(8)))
    state, _ = prepare(config, unet, one_device)
    state = state._replace(step=jnp.int32(7))
    key = jax.random.fold_in(jax.random.key(11), 7)
    loss, grads, _ = quick(make_loss_and_grad(config, config_schedule(config), unet, ONE_DEVICE))(key, state.params, batch)
    optimizer = make_optimizer(config.optim, 100)
    _, metrics = quick(make_train_step(config, config_schedule(config), unet, optimizer, ONE_DEVICE))(state, batch)
    np.testing.assert_allclose(metrics.loss, loss, rtol=RTOL)
    squares = [np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(grads)]
    np.testing.assert_allclose(metrics.grad_norm, np.sqrt(np.sum(squares)), rtol=RTOL)


def test_noise_and_timesteps_have_their_distributions(one_device):
    """A network that answers 0 has the loss |target|^2: for eps 1, for v of a black-and-white image 1, of a grey one alpha_bar.

    With B P = 8192 normal numbers, mean eps^2 has deviation sqrt(2 / 8192) = 0.016; four of them: p = 6e-5. The mean of
    alpha_bar over uniform t is known from the betas alone.
    """
    betas = np.linspace(1e-4 * 20, 0.02 * 20, 50)
    alpha_bar = np.cumprod(1 - betas)
    grey = Batch(jnp.zeros((64, 8, 8, 2), jnp.float32))
    for prediction, expected, deviation in [
        ("eps", 1.0, np.sqrt(2 / 8192)),
        ("x0", 0.0, 1e-12),
        ("v", alpha_bar.mean(), np.sqrt(alpha_bar.var() / 64 + 2 * np.mean(alpha_bar**2) / 8192)),
    ]:
        config = changed(diffusion={"prediction": prediction}, train={"batch_size": 64})
        state, train_step = prepare(config, network(OnePicture, config), one_device)
        _, metrics = quick(train_step)(state, grey)
        assert abs(float(metrics.loss) - expected) < 4 * deviation, prediction


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_cpu_takes_a_batch_in_parts_of_its_own(accumulate_steps, monkeypatch):
    """Every image by itself, under dropout and with timesteps drawn by importance, has the result of all at once."""
    config = changed(model={"dropout": 0.3}, diffusion={"timesteps": "importance", "loss": "vlb", "variance": "learned_range"})
    unet = make_network(config)
    params = jax.jit(unet.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 2)), jnp.zeros((1,), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(2), leaf.shape), params)
    batch, history = Batch(jnp.asarray(random_images(8))), empty_history(config.diffusion.num_steps)

    def run(steps):
        these = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate_steps=steps))
        arguments = (jax.random.key(5), params, batch, history)
        program = quick(make_loss_and_grad(these, config_schedule(these), unet, ONE_DEVICE)).lower(*arguments)
        return program.compile()(*arguments), program.as_text()

    whole, whole_text = run(1)
    monkeypatch.setattr(parts, "LEAST_BYTES", 1)
    monkeypatch.setattr(parts, "WEIGHT_SHARE", 0)
    result, text = run(accumulate_steps)
    # The input of the first convolution tells how many images it sees.
    assert "tensor<8x8x8x2xf32>, tensor<3x3x2x8xf32>" in whole_text
    assert "tensor<1x8x8x2xf32>, tensor<3x3x2x8xf32>" in text
    assert "tensor<8x8x8x2xf32>, tensor<3x3x2x8xf32>" not in text
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL), result, whole)


def test_parts_of_a_batch_have_dropout_of_their_own():
    """Two parts of one white image each: d loss / d c_p is -k_p / P / (1 - rate), k_p = how many of the two masks keep p."""
    config = changed(model={"dropout": 0.5}, diffusion={"prediction": "x0"}, optim={"accumulate_steps": 2})
    unet = network(OnePicture, config)
    white = Batch(jnp.ones((2, 8, 8, 2), jnp.float32))
    params = {"picture": jnp.zeros((8, 8, 2))}
    _, grads, _ = quick(make_loss_and_grad(config, config_schedule(config), unet, ONE_DEVICE))(jax.random.key(0), params, white)
    kept = np.asarray(grads["picture"]) * -(8 * 8 * 2) * 0.5
    counts = [np.sum(np.isclose(kept, k, atol=ATOL)) for k in (0, 1, 2)]
    assert sum(counts) == 128
    # Binomial(128; 1/4, 1/2, 1/4): four deviations, and with equal masks there would be no 1.
    assert abs(counts[1] - 64) < 4 * np.sqrt(32)
    assert abs(counts[0] - 32) < 4 * np.sqrt(24)


# --- images


def test_random_flip_mirrors_half_of_the_images_each_whole():
    images = np.random.default_rng(0).standard_normal((2000, 3, 4, 2)).astype(np.float32)
    flipped = np.asarray(random_flip(jax.random.key(0), jnp.asarray(images)))
    same = np.all(flipped == images, axis=(1, 2, 3))
    mirrored = np.all(flipped == np.flip(images, axis=2), axis=(1, 2, 3))
    assert np.all(same ^ mirrored)
    assert abs(mirrored.sum() - 1000) < 4 * np.sqrt(500)  # binomial(2000, 1/2): p = 6e-5
    # Neighbours are independent: pairs that go together are again binomial.
    assert abs(np.sum(mirrored[:-1] == mirrored[1:]) - 1000) < 4 * np.sqrt(500)
    again = np.asarray(random_flip(jax.random.key(1), jnp.asarray(images)))
    assert not np.array_equal(again, flipped)


@pytest.mark.parametrize("flip", [False, True])
def test_the_step_flips_if_the_config_says_so(one_device, flip):
    """White on the left, black on the right: the norm of OnePicture's gradient tells how many of 64 images were mirrored."""
    config = changed(diffusion={"prediction": "x0"}, data={"flip": flip}, train={"batch_size": 64})
    state, train_step = prepare(config, network(OnePicture, config), one_device)
    train_step = quick(train_step)
    images = np.zeros((64, 8, 8, 2), np.uint8)
    images[:, :, :4] = 255
    shares = []
    for _ in range(3):
        # The state is the initial one but for the step, so that the gradient is that of the empty picture.
        _, metrics = train_step(state, Batch(jnp.asarray(images)))
        shares.append((1 - float(metrics.grad_norm) * np.sqrt(128) / 2) / 2)  # of images mirrored, or not: min(k, 64 - k) / 64
        state = state._replace(step=state.step + 1)
    counts = np.array(shares) * 64
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    if flip:
        assert np.all(counts > 32 - 4.5 * 4)  # binomial(64, 1/2) has deviation 4; three draws, p = 2e-5
        assert len(set(np.round(counts))) > 1
    else:
        np.testing.assert_allclose(counts, 0, atol=1e-3)


def test_to_float():
    grey = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    np.testing.assert_allclose(np.ravel(to_float(jnp.asarray(grey))), np.linspace(-1, 1, 256), rtol=RTOL, atol=ATOL)
    assert float(to_float(jnp.asarray(grey)).min()) == -1.0
    assert float(to_float(jnp.asarray(grey)).max()) == 1.0
    real = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)), jnp.float32)
    np.testing.assert_array_equal(to_float(real), real)


# --- learning


def pictures_of(levels):
    """8x8x1 images of one grey level each."""
    return Batch(jnp.broadcast_to(jnp.asarray(levels, jnp.uint8)[:, None, None, None], (len(levels), 8, 8, 1)))


GREY = {"image_shape": (8, 8, 1)}


@pytest.fixture(scope="module")
def unet_state(one_device):
    config = changed(data=GREY)
    return prepare(config, make_unet(config.model, 1), one_device)[0]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_unet_learns_a_tiny_set(unet_state, prediction):
    """Black and white images under noise that never hides which it was: alpha_bar >= 0.35, so every target is in xt."""
    config = changed(
        data=GREY, diffusion={"prediction": prediction, "timesteps": "stratified", "beta_end": 0.002}, optim={"warmup_steps": 5}
    )
    assert float(config_schedule(config).alpha_bar[-1]) > 0.34
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    train_step = quick(make_train_step(config, config_schedule(config), make_unet(config.model, 1), optimizer, ONE_DEVICE))
    state = unet_state
    batch, losses = pictures_of([0, 255] * 4), []
    for _ in range(80):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics.loss))
    assert 0.7 < losses[0] < 1.3  # the network starts at 0, and each target has variance 1
    assert np.mean(losses[-10:]) < 0.2


def test_the_unet_learns_what_classes_mean(one_device):
    """Nothing but the class tells black from white where xt is noise: alpha_bar <= 0.01^2 at nine of ten timesteps.

    Without classes the best answer there is 0 and the loss 1; the one timestep where xt tells something can save 0.1.
    """
    config = changed(
        data=GREY, diffusion={"prediction": "x0", "num_steps": 10, "beta_start": 0.0099, "beta_end": 0.0099},
        optim={"learning_rate": 1e-2}, model={"num_classes": 2},
    )  # fmt: skip
    assert float(config_schedule(config).alpha_bar[1]) < 2e-4
    state, train_step = prepare(config, make_unet(config.model, 1), one_device)
    train_step = quick(train_step)
    batch = pictures_of([0, 255] * 4)._replace(labels=jnp.asarray([0, 1] * 4, jnp.int32))
    losses = []
    for _ in range(60):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-10:]) < 0.3
    swapped = batch._replace(labels=1 - batch.labels)
    _, metrics = train_step(state, swapped)
    assert float(metrics.loss) > 2  # wrong classes: (1 - (-1))^2 = 4 at best guess


# --- how it runs


@pytest.fixture(scope="module", params=[1, 8], ids=["1 device", "8 devices"])
def running(request):
    """[state], a compiled step that has run once, and the batches that follow; each test leaves its last state."""
    mesh = make_mesh(jax.devices()[: request.param])
    state, train_step = prepare(CONFIG, network(PixelNet, CONFIG), mesh)
    train_steps = compile_for(mesh, make_train_steps(train_step, 3), donate_argnums=0, out_shardings=replicated(mesh))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps_per_dispatch=3))
    stream = batches(config, ImageSet(random_images(20)), mesh, range(100))
    counts = put([np.int32(2), np.int32(3)], replicated(mesh))
    calls = ((next(stream), counts[number % 2]) for number in itertools.count())
    state, metrics = train_steps(state, *next(calls))
    jax.block_until_ready(metrics)
    return [state], train_steps, calls


def test_the_step_is_compiled_once(running):
    holder, train_steps, calls = running
    for _ in range(5):
        holder[0], _ = train_steps(holder[0], *next(calls))
    assert train_steps._cache_size() == 1


def test_steps_move_nothing_behind_the_back(running):
    """Under the guard an implicit transfer raises; on a CPU that holds for those to the device and between devices."""
    holder, train_steps, calls = running
    with jax.transfer_guard("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            jnp.square(np.ones(3, np.float32))
        for _ in range(4):
            holder[0], metrics = train_steps(holder[0], *next(calls))
            jax.device_get(metrics)


def test_the_old_state_is_given_up(running):
    holder, train_steps, calls = running
    old = holder[0]
    holder[0], _ = train_steps(old, *next(calls))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(holder[0]))


def test_steps_made_together_are_the_steps_made_one_by_one():
    """The same numbers for any count, and for the metrics of steps that were not made, none."""
    mesh = make_mesh(jax.devices()[:1])
    first, train_step = prepare(CONFIG, network(PixelNet, CONFIG), mesh)
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps_per_dispatch=4))
    (stack,) = batches(config, ImageSet(random_images(20)), mesh, [0])
    state, expected = first, []
    for i in range(4):
        state, metrics = quick(train_step)(state, jax.tree.map(lambda array, i=i: array[i], stack))
        expected.append(metrics)
    together = quick(make_train_steps(train_step, 4))
    whole, metrics = together(first, stack, jnp.int32(4))
    assert int(whole.step) == 4
    for got, wanted in zip(jax.tree.leaves((whole, metrics)), jax.tree.leaves((state, stacked(expected))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    half, metrics = together(first, stack, jnp.int32(2))
    np.testing.assert_array_equal(metrics.learning_rate[2:], 0)
    rest, _ = together(half, jax.tree.map(lambda array: jnp.roll(array, -2, axis=0), stack), jnp.int32(2))
    for got, wanted in zip(jax.tree.leaves(rest), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, wanted)


def stacked(metrics):
    return jax.tree.map(lambda *values: np.stack(values), *metrics)
