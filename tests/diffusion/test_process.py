"""The forward process, its posterior, the three predictions, and one reverse step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import ATOL, P_VALUE, assert_close

from ddpm_jax import (
    Denoised,
    make_denoiser,
    make_schedule,
    p_sample,
    predict_eps,
    predict_v,
    predict_x0,
    q_posterior,
    q_sample,
    rescale_zero_terminal_snr,
    sample,
)
from ddpm_jax.diffusion.process import dynamic_threshold, p_log_variance

BETAS = reference.linear_betas(1000)
T = np.array([0, 1, 2, 500, 998, 999], np.int32)
SHAPE = (len(T), 4, 3, 2)
PREDICT = {"x0": predict_x0, "eps": predict_eps, "v": predict_v}


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", 1000)


def random_images(seed, *names, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in names]


def each(function, *arrays, t=T):
    """function(*rows, t) for each image, stacked."""
    return np.stack([function(*(array[i] for array in arrays), t[i]) for i in range(len(t))])


def constant_denoiser(x0, eps=None):
    return lambda xt, t: Denoised(jnp.broadcast_to(x0, xt.shape), jnp.zeros_like(xt) if eps is None else eps)


# The forward process and its posterior


def test_q_sample_is_the_composition_of_one_step_kernels(schedule):
    x0, eps = random_images(0, "x0", "eps")
    xt = q_sample(schedule, jnp.asarray(x0), jnp.asarray(T), jnp.asarray(eps))
    assert xt.dtype == jnp.float32
    assert_close(xt, each(lambda x0, eps, t: reference.q_sample(BETAS, x0, t, eps), x0, eps))


def test_q_posterior_is_bayes_rule(schedule):
    x0, xt = random_images(1, "x0", "xt")
    mean, variance, log_variance = q_posterior(schedule, jnp.asarray(x0), jnp.asarray(xt), jnp.asarray(T))
    assert mean.dtype == variance.dtype == log_variance.dtype == jnp.float32
    assert_close(mean, each(lambda x0, xt, t: reference.q_posterior(BETAS, x0, xt, t)[0], x0, xt))
    expected = np.array([reference.q_posterior(BETAS, 0.0, 0.0, t)[1] for t in T])
    assert variance.shape == log_variance.shape == (len(T), 1, 1, 1)
    assert_close(variance.ravel(), expected, atol=0)
    assert_close(log_variance.ravel()[1:], np.log(expected[1:]))
    assert log_variance.ravel()[0] == log_variance.ravel()[1]


def test_q_posterior_at_zero_is_x0_itself(schedule):
    x0, xt = map(jnp.asarray, random_images(2, "x0", "xt"))
    mean, variance, _ = q_posterior(schedule, x0, xt, jnp.zeros(len(T), jnp.int32))
    np.testing.assert_array_equal(mean, x0)
    assert (variance == 0).all()


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 2, 2, 3)])
def test_images_of_any_rank(schedule, shape):
    x0, eps = random_images(3, "x0", "eps", shape=shape)
    xt = q_sample(schedule, jnp.asarray(x0), jnp.asarray(T), jnp.asarray(eps))
    assert_close(xt, each(lambda x0, eps, t: reference.q_sample(BETAS, x0, t, eps), x0, eps))


# What a network may predict


def exact_views(seed, t):
    """xt and the eps, x0 and v that belong to it, float64, for one image at each t."""
    x0, eps = (array.astype(np.float64) for array in random_images(seed, "x0", "eps"))
    a, v = reference.forward_kernels(BETAS)
    a, s = (coefficient[t].reshape(-1, 1, 1, 1) for coefficient in (a, np.sqrt(v)))
    return a * x0 + s * eps, {"x0": x0, "eps": eps, "v": a * eps - s * x0}, np.minimum(a, s)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 999), min_size=6, max_size=6))
def test_each_prediction_gives_the_other_two(seed, t):
    schedule = make_schedule("linear", 1000)
    xt, views, smallest = exact_views(seed, np.array(t))
    for given_as, output in views.items():
        for wanted, truth in views.items():
            xt32, output32 = jnp.asarray(xt, jnp.float32), jnp.asarray(output, jnp.float32)
            actual = PREDICT[wanted](schedule, xt32, jnp.asarray(t, jnp.int32), output32, given_as)
            assert actual.dtype == jnp.float32
            # x0 from eps divides by a, eps from x0 by s: the rounding of xt grows by as much (160 and 100 at the ends).
            error = np.abs(np.asarray(actual, np.float64) - truth) - reference.RTOL * np.abs(truth)
            assert (error <= ATOL / smallest).all(), (given_as, wanted)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [True, False])
def test_denoiser(schedule, prediction, clip):
    t = np.array([10, 100, 300, 500, 700, 900], np.int32)  # a and s above .01: see the tolerance
    xt, views, _ = exact_views(4, t)
    denoiser = make_denoiser(schedule, lambda xt, t: jnp.asarray(views[prediction], jnp.float32), prediction, clip)
    x0, eps, log_variance = denoiser(jnp.asarray(xt, jnp.float32), jnp.asarray(t))
    a, v = (coefficient[t].reshape(-1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
    expected = np.clip(views["x0"], -1, 1) if clip else views["x0"]
    assert clip == (np.abs(x0).max() <= 1)
    # Dividing by a or s, .018 or more here, magnifies the rounding of xt, 2e-7, up to fifty-fold.
    assert_close(x0, expected, rtol=1e-4, atol=1e-5)
    assert_close(eps, (xt - a * expected) / np.sqrt(v), rtol=1e-4, atol=1e-5)
    assert log_variance is None


def test_denoiser_clips_by_default_and_reads_the_network_as_eps(schedule):
    xt, views, _ = exact_views(5, T)
    arrays = jnp.asarray(xt, jnp.float32), jnp.asarray(T)

    def network(xt, t):
        return jnp.asarray(views["eps"], jnp.float32)

    default, explicit = make_denoiser(schedule, network)(*arrays), make_denoiser(schedule, network, "eps", True)(*arrays)
    np.testing.assert_array_equal(default.x0, explicit.x0)
    np.testing.assert_array_equal(default.eps, explicit.eps)


def test_the_network_sees_what_the_denoiser_is_given(schedule):
    (xt,) = map(jnp.asarray, random_images(6, "xt"))
    seen = []

    def network(xt, t):
        seen.append((xt, t))
        return xt

    make_denoiser(schedule, network)(xt, jnp.asarray(T))
    ((seen_xt, seen_t),) = seen
    np.testing.assert_array_equal(seen_xt, xt)
    np.testing.assert_array_equal(seen_t, T)


def test_a_bfloat16_network_gives_float32(schedule):
    (xt,) = map(jnp.asarray, random_images(7, "xt"))
    output = xt.astype(jnp.bfloat16)
    for clip in (True, False):
        half = make_denoiser(schedule, lambda xt, t: output, "v", clip)(xt, jnp.asarray(T))
        full = make_denoiser(schedule, lambda xt, t: output.astype(jnp.float32), "v", clip)(xt, jnp.asarray(T))
        for actual, expected in zip(half[:2], full[:2], strict=True):
            assert actual.dtype == jnp.float32
            np.testing.assert_array_equal(actual, expected)


# One reverse step


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_p_sample_equals_the_reference(schedule, variance):
    """With one key for all images their noise is the same, so a step from x0 = xt = 0 shows it; the rest is Bayes."""
    x0, xt = random_images(8, "x0", "xt")
    keys = jnp.repeat(jax.random.key(9)[None], len(T))
    zeros = jnp.zeros(SHAPE)
    deviations = np.array([np.sqrt(reference.p_variance(BETAS, t, variance)) for t in T])

    scaled_noise = np.asarray(
        p_sample(keys, schedule, constant_denoiser(jnp.zeros(())), zeros, jnp.asarray(T), variance), np.float64
    )
    noise = scaled_noise[1] / deviations[1]
    assert_close(scaled_noise, deviations.reshape(-1, 1, 1, 1) * noise)

    actual = p_sample(keys, schedule, constant_denoiser(jnp.asarray(x0)), jnp.asarray(xt), jnp.asarray(T), variance)
    assert actual.dtype == jnp.float32
    assert_close(actual, each(lambda x0, xt, t: reference.p_sample(BETAS, x0, xt, t, variance, noise), x0, xt))


@pytest.mark.parametrize("per_image", [False, True])
def test_the_noise_of_p_sample_is_normal(schedule, per_image):
    shape = (200, 10, 10, 1)
    key = jax.random.key(10)
    keys = jax.random.split(key, 200) if per_image else key
    step = p_sample(keys, schedule, constant_denoiser(jnp.zeros(())), jnp.zeros(shape), jnp.full(200, 500), "fixed_large")
    noise = np.asarray(step) / np.sqrt(BETAS[500])
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > P_VALUE
    # Independent from image to image and from pixel to pixel: the mean of 200 is N(0, 1/200), and that of 100 alike.
    assert scipy.stats.kstest(noise.mean(0).ravel() * np.sqrt(200), "norm").pvalue > P_VALUE
    assert scipy.stats.kstest(noise.mean((1, 2, 3)) * 10, "norm").pvalue > P_VALUE


def test_p_sample_adds_no_noise_at_zero(schedule):
    x0, xt = map(jnp.asarray, random_images(11, "x0", "xt"))
    for seed in (0, 1):
        step = p_sample(jax.random.key(seed), schedule, constant_denoiser(x0), xt, jnp.zeros(len(T), jnp.int32))
        np.testing.assert_array_equal(step, x0)


def test_the_default_variance_is_large(schedule):
    x0, xt = map(jnp.asarray, random_images(12, "x0", "xt"))
    arguments = (jax.random.key(0), schedule, constant_denoiser(x0), xt, jnp.asarray(T))
    np.testing.assert_array_equal(p_sample(*arguments), p_sample(*arguments, variance="fixed_large"))
    assert not np.array_equal(p_sample(*arguments), p_sample(*arguments, variance="fixed_small"))


def test_log_variances(schedule):
    large, small = p_log_variance(schedule, "fixed_large"), p_log_variance(schedule, "fixed_small")
    assert large.dtype == small.dtype == jnp.float32
    assert_close([large[0], small[0]], [-9.81672513529567] * 2)
    assert_close(large[1:], np.log(BETAS[1:]))
    assert_close(small[1:], np.log(reference.posterior_coefficients(BETAS)[2][1:]))


def test_an_image_with_a_key_of_its_own_does_not_depend_on_its_batch(schedule):
    x0, xt = map(jnp.asarray, random_images(13, "x0", "xt"))
    keys = jax.random.split(jax.random.key(14), len(T))
    batch = p_sample(keys, schedule, constant_denoiser(x0), xt, jnp.asarray(T))
    for i in range(len(T)):
        alone = p_sample(keys[i : i + 1], schedule, constant_denoiser(x0[i]), xt[i : i + 1], jnp.asarray(T[i : i + 1]))
        np.testing.assert_array_equal(alone[0], batch[i])


def test_raw_keys_are_keys(schedule):
    x0, xt = map(jnp.asarray, random_images(15, "x0", "xt"))
    arguments = (schedule, constant_denoiser(x0), xt, jnp.asarray(T))
    typed, raw = jax.random.key(16), jax.random.PRNGKey(16)
    np.testing.assert_array_equal(p_sample(raw, *arguments), p_sample(typed, *arguments))
    one_each = p_sample(jax.random.split(raw, len(T)), *arguments)
    np.testing.assert_array_equal(one_each, p_sample(jax.random.split(typed, len(T)), *arguments))
    assert not np.array_equal(one_each, p_sample(raw, *arguments))


def test_the_wrong_number_of_keys(schedule):
    x0, xt = map(jnp.asarray, random_images(17, "x0", "xt"))
    with pytest.raises(ValueError, match=r"needs 6 keys, not \(5,\)"):
        p_sample(jax.random.split(jax.random.key(0), 5), schedule, constant_denoiser(x0), xt, jnp.asarray(T))


def test_unknown_names(schedule):
    x0, xt = map(jnp.asarray, random_images(18, "x0", "xt"))
    t = jnp.asarray(T)
    # Unwrapped: the type checks of the test session would catch a wrong name before the function does.
    with pytest.raises(ValueError, match=r"unknown variance 'medium': choose fixed_small, fixed_large or learned_range"):
        inspect.unwrap(p_log_variance)(schedule, "medium")
    for predict in PREDICT.values():
        with pytest.raises(ValueError, match=r"unknown prediction 'score': choose eps, x0 or v"):
            inspect.unwrap(predict)(schedule, xt, t, x0, "score")
    with pytest.raises(ValueError, match=r"unknown prediction 'score': choose eps, x0 or v"):
        inspect.unwrap(make_denoiser)(schedule, lambda xt, t: xt, "score")
    with pytest.raises(ValueError, match=r"unknown way to clip 'hard': choose True, False or 'dynamic'"):
        inspect.unwrap(make_denoiser)(schedule, lambda xt, t: xt, "v", "hard")


# Dynamic thresholding


def plain_threshold(image, quantile=0.995):
    """Section 2.3 of Saharia et al. (2022) for one image, the quantile interpolated between the sorted values around it."""
    values = np.sort(np.abs(image).ravel())
    place = quantile * (len(values) - 1)
    below = int(place)
    s = values[below] + (place - below) * (values[min(below + 1, len(values) - 1)] - values[below])
    return np.clip(image, -s, s) / s if s > 1 else image


@pytest.mark.parametrize("shape", [(6, 16, 16, 3), (6, 7), (6, 2, 2, 1)])
def test_dynamic_threshold_equals_the_reference(shape):
    x0 = (np.random.default_rng(20).standard_normal(shape) * np.linspace(0.1, 3, 6).reshape(6, *[1] * (len(shape) - 1))).astype(
        "f4"
    )
    got = dynamic_threshold(jnp.asarray(x0), 1)
    assert_close(got, np.stack([plain_threshold(image.astype(np.float64)) for image in x0]))
    for i in range(6):
        assert_close(dynamic_threshold(jnp.asarray(x0[i]), 0), got[i])


def test_dynamic_threshold_leaves_images_within_the_range_alone():
    x0 = np.random.default_rng(21).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
    np.testing.assert_array_equal(dynamic_threshold(jnp.asarray(x0), 1), x0)


def test_denoiser_with_a_dynamic_threshold(schedule):
    t = np.array([10, 100, 300, 500, 700, 900], np.int32)
    xt, views, _ = exact_views(22, t)
    denoiser = make_denoiser(schedule, lambda xt, t: jnp.asarray(3 * views["x0"], jnp.float32), "x0", "dynamic")
    x0, eps, _ = denoiser(jnp.asarray(xt, jnp.float32), jnp.asarray(t))
    expected = np.stack([plain_threshold(3 * image) for image in views["x0"]])
    a, v = (coefficient[t].reshape(-1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
    assert np.abs(expected).max() == 1
    assert_close(x0, expected)
    assert_close(eps, (xt - a * expected) / np.sqrt(v), rtol=1e-4, atol=1e-5)  # see test_denoiser


# Zero terminal SNR


def test_zero_terminal_snr_refuses_eps(schedule):
    rescaled = rescale_zero_terminal_snr(schedule)
    with pytest.raises(ValueError, match=r"prediction eps tells nothing of x0 where alpha_bar = 0 .*: choose x0 or v"):
        make_denoiser(rescaled, lambda xt, t: xt)
    with pytest.raises(ValueError, match="prediction eps"):
        jax.jit(lambda xt: make_denoiser(rescaled, lambda xt, t: xt)(xt, jnp.zeros(2, jnp.int32)))(jnp.zeros((2, 3)))
    make_denoiser(schedule, lambda xt, t: xt)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_pure_noise_tells_x0_by_the_network_alone(schedule, prediction):
    """At the last step xt = eps, v = -x0, and x_{t-1} is drawn around what the network says: N(sqrt(ab) x0, 1 - ab)."""
    rescaled = rescale_zero_terminal_snr(schedule)
    x0, eps = random_images(23, "x0", "eps")
    t, x0, eps = jnp.full(6, 999, jnp.int32), jnp.asarray(x0), jnp.asarray(eps)
    xt = q_sample(rescaled, x0, t, eps)
    np.testing.assert_array_equal(xt, eps)
    output = predict_v(rescaled, xt, t, x0, "x0") if prediction == "v" else x0
    np.testing.assert_array_equal(output, -x0 if prediction == "v" else x0)
    denoised = make_denoiser(rescaled, lambda xt, t: output, prediction, clip=False)(xt, t)
    np.testing.assert_array_equal(denoised.x0, x0)
    np.testing.assert_array_equal(denoised.eps, eps)
    mean, variance, _ = q_posterior(rescaled, x0, xt, t)
    alpha_bar = float(rescaled.alpha_bar[998])
    assert_close(mean, np.sqrt(alpha_bar) * np.asarray(x0))
    assert_close(variance, np.full((6, 1, 1, 1), 1 - alpha_bar))


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_zero_terminal_snr_samples_gaussian_data(prediction, sampler):
    """Data N(0.3, 0.2^2) and their exact denoiser: the first step starts from x0 = 0.3, and 4000 images have its law."""
    schedule = rescale_zero_terminal_snr(make_schedule("linear", 50))
    a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar

    def network(xt, t):
        a_t, s_t = a[t][:, None], s[t][:, None]
        x0 = (0.3 * s_t**2 + 0.04 * a_t * xt) / (s_t**2 + 0.04 * a_t**2)
        return x0 if prediction == "x0" else (a_t * xt - x0) / s_t

    for num_steps in (1, 2, 10, 50):
        denoiser = make_denoiser(schedule, network, prediction)
        images = sample(jax.random.key(24), schedule, denoiser, (4000, 1), sampler, num_steps, variance="fixed_small")
        assert np.isfinite(images).all()
        if num_steps == 1:
            assert_close(images, np.full((4000, 1), 0.3))
    mean, variance = reference.gaussian_chain(
        reference.zero_terminal_betas(reference.linear_betas(50)), np.array(0.3), 0.2, range(50), sampler, "fixed_small"
    )
    images = np.asarray(images, np.float64)
    assert 2 * scipy.stats.norm.sf(abs(images.mean() - mean) / np.sqrt(variance / 4000)) > P_VALUE
    upper = scipy.stats.chi2.sf(np.sum((images - mean) ** 2) / variance, 4000)
    assert 2 * min(upper, 1 - upper) > P_VALUE


# Under JAX's transformations


def apply_q_sample(schedule, key, x0, xt, t):
    return q_sample(schedule, x0, t, xt)


def apply_q_posterior(schedule, key, x0, xt, t):
    return q_posterior(schedule, x0, xt, t)[0]


def apply_p_sample(schedule, key, x0, xt, t):
    return p_sample(key, schedule, lambda xt, t: Denoised(jnp.tanh(x0 + xt), xt), xt, t)


FUNCTIONS = pytest.mark.parametrize("function", [apply_q_sample, apply_q_posterior, apply_p_sample])


def transform_arguments():
    """16 images: x0, xt, t, and a key for each."""
    x0, xt = map(jnp.asarray, random_images(19, "x0", "xt", shape=(16, 4, 3, 2)))
    t = jnp.asarray(np.append(np.arange(0, 900, 60), 999), jnp.int32)
    return jax.random.split(jax.random.key(20), 16), x0, xt, t


@FUNCTIONS
def test_jit(schedule, function):
    arguments = transform_arguments()
    assert_close(jax.jit(function)(schedule, *arguments), function(schedule, *arguments))


@FUNCTIONS
def test_vmap_over_images_with_a_scalar_t(schedule, function):
    arguments = transform_arguments()
    alone = jax.vmap(lambda *image: function(schedule, *image))(*arguments)
    assert_close(alone, function(schedule, *arguments))


@FUNCTIONS
def test_vmap_over_batches(schedule, function):
    arguments = transform_arguments()
    batches = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), arguments)
    assert_close(
        jax.vmap(lambda *batch: function(schedule, *batch))(*batches).reshape(arguments[1].shape),
        function(schedule, *arguments),
    )


@FUNCTIONS
def test_grad(schedule, function):
    """The derivatives by x0 and xt are the coefficients of the reference."""
    keys, x0, xt, t = transform_arguments()

    def total(x0, xt):
        return function(schedule, keys, x0, xt, t).sum()

    by_x0, by_xt = jax.grad(total, (0, 1))(x0, xt)
    if function is apply_q_sample:
        a, v = reference.forward_kernels(BETAS)
        expected = a, np.sqrt(v)
    else:
        expected = reference.posterior_coefficients(BETAS)[:2]
    c0, ct = (np.broadcast_to(coefficient[t].reshape(-1, 1, 1, 1), x0.shape) for coefficient in expected)
    if function is apply_p_sample:  # x0 is tanh(x0 + xt) there
        slope = 1 / np.cosh(np.asarray(x0 + xt, np.float64)) ** 2
        c0, ct = c0 * slope, ct + c0 * slope
    assert_close(by_x0, c0)
    assert_close(by_xt, ct)


@FUNCTIONS
def test_pmap_over_eight_devices_equals_sharded_jit_and_one_device(schedule, function):
    assert jax.device_count() == 8
    arguments = transform_arguments()
    plain = function(schedule, *arguments)

    by_device = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), arguments)
    pmapped = jax.pmap(lambda *shard: function(schedule, *shard))(*by_device)
    assert len(pmapped.sharding.device_set) == 8
    assert_close(pmapped.reshape(plain.shape), plain)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(function)(schedule, *jax.device_put(arguments, sharding))
    assert len(sharded.sharding.device_set) == 8
    assert_close(sharded, plain)
