"""The commands of docs/recipes.md and of the configs' docstrings: their files are there, their options are understood."""

import importlib
import re
import shlex

import pytest
from helpers import ROOT

FILES = [ROOT / "docs" / "recipes.md", *sorted((ROOT / "configs").glob("*.py"))]
# What each command line calls once its options are read and checked.
CALLS = {
    "train": ("train", "train"),
    "sample": ("sample", "load"),
    "evaluate": ("evaluate", "load"),
    "prepare": ("prepare", "prepare"),
    "ddpm_jax.data": ("ddpm_jax.data.__main__", "load_images"),
}


def commands():
    for file in FILES:
        for line in re.findall(r"^ *python (?:-m )?(.*)", file.read_text(), re.MULTILINE):
            # In a docstring the explanation follows after spaces, in the page after a "#".
            words = shlex.split(re.split(r"  +|\\$", line)[0], comments=True)
            yield pytest.param(words[0].removesuffix(".py"), words[1:], id=f"{file.stem}: {' '.join(words)}")


class Reached(Exception):
    """The command's options are fine."""


@pytest.mark.parametrize(("program", "options"), list(commands()))
def test_a_command_is_understood(program, options, monkeypatch):
    module_name, call = CALLS[program]
    module = importlib.import_module(module_name)

    def reach(*_, **__):
        raise Reached

    monkeypatch.setattr(module, call, reach)
    if call == "prepare":
        monkeypatch.setattr(module, "verify_records", reach)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Reached):
        module.main(options)


def test_there_are_commands_for_every_config():
    text = (ROOT / "docs" / "recipes.md").read_text()
    names = [file.stem for file in FILES[1:]]
    assert not [name for name in names if name not in ("fashion_mnist_cond", "cifar10_cond") and f"({name})" not in text
                and f"configs/{name}.py" not in text]  # fmt: skip
    assert sum(1 for _ in commands()) > 2 * len(names)
