"""The simple loss and its weights, the bound as a loss, and the two together."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats
from reference import P_VALUE, assert_close

from ddpm_jax import make_denoiser, make_schedule, rescale_zero_terminal_snr, schedule_from_betas
from ddpm_jax.diffusion.losses import hybrid_loss, loss_weight, simple_loss, vlb_loss

BETAS = reference.linear_betas(1000)
T = np.array([0, 1, 250, 999], np.int32)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", 1000)


def images(seed, shape=(4, 5, 3, 2)):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(np.float32) for _ in range(2))


def targets(x0, eps, t):
    a, v = (coefficient[t].reshape(-1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
    return {"eps": eps, "x0": x0, "v": a * eps - np.sqrt(v) * x0}


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_loss_equals_the_reference(schedule, prediction):
    x0, eps = images(3)

    def network(xp, xt, t):
        return xp.tanh(0.5 * xt + t.reshape(-1, 1, 1, 1) / 1000)

    losses = simple_loss(
        schedule,
        lambda xt, t: network(jnp, xt, t.astype(jnp.float32)),
        jnp.asarray(x0),
        jnp.asarray(T),
        jnp.asarray(eps),
        prediction,
    )
    assert losses.dtype == jnp.float32
    xt = np.stack([reference.q_sample(BETAS, x0[i].astype(np.float64), t, eps[i]) for i, t in enumerate(T)])
    difference = targets(x0.astype(np.float64), eps, T)[prediction] - network(np, xt, T)
    assert_close(losses, (difference**2).sum((1, 2, 3)) / 30)


def test_eps_is_the_default(schedule):
    x0, eps = map(jnp.asarray, images(4))
    arguments = (schedule, lambda xt, t: 0.5 * xt, x0, jnp.asarray(T), eps)
    np.testing.assert_array_equal(simple_loss(*arguments), simple_loss(*arguments, prediction="eps"))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_network_has_no_loss(schedule, prediction):
    x0, eps = images(5)
    perfect = jnp.asarray(targets(x0, eps, T)[prediction], jnp.float32)
    losses = simple_loss(schedule, lambda xt, t: perfect, jnp.asarray(x0), jnp.asarray(T), jnp.asarray(eps), prediction)
    assert (losses < 1e-9).all()


def test_a_network_of_zeros_has_the_loss_one(schedule):
    """The sum of N squared normal numbers is chi-square with N degrees of freedom."""
    shape = (16, 32, 32, 3)
    x0, eps = map(jnp.asarray, images(6, shape))
    losses = simple_loss(schedule, lambda xt, t: jnp.zeros_like(xt), x0, jnp.full(16, 700), eps)
    assert losses.shape == (16,)
    size = np.prod(shape)
    upper = scipy.stats.chi2.sf(float(losses.mean()) * size, size)
    assert 2 * min(upper, 1 - upper) > P_VALUE


def test_an_unknown_prediction(schedule):
    x0, eps = map(jnp.asarray, images(7))
    # Unwrapped: the type checks of the test session would catch a wrong name before the function does.
    with pytest.raises(ValueError, match=r"unknown prediction 'score': choose eps, x0 or v"):
        inspect.unwrap(simple_loss)(schedule, lambda xt, t: xt, x0, jnp.asarray(T), eps, "score")


# --- weights


def snr_weight(kind, prediction, betas, gamma=5.0):
    """w_t [T] in float64, from what each paper says of x0's error."""
    a, v = reference.forward_kernels(betas)
    of_x0 = np.minimum(a**2 / v, gamma) if kind == "min_snr" else np.maximum(a**2 / v, 1)
    # One unit of x0's error is a / s of eps, as x = a x0 + s eps stays where it is, and 1 / s of v = (a x - x0) / s.
    return of_x0 / {"x0": 1.0, "eps": a**2 / v, "v": 1 / v}[prediction]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("kind", "gamma"), [("min_snr", 5.0), ("min_snr", 0.3), ("truncated_snr", 5.0)])
