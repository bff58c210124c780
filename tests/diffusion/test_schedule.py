"""Schedules against published numbers and the float64 reference; sub-sequences of them."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import RTOL, assert_close

from ddpm_jax import make_schedule, rescale_zero_terminal_snr, schedule_from_betas
from ddpm_jax.diffusion.schedule import Schedule, respace, spaced_timesteps

SMALLEST_T = {"linear": 21, "scaled_linear": 21, "cosine": 1, "sigmoid": 1}
"""The linear kinds' last beta is 20 / T: below 21 steps it is 1 or more."""


@st.composite
def kinds_and_steps(draw, largest=400):
    kind = draw(st.sampled_from(sorted(reference.BETAS)))
    return kind, draw(st.integers(SMALLEST_T[kind], largest))


def check_fields(schedule, betas):
    """Every field against the reference, in relative terms: several coefficients are far smaller than ATOL."""
    a, v = reference.forward_kernels(betas)
    ab = reference.alpha_bars(betas)
    c0, ct, variance = reference.posterior_coefficients(betas)
    shifted = slice(None, -1)
    expected = {
        "beta": betas,
        "alpha_bar": ab,
        "alpha_bar_prev": np.append(1.0, ab[shifted]),
        "log_alpha_bar": np.log(ab),
        "sqrt_alpha_bar": a,
        "sqrt_one_minus_alpha_bar": np.sqrt(v),
        "sqrt_one_minus_alpha_bar_prev": np.append(0.0, np.sqrt(v[shifted])),
        "posterior_mean_x0": c0,
        "posterior_mean_xt": ct,
        "posterior_variance": variance,
    }
    for name, value in expected.items():
        assert_close(getattr(schedule, name), value, atol=0)
    log_variance = np.log(variance[1:]) if len(betas) > 1 else [math.log(1e-20)]
    assert_close(schedule.posterior_log_variance, np.append(log_variance[0], log_variance)[: len(betas)])
    assert_close(schedule.log_snr, np.log(ab) - np.log(v))
    assert set(expected) | {"posterior_log_variance", "log_snr"} == set(schedule._fields)


def test_published_values_of_the_linear_schedule():
    schedule = make_schedule()
    assert schedule.num_steps == 1000
    for actual, golden in [
        (schedule.beta[0], 1e-4),
        (schedule.beta[999], 0.02),
        (schedule.alpha_bar[0], 0.9999),
        (schedule.alpha_bar[999], 4.035829765375676e-05),
        (schedule.posterior_variance[0], 0.0),
        (schedule.posterior_variance[1], 5.4531876613021935e-05),
        (schedule.posterior_log_variance[0], -9.81672513529567),
        (schedule.posterior_log_variance[1], -9.81672513529567),
        (schedule.posterior_mean_x0[0], 1.0),
        (schedule.posterior_mean_x0[1], 0.5452914995),
        (schedule.posterior_mean_xt[0], 0.0),
        (schedule.posterior_mean_xt[1], 0.4547084990),
    ]:
        assert_close(actual, golden, atol=0)


@pytest.mark.parametrize(("num_steps", "golden"), [(1000, 2.42877e-09), (4000, 1.51798e-10)])
def test_published_values_of_the_cosine_schedule(num_steps, golden):
    assert_close(make_schedule("cosine", num_steps).alpha_bar[-1], golden, atol=0)


@given(kinds_and_steps())
def test_every_field_equals_the_reference(kind_and_steps):
    kind, num_steps = kind_and_steps
    check_fields(make_schedule(kind, num_steps), reference.BETAS[kind](num_steps))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {"beta_start": 2e-4, "beta_end": 0.01}),
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        ("cosine", {"s": 0.02}),
        ("sigmoid", {"start": 0.0, "end": 3.0, "tau": 0.7}),
    ],
)
def test_options_equal_the_reference(kind, options):
    check_fields(make_schedule(kind, 100, **options), reference.BETAS[kind](100, **options))


