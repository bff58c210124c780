"""Interpolation, image-to-image and RePaint against closed forms of Gaussian data, whose exact denoiser is linear."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats
from reference import P_VALUE, assert_close

import ddpm_jax as ddpm
from ddpm_jax import Denoised, make_denoiser, make_schedule
from ddpm_jax.diffusion.editing import image_to_image, inpaint, interpolate, repaint_moves
from ddpm_jax.diffusion.samplers import Sampler
from ddpm_jax.diffusion.schedule import spaced_timesteps

TOTAL = 50
BETAS = reference.linear_betas(TOTAL)
COUNT = 20_000

# Data N(MEAN, COV) of four correlated pixels, two of which are known.
MEAN = np.array([0.3, -0.2, 0.1, 0.0])
FACTOR = np.array([[0.5, 0.0, 0.0, 0.0], [0.4, 0.2, 0.0, 0.0], [0.3, -0.2, 0.3, 0.0], [-0.2, 0.1, 0.2, 0.2]])
COV = FACTOR @ FACTOR.T
IMAGE = np.array([0.9, 0.0, -0.7, 0.0])
PAINTED = np.array([False, True, False, True])


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", TOTAL)


@functools.cache
def exact_x0(total):
    """E[x0 | xt] = offset[t] + gain[t] xt, by the precision form of Bayes' rule."""
    precision, offsets, gains = np.linalg.inv(COV), [], []
    for a, v in zip(*reference.forward_kernels(reference.linear_betas(total)), strict=True):
        posterior = np.linalg.inv(precision + np.eye(4) * a**2 / v)
        offsets.append(posterior @ precision @ MEAN)
        gains.append(posterior * a / v)
    return np.stack(offsets), np.stack(gains)


def exact_denoiser(xt, t):
    """For x [B, 4]."""
    a, v = (jnp.asarray(c, jnp.float32)[t][:, None] for c in reference.forward_kernels(BETAS))
    offset, gain = (jnp.asarray(part, jnp.float32)[t] for part in exact_x0(TOTAL))
    x0 = offset + jnp.einsum("bij,bj->bi", gain, xt, precision="highest")
    return Denoised(x0, (xt - a * x0) / jnp.sqrt(v))


def law(mean, cov, moves, timesteps, painted, sampler="ddpm", variance="fixed_small", total=TOTAL):
    """Mean and covariance at the end of a walk that starts from N(mean, cov): every move is linear with Gaussian noise."""
    betas = reference.visited_betas(reference.linear_betas(total), timesteps)
    lines = [(offset, gain) for offset, gain in zip(*exact_x0(total), strict=True)]
    down_maps = [down_map(betas, lines[t], i, painted, sampler, variance) for i, t in enumerate(timesteps)]
    for i, down in moves:
        if down:
            offset, gain, noise = down_maps[i]
            mean, cov = offset + gain @ mean, gain @ cov @ gain.T + np.diag(noise)
        else:
            mean, cov = math.sqrt(1 - betas[i]) * mean, (1 - betas[i]) * cov + betas[i] * np.eye(4)
    return mean, cov


def down_map(betas, line, i, painted, sampler, variance):
    """x -> offset + gain x + N(0, diag noise) of one step down, read off the reference's at x = 0 and the unit vectors."""
    a, v = reference.forward_kernels(betas)

    def step(x):
        x0 = line[0] + line[1] @ x
        if sampler == "ddpm":
            return reference.p_sample(betas, x0, x, i, variance, 0.0)
        return reference.ddim_step(betas, x0, (x - a[i] * x0) / math.sqrt(v[i]), i, 0.0, 0.0)

    offset = step(np.zeros(4))
    gain = np.stack([step(unit) - offset for unit in np.eye(4)], axis=1)
    noise = reference.p_variance(betas, i, variance) if sampler == "ddpm" else 0.0
    a_prev, v_prev = (a[i - 1], v[i - 1]) if i else (1.0, 0.0)
    gain[~painted] = 0.0
    return np.where(painted, offset, a_prev * IMAGE), gain, np.where(painted, noise, v_prev)


