"""The forward process q, its posterior, and one reverse step p, as pure functions.

    q(xt | x0)          = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I)                              Eq. 4
    q(x_{t-1} | xt, x0) = N(posterior_mean_x0[t] x0 + posterior_mean_xt[t] xt, posterior_variance[t] I)   Eq. 7
    p(x_{t-1} | xt)     = q(x_{t-1} | xt, x0 = what the network predicts) with a variance of its own      section 3.2

Equations are those of Ho, Jain & Abbeel (2020), arXiv:2006.11239. With xt = a x0 + s eps, a^2 + s^2 = 1, a network
may predict eps, x0, or v = a eps - s x0 (Salimans & Ho 2022, arXiv:2202.00512); each gives the other two.

Everywhere x is float32 [..., H, W, C] (any shape will do) and t int32, with as many axes as x has batch axes: [B] for
a batch, [] under vmap. All of it works under jit, vmap, grad and pmap.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from ddpm_jax.diffusion.schedule import Schedule, respace

Prediction = Literal["eps", "x0", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Clip = bool | Literal["dynamic"]
AnyKey = Key[Array, "..."] | UInt32[Array, "..."]

DYNAMIC_QUANTILE = 0.995  # Share of an image's values that dynamic thresholding leaves as they are.


class Denoised(NamedTuple):
    """What a denoiser makes of xt: two views of one prediction, xt = a x0 + s eps, and a learned variance if any."""

    x0: Float[Array, "*shape"]
    eps: Float[Array, "*shape"]
    log_variance: Float[Array, "*shape"] | None = None
    """Of the step t -> t-1 of the schedule that the denoiser was made with."""


NetworkFn = Callable[[Float[Array, "*shape"], Int[Array, "*batch"]], Float[Array, "*shape"]]
Denoiser = Callable[[Float[Array, "*shape"], Int[Array, "*batch"]], Denoised]


def at(coefficient: Float[Array, " T"], t: Int[Array, "*batch"], x: Float[Array, "*shape"]) -> Float[Array, "..."]:
    """coefficient[t], with axes of size one behind so that it multiplies x."""
    return coefficient[t].reshape(t.shape + (1,) * (x.ndim - t.ndim))


def q_sample(
    schedule: Schedule, x0: Float[Array, "*shape"], t: Int[Array, "*batch"], eps: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Draw xt ~ q(xt | x0): xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, Eq. 4 of Ho et al. (2020).

    Args:
        schedule: T steps.
        x0: clean images in [-1, 1].
        t: timesteps 0 ... T-1.
        eps: standard normal noise.
    """
    return at(schedule.sqrt_alpha_bar, t, x0) * x0 + at(schedule.sqrt_one_minus_alpha_bar, t, x0) * eps