@given(kinds_and_steps(largest=1000))
def test_invariants(kind_and_steps):
    schedule = Schedule(*map(np.asarray, make_schedule(*kind_and_steps)))
    for value in schedule:
        assert value.dtype == np.float32
        assert value.shape == (kind_and_steps[1],)
        assert np.isfinite(value).all()
    assert (np.diff(schedule.alpha_bar) < 0).all()
    assert (np.diff(schedule.log_snr) < 0).all()
    assert schedule.alpha_bar_prev[0] == 1
    np.testing.assert_array_equal(schedule.alpha_bar_prev[1:], schedule.alpha_bar[:-1])
    assert_close(schedule.sqrt_alpha_bar**2 + schedule.sqrt_one_minus_alpha_bar**2, np.ones(schedule.num_steps))
    assert (schedule.posterior_variance <= schedule.beta).all()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_the_end_is_as_noisy_for_every_number_of_steps(kind):
    """1000 / T scales the betas; unscaled, T = 300 would end at alpha_bar = .048."""
    ends = [make_schedule(kind, num_steps).alpha_bar[-1] for num_steps in (100, 300, 1000, 4000)]
    assert max(ends) < 1e-3 if kind == "scaled_linear" else max(ends) < 5e-5


def test_one_minus_alpha_bar_keeps_its_digits():
    """In float32 1 - alpha_bar would have 6e-8 / 1e-6 = 6 % of error here."""
    betas = np.full(50, 1e-6)
    schedule = schedule_from_betas(betas)
    _, v = reference.forward_kernels(betas)
    assert_close(np.asarray(schedule.sqrt_one_minus_alpha_bar, np.float64) ** 2, v, rtol=1e-6, atol=0)
    assert_close(np.exp(-np.asarray(schedule.log_snr, np.float64)), v / reference.alpha_bars(betas), atol=0)


def test_one_step():
    schedule = schedule_from_betas([0.36])
    check_fields(schedule, np.array([0.36]))
    assert_close([schedule.sqrt_alpha_bar[0], schedule.sqrt_one_minus_alpha_bar[0]], [0.8, 0.6])
    assert (schedule.posterior_mean_x0[0], schedule.posterior_mean_xt[0], schedule.posterior_variance[0]) == (1, 0, 0)


@given(st.lists(st.floats(1e-6, 0.9), min_size=1, max_size=30))
def test_any_betas(betas):
    check_fields(schedule_from_betas(betas), np.array(betas))


@pytest.mark.parametrize("convert", [list, tuple, np.asarray, lambda betas: np.asarray(betas, np.float32), jnp.asarray])
def test_any_container_of_betas(convert):
    betas = convert([0.125, 0.25, 0.5])  # exact in float32
    check_fields(schedule_from_betas(betas), np.array([0.125, 0.25, 0.5]))


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, -math.inf])
def test_a_beta_outside_its_range_is_named(bad):
    with pytest.raises(ValueError, match=r"beta\[1\] = .* outside \(0, 1\)"):
        schedule_from_betas([0.1, bad, 0.2])


@pytest.mark.parametrize("bad", [[], 0.1, [[0.1, 0.2]], np.zeros((0, 3))])
def test_betas_of_another_shape(bad):
    with pytest.raises(ValueError, match="non-empty list"):
        schedule_from_betas(bad)


# The type checks of the test session would catch a wrong type before the function does.
make_unchecked_schedule = inspect.unwrap(make_schedule)
unchecked_spaced_timesteps = inspect.unwrap(spaced_timesteps)


@pytest.mark.parametrize("bad", [0, -5, 2.5, True, "100", None])
def test_a_bad_number_of_steps(bad):
    with pytest.raises(ValueError, match="whole number of steps"):
        make_unchecked_schedule("linear", bad)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"unknown schedule 'quartic'.*linear.*cosine.*sigmoid.*scaled_linear"):
        make_unchecked_schedule("quartic", 100)


@pytest.mark.parametrize(
    ("kind", "option"), [("linear", "s"), ("cosine", "beta_start"), ("sigmoid", "sigma"), ("linear", "kind2")]
)
def test_an_unknown_option(kind, option):
    with pytest.raises(ValueError, match=f"{kind} schedule has no option {option}"):
        make_unchecked_schedule(kind, 100, **{option: 1.0})


