"""Guidance on a mixture of two Gaussian classes, whose densities are known at every noise level.

The networks are the exact ones; what guidance makes of them is compared with scores that are central differences, in float64,
of the logarithms of scipy's densities.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.special
import scipy.stats
from reference import P_VALUE, assert_close

from ddpm_jax import classifier_free, classifier_guided, make_denoiser, make_schedule, predict_eps, sample
from ddpm_jax.diffusion.process import predict_v, predict_x0

TOTAL = 50
BETAS = reference.linear_betas(TOTAL)
A, V = reference.forward_kernels(BETAS)
SHAPE = (6, 2, 1, 1)
TIMES = np.array([0, 3, 10, 20, 35, 49], np.int32)
MEANS = np.array([[[[-0.5]], [[0.3]]], [[[0.4]], [[0.1]]]])  # of classes 0 and 1, in images of 2x1x1
DEVIATIONS = (0.3, 0.5)
WEIGHTS = (0.3, 0.7)
PREDICTIONS = ["eps", "x0", "v"]


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", TOTAL)


@pytest.fixture(scope="module")
def xt():
    return jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)


# The exact networks, in float32


def column(values, t, x):
    return jnp.asarray(values, jnp.float32)[t].reshape(t.shape + (1,) * (x.ndim - t.ndim))


def mean_of(mean, x):
    return jnp.broadcast_to(jnp.asarray(mean, jnp.float32), x.shape)


def class_eps(xt, t, label):
    """eps of N(m, d^2): s (xt - a m) / (a^2 d^2 + s^2)."""
    a, v = column(A, t, xt), column(V, t, xt)
    offset = xt - a * mean_of(MEANS[label], xt)
    return jnp.sqrt(v) * offset / (jnp.square(a * DEVIATIONS[label]) + v)


def class_logits(xt, t):
    """log p(y) p(xt | y) [2, B], up to what both have in common."""
    a, v = column(A, t, xt), column(V, t, xt)
    terms = []
    for mean, deviation, weight in zip(MEANS, DEVIATIONS, WEIGHTS, strict=True):
        variance = jnp.square(a * deviation) + v
        pixels = -jnp.square(xt - a * mean_of(mean, xt)) / (2 * variance) - jnp.log(variance) / 2
        terms.append(math.log(weight) + jnp.sum(pixels, axis=(-3, -2, -1)))
    return jnp.stack(terms)


def mixture_eps(xt, t):
    shares = jax.nn.softmax(class_logits(xt, t), axis=0)
    parts = [share.reshape((*t.shape, 1, 1, 1)) * class_eps(xt, t, k) for k, share in enumerate(shares)]
    return parts[0] + parts[1]


def log_class(xt, t, label=1):
    """log p(y | xt) [B]."""
    return jax.nn.log_softmax(class_logits(xt, t), axis=0)[label]


def as_prediction(schedule, eps_fn, prediction):
    convert = {"eps": lambda s, xt, t, eps: eps, "x0": predict_x0, "v": predict_v}[prediction]
    return lambda xt, t: convert(schedule, xt, t, eps_fn(xt, t))


# The oracle


def log_density(x, t, label=None):
    """log p(xt | y), or log p(xt), of one image, by scipy in float64."""
    logs = [
        scipy.stats.norm.logpdf(x, A[t] * mean, math.sqrt((A[t] * deviation) ** 2 + V[t])).sum()
        for mean, deviation in zip(MEANS, DEVIATIONS, strict=True)
    ]
    return scipy.special.logsumexp(logs, b=WEIGHTS) if label is None else logs[label]


def oracle_eps(xt, scale, label=1):
    """-s grad log [p(xt | y)^scale p(xt)^(1 - scale)] for images at TIMES."""
    out = np.zeros(xt.shape)
    for i, (x, t) in enumerate(zip(np.asarray(xt, np.float64), TIMES, strict=True)):
        for place in np.ndindex(x.shape):
            h = np.zeros(x.shape)
            h[place] = 1e-5
            value = [scale * log_density(y, t, label) + (1 - scale) * log_density(y, t) for y in (x + h, x - h)]
            out[i][place] = -math.sqrt(V[t]) * (value[0] - value[1]) / 2e-5
    return out


# Classifier-free guidance


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_the_guided_score_is_that_of_the_weighted_densities(schedule, xt, prediction, scale):
    conditional, free = (as_prediction(schedule, fn, prediction) for fn in (functools.partial(class_eps, label=1), mixture_eps))
    network_fn = classifier_free(schedule, conditional, free, scale)
    eps = predict_eps(schedule, xt, jnp.asarray(TIMES), network_fn(xt, jnp.asarray(TIMES)), prediction)
    # x0 and v at the ends of the schedule, made from eps and turned back, lose a factor of s / a or a / s <= 30 in digits.
    assert_close(eps, oracle_eps(xt, scale), **({} if prediction == "eps" else {"rtol": 1e-4, "atol": 1e-5}))


def test_scales_zero_and_one_are_the_networks_themselves(schedule, xt):
    def conditional(xt, t):
        return jnp.sin(3 * xt)

    def free(xt, t):
        return jnp.cos(xt)

    assert classifier_free(schedule, conditional, free, 1.0) is conditional
    assert classifier_free(schedule, conditional, free, 1.0, interval=(0.1, 0.5), rescale=0.7) is conditional
    assert classifier_free(schedule, conditional, free, 0.0) is free
    assert classifier_free(schedule, conditional, free, 0.0, rescale=0.7) is free


def test_the_whole_chain_at_scale_one_has_the_same_bits(schedule, xt):
    conditional = functools.partial(class_eps, label=0)

    def draw(network_fn):
        return sample(jax.random.key(0), schedule, make_denoiser(schedule, network_fn), SHAPE, "ddpm", 7)

    np.testing.assert_array_equal(draw(classifier_free(schedule, conditional, mixture_eps, 1.0)), draw(conditional))
    np.testing.assert_array_equal(draw(classifier_free(schedule, conditional, mixture_eps, 0.0)), draw(mixture_eps))
    assert not np.allclose(draw(classifier_free(schedule, conditional, mixture_eps, 2.0)), draw(conditional), atol=0.01)


def test_one_image_under_vmap_is_one_of_a_batch(schedule, xt):
    conditional = functools.partial(class_eps, label=1)
    for options in ({}, {"interval": (0.3, 3.0)}, {"rescale": 0.7}):
        network_fn = classifier_free(schedule, conditional, mixture_eps, 3.0, **options)
        assert_close(jax.vmap(network_fn)(xt, jnp.asarray(TIMES)), network_fn(xt, jnp.asarray(TIMES)))


def test_networks_in_bfloat16_are_combined_in_float32(schedule, xt):
    def halves(value):
        return lambda xt, t: jnp.full(xt.shape, value, jnp.bfloat16)

    out = classifier_free(schedule, halves(1.0), halves(1.0078125), 0.5)(xt, jnp.asarray(TIMES))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.full(SHAPE, 1.00390625, np.float32))  # halfway between neighbours in bfloat16


# Interval


def test_outside_the_interval_the_conditional_network_stands_alone(schedule, xt):
    conditional, t = functools.partial(class_eps, label=1), jnp.asarray(TIMES)
    sigma = np.sqrt(V) / A
    low, high = sigma[3] * 1.01, sigma[35] * 1.01  # so t = 10, 20, 35 lie inside
    out = np.asarray(classifier_free(schedule, conditional, mixture_eps, 3.0, (low, high))(xt, t))
    np.testing.assert_array_equal(out[[0, 1, 5]], conditional(xt, t)[jnp.array([0, 1, 5])])
    everywhere = classifier_free(schedule, conditional, mixture_eps, 3.0)(xt, t)
    assert_close(out[2:5], everywhere[2:5])
    assert np.abs(out - np.asarray(conditional(xt, t))).max(axis=(1, 2, 3))[2:5].min() > 0.01
    # The upper end belongs to it, the lower does not.
    ends = [float(jnp.exp(-0.5 * schedule.log_snr[i])) for i in (10, 35)]
    out = np.asarray(classifier_free(schedule, conditional, mixture_eps, 3.0, tuple(ends))(xt, t))
    inside = (out != np.asarray(conditional(xt, t))).any(axis=(1, 2, 3))
    assert inside.tolist() == [False, False, False, True, True, False]


def test_outside_the_interval_the_other_network_is_not_evaluated(schedule, xt):
    calls = []

    def free(xt, t):
        jax.debug.callback(lambda: calls.append(1))
        return mixture_eps(xt, t)

    network_fn = classifier_free(schedule, functools.partial(class_eps, label=1), free, 3.0, (0.2, 2.0))
    sigma = np.sqrt(V) / A
    sample(jax.random.key(0), schedule, make_denoiser(schedule, network_fn), SHAPE, "ddim", TOTAL).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == np.sum((sigma > 0.2) & (sigma <= 2.0)) < TOTAL


# Rescale


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescale_is_lin_et_al(schedule, phi):
    """Equations 13 to 16 image by image in float64; at phi = 1 the deviation is the conditional's."""
    generator = np.random.default_rng(1)
    conditional, free, xt = generator.standard_normal((3, 4, 5, 6, 3)).astype(np.float32)
    t = jnp.asarray([0, 10, 30, 49], jnp.int32)

    def constant(value):
        return lambda xt, t: jnp.asarray(value)

    out = classifier_free(schedule, constant(conditional), constant(free), 7.5, rescale=phi)(jnp.asarray(xt), t)
    for i in range(4):
        asked, other = conditional[i].astype(np.float64), free[i].astype(np.float64)
        guided = 7.5 * asked - 6.5 * other
        expected = phi * guided * (asked.std() / guided.std()) + (1 - phi) * guided
        assert_close(out[i], expected, atol=1e-5)  # differences of numbers up to 30
        if phi == 1:
            assert np.asarray(out[i], np.float64).std() == pytest.approx(asked.std(), rel=1e-5)


