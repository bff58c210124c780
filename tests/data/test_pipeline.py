"""The way of images to the devices: whole, or a dispatch at a time, read ahead by threads."""

import gc
import threading
import time
import weakref

import jax
import numpy as np
import pytest
from helpers import one_line_error
from rich.console import Console

from ddpm_jax import Config, InputError
from ddpm_jax.config import override
from ddpm_jax.data import ImageSet, StoredImages, batches, pipeline
from ddpm_jax.data.arrays import load_arrays
from ddpm_jax.data.order import crop_draws, make_order
from ddpm_jax.data.pipeline import read_all, stays_on_device
from ddpm_jax.parallel import make_mesh
from ddpm_jax.training.loop import fit_to_data

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (5, 8, 6, 3), np.uint8)
FLOATS = RANDOM.uniform(-1, 1, (5, 8, 6, 3)).astype(np.float32)
NUM_IMAGES = 21  # the batch of 8 does not divide it


@pytest.fixture(scope="module")
def numbered():
    """Images whose pixels all hold the image's number, and whose labels are that number plus 100."""
    numbers = np.arange(NUM_IMAGES)
    return ImageSet(
        np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (NUM_IMAGES, 4, 4, 3)).copy(),
        numbers.astype(np.int32) + 100,
    )


class Stored(StoredImages):
    """The same images, read when they are asked for; remembers what was, and may fail at one of them."""

    def __init__(self, images, bad=None, seconds=0.0):
        super().__init__(len(images), images.shape[1:])
        self.images, self.bad, self.seconds = images, bad, seconds
        self.reads, self.threads = [], set()

    def read(self, indices, draws=None):
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread())
        self.reads.append((np.array(indices), draws))
        if self.bad in indices:
            raise InputError(f"image {self.bad} can't be read")
        return self.images[indices]


@pytest.fixture
def stored(numbered):
    return ImageSet(Stored(numbered.images), numbered.labels)


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("grain", "decode"))]


@pytest.fixture(autouse=True)
def no_threads_remain():
    """Those that were at an image when the generator was closed finish it, and end."""
    yield
    gc.collect()
    for thread in workers():
        thread.join(timeout=5)
    assert workers() == []


def batch_config(megabytes, **values):
    return override(Config(), {"train.batch_size": 8, "model.num_classes": 200, "data.device_megabytes": megabytes} | values)


def drawn(config, image_set, start, stop):
    stacks = batches(config, image_set, make_mesh(), range(start, stop))
    return [jax.tree.map(lambda array: np.asarray(array)[0], stack) for stack in stacks]


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
def test_batches_hold_each_image_once_with_its_label(numbered, megabytes):
    got = drawn(batch_config(megabytes), numbered, 0, NUM_IMAGES)  # 8 epochs
    for batch in got:
        assert batch.images.shape == (8, 4, 4, 3) and batch.images.dtype == np.uint8 and batch.labels.dtype == np.int32
        assert (batch.images == batch.images[:, :1, :1, :1]).all()
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0] + 100, batch.labels)
    stream = np.concatenate([batch.labels for batch in got]).reshape(8, NUM_IMAGES)
    assert all(sorted(epoch.tolist()) == list(range(100, 100 + NUM_IMAGES)) for epoch in stream)


@pytest.mark.parametrize("images", [BYTES, FLOATS])
def test_device_and_host_give_equal_batches(images):
    image_set = ImageSet(images)
    pairs = zip(drawn(batch_config(512, **{"model.num_classes": None}), image_set, 3, 9),
                drawn(batch_config(0, **{"model.num_classes": None}), image_set, 3, 9), strict=True)  # fmt: skip
    for device, host in pairs:
        assert device.labels is None and host.labels is None
        np.testing.assert_array_equal(device.images, host.images, strict=True)


def test_memory_mapped_images_give_equal_batches(tmp_path, numbered):
    np.save(tmp_path / "set.npy", numbered.images)
    config = batch_config(0, **{"model.num_classes": None})
    mapped = drawn(config, load_arrays(tmp_path / "set.npy"), 0, 4)
    for batch, expected in zip(mapped, drawn(config, numbered, 0, 4), strict=True):
        np.testing.assert_array_equal(batch.images, expected.images, strict=True)


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
def test_a_resumed_run_sees_what_it_would_have_seen(numbered, megabytes):
    config = batch_config(megabytes)
    straight, resumed = drawn(config, numbered, 0, 12), drawn(config, numbered, 5, 12)
    assert len(straight) == 12 and len(resumed) == 7
    for expected, batch in zip(straight[5:], resumed, strict=True):
        np.testing.assert_array_equal(batch.labels, expected.labels)
        np.testing.assert_array_equal(batch.images, expected.images)


