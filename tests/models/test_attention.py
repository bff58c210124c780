"""Attention for CPUs against the sums that define it, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.models import attention
from ddpm_jax.models.attention import attention_cpu


def reference(q, k, v, dy):
    """y, and the gradients of sum(y * dy), position by position with the Jacobian of the softmax written out."""
    q, k, v, dy = (np.asarray(array, np.float64) for array in (q, k, v, dy))
    y, dq, dk, dv = (np.zeros_like(q) for _ in range(4))
    for b in range(len(q)):
        for i in range(q.shape[1]):
            s = np.array([q[b, i] @ k[b, j] for j in range(k.shape[1])]) / np.sqrt(q.shape[2])
            w = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            y[b, i] = w @ v[b]
            ds = (np.diag(w) - np.outer(w, w)) @ (v[b] @ dy[b, i]) / np.sqrt(q.shape[2])
            dq[b, i] = ds @ k[b]
            dk[b] += np.outer(ds, q[b, i])
            dv[b] += np.outer(w, dy[b, i])
    return y, dq, dk, dv


def set_parts(monkeypatch, limit):
    """Parts of so many bytes; what was traced with others is forgotten."""
    monkeypatch.setattr(attention, "CACHE_BYTES", limit)
    jax.clear_caches()


@pytest.mark.parametrize("images_per_part", [1, 2, 6])
def test_values_and_gradients(images_per_part, monkeypatch):
    set_parts(monkeypatch, images_per_part * 9 * 9 * 4)
    q, k, v, dy = jax.random.normal(jax.random.key(0), (4, 6, 9, 5)) * jnp.array([3.0, 1.0, 1.0, 1.0])[:, None, None, None]
    y, vjp = jax.vjp(attention_cpu, q, k, v)
    for got, expected in zip((y, *vjp(dy)), reference(q, k, v, dy), strict=True):
        assert got.dtype == jnp.float32
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_weights_are_never_all_there(monkeypatch):
    """The largest array of a program in parts is one part's weights."""
    set_parts(monkeypatch, 2 * 64 * 64 * 4)
    shape = jax.ShapeDtypeStruct((16, 64, 8), jnp.float32)
    program = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention_cpu(q, k, v) ** 2), (0, 1, 2))).lower(shape, shape, shape)
    assert "16x64x64" not in program.as_text()
    assert "2x64x64" in program.as_text()


def test_logits_whose_rounding_errors_are_large():
    """Compiled, the largest logit may be rounded otherwise than those that it is taken from: 1e5 apart where they are 1e12."""
    q, k, v, dy = jax.random.normal(jax.random.key(0), (4, 2, 12, 8)) * jnp.array([1e6, 1e6, 1.0, 1.0])[:, None, None, None]
    y, vjp = jax.vjp(attention_cpu, q, k, v)
    assert all(np.isfinite(array).all() for array in (y, *vjp(dy)))
    assert np.abs(y - reference(q, k, v, dy)[0]).max() <= 1e-5
