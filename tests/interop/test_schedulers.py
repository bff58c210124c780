"""Steps of our samplers beside those of diffusers' schedulers: the same noise, the same network, whole trajectories.

The network is the exact denoiser of the mixture in tests/mixture.py, so nothing explodes and nothing is flat. Frames are
compared to an absolute 1e-4. diffusers computes alpha_bar in float32, and 1 - alpha_bar from it, which leaves few digits at
small t. Over the 1000 steps of its DDPMScheduler that puts frames 1e-4 (linear) and 2e-4 (cosine) away from the same chain in
float64, where ours are 2e-6 away; so its schedulers are given the alpha_bar of their betas in float64, and do with it what
they do.
"""

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import peers
import pytest
from diffusers.schedulers import scheduling_ddpm
from peers import diffusers, torch

import ddpm_jax as ddpm
from ddpm_jax.diffusion.multistep import step_lengths
from ddpm_jax.diffusion.process import fold_in, normal
from ddpm_jax.diffusion.samplers import SAMPLERS, visit
from ddpm_jax.diffusion.schedule import respace, spaced_timesteps

pytestmark = peers.MARKS

TOTAL = 1000
SHAPE = (2, 3, 3, 2)  # each pixel is a point in the plane
KEY = jax.random.key(5)
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS = {"uniform": "linspace", "trailing": "trailing"}
CLIPS = {
    "none": {"clip_sample": False},
    "static": {"clip_sample": True},
    "dynamic": {"thresholding": True, "sample_max_value": 1e6},
}
TOLERANCE = 1e-4

every_schedule = pytest.mark.parametrize("kind", SCHEDULES)


def make_scheduler(scheduler, kind, **options):
    """One of diffusers' schedulers, with the alpha_bar of its betas in float64: float32 loses what is compared."""
    made = scheduler(TOTAL, beta_schedule=kind, **options)
    made.alphas_cumprod = torch.cumprod(1 - made.betas.double(), 0)
    return made


def network(xp, kind, prediction, learned=False):
    """(x [B, H, W, 2], t [B]) -> eps, x0 or v, and a variance if it is learned; xp is NumPy or jax.numpy."""
    alpha_bar = np.asarray(ddpm.make_schedule(SCHEDULES[kind], TOTAL).alpha_bar, np.float64)

    def output(x, t):
        a, s = (xp.asarray(table, x.dtype)[t].reshape(-1, 1, 1, 1) for table in (alpha_bar**0.5, (1 - alpha_bar) ** 0.5))
        x0 = mixture.denoise(xp, x, a, s)
        eps = (x - a * x0) / s
        what = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]
        return xp.concatenate([what, xp.tanh(2 * x)], axis=-1) if learned else what

    return output


