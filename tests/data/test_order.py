"""The order of training images: which one stands at which position, and which rows a process reads."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given

from ddpm_jax.data.order import crop_draws, epoch_order, make_balanced_order, make_order
from ddpm_jax.parallel import make_mesh, rows_held

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(0, 10**6), st.integers(1, 300))
def test_epoch_order_is_a_permutation(seed, epoch, num_images):
    assert sorted(epoch_order(seed, epoch, num_images).tolist()) == list(range(num_images))


@given(seeds, st.integers(1, 40), st.integers(1, 60))
def test_an_epoch_shows_each_image_once(seed, num_images, batch_size):
    """Also where the batch does not divide the set, or is larger than it."""
    indices = make_order(seed, num_images, batch_size)
    num_steps = -(-3 * num_images // batch_size)
    stream = np.concatenate([indices(step, 1)[0] for step in range(num_steps)])
    assert stream.dtype == np.int32 and len(stream) == num_steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * num_images : (epoch + 1) * num_images].tolist()) == list(range(num_images))


@given(seeds, st.integers(0, 9), st.integers(1, 6))
def test_many_steps_at_once_are_those_steps(seed, step, count):
    indices = make_order(seed, 20, 7)
    together = indices(step, count)
    assert together.shape == (count, 7) and together.dtype == np.int32
    np.testing.assert_array_equal(together, np.concatenate([indices(step + i, 1) for i in range(count)]))


@given(seeds, st.permutations(range(12)))
def test_order_depends_on_seed_and_step_alone(seed, steps):
    """Not on the steps that were asked for before."""
    forwards, shuffled = make_order(seed, 20, 7), make_order(seed, 20, 7)
    expected = [forwards(step, 1).tolist() for step in range(12)]
    assert [shuffled(step, 1).tolist() for step in steps] == [expected[step] for step in steps]


def test_orders_of_other_seeds_and_epochs_differ():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in range(20) for epoch in range(20)]
    assert len(set(orders)) == 400


def test_every_order_is_as_likely():
    """All 24 orders of 4 images over 4,800 epochs, and over as many seeds: chi-squared, 23 degrees of freedom."""
    for orders in ([epoch_order(0, n, 4) for n in range(4800)], [epoch_order(n, 0, 4) for n in range(4800)]):
        _, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(counts) == 24
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


# Balanced

classes = st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=30)  # classes 3, 4, ... have no images


@given(seeds, classes, st.integers(1, 40))
def test_balanced_order_shows_each_class_once_a_round_and_each_image_once_a_pass(seed, labels, batch_size):
    labels = np.array(labels, np.int32)
    indices = make_balanced_order(seed, labels, batch_size)
    present, sizes = np.unique(labels, return_counts=True)
    num_rounds = 2 * max(sizes) + 1
    num_steps = -(-num_rounds * len(present) // batch_size)
    stream = np.concatenate([indices(step, 1)[0] for step in range(num_steps)])[: num_rounds * len(present)]
    assert stream.dtype == np.int32
    for round_ in labels[stream].reshape(num_rounds, len(present)):
        assert sorted(round_.tolist()) == present.tolist()
    for label in present:
        own = stream[labels[stream] == label]
        members = np.flatnonzero(labels == label).tolist()
        for first in range(0, num_rounds - len(members) + 1, len(members)):
            assert sorted(own[first : first + len(members)].tolist()) == members


@given(seeds, st.permutations(range(12)), st.integers(1, 6))
def test_balanced_order_depends_on_seed_and_step_alone(seed, steps, count):
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2], np.int32)
    forwards, shuffled = make_balanced_order(seed, labels, 7), make_balanced_order(seed, labels, 7)
    expected = [forwards(step, 1)[0].tolist() for step in range(12 + count)]
    for step in steps:
        assert shuffled(step, count).tolist() == expected[step : step + count]


def test_balanced_order_far_along_is_quick_and_whole():
    labels = np.repeat(np.arange(10, dtype=np.int32), 7)
    whole = make_balanced_order(0, labels, 70)(10**7, 1)[0]
    assert np.bincount(labels[whole]).tolist() == [7] * 10


def test_every_balanced_order_is_as_likely():
    """The 6 orders of 3 classes over 6,000 rounds, and of a class's 3 images over 2,000 passes: chi-squared."""
    labels = np.repeat(np.arange(3, dtype=np.int32), 3)
    stream = make_balanced_order(0, labels, 18_000)(0, 1)[0]
    _, counts = np.unique(labels[stream].reshape(-1, 3), axis=0, return_counts=True)
    assert len(counts) == 6 and scipy.stats.chisquare(counts).pvalue > 1e-3
    passes = [stream[labels[stream] == label].reshape(-1, 3) - 3 * label for label in range(3)]
    for orders in passes:
        _, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(counts) == 6 and scipy.stats.chisquare(counts).pvalue > 1e-3
    # Nor do the orders of two classes have anything to do with each other: 36 pairs of orders.
    _, counts = np.unique(np.concatenate(passes[:2], axis=1), axis=0, return_counts=True)
    assert len(counts) == 36 and scipy.stats.chisquare(counts).pvalue > 1e-3