def test_another_seed_gives_another_order(numbered):
    one, other = (np.concatenate([b.labels for b in drawn(batch_config(512, seed=seed), numbered, 0, 5)]) for seed in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
def test_batches_are_split_over_the_devices(numbered, megabytes):
    assert jax.device_count() == 8
    config = batch_config(megabytes, **{"train.batch_size": 16, "train.steps_per_dispatch": 3})
    (batch,) = batches(config, numbered, make_mesh(), [2])
    whole = make_order(config.seed, NUM_IMAGES, 16)(2, 3)
    for array, expected in ((batch.images[..., 0, 0, 0], whole), (batch.labels, whole + 100)):
        assert len(array.sharding.device_set) == 8
        for shard in array.addressable_shards:
            place = 2 * jax.devices().index(shard.device)
            np.testing.assert_array_equal(np.asarray(shard.data), expected[:, place : place + 2])


def test_labels_stay_at_home_where_the_network_has_no_classes(numbered):
    (batch,) = drawn(batch_config(512, **{"model.num_classes": None}), numbered, 0, 1)
    assert batch.labels is None


# Images that are decoded when they are asked for


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
@pytest.mark.parametrize("together", [1, 4])
def test_stored_images_give_the_batches_of_an_array(numbered, stored, megabytes, together):
    config = batch_config(megabytes, **{"train.steps_per_dispatch": together, "train.num_steps": 12})
    for array, decoded in zip(
        *(list(batches(config, s, make_mesh(), range(0, 12, 4))) for s in (numbered, stored)), strict=True
    ):
        assert array.images.shape == (together, 8, 4, 4, 3)
        jax.tree.map(np.testing.assert_array_equal, array, decoded)


def test_a_small_set_is_decoded_once_by_several_threads():
    images = Stored(RANDOM.integers(0, 256, (300, 4, 4, 1), np.uint8), seconds=0.01)
    config = batch_config(512, **{"model.num_classes": None, "data.num_workers": 3})
    assert len(drawn(config, ImageSet(images), 0, 100)) == 100
    assert sorted(np.concatenate([indices for indices, _ in images.reads]).tolist()) == list(range(300))
    assert len(images.threads) == 3 and threading.main_thread() not in images.threads


def test_what_was_decoded_does_not_stay_in_the_hosts_memory(stored, monkeypatch):
    """The devices get copies here, since a CPU takes the host's own arrays where it can."""
    put, decoded = pipeline.put, []

    def read(*args):
        images = read_all(*args)
        decoded.append(weakref.ref(images))
        return images

    monkeypatch.setattr(pipeline, "read_all", read)
    monkeypatch.setattr(pipeline, "put", lambda tree, sharding: put(jax.tree.map(np.copy, tree), sharding))
    stream = batches(batch_config(512), stored, make_mesh(), range(3))
    next(stream)
    gc.collect()
    assert [each() for each in decoded] == [None]
    assert len(list(stream)) == 2


def test_decoding_a_small_set_shows_how_far_it_is(monkeypatch, capsys):
    """Only if it takes longer than a moment, and only on a terminal; nothing of it remains."""
    monkeypatch.setattr(pipeline, "MOMENT", 0.05)
    monkeypatch.setattr(pipeline, "console", Console(force_terminal=True, width=80))
    images = Stored(RANDOM.integers(0, 256, (640, 4, 4, 1), np.uint8), seconds=0.05)
    np.testing.assert_array_equal(read_all(images, 2), images.images)
    assert "decoding: image" in capsys.readouterr().out
    images.seconds = 0.0
    read_all(images, 2)
    assert "decoding" not in capsys.readouterr().out


@pytest.mark.parametrize("megabytes", [512, 0], ids=["on the device", "from the host"])
@pytest.mark.parametrize("bad", [0, NUM_IMAGES - 1])
def test_an_image_that_cannot_be_read_ends_in_its_line(numbered, megabytes, bad):
    """Also with other images waiting; after it the generator is at its end."""
    images = ImageSet(Stored(numbered.images, bad=bad, seconds=0.01), numbered.labels)
    stream = batches(batch_config(megabytes), images, make_mesh(), range(100))
    message = one_line_error(lambda: [None for _ in stream], fragments=[])
    assert message == f"image {bad} can't be read"
    assert list(stream) == []


# Random crops


def test_random_crops_are_decided_by_the_position(stored):
    """Not by the dispatch, the thread, or where the run was resumed; a set that changes doesn't stay on the device."""
    values = {"data.framing": "random", "train.num_steps": 12, "data.num_workers": 3}
    assert not stays_on_device(batch_config(512, **values), stored)
    seen = {}
    for together, start in ((1, 0), (4, 0), (4, 8), (1, 5)):
        config = batch_config(512, **values, **{"train.steps_per_dispatch": together})
        stored.images.reads.clear()
        list(batches(config, stored, make_mesh(), range(start, 12, together)))
        crops = np.concatenate([draws for _, draws in stored.images.reads])
        seen[together, start] = {tuple(draw) for draw in crops}
        assert len(crops) == 8 * (12 - start)
    expected = crop_draws(0, 0, 96)
    for (_, start), draws in seen.items():
        assert draws == {tuple(draw) for draw in expected[8 * start :]}


def test_each_image_gets_the_crop_of_its_position(stored):
    config = batch_config(512, **{"data.framing": "random", "train.num_steps": 6, "data.num_workers": 1})
    list(batches(config, stored, make_mesh(), range(6)))
    order, draws = make_order(0, NUM_IMAGES, 8), crop_draws(0, 0, 48).reshape(6, 8, 3)
    for step, (indices, given) in enumerate(stored.images.reads):
        np.testing.assert_array_equal(indices, order(step, 1)[0])
        np.testing.assert_array_equal(given, draws[step])


def test_arrays_and_other_framings_have_no_random_crops(numbered, stored):
    assert stays_on_device(batch_config(512, **{"data.framing": "random"}), numbered)
    list(batches(batch_config(0), stored, make_mesh(), range(3)))
    assert [draws for _, draws in stored.images.reads] == [None] * 3


# Reading ahead


def test_images_are_read_before_they_are_asked_for(stored):
    """As many dispatches as the workers and the devices hold, and no more."""
    stream = batches(batch_config(0, **{"data.num_workers": 2}), stored, make_mesh(), range(1000))
    next(stream)
    deadline = time.monotonic() + 5
    while len(stored.images.reads) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(stored.images.reads) == 5  # the one that was taken, and num_workers + 2
    stream.close()


def test_workers_read_at_the_same_time(numbered):
    """Each read waits until another one is under way."""

    class Meeting(Stored):
        barrier = threading.Barrier(2, timeout=20)

        def read(self, indices, draws=None):
            self.barrier.wait()
            return super().read(indices, draws)

    images = ImageSet(Meeting(numbered.images), numbered.labels)
    config = batch_config(0, **{"data.num_workers": 2, "train.num_steps": 20})
    assert len(list(batches(config, images, make_mesh(), range(20)))) == 20
    assert len(images.images.threads) == 2


def test_nothing_is_read_beyond_the_end_or_twice(stored):
    """Dispatches of up to 4 steps, cut short after 2 as by a record, and by the end: what isn't made isn't read."""
    config = batch_config(0, **{"train.steps_per_dispatch": 4, "train.num_steps": 9})
    stacks = list(batches(config, stored, make_mesh(), [0, 4, 6]))
    assert sorted(len(indices) for indices, _ in stored.images.reads) == [16, 24, 32]
    order = make_order(0, NUM_IMAGES, 8)
    for (start, count), stack in zip(((0, 4), (4, 2), (6, 3)), stacks, strict=True):
        assert stack.images.shape == (4, 8, 4, 4, 3) and stack.labels.shape == (4, 8)
        np.testing.assert_array_equal(stack.labels[:count], order(start, count) + 100)
        assert not np.asarray(stack.labels[count:]).any() and not np.asarray(stack.images[count:]).any()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_threads_end_with_the_generator(stored, taken):
    stream = batches(batch_config(0), stored, make_mesh(), range(1000))
    for _ in range(taken):
        next(stream)
    stream.close()
    for thread in workers():
        thread.join(timeout=5)
    assert workers() == [] and len(stored.images.reads) <= taken + 4
    assert list(stream) == []


# Sampling


def test_balanced_batches_hold_each_class_equally_often(numbered):
    """Classes of 15, 5 and 1 images: 15 steps of 24 show each 120 times."""
    image_set = ImageSet(numbered.images, np.repeat(np.arange(3, dtype=np.int32), (15, 5, 1)))
    for megabytes in (512, 0):
        config = batch_config(megabytes, **{"data.sampling": "balanced", "train.batch_size": 24, "model.num_classes": 3})
        got = drawn(config, image_set, 0, 15)
        for batch in got:
            assert np.bincount(batch.labels).tolist() == [8, 8, 8]
            np.testing.assert_array_equal(image_set.labels[batch.images[:, 0, 0, 0]], batch.labels)
        counts = np.bincount(np.concatenate([batch.images[:, 0, 0, 0] for batch in got]), minlength=NUM_IMAGES)
        assert counts.tolist() == [8] * 15 + [24] * 5 + [120]
        resumed = drawn(config, image_set, 7, 15)
        for expected, batch in zip(got[7:], resumed, strict=True):
            np.testing.assert_array_equal(batch.images, expected.images)


def test_balanced_sampling_works_without_a_network_that_knows_classes(numbered):
    config = batch_config(0, **{"data.sampling": "balanced", "model.num_classes": None})
    (batch,) = drawn(config, numbered, 0, 1)
    assert batch.labels is None


def test_balanced_sampling_needs_labels(numbered):
    config = batch_config(0, **{"data.sampling": "balanced", "model.num_classes": None, "model.multipliers": [1]})
    config = override(config, {"model.attention_resolutions": []})
    for call in (lambda: next(batches(config, ImageSet(numbered.images), make_mesh(), [0])),
                 lambda: fit_to_data(config, ImageSet(numbered.images))):  # fmt: skip
        one_line_error(call, fragments=["data.sampling = balanced", "fashion_mnist", "no labels", "natural"])