def conditional():
    """The exact law of the painted pixels given the others: the block of the precision, and what it says of the mean."""
    precision = np.linalg.inv(COV)
    cov = np.linalg.inv(precision[np.ix_(PAINTED, PAINTED)])
    mean = MEAN[PAINTED] - cov @ precision[np.ix_(PAINTED, ~PAINTED)] @ (IMAGE - MEAN)[~PAINTED]
    return mean, cov


def divergence(law):
    """KL(law || exact conditional) of the painted pixels, in nats."""
    mean, cov = law[0][PAINTED], law[1][np.ix_(PAINTED, PAINTED)]
    target_mean, target_cov = conditional()
    precision, difference = np.linalg.inv(target_cov), target_mean - mean
    spread = np.trace(precision @ cov) - len(mean) + np.log(np.linalg.det(target_cov) / np.linalg.det(cov))
    return 0.5 * float(spread + difference @ precision @ difference)


def assert_has_law(samples, mean, cov):
    """Whitened by the law, samples [N, D] are standard normal: means, variances, correlations, and the whole distribution."""
    count, dim = samples.shape
    z = np.linalg.solve(np.linalg.cholesky(cov), (np.asarray(samples, np.float64) - mean).T).T
    assert scipy.stats.chi2.sf(count * np.sum(z.mean(0) ** 2), dim) > P_VALUE
    tail = scipy.stats.chi2.sf(np.sum(z**2), z.size)
    assert 2 * min(tail, 1 - tail) > P_VALUE
    correlations = np.corrcoef(z.T)[np.triu_indices(dim, 1)] * math.sqrt(count)
    assert scipy.stats.chi2.sf(np.sum(correlations**2), len(correlations)) > P_VALUE
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > P_VALUE


def images(count):
    return jnp.asarray(np.broadcast_to(IMAGE, (count, 4)), jnp.float32)


# Interpolation


def reference_slerp(x, y, share):
    """The formula as it stands, in float64."""
    angle = math.acos(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))
    return (math.sin((1 - share) * angle) * x + math.sin(share * angle) * y) / math.sin(angle)


def noises(seed, count, shape=(28, 28, 1)):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def test_interpolation_equals_the_formula():
    start, end = noises(0, 2)
    shares = np.linspace(0, 1, 11)
    actual = interpolate(jnp.asarray(start), jnp.asarray(end), jnp.asarray(shares, jnp.float32))
    expected = [reference_slerp(start.astype(np.float64), end.astype(np.float64), share) for share in shares]
    assert actual.dtype == jnp.float32
    assert_close(actual, np.stack(expected))
    assert_close(actual[0], start)
    assert_close(actual[-1], end)


def test_interpolation_keeps_norm_and_normality():
    """Of 100 pairs; the straight line in between has half the variance."""
    starts, ends = noises(1, 100, (8, 5, 1)), noises(2, 100, (8, 5, 1))
    middle = jax.vmap(functools.partial(interpolate, share=jnp.array([0.5])))(jnp.asarray(starts), jnp.asarray(ends))[:, 0]
    assert scipy.stats.kstest(np.ravel(middle), "norm").pvalue > P_VALUE
    assert scipy.stats.kstest(np.ravel((starts + ends) / 2), "norm").pvalue < P_VALUE
    start, end = starts[0], ends[0] * np.linalg.norm(starts[0]) / np.linalg.norm(ends[0])
    points = interpolate(jnp.asarray(start), jnp.asarray(end), jnp.linspace(0.0, 1.0, 7))
    lengths = np.linalg.norm(np.asarray(points, np.float64).reshape(7, -1), axis=1)
    assert_close(lengths, np.full(7, np.linalg.norm(start)))
    steps = np.diff(np.asarray(points, np.float64), axis=0).reshape(6, -1)
    assert_close(np.linalg.norm(steps, axis=1), np.full(6, np.linalg.norm(steps[0])), rtol=1e-4)  # differences of near points