def test_weights_equal_the_reference(schedule, kind, gamma, prediction):
    weight = loss_weight(schedule, kind, prediction, gamma)
    assert weight.dtype == jnp.float32
    assert_close(weight, snr_weight(kind, prediction, BETAS, gamma), atol=0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_constant_weight_is_none(schedule, prediction):
    np.testing.assert_array_equal(loss_weight(schedule, "constant", prediction), 1)


def test_published_values_of_min_snr(schedule):
    """Hang et al. (2023): for eps the weight is min(1, gamma / snr), so it is 1 where the noise is strong."""
    weight = np.asarray(loss_weight(schedule, "min_snr", "eps"))
    np.testing.assert_array_equal(weight[500:], 1)
    assert_close(weight[0], 5 / 9999, rtol=1e-5, atol=0)


def test_the_last_step_of_a_zero_terminal_snr(schedule):
    rescaled = rescale_zero_terminal_snr(schedule)
    for prediction in ("x0", "v"):
        assert loss_weight(rescaled, "truncated_snr", prediction)[-1] == 1
        assert loss_weight(rescaled, "min_snr", prediction)[-1] == 0


def test_an_unknown_weight(schedule):
    with pytest.raises(ValueError, match=r"unknown weight 'max_snr': choose constant, min_snr or truncated_snr"):
        inspect.unwrap(loss_weight)(schedule, "max_snr", "eps")


# x0 = theta tanh(x), as a network of each kind: the same function, so that only the objective can differ.
AS_NETWORK = {
    "x0": lambda x0, xt, a, s: x0,
    "eps": lambda x0, xt, a, s: (xt - a * x0) / s,
    "v": lambda x0, xt, a, s: (a * xt - x0) / s,
}


def gradient(schedule, prediction, weight, x0, eps, t, theta=0.7):
    """d / d theta of the mean loss over the batch."""

    def loss(theta):
        def network(xt, t):
            a, s = (c[t].reshape(-1, 1, 1, 1) for c in (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar))
            return AS_NETWORK[prediction](theta * jnp.tanh(xt), xt, a, s)

        return jnp.mean(simple_loss(schedule, network, *map(jnp.asarray, (x0, t, eps)), prediction, weight))

    return jax.grad(loss)(jnp.float32(theta))


def plain_gradient(weight_of_x0, x0, eps, t, theta=0.7):
    x0, eps = x0.astype(np.float64), eps.astype(np.float64)
    a, v = (coefficient[t].reshape(-1, 1, 1, 1) for coefficient in reference.forward_kernels(BETAS))
    h = np.tanh(a * x0 + np.sqrt(v) * eps)
    return np.mean(weight_of_x0[t].reshape(-1, 1, 1, 1) * 2 * (theta * h - x0) * h)


MIDDLE = np.array([20, 150, 400, 700], np.int32)  # a and s above 0.08: see the tolerance


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("kind", ["min_snr", "truncated_snr"])
def test_every_prediction_has_the_same_gradient_under_a_weight(schedule, kind, prediction):
    x0, eps = images(8)
    got = gradient(schedule, prediction, loss_weight(schedule, kind, prediction), x0, eps, MIDDLE)
    # The difference of eps and its prediction is a / s times that of x0: with a = 0.08 it loses a digit.
    assert_close(got, plain_gradient(snr_weight(kind, "x0", BETAS), x0, eps, MIDDLE), rtol=5e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_eps_is_x0_weighted_by_snr_and_v_by_its_share(schedule, prediction):
    """Ho et al.'s constant weight of eps, asked of x0 and of v: snr |x0 error|^2 = snr / (snr + 1) |v error|^2."""
    x0, eps = images(9)
    a, v = reference.forward_kernels(BETAS)
    weight = {"x0": a**2 / v, "v": a**2}[prediction]
    expected = plain_gradient(a**2 / v, x0, eps, MIDDLE)
    assert_close(gradient(schedule, "eps", None, x0, eps, MIDDLE), expected, rtol=5e-5)
    assert_close(gradient(schedule, prediction, jnp.asarray(weight, jnp.float32), x0, eps, MIDDLE), expected, rtol=5e-5)


# --- the bound, and both


def network_output(seed, channels=2):
    """Outputs [4, 5, 3, 2 channels] of a network that tells its variance: the prediction, and places within the range."""
    rng = np.random.default_rng(seed)
    output = rng.standard_normal((4, 5, 3, channels)), rng.uniform(-1, 1, (4, 5, 3, channels))
    return np.concatenate(output, axis=-1).astype(np.float32)


def grey_images(seed):
    x0, eps = images(seed)
    return (np.round(np.clip(x0, -1, 1) * 127.5 + 127.5) / 127.5 - 1).astype(np.float32), eps


def x0_of(prediction, output, xt, t):
    a, v = (coefficient[t] for coefficient in reference.forward_kernels(BETAS))
    s = np.sqrt(v)
    return {"eps": lambda: (xt - s * output) / a, "x0": lambda: output, "v": lambda: a * xt - s * output}[prediction]()


def bits(x0, eps, output, prediction, times=T):
    """T L_t of each image in float64."""
    terms = []
    for i, t in enumerate(times):
        xt = reference.q_sample(BETAS, x0[i].astype(np.float64), t, eps[i])
        guess = x0_of(prediction, output[i, ..., :2].astype(np.float64), xt, t)
        terms.append(reference.vlb_term(BETAS, x0[i], guess, t, "learned_range", output[i, ..., 2:]))
    return 1000 * np.array(terms)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_hybrid_equals_the_reference(schedule, prediction):
    (x0, eps), output, t = grey_images(10), network_output(11), np.array([1, 20, 400, 700], np.int32)
    weight = snr_weight("min_snr", prediction, BETAS)
    got = hybrid_loss(schedule, lambda xt, t: jnp.asarray(output), *map(jnp.asarray, (x0, t, eps)), prediction,
                      jnp.asarray(weight, jnp.float32))  # fmt: skip
    assert got.dtype == jnp.float32
    difference = targets(x0.astype(np.float64), eps, t)[prediction] - output[..., :2]
    simple = weight[t] * (difference**2).mean((1, 2, 3))
    assert_close(got, simple + 0.001 * bits(x0, eps, output, prediction, t), rtol=2e-5)  # float32's log variances: 5e-7 of 12


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_mean_of_the_bound_over_all_timesteps_is_the_sum_of_its_terms(variance):
    """40 steps, the same image at each, a network that answers xt / 2."""
    betas = reference.linear_betas(40)
    schedule = schedule_from_betas(betas)
    x0, eps = grey_images(12)
    x0, eps = np.repeat(x0[:1], 40, 0), np.resize(eps, (40, *eps.shape[1:]))
    losses = vlb_loss(schedule, lambda xt, t: 0.5 * xt, *map(jnp.asarray, (x0, np.arange(40), eps)), "x0", variance)
    xt = [reference.q_sample(betas, x0[t].astype(np.float64), t, eps[t]) for t in range(40)]
    expected = np.sum([reference.vlb_term(betas, x0[t], 0.5 * xt[t], t, variance) for t in range(40)])
    assert_close(np.mean(np.asarray(losses, np.float64)), expected, rtol=2e-5)


def test_the_bound_of_the_hybrid_does_not_reach_the_mean(schedule):
    """The gradient of the prediction is that of the simple loss, bit by bit; the variance's is that of the bound alone."""
    (x0, eps), output = map(jnp.asarray, grey_images(13)), jnp.asarray(network_output(14))
    t = jnp.asarray(MIDDLE)

    def simple(mean):
        return jnp.sum(simple_loss(schedule, lambda xt, t: mean, x0, t, eps))

    def hybrid(output):
        return jnp.sum(hybrid_loss(schedule, lambda xt, t: output, x0, t, eps))

    def bound(output):
        return jnp.sum(vlb_loss(schedule, lambda xt, t: output, x0, t, eps, "eps", "learned_range"))

    of_hybrid, of_bound = jax.grad(hybrid)(output), jax.grad(bound)(output)
    np.testing.assert_array_equal(of_hybrid[..., :2], jax.grad(simple)(output[..., :2]))
    assert_close(of_hybrid[..., 2:], 0.001 * of_bound[..., 2:])
    assert all(np.abs(of_bound[i, ..., half]).max() > 1e-6 for i in range(4) for half in (slice(0, 2), slice(2, 4)))


def test_gradient_of_the_bound_is_the_difference_quotient(schedule):
    """With respect to the predicted x0 and to the place of the variance, against float64."""
    x0, eps = grey_images(15)
    output = network_output(16)
    output[..., :2] = x0 + 0.05 * output[..., :2]
    t = np.array([0, 1, 30, 600], np.int32)

    def loss(output):
        return jnp.sum(vlb_loss(schedule, lambda xt, t: output, *map(jnp.asarray, (x0, t, eps)), "x0", "learned_range"))

    got = np.asarray(jax.grad(loss)(jnp.asarray(output)))
    wide = output.astype(np.float64)
    for channel in (0, 3):
        step = np.zeros_like(wide)
        step[..., 2, 1, channel] = 1e-6
        up, down = (bits(x0, eps, array, "x0", t) for array in (wide + step, wide - step))
        # The quotient is off by 1e-16 of 1e4 bits over 1e-6; float32's x0 - x0's prediction, of 0.01, is off by 1e-7.
        assert_close(got[:, 2, 1, channel], (up - down) / 2e-6, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("place", "bound"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_a_learned_variance_lies_between_the_fixed_ones(schedule, place, bound):
    t = np.array([1, 30, 600, 999], np.int32)
    xt = jnp.asarray(images(17)[0])

    def log_variance(place):
        network = lambda xt, t: jnp.concatenate([xt, jnp.full_like(xt, place)], axis=-1)  # noqa: E731
        return make_denoiser(schedule, network)(xt, jnp.asarray(t)).log_variance

    expected = [np.log(reference.p_variance(BETAS, step, bound)) for step in t]
    assert_close(log_variance(place)[:, 0, 0, 0], expected)
    assert log_variance(place).shape == xt.shape
    assert (log_variance(0.9 * place) * place <= log_variance(place) * place).all()
    middle = [sum(np.log(reference.p_variance(BETAS, step, kind)) for kind in ("fixed_small", "fixed_large")) / 2 for step in t]
    assert_close(log_variance(0.0)[:, 0, 0, 0], middle)


def test_hybrid_needs_a_network_that_tells_its_variance(schedule):
    x0, eps = map(jnp.asarray, images(18))
    with pytest.raises(ValueError, match="hybrid loss needs a network of 4 output channels, not 2"):
        hybrid_loss(schedule, lambda xt, t: xt, x0, jnp.asarray(T), eps)
