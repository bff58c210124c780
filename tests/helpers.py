"""What several test modules need: the scripts as modules, in-process and as processes, and the shape of an error."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from ddpm_jax import Config, InputError

ROOT = Path(__file__).parents[1]


def load_script(path: str) -> ModuleType:
    """A script of the repository, such as "train.py", as a module; it finds its neighbours by name, as when it is run."""
    file = ROOT / path
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and tyro look their module up
    spec.loader.exec_module(module)
    return module


def start_script(*arguments: str | Path, cwd: Path) -> subprocess.Popen:
    """A script of the repository as a process of its own, on one CPU device."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])]
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_script(*arguments: str | Path, cwd: Path) -> str:
    """Run a script to its good end; what it wrote to stderr."""
    process = start_script(*arguments, cwd=cwd)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    return errors


def one_line_error(call, *arguments, fragments: Sequence[str]) -> str:
    """The message of the InputError that a call raises: one line that holds all the fragments."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1 and message == message.strip(), message
    assert not [fragment for fragment in fragments if fragment not in message], message
    return message


def other_value(hint: Any, value: Any) -> Any:
    """A value of a config field's type that differs from the given one."""
    if get_origin(hint) is UnionType:
        hint = get_args(hint)[0]
        value = other_value(hint, None) if value is None else value
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if get_origin(hint) is tuple:
        items = ("a", "b", "c") if get_args(hint)[0] is str else (4, 5, 6)
        return tuple(item + 1 for item in value) if value else items[: len(get_args(hint))]
    return {
        bool: lambda: not value,
        int: lambda: (value or 0) + 3,
        float: lambda: (value or 0.0) + 0.25,
        str: lambda: "other.npz",
    }[hint]()


def field_types() -> dict[str, Any]:
    """The type of every config field, by dotted name."""
    sections = get_type_hints(Config)
    nested = {
        f"{section}.{name}": hint
        for section, kind in sections.items()
        if is_dataclass(kind)
        for name, hint in get_type_hints(kind).items()
    }
    return nested | {name: hint for name, hint in sections.items() if not is_dataclass(hint)}


def replace_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with fields replaced by dotted name, unchecked."""
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        value = replace(getattr(config, section), **{field: value}) if section else value
        config = replace(config, **{section or field: value})
    return config
