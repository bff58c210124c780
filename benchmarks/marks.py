"""Marks on the clock of a training run, at which its weights are put aside; imports neither JAX nor PyTorch."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def label_of(minutes: float) -> str:
    """How files and tables call a mark: 5, 0.5."""
    return f"{minutes:g}"


def write_json(path: Path, values: Any) -> None:
    """A JSON file that takes its name only when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)


class Marks:
    """Calls save(label) at each mark, and writes LABEL.json with what the run had done by then.

    The step that is under way when a mark comes is finished and counts for it. The clock stands still while weights are saved.

    Args:
        folder: for the files.
        minutes: the marks, rising.
        began: time.time() at the start of the process, so that imports and whatever comes before the first step count.
        images_per_step: images of a training step.
        about: further facts for the files.
        save: puts the weights of a mark aside.
        now: the clock.
    """

    def __init__(
        self,
        folder: Path,
        minutes: Sequence[float],
        began: float,
        images_per_step: int,
        about: dict[str, Any],
        save: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._left, self._began, self._now = folder, list(minutes), began, now
        self._images_per_step, self._about, self._save = images_per_step, about, save
        self._steps, self._start_seconds = 0, 0.0

    def step(self) -> bool:
        """To be called after every training step; whether the last mark is behind it."""
        stopped = self._now()
        seconds = stopped - self._began
        self._steps += 1
        if self._steps == 1:
            self._start_seconds = seconds
        while self._left and seconds >= 60 * self._left[0]:
            minutes = self._left.pop(0)
            self._save(label_of(minutes))
            facts = {"minutes": minutes, "seconds": seconds, "start_seconds": self._start_seconds, "steps": self._steps}
            facts |= {"images": self._steps * self._images_per_step} | self._about
            write_json(self._folder / f"{label_of(minutes)}.json", facts)
        self._began += self._now() - stopped
        return not self._left