def q_sample_prev(
    schedule: Schedule, x0: Float[Array, "*shape"], t: Int[Array, "*batch"], eps: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """x_{t-1} of the same x0 and eps, sqrt(alpha_bar_{t-1}) x0 + sqrt(1 - alpha_bar_{t-1}) eps; at t = 0 x0 itself."""
    return at(jnp.sqrt(schedule.alpha_bar_prev), t, x0) * x0 + at(schedule.sqrt_one_minus_alpha_bar_prev, t, x0) * eps


def q_posterior(
    schedule: Schedule, x0: Float[Array, "*shape"], xt: Float[Array, "*shape"], t: Int[Array, "*batch"]
) -> tuple[Float[Array, "*shape"], Float[Array, "..."], Float[Array, "..."]]:
    """Mean, variance and log variance of q(x_{t-1} | xt, x0), Eqs. 6 and 7 of Ho et al. (2020).

    The mean has the shape of x0; variance and log variance are one number per image and broadcast against it. At t = 0
    the mean is x0 and the variance 0, while the log variance repeats that of t = 1.
    """
    mean = at(schedule.posterior_mean_x0, t, x0) * x0 + at(schedule.posterior_mean_xt, t, xt) * xt
    return mean, at(schedule.posterior_variance, t, x0), at(schedule.posterior_log_variance, t, x0)


def predict_x0(
    schedule: Schedule,
    xt: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
    output: Float[Array, "*shape"],
    prediction: Prediction = "eps",
) -> Float[Array, "*shape"]:
    """x0 from a network's output: (xt - s eps) / a, Eq. 15 of Ho et al. (2020), or a xt - s v. Not clipped."""
    a, s = at(schedule.sqrt_alpha_bar, t, xt), at(schedule.sqrt_one_minus_alpha_bar, t, xt)
    if prediction == "eps":
        return (xt - s * output) / a
    if prediction == "v":
        return a * xt - s * output
    _check_prediction(prediction)
    return output


def predict_eps(
    schedule: Schedule,
    xt: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
    output: Float[Array, "*shape"],
    prediction: Prediction = "eps",
) -> Float[Array, "*shape"]:
    """eps from a network's output: (xt - a x0) / s, or s xt + a v."""
    a, s = at(schedule.sqrt_alpha_bar, t, xt), at(schedule.sqrt_one_minus_alpha_bar, t, xt)
    if prediction == "x0":
        return (xt - a * output) / s
    if prediction == "v":
        return s * xt + a * output
    _check_prediction(prediction)
    return output


def predict_v(
    schedule: Schedule,
    xt: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
    output: Float[Array, "*shape"],
    prediction: Prediction = "eps",
) -> Float[Array, "*shape"]:
    """v = a eps - s x0 (Salimans & Ho 2022) from a network's output: (eps - s xt) / a, or (a xt - x0) / s."""
    a, s = at(schedule.sqrt_alpha_bar, t, xt), at(schedule.sqrt_one_minus_alpha_bar, t, xt)
    if prediction == "eps":
        return (output - s * xt) / a
    if prediction == "x0":
        return (a * xt - output) / s
    _check_prediction(prediction)
    return output


@dataclasses.dataclass(frozen=True)
class NetworkDenoiser:
    """What make_denoiser makes: the denoiser of a network."""

    schedule: Schedule
    network_fn: NetworkFn
    prediction: Prediction
    clip: Clip

    def __call__(self, xt: Float[Array, "*shape"], t: Int[Array, "*batch"]) -> Denoised:
        """x0, eps and any learned log variance at xt."""
        output, log_variance = self.network_fn(xt, t).astype(xt.dtype), None
        if output.shape[-1] == 2 * xt.shape[-1]:
            output, place = jnp.split(output, 2, axis=-1)
            log_variance = range_log_variance(self.schedule, place, t)
        x0 = predict_x0(self.schedule, xt, t, output, self.prediction)
        if not self.clip:
            return Denoised(x0, predict_eps(self.schedule, xt, t, output, self.prediction), log_variance)
        x0 = dynamic_threshold(x0, t.ndim) if self.clip == "dynamic" else jnp.clip(x0, -1.0, 1.0)
        return Denoised(x0, predict_eps(self.schedule, xt, t, x0, "x0"), log_variance)

    def visiting(self, timesteps: Int[Array, " K"]) -> "NetworkDenoiser":
        """The denoiser of the process that visits only these timesteps (ascending): its t counts them, 0 ... K-1."""
        short = respace(self.schedule, timesteps)
        return dataclasses.replace(self, schedule=short, network_fn=lambda xt, t: self.network_fn(xt, timesteps[t]))


def make_denoiser(
    schedule: Schedule, network_fn: NetworkFn, prediction: Prediction = "eps", clip: Clip = True
) -> NetworkDenoiser:
    """A denoiser (xt, t) -> Denoised from a network (xt, t) -> output.

    A network whose output has twice the channels of xt tells its variance in the second half, -1 ... 1 between that of
    the posterior and beta (Nichol & Dhariwal 2021, Eq. 15).

    Args:
        schedule: the one that the network was trained with.
        network_fn: the network with its weights; computed in any dtype, read as float32.
        prediction: what its output means: "eps", "x0" or "v".
        clip: whether x0 is clipped to [-1, 1], the range of images, or "dynamic", see dynamic_threshold; eps then follows
            the clipped x0.

    Raises:
        ValueError: an unknown name, or "eps" with a schedule that ends at alpha_bar = 0.
    """
    _check_prediction(prediction)
    if clip not in (True, False, "dynamic"):
        raise ValueError(f"unknown way to clip {clip!r}: choose True, False or 'dynamic'")
    known = not isinstance(schedule.alpha_bar, jax.core.Tracer)  # as an argument of a compiled function it is not
    if prediction == "eps" and known and jax.device_get(schedule.alpha_bar)[-1] == 0:
        raise ValueError("prediction eps tells nothing of x0 where alpha_bar = 0 (zero terminal SNR): choose x0 or v")
    return NetworkDenoiser(schedule, network_fn, prediction, clip)


def dynamic_threshold(x0: Float[Array, "*shape"], batch_axes: int) -> Float[Array, "*shape"]:
    """x0 clipped to [-s, s] and divided by s, image by image, section 2.3 of Saharia et al. (2022), arXiv:2205.11487.

    s >= 1 is the DYNAMIC_QUANTILE of |x0| over all axes behind the first `batch_axes`. Where a sampler drives x0 out of
    [-1, 1], as strong guidance does, saturated pixels so keep their differences. Their p is not given; 0.995 is what is used.
    """
    s = jnp.quantile(jnp.abs(x0), DYNAMIC_QUANTILE, axis=tuple(range(batch_axes, x0.ndim)), keepdims=True)
    s = jnp.maximum(s, 1.0)
    return jnp.clip(x0, -s, s) / s


def p_sample(
    key: AnyKey,
    schedule: Schedule,
    denoiser: Denoiser,
    xt: Float[Array, "*shape"],
    t: Int[Array, "*batch"],
    variance: Variance = "fixed_large",
) -> Float[Array, "*shape"]:
    """Draw x_{t-1} ~ p(x_{t-1} | xt), line 4 of Algorithm 2 of Ho et al. (2020); no noise is added at t = 0.

    Args:
        key: one key, or one for each image [B], which makes an image's noise independent of its batch.
        schedule: T steps.
        denoiser: see make_denoiser.
        xt: noisy images.
        t: timesteps 0 ... T-1.
        variance: "fixed_large" (beta_t) or "fixed_small" (the posterior variance), section 3.2; "learned_range": what the
            denoiser tells, Eq. 15 of Nichol & Dhariwal (2021), arXiv:2102.09672.
    """
    mean, log_variance = p_mean_log_variance(schedule, denoiser, xt, t, variance)
    noise = normal(key, xt.shape)
    last = (t == 0).reshape(t.shape + (1,) * (xt.ndim - t.ndim))
    return jnp.where(last, mean, mean + jnp.exp(0.5 * log_variance) * noise)


def p_mean_log_variance(
    schedule: Schedule, denoiser: Denoiser, xt: Float[Array, "*shape"], t: Int[Array, "*batch"], variance: Variance
) -> tuple[Float[Array, "*shape"], Float[Array, "..."]]:
    """Mean and log variance of p(x_{t-1} | xt); the latter is one number for each image, or has the shape of xt if learned.

    Raises:
        ValueError: "learned_range" with a denoiser that tells no variance, or an unknown name.
    """
    denoised = denoiser(xt, t)
    mean, _, _ = q_posterior(schedule, denoised.x0, xt, t)
    return mean, p_log_variance_of(schedule, denoised, t, variance)


def p_log_variance_of(
    schedule: Schedule, denoised: Denoised, t: Int[Array, "*batch"], variance: Variance
) -> Float[Array, "..."]:
    """Log variance of p(x_{t-1} | xt), to be multiplied with images: the fixed one of t, or what the denoiser tells.

    Raises:
        ValueError: "learned_range" with a denoiser that tells no variance, or an unknown name.
    """
    if variance != "learned_range":
        return at(p_log_variance(schedule, variance), t, denoised.x0)
    if denoised.log_variance is None:
        raise ValueError("variance learned_range needs a network that tells its variance: choose fixed_small or fixed_large")
    return denoised.log_variance


def range_log_variance(schedule: Schedule, place: Float[Array, "*shape"], t: Int[Array, "*batch"]) -> Float[Array, "*shape"]:
    """f log beta + (1 - f) log posterior variance, f = (place + 1) / 2, Eq. 15 of Nichol & Dhariwal (2021)."""
    upper, lower = at(jnp.log(schedule.beta), t, place), at(schedule.posterior_log_variance, t, place)
    fraction = (place + 1.0) / 2.0
    return fraction * upper + (1.0 - fraction) * lower


def p_log_variance(schedule: Schedule, variance: Variance = "fixed_large") -> Float[Array, " T"]:
    """Fixed log variance of p(x_{t-1} | xt) for every t, section 3.2 of Ho et al. (2020).

    "fixed_large" is log beta_t, the upper bound; "fixed_small" the log of the posterior variance, the lower one. At
    t = 0 both hold the posterior's entry for t = 1, as in Ho et al.'s code; it matters to the likelihood alone.
    """
    if variance == "fixed_small":
        return schedule.posterior_log_variance
    if variance != "fixed_large":
        raise ValueError(f"unknown variance {variance!r}: choose fixed_small, fixed_large or learned_range")
    return jnp.log(schedule.beta).at[0].set(schedule.posterior_log_variance[0])


def as_keys(key: AnyKey) -> Key[Array, "..."]:
    """The key as a typed one: jax.random.PRNGKey's raw uint32 arrays are taken too."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def fold_in(key: AnyKey, index: Int[Array, ""] | int) -> Key[Array, "..."]:
    """`jax.random.fold_in` of one key, or of one key for each row [B]."""
    keys, index = as_keys(key), jnp.asarray(index, jnp.int32)
    return jax.random.fold_in(keys, index) if keys.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def normal(key: AnyKey, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Standard normal float32 noise of the given shape, from one key, or row by row from one key for each row [B]."""
    keys = as_keys(key)
    if keys.ndim == 0:
        return jax.random.normal(keys, shape)
    if keys.shape != shape[:1]:
        raise ValueError(f"one key for each image needs {shape[0]} keys, not {keys.shape}")
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)


def _check_prediction(prediction: str) -> None:
    if prediction not in ("eps", "x0", "v"):
        raise ValueError(f"unknown prediction {prediction!r}: choose eps, x0 or v")
