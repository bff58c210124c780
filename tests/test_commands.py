"""The commands of README.md, of docs and of the configs' docstrings: their files are there, their options are understood."""

import importlib
import re
import shlex

import pytest
from helpers import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *CONFIGS]
LEFT_OUT = ("benchmarks/", "--processes.", "COMMAND")  # other programs, and what waits for other processes
# What each command line calls, whichever comes first, once its options are read and checked.
CALLS = {
    "train": ("train", ["train"]),
    "sample": ("sample", ["load"]),
    "evaluate": ("evaluate", ["load", "load_images"]),
    "export": ("export", ["load"]),
    "prepare": ("prepare", ["prepare", "verify_records"]),
    "ddpm_jax.data": ("ddpm_jax.data.__main__", ["load_images"]),
}


def commands():
    for file in FILES:
        for line in re.findall(r"^ *(?:srun )?python (?:-m )?(.*)", file.read_text(), re.MULTILINE):
            if any(part in line for part in LEFT_OUT):
                continue
            # In a docstring the explanation follows after spaces, in the page after a "#".
            words = shlex.split(re.split(r"  +|\\$", line)[0], comments=True)
            yield pytest.param(words[0].removesuffix(".py"), words[1:], id=f"{file.stem}: {' '.join(words)}")


class Reached(Exception):
    """The command's options are fine."""


@pytest.mark.parametrize(("program", "options"), list(commands()))
def test_a_command_is_understood(program, options, monkeypatch):
    module_name, calls = CALLS[program]
    module = importlib.import_module(module_name)

    def reach(*_, **__):
        raise Reached

    for call in calls:
        monkeypatch.setattr(module, call, reach)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Reached):
        module.main(options)


def test_there_are_commands_for_every_config():
    text = (ROOT / "docs" / "recipes.md").read_text()
    names = [file.stem for file in CONFIGS]
    assert not [name for name in names if name not in ("fashion_mnist_cond", "cifar10_cond") and f"({name})" not in text
                and f"configs/{name}.py" not in text]  # fmt: skip
    assert sum(1 for _ in commands()) > 2 * len(names)
