"""Samplers step by step against the reference, and whole chains with data whose exact denoiser is known."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats
from jax.extend.core import jaxprs_in_params
from reference import P_VALUE, assert_close

from ddpm_jax import Denoised, make_denoiser, make_schedule, p_sample, sample
from ddpm_jax.diffusion.samplers import ddim_step
from ddpm_jax.diffusion.schedule import respace, spaced_timesteps

TOTAL = 50
BETAS = reference.linear_betas(TOTAL)
SHAPE = (4, 3, 2, 1)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", TOTAL)


def x0_and_eps(xp, x, t):
    """A smooth network; its eps is unrelated to its x0, so that a sampler that mixes them up is seen."""
    return 0.9 * xp.tanh(0.5 * x + xp.cos(t)), 0.8 * xp.sin(x + 0.1 * t)


def denoiser(xt, t):
    t = t.astype(jnp.float32).reshape(t.shape + (1,) * (xt.ndim - t.ndim))
    return Denoised(*x0_and_eps(jnp, xt, t))


def reference_denoise(x, t):
    return x0_and_eps(np, x, t)


def normal_images(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def zero_denoiser(xt, t):
    return Denoised(jnp.zeros_like(xt), jnp.zeros_like(xt))


# One step of DDIM


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_equals_the_reference(schedule, eta):
    """With one key for all images their noise is the same, so a step of a network of zeros shows it."""
    t = np.array([0, 1, 2, 25, 48, 49], np.int32)
    x0, eps, xt = (normal_images(seed, (6, 4, 3, 2)) for seed in range(3))
    keys = jnp.repeat(jax.random.key(3)[None], 6)
    sigmas = np.array([reference.ddim_sigma(BETAS, step, eta) for step in t])
    scaled_noise = np.asarray(ddim_step(keys, schedule, zero_denoiser, jnp.asarray(xt), jnp.asarray(t), eta), np.float64)
    noise = scaled_noise[3] / sigmas[3] if eta else np.zeros((4, 3, 2))
    assert_close(scaled_noise, sigmas.reshape(-1, 1, 1, 1) * noise)

    def exact(xt, t):
        return Denoised(jnp.asarray(x0), jnp.asarray(eps))

    actual = ddim_step(keys, schedule, exact, jnp.asarray(xt), jnp.asarray(t), eta)
    expected = [reference.ddim_step(BETAS, x0[i], eps[i], step, eta, noise) for i, step in enumerate(t)]
    assert_close(actual, np.stack(expected))


def test_the_noise_of_ddim_is_normal(schedule):
    step = ddim_step(jax.random.key(4), schedule, zero_denoiser, jnp.zeros((20_000, 1)), jnp.full(20_000, 30), 0.7)
    assert scipy.stats.kstest(np.ravel(step) / reference.ddim_sigma(BETAS, 30, 0.7), "norm").pvalue > P_VALUE


def test_ddim_with_eta_one_has_the_law_of_the_posterior(schedule):
    """Song et al. (2021), section 4.1: with an eps that belongs to x0, the mean is that of Bayes' rule."""
    t = np.array([0, 1, 25, 49], np.int32)
    x0, xt = normal_images(5), normal_images(6)
    a, v = (coefficient[t].reshape(-1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
    eps = jnp.asarray((xt - a * x0) / np.sqrt(v), jnp.float32)
    arguments = (jnp.asarray(xt), jnp.asarray(t), 1.0)
    keys = jnp.repeat(jax.random.key(7)[None], 4)
    step = ddim_step(keys, schedule, lambda xt, t: Denoised(jnp.asarray(x0), eps), *arguments)
    noise = ddim_step(keys, schedule, zero_denoiser, *arguments)
    assert_close(step - noise, np.stack([reference.q_posterior(BETAS, x0[i], xt[i], step)[0] for i, step in enumerate(t)]))
    for i, step in enumerate(t):
        sigma = reference.ddim_sigma(BETAS, step, 1.0)
        assert sigma == pytest.approx(math.sqrt(reference.p_variance(BETAS, step, "fixed_small")))
        assert (noise[i] == 0).all() == (sigma == 0)


# The loop


@pytest.mark.parametrize(("num_steps", "variance"), [(TOTAL, "fixed_large"), (8, "fixed_small")])
def test_ddpm_is_a_loop_of_p_sample(schedule, num_steps, variance):
    """The step from timestep t has the key fold_in(key, t); t is that of the long process, and the network's too."""
    key, x = jax.random.key(8), jnp.asarray(normal_images(9))
    frames = sample(
        key, schedule, denoiser, SHAPE, "ddpm", num_steps, x_init=x, trajectory=True, variance=variance, spacing="quadratic"
    )
    visited = jnp.asarray(spaced_timesteps(num_steps, TOTAL, "quadratic"))
    short = schedule if num_steps == TOTAL else respace(schedule, visited)
    step = jax.jit(lambda key, x, i: p_sample(key, short, lambda x, i: denoiser(x, visited[i]), x, i, variance))
    expected = [x]
    for i in reversed(range(num_steps)):
        expected.append(step(jax.random.fold_in(key, visited[i]), expected[-1], jnp.full(SHAPE[0], i)))
    assert frames.dtype == jnp.float32
    assert_close(frames, np.stack(expected))


@pytest.mark.parametrize(
    ("num_steps", "spacing"),
    [(None, "uniform"), (1, "uniform"), (7, "uniform"), (7, "trailing"), (7, "quadratic"), (20, "quadratic")],
)
def test_ddim_equals_the_reference(schedule, num_steps, spacing):
    x = normal_images(10)
    actual = sample(jax.random.key(11), schedule, denoiser, SHAPE, "ddim", num_steps, spacing=spacing, x_init=jnp.asarray(x))
    timesteps = spaced_timesteps(num_steps or TOTAL, TOTAL, spacing)
    assert actual.dtype == jnp.float32
    assert_close(actual, reference.ddim(BETAS, timesteps, x.astype(np.float64), reference_denoise))


def test_ddim_without_noise_does_not_depend_on_the_key(schedule):
    x = jnp.asarray(normal_images(12))
    draw = jax.jit(lambda key: sample(key, schedule, denoiser, SHAPE, "ddim", 5, x_init=x))
    np.testing.assert_array_equal(draw(jax.random.key(0)), draw(jax.random.key(1)))
    noisy = jax.jit(lambda key: sample(key, schedule, denoiser, SHAPE, "ddim", 5, eta=0.5, x_init=x))
    assert not np.allclose(noisy(jax.random.key(0)), noisy(jax.random.key(1)))


def test_the_start_is_normal_and_every_image_has_its_own(schedule):
    shape = (500, 8, 5, 1)
    start = np.asarray(sample(jax.random.key(13), schedule, zero_denoiser, shape, "ddim", 1, trajectory=True)[0])
    assert scipy.stats.kstest(start.ravel(), "norm").pvalue > P_VALUE
    assert scipy.stats.kstest(start.mean(0).ravel() * math.sqrt(500), "norm").pvalue > P_VALUE
    assert scipy.stats.kstest(start.mean((1, 2, 3)) * math.sqrt(40), "norm").pvalue > P_VALUE


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_noise_of_each_step_is_new(schedule, sampler):
    """With a network of zeros, successive differences to the step's mean are the noises: none is the start's or another's."""
    shape = (2, 20, 20, 1)
    frames = sample(jax.random.key(14), schedule, zero_denoiser, shape, sampler, 6, eta=1.0, trajectory=True)
    short = reference.visited_betas(BETAS, spaced_timesteps(6, TOTAL))
    noises = [np.ravel(frames[0])]
    for frame, i in enumerate(range(5, 0, -1)):
        after, before = np.ravel(frames[frame + 1]), np.ravel(frames[frame])
        # eps = x0 = 0 here, so that ddim's mean is 0, while ddpm's posterior mean keeps a share of xt.
        mean = reference.q_posterior(short, 0.0, before, i)[0] if sampler == "ddpm" else 0.0
        noises.append(after - mean)
    correlation = np.corrcoef(noises)[np.triu_indices(6, 1)]
    assert scipy.stats.kstest(correlation * math.sqrt(800), "norm").pvalue > P_VALUE
    assert np.abs(correlation).max() < 5 / math.sqrt(800)


def test_trajectories(schedule):
    """True gives every state; n gives n of them, as evenly spaced as whole steps can be; neither changes the result."""
    key, x, num_steps = jax.random.key(15), jnp.asarray(normal_images(16)), 7
    draw = functools.partial(sample, key, schedule, denoiser, SHAPE, "ddpm", num_steps, x_init=x)
    result = draw()
    every = np.asarray(draw(trajectory=True))
    assert every.shape == (num_steps + 1, *SHAPE)
    np.testing.assert_array_equal(every[0], x)
    assert_close(every[-1], result)
    for num_frames in (2, 5):
        frames = np.asarray(draw(trajectory=num_frames))
        assert frames.shape == (num_frames, *SHAPE)
        distance = np.abs(frames[:, None] - every[None]).max((2, 3, 4, 5))
        steps = distance.argmin(1)
        assert distance.min(1).max() < 1e-5
        assert (steps[0], steps[-1]) == (0, num_steps)
        assert np.ptp(np.diff(steps)) <= 1
        assert (np.diff(steps) >= 1).all()


def test_more_frames_than_states_are_all_states(schedule):
    draw = functools.partial(sample, jax.random.key(17), schedule, denoiser, SHAPE, "ddim", 3)
    frames = draw(trajectory=9)
    assert frames.shape == (4, *SHAPE)
    assert_close(frames, draw(trajectory=True))


def test_the_start_is_the_same_for_any_number_of_steps(schedule):
    key = jax.random.key(34)
    starts = [
        sample(key, schedule, denoiser, SHAPE, sampler, num_steps, trajectory=2)[0]
        for sampler, num_steps in [("ddpm", 2), ("ddim", 7), ("ddim", None)]
    ]
    np.testing.assert_array_equal(starts[1], starts[0])
    np.testing.assert_array_equal(starts[2], starts[0])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_image_with_a_key_of_its_own_does_not_depend_on_its_batch(schedule, sampler):
    keys = jax.random.split(jax.random.key(18), 4)
    draw = functools.partial(sample, schedule=schedule, denoiser=denoiser, sampler=sampler, num_steps=6, eta=0.5)
    four = jax.jit(functools.partial(draw, shape=SHAPE))
    batch = four(keys)
    assert_close(four(keys[::-1]), batch[::-1])
    assert_close(draw(keys[2:3], shape=(1, *SHAPE[1:]))[0], batch[2])


def test_raw_keys_are_keys(schedule):
    draw = jax.jit(functools.partial(sample, schedule=schedule, denoiser=denoiser, shape=SHAPE, num_steps=3))
    typed, raw = jax.random.key(19), jax.random.PRNGKey(19)
    assert_close(draw(raw), draw(typed))
    assert_close(draw(jax.random.split(raw, 4)), draw(jax.random.split(typed, 4)))


def test_a_clipping_denoiser_gives_images_in_range(schedule):
    clipping = make_denoiser(schedule, lambda xt, t: 3.0 * xt, "v")
    images = sample(jax.random.key(21), schedule, clipping, SHAPE, "ddpm", 5)
    assert jnp.abs(images).max() <= 1


# The program


def equations(jaxpr):
    """Every equation of a jaxpr, also of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("trajectory", [False, 3])
def test_the_program_is_one_scan_that_stacks_nothing(schedule, sampler, trajectory):
    draw = functools.partial(sample, schedule=schedule, denoiser=denoiser, shape=SHAPE, sampler=sampler, trajectory=trajectory)
    program = jax.make_jaxpr(draw)(jax.random.key(0))
    loops = [equation for equation in equations(program.jaxpr) if equation.primitive.name in ("scan", "while")]
    (scan,) = (equation for equation in loops if equation.primitive.name == "scan")
    assert len(loops) == 1
    assert scan.params["length"] == TOTAL
    (body,) = jaxprs_in_params(scan.params)
    outputs = [variable.aval.shape for variable in scan.outvars]
    assert outputs == [variable.aval.shape for variable in body.outvars]  # a stacked one would have an axis more
    images = math.prod(SHAPE) * (1 + int(trajectory))
    assert sum(map(math.prod, outputs)) <= images + 1


def test_in_a_jit_of_ones_own_it_is_compiled_once_for_all_keys_schedules_and_weights():
    traces = []

    def draw(key, schedule, weight):
        traces.append(None)
        return sample(key, schedule, lambda xt, t: Denoised(weight * xt, xt), SHAPE, "ddim", 2)

    jitted = jax.jit(draw)
    for seed, kind, weight in [(22, "linear", 0.5), (23, "linear", 0.5), (22, "cosine", 0.5), (22, "cosine", 0.2)]:
        images = jitted(jax.random.key(seed), make_schedule(kind, TOTAL), jnp.float32(weight))
        start = sample(jax.random.key(seed), make_schedule(kind, TOTAL), zero_denoiser, SHAPE, "ddim", 1, trajectory=2)[0]
        expected = reference.ddim(
            reference.BETAS[kind](TOTAL), [0, TOTAL - 1], np.asarray(start, np.float64), lambda x, t, w=weight: (w * x, x)
        )
        assert_close(images, expected)
    assert len(traces) == 1


def test_jit_and_vmap(schedule):
    keys = jax.random.split(jax.random.key(26), 3)
    draw = functools.partial(sample, schedule=schedule, denoiser=denoiser, shape=SHAPE, num_steps=4)
    jitted = jax.jit(draw)
    assert_close(jitted(keys[1]), draw(keys[1]))
    assert_close(jax.vmap(draw)(keys), np.stack([jitted(key) for key in keys]))


def test_grad_through_ddim_by_the_start(schedule):
    """Against the central difference of the float64 reference along one direction."""
    x, direction, weight = (normal_images(seed).astype(np.float64) for seed in (27, 28, 29))
    timesteps = spaced_timesteps(3, TOTAL)

    def total(x):
        images = sample(jax.random.key(30), schedule, denoiser, SHAPE, "ddim", 3, x_init=x)
        return jnp.sum(jnp.asarray(weight, jnp.float32) * images)

    def reference_total(x):
        return np.sum(weight * reference.ddim(BETAS, timesteps, x, reference_denoise))

    gradient = jax.grad(total)(jnp.asarray(x, jnp.float32))
    h = 1e-5
    expected = (reference_total(x + h * direction) - reference_total(x - h * direction)) / (2 * h)
    assert abs(expected) > 0.1
    # A sum of 24 float32 products, each of order one.
    assert_close(np.sum(np.asarray(gradient, np.float64) * direction), expected, atol=1e-5)


# Errors

unchecked_sample = inspect.unwrap(sample)
"""Without the type checks of the test session, which would catch a wrong name first."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "plms"}, r"unknown sampler 'plms'.*ddpm.*ddim"),
        ({"sampler": "ddim", "eta": -0.1}, r"eta must lie in \[0, 1\], not -0.1"),
        ({"sampler": "ddim", "eta": 1.1}, r"eta must lie in \[0, 1\], not 1.1"),
        ({"sampler": "ddim", "eta": math.nan}, r"eta must lie in \[0, 1\], not nan"),
        ({"num_steps": 0}, r"choose 1 to 50"),
        ({"num_steps": TOTAL + 1}, r"cannot take 51 sampling steps of a 50-step process: choose 1 to 50"),
        ({"x_init": jnp.zeros((4, 3, 2, 2))}, r"x_init has shape \(4, 3, 2, 2\), not \(4, 3, 2, 1\)"),
        ({"trajectory": 1}, r"at least 2 frames"),
        ({"trajectory": -1}, r"at least 2 frames, not -1"),
    ],
)
def test_bad_arguments(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        unchecked_sample(jax.random.key(0), schedule, zero_denoiser, SHAPE, **arguments)


def test_the_wrong_number_of_keys(schedule):
    with pytest.raises(ValueError, match=r"needs 4 keys, not \(3,\)"):
        sample(jax.random.split(jax.random.key(0), 3), schedule, zero_denoiser, SHAPE)


# Whole chains with exact denoisers

SETTINGS = [
    {"sampler": "ddpm", "variance": "fixed_small"},
    {"sampler": "ddpm", "variance": "fixed_large"},
    {"sampler": "ddpm", "variance": "fixed_large", "num_steps": 10, "spacing": "uniform"},
    {"sampler": "ddpm", "variance": "fixed_small", "num_steps": 10, "spacing": "trailing"},
    {"sampler": "ddim", "eta": 0.0, "num_steps": 10, "spacing": "quadratic"},
    {"sampler": "ddim", "eta": 0.5, "num_steps": 10, "spacing": "uniform"},
    {"sampler": "ddim", "eta": 1.0},
]


def setting_name(setting):
    return "-".join(map(str, setting.values()))


@pytest.mark.parametrize("setting", [SETTINGS[i] for i in (1, 3, 4, 5)], ids=setting_name)
def test_point_mass_data_is_reached_exactly(schedule, setting):
    """All data at c: E[x0 | xt] = c, eps = (xt - a c) / s. On ddim's way with eta = 0 this eps never changes."""
    c = normal_images(31)
    exact = make_denoiser(schedule, lambda xt, t: jnp.asarray(c), "x0", clip=False)
    frames = np.asarray(sample(jax.random.key(32), schedule, exact, SHAPE, trajectory=True, **setting))
    np.testing.assert_array_equal(frames[-1], c)
    if setting.get("eta") == 0:
        timesteps = spaced_timesteps(setting["num_steps"], TOTAL, setting["spacing"])
        a, v = (coefficient[timesteps].reshape(-1, 1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
        eps = (frames[0] - a[-1] * c) / np.sqrt(v[-1])
        assert_close(frames[:-1], (a * c + np.sqrt(v) * eps)[::-1])


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_name)
def test_gaussian_data_has_the_law_of_the_linear_recursion(schedule, setting):
    """Data N(m, diag s^2): E[x0 | xt] is linear in xt, so x_0 is normal, and its law follows from the steps' gains."""
    m = np.array([-0.5, 0.0, 0.3, 0.8]).reshape(2, 2, 1)
    s = np.array([0.2, 0.5, 1.0, 0.05]).reshape(2, 2, 1)
    a, v = (coefficient.reshape(-1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
    offset = np.stack([reference.gaussian_x0(BETAS, m, s, 0 * m, t) for t in range(TOTAL)])
    gain = np.stack([reference.gaussian_x0(BETAS, m, s, 0 * m + 1, t) for t in range(TOTAL)]) - offset

    def line(offset, gain):
        offset, gain = jnp.asarray(offset, jnp.float32), jnp.asarray(gain, jnp.float32)
        return lambda xt, t: offset[t] + gain[t] * xt

    x0_line, eps_line = line(offset, gain), line(-a * offset / np.sqrt(v), (1 - a * gain) / np.sqrt(v))

    def exact(xt, t):
        return Denoised(x0_line(xt, t), eps_line(xt, t))

    samples = np.asarray(sample(jax.random.key(0), schedule, exact, (5000, 2, 2, 1), **setting), np.float64)

    num_steps = setting.get("num_steps", TOTAL)
    timesteps = spaced_timesteps(num_steps, TOTAL, setting.get("spacing", "uniform"))
    law = {name: value for name, value in setting.items() if name in ("sampler", "variance", "eta")}
    mean, variance = reference.gaussian_chain(BETAS, m, s, timesteps, **law)
    z = (samples - mean) / np.sqrt(variance)
    assert scipy.stats.chi2.sf(5000 * np.sum(z.mean(0) ** 2), 4) > P_VALUE  # four z-tests of the mean at once
    tail = scipy.stats.chi2.sf(np.sum(z**2), z.size)
    assert 2 * min(tail, 1 - tail) > P_VALUE
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > P_VALUE
    assert np.abs(np.corrcoef(z.reshape(5000, 4).T)[np.triu_indices(4, 1)]).max() < 4 / math.sqrt(5000)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_linear_recursion_comes_close_to_the_data(variance):
    """That the law above is one worth having: with T = 250 it is almost that of the data."""
    m, s = np.array([-0.5, 0.3, 0.0]), np.array([0.2, 0.5, 1.0])
    mean, var = reference.gaussian_chain(reference.linear_betas(250), m, s, range(250), "ddpm", variance)
    np.testing.assert_allclose(mean, m, atol=0.01)
    np.testing.assert_allclose(np.sqrt(var), s, atol=0.02)