def to_torch(x):
    return torch.tensor(np.asarray(x, np.float32)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.permute(0, 2, 3, 1).numpy()


def ask(output, x, t):
    """What the network gives for torch's images at one timestep."""
    return to_torch(output(from_torch(x).astype(np.float64), np.full(len(x), int(t))))


@jax.jit
def noise(t):
    """What our samplers add at timestep t; x_T is that of T."""
    return normal(fold_in(KEY, t), SHAPE)


def ours(kind, sampler, num_steps, spacing, clip, prediction="eps", **options):
    """Frames [num_steps + 1, B, H, W, 2], x_T first."""
    schedule, learned = ddpm.make_schedule(SCHEDULES[kind], TOTAL), options.get("variance") == "learned_range"
    denoiser = ddpm.make_denoiser(
        schedule, network(jnp, kind, prediction, learned), prediction, {"none": False, "static": True}.get(clip, clip)
    )
    return np.asarray(
        ddpm.sample(KEY, schedule, denoiser, SHAPE, sampler, num_steps, spacing=spacing, trajectory=True, **options)
    )


def theirs(scheduler, output, step):
    """The same of theirs, by step(scheduler, output, t, x) -> x."""
    x = to_torch(noise(TOTAL))
    frames = [from_torch(x)]
    for t in scheduler.timesteps:
        x = step(scheduler, ask(output, x, t), t, x)
        frames.append(from_torch(x))
    return np.stack(frames)


def check_frames(found, expected):
    assert found.shape == expected.shape
    assert np.isfinite(found).all() and found[-1].std() > 0.2
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_same_timesteps_are_visited(spacing):
    """By any number of steps; in some, theirs visit one more, t = -1, when trailing. One step from t = 999 is ours alone."""
    scheduler = diffusers.DDPMScheduler(timestep_spacing=SPACINGS[spacing])
    for num_steps in range(2, TOTAL + 1):
        scheduler.set_timesteps(num_steps)
        expected = scheduler.timesteps.numpy()[::-1]
        np.testing.assert_array_equal(spaced_timesteps(num_steps, TOTAL, spacing), expected[expected >= 0])


@every_schedule
@pytest.mark.parametrize(
    ("num_steps", "spacing", "variance", "prediction", "clip"),
    [
        (None, "uniform", "fixed_large", "eps", "static"),
        (50, "uniform", "learned_range", "eps", "static"),
        (37, "trailing", "fixed_small", "v", "none"),
        (20, "uniform", "fixed_small", "x0", "dynamic"),
    ],
)
def test_ddpm(kind, num_steps, spacing, variance, prediction, clip, monkeypatch):
    found = ours(kind, "ddpm", num_steps, spacing, clip, prediction, variance=variance)
    scheduler = make_scheduler(
        diffusers.DDPMScheduler, kind, variance_type=variance, prediction_type=PREDICTIONS[prediction],
        timestep_spacing=SPACINGS[spacing], **CLIPS[clip],
    )  # fmt: skip
    scheduler.set_timesteps(num_steps or TOTAL)
    drawn = iter([to_torch(noise(int(t))) for t in scheduler.timesteps if t > 0])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(drawn))
    output = network(np, kind, prediction, variance == "learned_range")
    check_frames(found, theirs(scheduler, output, lambda s, output, t, x: s.step(output, t, x).prev_sample))
    assert next(drawn, None) is None


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("num_steps", "spacing", "prediction", "clip"),
    [(50, "trailing", "eps", "static"), (50, "uniform", "v", "none")],
)
def test_ddim(kind, eta, num_steps, spacing, prediction, clip):
    """eps follows the clipped x0, which is `use_clipped_model_output` there.

    Theirs takes a step from t to t - 1000 // num_inference_steps, which is the next one it visits only when trailing, by a
    number of steps that divides 1000. Of evenly spaced ones it is therefore told step by step how far the next one is.
    """
    found = ours(kind, "ddim", num_steps, spacing, clip, prediction, eta=eta)
    scheduler = make_scheduler(
        diffusers.DDIMScheduler,
        kind,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=SPACINGS[spacing],
        **CLIPS[clip],
    )
    scheduler.set_timesteps(num_steps)
    gaps = dict(zip(scheduler.timesteps.tolist(), -np.diff(scheduler.timesteps, append=-1), strict=True))

    def step(scheduler, output, t, x):
        if spacing == "uniform":
            gap = max(int(gaps[int(t)]), 2)  # behind t = 0 comes the image, however far it is
            scheduler.num_inference_steps = TOTAL // gap
            assert TOTAL // scheduler.num_inference_steps == gap
        drawn = to_torch(noise(int(t)))
        return scheduler.step(output, t, x, eta, clip == "static", variance_noise=drawn if eta else None).prev_sample

    check_frames(found, theirs(scheduler, network(np, kind, prediction), step))


MULTISTEP = {"dpmpp_2m": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}
every_solver = pytest.mark.parametrize("sampler", MULTISTEP)


def make_solver(sampler, kind, prediction="eps", clip="none", **options):
    """diffusers' scheduler of a sampler, of order 2. It has no clip_sample; thresholding up to 1 is the same."""
    clips = {"none": {}, "static": {"thresholding": True, "sample_max_value": 1.0}, "dynamic": CLIPS["dynamic"]}
    options |= {"solver_order": 2, "prediction_type": PREDICTIONS[prediction], **clips[clip]}
    return make_scheduler(MULTISTEP[sampler], kind, **options)


def step_solver(scheduler, output, t, x):
    return scheduler.step(output, t, x).prev_sample