def test_rescale_of_an_output_without_deviation(schedule, xt):
    network_fn = classifier_free(schedule, lambda xt, t: jnp.zeros_like(xt), lambda xt, t: jnp.ones_like(xt), 2.0, rescale=1.0)
    assert np.isfinite(network_fn(xt, jnp.asarray(TIMES))).all()


# Learned variance


def test_a_learned_variance_is_the_conditionals(schedule, xt):
    t = jnp.asarray(TIMES)

    def with_variance(eps_fn, place):
        return lambda xt, t: jnp.concatenate([eps_fn(xt, t), jnp.full_like(xt, place)], axis=-1)

    conditional = functools.partial(class_eps, label=1)
    wide = classifier_free(schedule, with_variance(conditional, 0.25), with_variance(mixture_eps, -0.5), 3.0)(xt, t)
    assert_close(wide[..., :1], classifier_free(schedule, conditional, mixture_eps, 3.0)(xt, t))
    np.testing.assert_array_equal(wide[..., 1:], np.full(SHAPE, 0.25, np.float32))
    wide = classifier_guided(schedule, with_variance(mixture_eps, 0.25), log_class, 2.0)(xt, t)
    assert_close(wide[..., :1], classifier_guided(schedule, mixture_eps, log_class, 2.0)(xt, t))
    np.testing.assert_array_equal(wide[..., 1:], np.full(SHAPE, 0.25, np.float32))