@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-5, 1e-3, 0.1])
def test_interpolation_between_neighbours(distance):
    """Where the angle is too small for arccos in float32; the exact point lies within distance^2 of the straight line's."""
    start, direction = noises(3, 2)
    end = start + np.float32(distance) * direction
    actual = interpolate(jnp.asarray(start), jnp.asarray(end), jnp.array([0.3]))[0]
    x, y = start.astype(np.float64), end.astype(np.float64)
    expected = reference_slerp(x, y, 0.3) if distance >= 1e-3 else 0.7 * x + 0.3 * y
    assert_close(actual, expected)


# Image to image


@pytest.mark.parametrize(
    ("strength", "num_steps", "settings"),
    [(1.0, None, {"variance": "fixed_small"}), (0.4, None, {"variance": "fixed_large"}), (0.5, 8, {"spacing": "quadratic"}),
     (0.3, None, {"sampler": "ddim"}), (0.3, 100, {"sampler": "ddim"})],
)  # fmt: skip
def test_image_to_image_has_the_law_of_its_walk(schedule, strength, num_steps, settings):
    """From q(xt | x0) of the image down; at strength 1 that is the law of sampling itself."""
    samples = image_to_image(jax.random.key(0), schedule, exact_denoiser, images(COUNT), strength, num_steps, **settings)
    start = round(strength * TOTAL) - 1
    count = min(num_steps or TOTAL, start + 1)
    timesteps = spaced_timesteps(count, start + 1, settings.get("spacing", "uniform"))
    a, v = (coefficient[start] for coefficient in reference.forward_kernels(BETAS))
    moves = [(i, True) for i in reversed(range(count))]
    everywhere = np.ones(4, bool)
    method = {"sampler": settings.get("sampler", "ddpm"), "variance": settings.get("variance", "fixed_large")}
    assert_has_law(samples, *law(a * IMAGE, v * np.eye(4), moves, timesteps, everywhere, **method))
    if strength == 1:
        assert_has_law(samples, *law(np.zeros(4), np.eye(4), moves, timesteps, everywhere, **method))


@pytest.mark.parametrize("strength", [0.0, 0.009])
def test_strength_0_returns_the_image(schedule, strength):
    x0 = images(3)
    np.testing.assert_array_equal(image_to_image(jax.random.key(1), schedule, exact_denoiser, x0, strength), x0)
    frames = image_to_image(jax.random.key(1), schedule, exact_denoiser, x0, strength, trajectory=5)
    np.testing.assert_array_equal(frames, x0[None])