# Crops


@given(seeds, st.integers(0, 10**12), st.integers(1, 50), st.integers(0, 49))
def test_the_crop_of_a_position_depends_on_no_other(seed, start, count, skipped):
    skipped = min(skipped, count)
    whole = crop_draws(seed, start, start + count)
    assert whole.shape == (count, 3) and (whole >= 0).all() and (whole < 1).all()
    np.testing.assert_array_equal(crop_draws(seed, start + skipped, start + count), whole[skipped:], strict=True)


def test_crops_are_uniform_and_independent():
    """Kolmogorov-Smirnov for each number and its neighbour's product; other seeds and positions share nothing."""
    draws = crop_draws(3, 10, 20_010)
    for column in draws.T:
        assert scipy.stats.kstest(column, "uniform").pvalue > 1e-3
    for one, other in ((draws[:, 0], draws[:, 1]), (draws[:, 1], draws[:, 2]), (draws[:-1, 2], draws[1:, 0])):
        assert scipy.stats.pearsonr(one, other).pvalue > 1e-3
    assert len(np.unique(np.concatenate([draws, crop_draws(4, 10, 20_010)]))) == 120_000


# Processes


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_images", [12, 13, 35, 100, 5])
@pytest.mark.parametrize("permuted", [False, True])
def test_processes_together_see_each_image_once_an_epoch(num_processes, num_images, permuted):
    """Six devices, shared by 1, 2 and 3 processes; also where the mesh has them in another order."""
    devices = jax.devices()[:6]
    mesh = make_mesh([devices[i] for i in (4, 2, 5, 0, 3, 1)] if permuted else devices)
    batch_size, share = 12, 6 // num_processes
    rows = [rows_held(mesh, batch_size, devices[share * i : share * (i + 1)]) for i in range(num_processes)]
    assert [len(part) for part in rows] == [batch_size // num_processes] * num_processes
    assert sorted(np.concatenate(rows).tolist()) == list(range(batch_size))
    order = make_order(7, num_images, batch_size)
    num_steps = -(-3 * num_images // batch_size)
    parts = [np.stack([order(step, 1)[0][part] for step in range(num_steps)]) for part in rows]
    stream = np.empty((num_steps, batch_size), int)
    for part, seen in zip(rows, parts, strict=True):
        stream[:, part] = seen
    for epoch in stream.ravel()[: 3 * num_images].reshape(3, num_images):
        assert sorted(epoch.tolist()) == list(range(num_images))


def test_this_process_holds_all_rows_when_it_is_the_only_one():
    assert rows_held(make_mesh(), 16).tolist() == list(range(16))
