"""Classes by name or number, as a command line gives them."""

import numpy as np
from jaxtyping import Int

from ddpm_jax.config import DataConfig, unknown_name
from ddpm_jax.errors import InputError


def find_labels(config: DataConfig, text: str, num_images: int) -> int | Int[np.ndarray, " N"]:
    """The class of all images, or of each where the text names several, which the images show by turns.

    Whether the network has classes of these numbers is for the model to say.

    Args:
        config: of the model's run, with the names of its classes where they are known.
        text: such as "sneaker", "ankle boot,bag" or "7, 9"; upper and lower case are alike.
        num_images: N.

    Raises:
        InputError: a name that no class has (the nearest is given) or several have, or one where no names are known.
    """
    parts = [text] if text.strip().lower() in _numbers(config) else text.split(",")
    numbers = [_class_number(config, part.strip()) for part in parts]
    return numbers[0] if len(numbers) == 1 else np.resize(numbers, max(num_images, 1))


def _class_number(config: DataConfig, name: str) -> int:
    numbers = _numbers(config)
    found = numbers.get(name.lower(), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--labels: classes {', '.join(map(str, found))} are all called {name!r}: give one of these numbers")
    try:
        return int(name)
    except ValueError:
        pass
    if not numbers:
        raise InputError(f"--labels {name!r}: the names of this model's classes are not known: give numbers")
    message = unknown_name(name.lower(), numbers, "class")
    choices = "" if "did you mean" in message or len(numbers) > 20 else f": choose from {', '.join(numbers)}"
    raise InputError(f"--labels: {message}{choices}")


def _numbers(config: DataConfig) -> dict[str, list[int]]:
    """{name in lower case: the numbers of the classes that have it}."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(config.class_names):
        numbers.setdefault(name.strip().lower(), []).append(number)
    return numbers
