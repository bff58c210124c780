"""Classes by name: from the data to the config of a run, and from the command line to their numbers."""

import dataclasses

import numpy as np
import pytest
from helpers import one_line_error

from ddpm_jax import Config, DataConfig
from ddpm_jax.config import differences, from_json, override, to_json
from ddpm_jax.data import ImageSet, load_images
from ddpm_jax.labels import find_labels
from ddpm_jax.training.loop import fit_to_data

NAMES = DataConfig(class_names=("t-shirt", "Ankle boot", "bag", "7", "crane", "sneaker", "crane", "cap, red"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("sneaker", 5),
        (" Sneaker ", 5),
        ("ANKLE BOOT", 1),
        ("0", 0),
        ("6", 6),
        ("12", 12),
        ("-1", -1),
        ("7", 3),
        ("cap, red", 7),
    ],
)
def test_one_class_is_that_of_all_images(text, number):
    """A name that is a number counts as a name; which numbers there are is for the model to say."""
    assert find_labels(NAMES, text, 3) == number
    assert type(find_labels(NAMES, text, 3)) is int


@pytest.mark.parametrize(
    ("text", "num_images", "labels"),
    [("ankle boot,bag", 5, [1, 2, 1, 2, 1]), ("ankle boot , 2,9", 2, [1, 2]), ("0,sneaker,0", 3, [0, 5, 0])],
)
def test_several_classes_take_turns(text, num_images, labels):
    found = find_labels(NAMES, text, num_images)
    assert found.tolist() == labels and found.dtype.kind == "i"


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("sneeker", ["--labels", "'sneeker'", "did you mean 'sneaker'"]),
        ("bag,anklebot", ["'anklebot'", "did you mean 'ankle boot'"]),
        ("zzz", ["'zzz'", "choose from t-shirt, ankle boot"]),
        ("", ["''"]),
        ("bag,,bag", ["''"]),
        ("1.5", ["'1.5'"]),
        ("crane", ["4, 6", "'crane'", "number"]),
    ],
)
def test_names_that_no_class_or_several_have(text, fragments):
    one_line_error(find_labels, NAMES, text, 4, fragments=fragments)


def test_runs_without_names_take_numbers():
    assert find_labels(DataConfig(), "3", 4) == 3
    assert find_labels(DataConfig(), "3,1", 3).tolist() == [3, 1, 3]
    one_line_error(find_labels, DataConfig(), "sneaker", 4, fragments=["'sneaker'", "not known", "numbers"])


# From the data to the config


def config_of(num_classes, **values):
    values = {"model.num_classes": num_classes, "model.multipliers": [1], "model.attention_resolutions": []} | values
    return override(Config(), values)


def test_names_come_from_the_data_and_stay_with_the_config():
    image_set = load_images(DataConfig())
    config = fit_to_data(config_of(10), image_set)
    assert config.data.class_names == image_set.class_names and config.data.class_names[7] == "sneaker"
    assert from_json(to_json(config)) == config
    assert find_labels(config.data, "ankle boot", 1) == 9
    assert differences(config, fit_to_data(config_of(10), image_set)) == []
    older = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=()))
    assert differences(older, config) == []


def test_names_that_are_given_come_first():
    given = tuple(f"class {i}" for i in range(10))
    config = fit_to_data(config_of(10, **{"data.class_names": given}), load_images(DataConfig()))
    assert config.data.class_names == given


def test_without_classes_or_names_there_are_none():
    assert fit_to_data(config_of(None), load_images(DataConfig())).data.class_names == ()
    unnamed = ImageSet(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype=np.int32))
    assert fit_to_data(config_of(4), unnamed).data.class_names == ()


@pytest.mark.parametrize("values", [{"model.num_classes": 12}, {"data.class_names": ["a", "b"]}])
def test_as_many_names_as_classes(values):
    count = 2 if "data.class_names" in values else 10
    config = override(config_of(10), values)
    fragments = [f"model.num_classes = {config.model.num_classes}", f"{count} data.class_names"]
    one_line_error(fit_to_data, config, load_images(DataConfig()), fragments=fragments)