# Classifier guidance


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_an_exact_classifier_makes_the_conditional_network(schedule, xt, prediction, scale):
    """By Bayes' rule; scale 1 gives the score of the class, another scale that of the weighted densities."""
    network_fn = classifier_guided(schedule, as_prediction(schedule, mixture_eps, prediction), log_class, scale, prediction)
    eps = predict_eps(schedule, xt, jnp.asarray(TIMES), network_fn(xt, jnp.asarray(TIMES)), prediction)
    assert_close(eps, oracle_eps(xt, scale), **({} if prediction == "eps" else {"rtol": 1e-4, "atol": 1e-5}))  # as above


def test_a_classifier_counts_by_its_gradient(schedule, xt):
    """A constant makes no difference, nor do the other images of the batch."""
    t = jnp.asarray(TIMES)
    plain = classifier_guided(schedule, mixture_eps, log_class)(xt, t)
    shifted = classifier_guided(schedule, mixture_eps, lambda xt, t: log_class(xt, t) + 5.0)(xt, t)
    assert_close(shifted, plain)
    assert_close(classifier_guided(schedule, mixture_eps, log_class)(xt[2:4], t[2:4]), plain[2:4])
    assert_close(jax.vmap(classifier_guided(schedule, mixture_eps, log_class))(xt, t), plain)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_classifier_has_no_say_where_there_is_no_signal(schedule, xt, prediction):
    """With a = 0, zero terminal SNR, p(y | xt) doesn't depend on xt; a classifier that thinks so is not listened to."""
    blind = schedule._replace(sqrt_alpha_bar=schedule.sqrt_alpha_bar.at[-1].set(0.0))
    guided = classifier_guided(blind, lambda xt, t: 2.0 * xt, log_class, 3.0, prediction)(xt, jnp.asarray(TIMES))
    np.testing.assert_array_equal(guided[-1], 2.0 * xt[-1])  # TIMES ends in T - 1
    assert not np.allclose(guided[:-1], 2.0 * xt[:-1], atol=0.01)