@pytest.mark.parametrize("options", [{"beta_start": -1e-4}, {"beta_end": 0.0}])
def test_scaled_linear_needs_positive_betas(options):
    with pytest.raises(ValueError, match="must be greater than 0"):
        make_schedule("scaled_linear", 100, **options)


@pytest.mark.parametrize("num_steps", [2, 10, 20])
def test_too_few_steps_for_the_linear_betas(num_steps):
    with pytest.raises(ValueError, match=r"lies outside \(0, 1\): use more steps"):
        make_schedule("linear", num_steps)


@pytest.mark.parametrize("kind", sorted(reference.BETAS))
@pytest.mark.parametrize("num_steps", [21, 300, 1000])
def test_zero_terminal_snr_equals_the_reference(kind, num_steps):
    schedule = rescale_zero_terminal_snr(make_schedule(kind, num_steps))
    betas = reference.zero_terminal_betas(reference.BETAS[kind](num_steps))
    with np.errstate(divide="ignore"):  # log 0 at the end
        check_fields(schedule, betas)


def test_the_end_of_a_zero_terminal_snr():
    before = make_schedule("linear", 1000)
    schedule = rescale_zero_terminal_snr(before)
    assert schedule.alpha_bar[-1] == schedule.sqrt_alpha_bar[-1] == 0
    assert schedule.beta[-1] == schedule.sqrt_one_minus_alpha_bar[-1] == 1
    assert schedule.log_snr[-1] == schedule.log_alpha_bar[-1] == -math.inf
    assert schedule.alpha_bar[0] == before.alpha_bar[0]
    for name, value in schedule._asdict().items():
        assert value.dtype == jnp.float32
        assert np.isfinite(value[:-1]).all() and (name.startswith("log") or np.isfinite(value[-1]))
    assert (np.diff(schedule.log_snr) < 0).all()


@pytest.mark.parametrize("timesteps", [[9], [3, 9], [0, 1, 9], list(range(10))])
def test_sub_sequences_keep_a_zero_terminal_snr(timesteps):
    schedule = rescale_zero_terminal_snr(make_schedule("cosine", 10))
    short = jax.jit(respace)(schedule, jnp.asarray(timesteps))
    betas = reference.visited_betas(reference.zero_terminal_betas(reference.cosine_betas(10)), timesteps)
    c0, ct, variance = reference.posterior_coefficients(betas)
    for name, expected in {
        "beta": betas,
        "posterior_mean_x0": c0,
        "posterior_mean_xt": ct,
        "posterior_variance": variance,
    }.items():
        assert_close(getattr(short, name), expected, rtol=1e-5)
    assert np.isfinite(short.posterior_log_variance).all()
    assert short.alpha_bar[-1] == 0


def test_a_single_step_has_no_zero_terminal_snr():
    with pytest.raises(ValueError, match="needs a schedule of 2 steps or more"):
        rescale_zero_terminal_snr(make_schedule("cosine", 1))


@st.composite
def sub_sequences(draw):
    """(kind, T, ascending timesteps): a spacing's or any others. Few sizes, since each is compiled anew."""
    kind = draw(st.sampled_from(sorted(reference.BETAS)))
    total, num_steps = draw(st.sampled_from([25, 200])), draw(st.sampled_from([1, 2, 8, 25]))
    if draw(st.booleans()):
        return kind, total, spaced_timesteps(num_steps, total, draw(st.sampled_from(["uniform", "trailing", "quadratic"])))
    chosen = draw(st.sets(st.integers(0, total - 1), min_size=num_steps, max_size=num_steps))
    return kind, total, np.array(sorted(chosen), np.int32)


