"""The fast samplers as loops in float64 NumPy, in the papers' own variables; nothing here imports the library.

A loop gets a, s [K] at the visited timesteps, ascending, and denoise(x, i) -> E[x0 | xt]; lambda = log(a / s). Multistep
methods are written as in their papers: polynomials in lambda through what was seen, integrated in closed form.
"""

import math

import numpy as np


def _lambdas(a, s):
    """lambda [K + 1], of the image (infinity) first: entry i is where step i ends, i + 1 where it starts."""
    return [math.inf, *np.log(a / s)]


def euler(a, s, x, denoise, heun=False):
    """Karras et al. (2022), algorithm 1 with s(t) = 1, sigma(t) = t: in x / a, by sigma."""
    sigma = [0.0, *(s / a)]
    x = x / a[-1]
    for i in reversed(range(len(a))):
        slope = (x - denoise(a[i] * x, i)) / sigma[i + 1]
        end = x + (sigma[i] - sigma[i + 1]) * slope
        if heun and i and sigma[i + 1] <= math.exp(2) * sigma[i]:
            after = (end - denoise(a[i - 1] * end, i - 1)) / sigma[i]
            end = x + (sigma[i] - sigma[i + 1]) * (slope + after) / 2
        x = end
    return x


def heun(a, s, x, denoise):
    return euler(a, s, x, denoise, heun=True)


def dpmpp_2m(a, s, x, denoise, noises=None):
    """Lu et al. (2022), DPM-Solver++: algorithm 2; with noises [K] the SDE's."""
    lam, last = _lambdas(a, s), None
    for i in reversed(range(len(a))):
        a_end, s_end = (a[i - 1], s[i - 1]) if i else (1.0, 0.0)
        h, seen = lam[i] - lam[i + 1], denoise(x, i)
        combined = seen
        if i and last is not None:
            r = max((lam[i + 1] - lam[i + 2]) / h, 1.0)  # not further out than the last step was long
            combined = (1 + 1 / (2 * r)) * seen - 1 / (2 * r) * last
        if noises is None:
            x = s_end / s[i] * x - a_end * (math.exp(-h) - 1) * combined
        else:
            x = s_end / s[i] * math.exp(-h) * x + a_end * (1 - math.exp(-2 * h)) * combined
            x = x + s_end * math.sqrt(1 - math.exp(-2 * h)) * noises[i]
        last = seen
    return x


def dpmpp_3m(a, s, x, denoise):
    """Order 3: x = s'/s x + a' int exp(lambda - lambda') D dlambda with the parabola through three D, by quadrature."""
    lam, seen = _lambdas(a, s), []
    for i in reversed(range(len(a))):
        seen.insert(0, denoise(x, i))
        if i == 0:
            return seen[0]
        h = lam[i] - lam[i + 1]
        if len(seen) < 3 or h > 1.1 * (lam[i + 1] - lam[i + 2]):
            slope = (seen[0] - seen[1]) * min(h / (lam[i + 1] - lam[i + 2]), 1.0) if len(seen) > 1 else 0.0
            x = s[i - 1] / s[i] * x - a[i - 1] * math.expm1(-h) * (seen[0] + slope / 2)
        else:
            x = s[i - 1] / s[i] * x + a[i - 1] * _integral(lam[i + 1 : i + 4], seen[:3], lam[i + 1], lam[i])
    return None


def unipc(a, s, x, denoise):
    """Zhao et al. (2023), order 2, B(h) = exp(h) - 1: predict, look, correct with what was seen."""
    lam, seen, before = _lambdas(a, s), [], None
    for i in reversed(range(len(a))):
        new = denoise(x, i)
        if i == 0:
            return new
        h = lam[i + 1] - lam[i + 2] if seen else 0.0
        if len(seen) == 1 or (seen and h > 1.1 * (lam[i + 2] - lam[i + 3])):
            x = s[i] / s[i + 1] * before - a[i] * math.expm1(-h) * (seen[0] + (new - seen[0]) / 2)
        elif len(seen) > 1:
            nodes = [lam[i + 1], lam[i + 2], lam[i + 3]]
            x = s[i] / s[i + 1] * before + a[i] * _integral(nodes, [new, *seen[:2]], lam[i + 2], lam[i + 1])
        seen.insert(0, new)
        before = x
        h = lam[i] - lam[i + 1]
        slope = (seen[0] - seen[1]) * min(h / (lam[i + 1] - lam[i + 2]), 1.0) if len(seen) > 1 else 0.0
        x = s[i - 1] / s[i] * x - a[i - 1] * math.expm1(-h) * (seen[0] + slope / 2)
    return None


def _integral(nodes, values, start, end):
    """int_start^end exp(l - end) P(l) dl, P the polynomial through (nodes, values), by 12-point Gauss quadrature."""
    points, weights = np.polynomial.legendre.leggauss(12)
    total = 0.0
    for point, weight in zip(points, weights, strict=True):
        at = start + (end - start) * (point + 1) / 2
        shares = [math.prod((at - m) / (n - m) for m in nodes if m != n) for n in nodes]
        total = total + weight * math.exp(at - end) * sum(share * value for share, value in zip(shares, values, strict=True))
    return (end - start) / 2 * total


LOOPS = {"ddim": euler, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m, "unipc": unipc}