def shrinking_timesteps(kind, length):
    """Ascending timesteps between which log SNR rises less and less on the way down, at first by `length`.

    They begin at 999, but for the cosine schedule at 998: its last beta is cut off at .999, which leaves a jump behind it.
    """
    level = np.asarray(ddpm.make_schedule(SCHEDULES[kind], TOTAL).log_snr, np.float64) / 2
    visited, longest = [TOTAL - 1 if kind == "linear" else TOTAL - 2], length
    while True:
        within = np.flatnonzero(level[: visited[-1]] - level[visited[-1]] <= longest)
        if within.size == 0:
            return np.array(visited[::-1])
        longest = level[within[0]] - level[visited[-1]]
        visited.append(int(within[0]))


def walk(kind, sampler, timesteps, prediction, clip):
    """Frames of our steps over any timesteps."""
    schedule = ddpm.make_schedule(SCHEDULES[kind], TOTAL)
    clip = {"none": False, "static": True}.get(clip, clip)
    denoiser = ddpm.make_denoiser(schedule, network(jnp, kind, prediction), prediction, clip)
    short, denoiser = visit(schedule, denoiser, timesteps)
    method, x = SAMPLERS[sampler], noise(TOTAL)
    step = jax.jit(lambda x, index, memory: method.step(KEY, short, denoiser, x, jnp.full(SHAPE[:1], index), memory))
    frames, memory = [x], (jnp.zeros_like(x),) * method.memory
    for index in reversed(range(len(timesteps))):
        x, memory = step(x, jnp.int32(index), memory)
        frames.append(x)
    return np.stack(frames)


@every_schedule
@every_solver
@pytest.mark.parametrize(("prediction", "clip"), [("eps", "none"), ("v", "static")])
def test_multistep_samplers_where_no_step_is_longer_than_the_one_before(kind, sampler, prediction, clip):
    """From noise to image over timesteps between which the log SNR rises less and less.

    Over such, neither method differs from the papers here. None of diffusers' spacings is of this kind, so its schedulers
    are given the timesteps, and the sigmas that they have at them.
    """
    timesteps = shrinking_timesteps(kind, 0.7)
    assert len(timesteps) >= 10
    scheduler = make_solver(sampler, kind, prediction, clip)
    scheduler.set_timesteps(len(timesteps))
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    scheduler.timesteps = torch.tensor(timesteps[::-1].copy())
    scheduler.sigmas = torch.cat([sigmas[scheduler.timesteps], torch.zeros(1)]).float()
    found = walk(kind, sampler, timesteps, prediction, clip)
    check_frames(found, theirs(scheduler, network(np, kind, prediction), step_solver))


@every_schedule
@every_solver
def test_multistep_samplers_over_trailing_steps_until_these_grow(kind, sampler):
    """The spacing that both have; near the image each of these steps is longer in log SNR than the one before it.

    There ours, by design, doesn't draw the line through two x0 out further than it goes back, nor the parabola through
    three: see ddpm_jax/diffusion/multistep.py. diffusers has no setting for that (`lower_order_final` lowers the order of the
    last step alone), so frames are compared up to the first step that is longer than the one before; from there on they do
    differ. "linspace" can't be compared: for these schedulers it is num_steps + 1 timesteps without 0. The network predicts v
    with the cosine schedule, where alpha_bar = 2e-9 at first: eps in float32 doesn't tell x0 to better than 1e-3 there.
    """
    num_steps, prediction = 20, "eps" if kind == "linear" else "v"
    found = ours(kind, sampler, num_steps, "trailing", "none", prediction)
    scheduler = make_solver(sampler, kind, prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    expected = theirs(scheduler, network(np, kind, prediction), step_solver)
    timesteps = jnp.asarray(spaced_timesteps(num_steps, TOTAL, "trailing"))
    lengths = np.asarray(step_lengths(respace(ddpm.make_schedule(SCHEDULES[kind], TOTAL), timesteps))[0])[::-1]
    same = 1 + int(np.argmax(np.diff(lengths) > 0))
    assert 8 <= same < num_steps - 2
    check_frames(found[: same + 1], expected[: same + 1])
    assert np.abs(found[same + 1 :] - expected[same + 1 :]).max() > 10 * TOLERANCE
    np.testing.assert_allclose(found[-1], expected[-1], rtol=0, atol=0.5)