@given(sub_sequences())
def test_respace_keeps_the_marginals_and_has_the_posterior_of_bayes(sub_sequence):
    kind, total, timesteps = sub_sequence
    schedule = make_schedule(kind, total)
    short = respace(schedule, jnp.asarray(timesteps))
    for name in ("alpha_bar", "log_alpha_bar", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"):
        assert_close(getattr(short, name), getattr(schedule, name)[timesteps], rtol=1e-6, atol=0)
    assert_close(short.log_snr, schedule.log_snr[timesteps])

    betas = reference.visited_betas(reference.BETAS[kind](total), timesteps)
    c0, ct, variance = reference.posterior_coefficients(betas)
    # beta is the difference of two float32 log alpha_bar: their last digit is an absolute error of it.
    error = RTOL * betas + 2.0**-22 * np.abs(np.log(reference.alpha_bars(betas)))

    def close(actual, expected, scale=1.0):
        assert (np.abs(np.asarray(actual, np.float64) - expected) <= scale * error + RTOL * np.abs(expected)).all()

    close(short.beta, betas)
    close(short.posterior_variance, variance)
    _, v = reference.forward_kernels(betas)
    close(short.posterior_mean_x0, c0, scale=1 / v)  # = sqrt(alpha_bar_prev) beta / v
    close(short.posterior_mean_xt, ct)
    if len(timesteps) > 1:
        assert short.posterior_log_variance[0] == short.posterior_log_variance[1]
        close(np.append(0.0, np.exp(np.asarray(short.posterior_log_variance, np.float64)[1:])), variance)


def test_respace_to_every_step_changes_nothing():
    schedule = make_schedule("linear", 50)
    short = respace(schedule, jnp.arange(50))
    for name in schedule._fields:
        # beta is recomputed from float32 log alpha_bar (up to 11): 5e-7 absolute, of betas from .002 up.
        assert_close(getattr(short, name), getattr(schedule, name), rtol=1e-4)


def check_spacing(num_steps, total, spacing):
    timesteps = spaced_timesteps(num_steps, total, spacing)
    assert timesteps.dtype == np.int32
    assert timesteps.shape == (num_steps,)
    assert timesteps[0] >= 0
    assert timesteps[-1] == total - 1
    assert (np.diff(timesteps) >= 1).all()
    position = np.arange(1, num_steps + 1)
    if spacing == "trailing":
        ideal = position * total / num_steps - 1
    else:
        fraction = (position - 1) / (num_steps - 1) if num_steps > 1 else np.ones(1)
        ideal = (total - 1) * (fraction if spacing == "uniform" else fraction**2)
    nearest = np.abs(timesteps - ideal) <= 0.5 + 1e-9
    follows = np.append(False, np.diff(timesteps) == 1) & (timesteps > ideal)  # its place was taken
    assert (nearest | (follows & (spacing == "quadratic"))).all()


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic"])
def test_spacing_of_all_small_processes(spacing):
    for total in range(1, 41):
        for num_steps in range(1, total + 1):
            check_spacing(num_steps, total, spacing)


@given(st.integers(1, 5000), st.data(), st.sampled_from(["uniform", "trailing", "quadratic"]))
def test_spacing_of_large_processes(total, data, spacing):
    check_spacing(data.draw(st.integers(1, total)), total, spacing)


@pytest.mark.parametrize(
    ("num_steps", "total", "spacing", "expected"),
    [
        (10, 1000, "trailing", range(99, 1000, 100)),  # Lin et al. (2023), table 2, counted from 0
        (4, 10, "trailing", [1, 4, 7, 9]),  # round([10, 7.5, 5, 2.5]) - 1, a half going to the even number
        (10, 1000, "uniform", range(0, 1000, 111)),
        (11, 101, "quadratic", [i**2 for i in range(11)]),
        (1, 1000, "uniform", [999]),
        (7, 7, "quadratic", range(7)),
    ],
)
def test_spacing_by_hand(num_steps, total, spacing, expected):
    np.testing.assert_array_equal(spaced_timesteps(num_steps, total, spacing), list(expected))


@pytest.mark.parametrize("num_steps", [0, -1, 11])
def test_more_or_fewer_steps_than_there_are(num_steps):
    with pytest.raises(ValueError, match="choose 1 to 10"):
        spaced_timesteps(num_steps, 10)


def test_an_unknown_spacing():
    with pytest.raises(ValueError, match=r"unknown spacing 'leading'.*uniform"):
        unchecked_spaced_timesteps(5, 10, "leading")
