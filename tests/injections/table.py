"""What a row of the fault table is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from injections.bench import Bench


class Outcome(NamedTuple):
    """What was seen of a fault whose promise was kept."""

    happened: str
    """What the programs did."""
    lost: str
    """What had to be made again, or is gone."""


class Broken(Exception):
    """A promise that was not kept; the message says what was seen instead."""


class NotInjected(Exception):
    """A fault that can't be injected here; the message says why."""


@dataclass(frozen=True)
class Fault:
    """A fault, how it is injected, and the function that injects it and checks every part of the promise."""

    name: str
    how: str
    promise: str
    inject: Callable[[Bench, Path], Outcome]
    """Takes the bench and a folder of its own. Raises Broken or NotInjected."""


def require(kept: bool, seen: str) -> None:
    """Raise Broken, with what was seen, unless a part of a promise is kept."""
    if not kept:
        raise Broken(seen)
