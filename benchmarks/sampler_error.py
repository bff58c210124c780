"""Error over evaluations for every sampler, on data whose exact denoiser is known: a mixture of Gaussians in the plane.

    python benchmarks/sampler_error.py --out docs/sampler_error.png          about a minute

Left: distance to where the exact probability flow (float64, scipy) takes the same x_T, root mean square over 500 points, for
the deterministic samplers on a schedule with lambda from 7 to -6 in equal steps. Right: sliced Wasserstein-2 distance of
20,000 draws to the data's law, for all samplers on the default cosine schedule of T = 1000; dotted: of the data's own draws.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from ddpm_jax import SAMPLERS, Denoised, Schedule, make_schedule, sample, schedule_from_betas
from ddpm_jax.diffusion.process import Denoiser, at

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import mixture

LAMBDA = np.linspace(7.0, -6.0, 1025)
DRAWS = 20_000


def exact(schedule: Schedule) -> Denoiser:
    """The denoiser of the mixture."""

    def denoiser(xt: jax.Array, t: jax.Array) -> Denoised:
        a, s = at(schedule.sqrt_alpha_bar, t, xt), at(schedule.sqrt_one_minus_alpha_bar, t, xt)
        x0 = mixture.denoise(jnp, xt, a, s)
        return Denoised(x0, (xt - a * x0) / s)

    return denoiser


def flow_errors(counts: list[int]) -> dict[str, list[float]]:
    """Root mean square distance to the exact flow for each deterministic sampler and number of steps."""
    alpha_bar = 1 / (1 + np.exp(-2 * LAMBDA))
    schedule = schedule_from_betas(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))
    x = np.random.default_rng(0).standard_normal((500, 2)).astype(np.float32)
    end = mixture.flow(x.astype(np.float64), np.sqrt(alpha_bar[-1]), np.sqrt(1 - alpha_bar[-1]))

    def error(name: str, count: int) -> float:
        drawn = sample(jax.random.key(0), schedule, exact(schedule), x.shape, name, count, x_init=jnp.asarray(x))
        return float(np.sqrt(np.mean((np.asarray(drawn, np.float64) - end) ** 2)))

    return {name: [error(name, n) for n in counts] for name, known in SAMPLERS.items() if not known.stochastic}


def sliced_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Sliced Wasserstein-2 distance of two sets of as many points, over 32 directions."""
    angles = np.pi * np.arange(32) / 32
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.sqrt(np.mean((np.sort(first @ directions, 0) - np.sort(second @ directions, 0)) ** 2)))


def law_errors(counts: list[int]) -> tuple[dict[str, list[float]], float]:
    """Distance to the data's law for each sampler and number of steps, and that of the data's own draws."""
    schedule, rng = make_schedule("cosine"), np.random.default_rng(1)
    data = mixture.draw(rng, DRAWS)

    def error(name: str, count: int) -> float:
        drawn = sample(jax.random.key(1), schedule, exact(schedule), (DRAWS, 2), name, count, spacing="logsnr")
        return sliced_distance(np.asarray(drawn, np.float64), data)

    return {name: [error(name, n) for n in counts] for name in SAMPLERS}, sliced_distance(mixture.draw(rng, DRAWS), data)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/sampler_error.png")
    out = parser.parse_args().out
    flow_counts, law_counts = [5, 9, 17, 33, 65, 129, 257], [5, 10, 20, 50, 100, 250]
    flow, (law, floor) = flow_errors(flow_counts), law_errors(law_counts)
    figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, errors, counts in ((left, flow, flow_counts), (right, law, law_counts)):
        for index, name in enumerate(SAMPLERS):
            if name in errors:
                print(name, [f"{error:.2g}" for error in errors[name]])
                evaluations = SAMPLERS[name].evaluations * np.array(counts)
                style = "--" if name == "euler" else "-"  # which lies on ddim
                axes.loglog(evaluations, errors[name], style, marker="o", markersize=3, color=f"C{index}", label=name)
        axes.set_xlabel("evaluations")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    right.axhline(floor, color="black", linestyle=":")
    left.set(title="distance to the exact probability flow", ylabel="root mean square")
    right.set(title="distance to the law of the data, cosine, logsnr spacing", ylabel="sliced Wasserstein-2")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
