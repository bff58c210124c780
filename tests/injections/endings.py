"""How programs end that can't go on, as the faults have it in common."""

import re
import subprocess

from injections.table import Broken, require
from runs import Running


def error_line(running: Running, *fragments: str, statuses: tuple[int, ...] = (2,), limit: float = 120) -> str:
    """The one line in which a program says what is wrong, with paths left out, once it has ended with one of the statuses.

    Raises:
        Broken: another status, no such line or several, a traceback, or a line without one of the fragments.
    """
    try:
        status, errors = running.wait(limit), running.errors
    except subprocess.TimeoutExpired as error:
        raise Broken(f"has not ended after {limit:.0f} s: {running.errors[-2000:]}") from error
    require(status in statuses, f"status {status}: {errors[-2000:]}")
    require(not re.search(r"Traceback|^\s*Exception ", errors, re.M), errors[-2000:])
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    require(len(lines) == 1, f"{len(lines)} error lines: {errors[-2000:]}")
    missing = [fragment for fragment in fragments if fragment not in lines[0]]
    require(not missing, f"{missing} not in: {lines[0]}")
    return f"status {status}: “{short(lines[0])}”"


def short(line: str) -> str:
    """A line without the folders of its paths."""
    return re.sub(r"/[^\s:;,'\"]*/(?=(run|set|samples|checkpoints)\b)", "", line)