def test_a_weak_edit_stays_near_and_a_strong_one_goes_far(schedule):
    distances = [
        float(
            jnp.mean(jnp.abs(image_to_image(jax.random.key(2), schedule, exact_denoiser, images(500), strength) - images(500)))
        )
        for strength in (0.1, 0.4, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_the_noise_of_an_edit_is_that_of_sampling(schedule):
    """Image i starts from the x_T that `sample` would start from, so that strength 1 ends close to its image."""
    keys = jax.random.split(jax.random.key(3), 4)
    frames = image_to_image(keys, schedule, exact_denoiser, images(4), 1.0, sampler="ddim", trajectory=2)
    start = ddpm.sample(keys, schedule, exact_denoiser, (4, 4), sampler="ddim", trajectory=2)[0]
    assert_close(frames[0], reference.q_sample(BETAS, IMAGE, TOTAL - 1, np.asarray(start, np.float64)))


def test_the_trajectory_of_an_edit(schedule):
    frames = image_to_image(jax.random.key(4), schedule, exact_denoiser, images(2), 0.4, 10, sampler="ddim", trajectory=True)
    assert frames.shape == (11, 2, 4)


# RePaint: the walk


@pytest.mark.parametrize(("num_steps", "num_resamples"), [(1, 1), (5, 1), (5, 3), (12, 2)])
def test_the_walk_with_jumps_of_one_is_algorithm_1(num_steps, num_resamples):
    expected = []
    for t in range(num_steps, 0, -1):
        for u in range(1, num_resamples + 1):
            expected.append((t - 1, 1))
            if u < num_resamples and t > 1:
                expected.append((t - 1, 0))
            if t == 1:
                break  # nothing random is left to repeat
    assert_walks_equal(repaint_moves(num_steps, 1, num_resamples), expected)


def assert_walks_equal(moves, expected):
    """Resampling before the next step down, as in Algorithm 1, or after it has been made, is the same walk of levels."""
    assert levels(moves) == levels(expected)


def levels(moves):
    """The number of steps left before the first move and after each; every move must start where the last one ended."""
    out = []
    for t, down in np.asarray(moves).tolist():
        before, after = (t + 1, t) if down else (t, t + 1)
        assert not out or out[-1] == before
        out = [*(out or [before]), after]
    return out


@pytest.mark.parametrize(("num_steps", "jump_length", "num_resamples"), [(20, 10, 3), (21, 10, 3), (17, 4, 2), (250, 10, 10)])
def test_the_walk_with_long_jumps(num_steps, jump_length, num_resamples):
    """It ends at the image, and jumps back from 1, 1 + j, 1 + 2j, ... steps before it, as often as asked and by j steps."""
    walk = levels(repaint_moves(num_steps, jump_length, num_resamples))
    assert (walk[0], walk[-1]) == (num_steps, 0) and max(walk) <= num_steps and walk.count(0) == 1
    turns = [i for i in range(1, len(walk) - 1) if walk[i - 1] > walk[i] < walk[i + 1]]
    expected = [level for level in range(num_steps - jump_length, 0, -1) if level % jump_length == 1]
    assert [walk[i] for i in turns] == [level for level in expected for _ in range(num_resamples - 1)]
    for i in turns:
        assert walk[i : i + 2 * jump_length + 1] == [walk[i] + min(n, 2 * jump_length - n) for n in range(2 * jump_length + 1)]


def test_the_walk_of_the_papers_face_experiments():
    """T = 250, jumps of 10, 10 resamplings (section 5.1): 250 steps down, and 24 jumps of 9 x (10 up + 10 down)."""
    moves = repaint_moves(250, 10, 10)
    assert len(moves) == 250 + 24 * 9 * 20
    assert moves[:, 1].sum() == 250 + 24 * 9 * 10


# RePaint: what it draws


def paint(schedule, num_resamples, count=COUNT, key=5, **settings):
    mask = jnp.asarray(PAINTED)[None]
    return inpaint(jax.random.key(key), schedule, exact_denoiser, images(count), mask, num_resamples=num_resamples, **settings)


@pytest.mark.parametrize(
    ("num_steps", "num_resamples", "jump_length", "method"),
    [(TOTAL, 1, 1, {"variance": "fixed_small"}), (20, 3, 1, {"variance": "fixed_small"}),
     (20, 4, 5, {"variance": "fixed_large"}), (20, 3, 4, {"sampler": "ddim"})],
)  # fmt: skip
def test_inpainting_has_the_law_of_the_walk(schedule, num_steps, num_resamples, jump_length, method):
    """Against the linear recursion in float64; the kept pixels are exact."""
    samples = np.asarray(paint(schedule, num_resamples, num_steps=num_steps, jump_length=jump_length, **method))
    np.testing.assert_array_equal(samples[:, ~PAINTED], np.asarray(images(COUNT))[:, ~PAINTED])
    timesteps, moves = spaced_timesteps(num_steps, TOTAL), repaint_moves(num_steps, jump_length, num_resamples)
    mean, cov = law(np.zeros(4), np.eye(4), moves, timesteps, PAINTED, **method)
    assert_has_law(samples[:, PAINTED], mean[PAINTED], cov[np.ix_(PAINTED, PAINTED)])


def test_more_resampling_comes_nearer_to_the_exact_conditional(schedule):
    """In 50 steps, by the samples and by the law of the walk, whose divergences agree."""
    exact, measured = [], []
    for num_resamples in (1, 3, 10):
        moves = repaint_moves(TOTAL, 1, num_resamples)
        exact.append(divergence(law(np.zeros(4), np.eye(4), moves, range(TOTAL), PAINTED)))
        samples = np.asarray(paint(schedule, num_resamples, jump_length=1, variance="fixed_small"), np.float64)
        measured.append(divergence((samples.mean(0), np.cov(samples.T))))
    assert measured[0] > 3 * measured[1] > 6 * measured[2]
    np.testing.assert_allclose(measured, exact, rtol=0.05)  # 20,000 samples


@pytest.mark.parametrize("jump_length", [1, 2, 5])
def test_the_walk_converges_to_the_exact_conditional(jump_length):
    """As resamplings and timesteps grow; by its law. At first it is 5 nats away."""
    start = np.zeros(4), np.eye(4)

    def distance(total, num_resamples):
        moves = repaint_moves(total, jump_length, num_resamples)
        return divergence(law(*start, moves, range(total), PAINTED, total=total))

    assert 5 < distance(400, 1) < distance(200, 1)
    by_resamples = [distance(200, num_resamples) for num_resamples in (1, 2, 4, 8, 16)]
    assert all(after < before for before, after in itertools.pairwise(by_resamples))
    by_timesteps = [distance(total, 20) for total in (50, 100, 200, 400)]
    assert all(after < before / 2 or after < 0.04 for before, after in itertools.pairwise(by_timesteps))
    assert by_timesteps[-1] < 0.04


def test_what_is_under_the_mask_has_no_influence(schedule):
    keys = jax.random.split(jax.random.key(6), 5)
    mask = jnp.asarray(PAINTED)[None]
    other = jnp.where(mask, 5.0, images(5))
    draw = jax.jit(lambda x0: inpaint(keys, schedule, exact_denoiser, x0, mask, num_steps=20, num_resamples=2))
    np.testing.assert_array_equal(draw(other)[:, PAINTED], draw(images(5))[:, PAINTED])


def test_an_inpainted_image_with_a_key_of_its_own_does_not_depend_on_its_batch(schedule):
    keys, mask = jax.random.split(jax.random.key(7), 4), jnp.asarray(PAINTED)[None]
    settings = {"num_steps": 12, "num_resamples": 3, "jump_length": 4}
    batch = inpaint(keys, schedule, exact_denoiser, images(4), mask, **settings)
    assert len(np.unique(np.asarray(batch)[:, PAINTED], axis=0)) == 4
    assert_close(inpaint(keys[2:3], schedule, exact_denoiser, images(1), mask, **settings)[0], batch[2])


def test_kept_pixels_are_exact_with_a_network(schedule):
    """Also with a learned variance and masks of their own for every image and channel."""
    generator = np.random.default_rng(8)
    x0 = jnp.asarray(generator.uniform(-1, 1, (5, 6, 6, 3)), jnp.float32)
    mask = jnp.asarray(generator.random((5, 6, 6, 3)) < 0.5)
    denoiser = make_denoiser(schedule, lambda xt, t: jnp.concatenate([jnp.sin(3 * xt), jnp.cos(xt)], -1), "v")
    for settings in ({"variance": "learned_range"}, {"sampler": "ddim", "eta": 0.5}):
        painted = inpaint(jax.random.key(9), schedule, denoiser, x0, mask, num_steps=12, num_resamples=2, **settings)
        np.testing.assert_array_equal(jnp.where(mask, 0, painted), jnp.where(mask, 0, x0))
        assert jnp.isfinite(painted).all() and jnp.abs(painted).max() <= 1
        assert jnp.mean(jnp.abs(painted - x0)[mask]) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jump_length": 0}, "jump_length = 0"),
        ({"num_resamples": 0}, "num_resamples = 0"),
        ({"num_steps": 10}, "jump_length = 10 must be below the 10 steps"),
        ({"num_steps": TOTAL + 1}, "choose 1 to 50"),
        ({"sampler": Sampler(lambda *args: args[3:], memory=1)}, "builds upon earlier steps"),
        ({"sampler": "eular"}, "unknown sampler 'eular'"),
        ({"sampler": "ddim", "eta": 2.0}, r"eta must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments_of_inpainting(schedule, settings, message):
    with pytest.raises(ValueError, match=message):
        inpaint(jax.random.key(0), schedule, exact_denoiser, images(2), jnp.asarray(PAINTED)[None], **settings)


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_bad_strength(schedule, strength):
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]"):
        image_to_image(jax.random.key(0), schedule, exact_denoiser, images(2), strength)