@pytest.mark.parametrize("label", [0, 1])
def test_a_guided_mixture_draws_the_class(schedule, label):
    """ddpm with the network of both classes and the classifier: the law that the class's own network would give, exactly."""
    log_prob_fn = functools.partial(log_class, label=label)
    denoiser = make_denoiser(schedule, classifier_guided(schedule, mixture_eps, log_prob_fn), clip=False)
    x = np.asarray(sample(jax.random.key(label), schedule, denoiser, (20_000, *SHAPE[1:]), "ddpm"), np.float64)
    mean, variance = reference.gaussian_chain(BETAS, MEANS[label], DEVIATIONS[label], range(TOTAL), "ddpm")
    for place in np.ndindex(mean.shape):
        standardised = (x[(slice(None), *place)] - mean[place]) / math.sqrt(variance[place])
        assert scipy.stats.kstest(standardised, "norm").pvalue > P_VALUE


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": math.nan}, "scale must be finite, not nan"),
        ({"scale": math.inf}, "scale must be finite, not inf"),
        ({"scale": 2.0, "rescale": 1.5}, r"rescale must lie in \[0, 1\], not 1.5"),
        ({"scale": 2.0, "rescale": -0.1}, "rescale"),
        ({"scale": 2.0, "interval": (1.0, 1.0)}, "0 <= low < high, not 1.0 and 1.0"),
        ({"scale": 2.0, "interval": (-1.0, 1.0)}, "0 <= low < high, not -1.0"),
        ({"scale": 2.0, "interval": (0.0, math.nan)}, "0 <= low < high"),
    ],
)
def test_settings_out_of_range(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        classifier_free(schedule, mixture_eps, mixture_eps, **options)


def test_an_unknown_prediction(schedule):
    # Unwrapped: the type checks of the test session would catch a wrong name before the function does.
    with pytest.raises(ValueError, match="unknown prediction 'score': choose eps, x0 or v"):
        inspect.unwrap(classifier_guided)(schedule, mixture_eps, log_class, 1.0, "score")
