"""Processes: of several that make one run, who writes, what they tell each other, and what they must agree on.

What they tell each other goes over JAX's coordination service, so over the network alone: no device waits for it. A single
process does nothing of it. See joining.py for how they find each other and endings.py for how they end.
"""

import collections
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # the service's client has no public name; Orbax takes it from here, too

from ddpm_jax.errors import InputError

DAY = 24 * 3600 * 1000  # milliseconds: others may read data for hours, and whether they live, the service watches
LONGEST = 24 * DAY  # at a barrier, which can't be waited for again once it has failed; 31 bits hold no more whole days
SHOWN_WITHIN = 10.0  # seconds in which a network file system shows a new file everywhere

_rounds: collections.Counter[str] = collections.Counter()


def several() -> bool:
    """Whether this process is one of several."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return distributed.global_state.process_id == 0


def process_index() -> int:
    """Which of the processes this is, from 0; unlike JAX's, it waits for no devices."""
    return distributed.global_state.process_id


def tell(name: str, value: str) -> None:
    """Tell a value under a name to whoever hears it; what was told first under a name stays."""
    try:
        _client().key_value_set(f"ddpm_jax/{name}", value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def hear(name: str) -> str:
    """Wait for the value that is told under a name. Raises JaxRuntimeError once the run is over."""
    while True:
        try:
            return _client().blocking_key_value_get(f"ddpm_jax/{name}", DAY)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def from_all(name: str, value: str) -> list[str]:
    """The values that the processes give, in their order. All must ask; each name is a round of its own."""
    if not several():
        return [value]
    place = f"ddpm_jax/{name}/{_rounds[name]}"
    _rounds[name] += 1
    client = _client()
    client.key_value_set(f"{place}/{process_index():06}", value)
    client.wait_at_barrier(place, LONGEST)
    return [text for _, text in sorted(client.key_value_dir_get(f"{place}/"))]


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    return "set" in from_all("anywhere", "set" if flag else "")


def wait_for_all(name: str) -> None:
    """Go on when all processes have come here."""
    from_all(f"wait for {name}", "")


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise InputError, in every process, where one of them has another fact than the first."""
    lines = [f"{name} = {value}" for name, value in facts.items()]
    told = [text.splitlines() for text in from_all("facts", "\n".join(lines))]
    for index, theirs in enumerate(told):
        if theirs != told[0]:
            pairs = zip(theirs, told[0], strict=False)
            other = next(
                (f"{one}, but process 0 has {two}" for one, two in pairs if one != two), "other options than process 0"
            )
            raise InputError(f"process {index} has {other}: start the same command, on the same data, in all processes")


def check_shared(folder: Path) -> None:
    """Raise InputError, in every process, unless the folder is the same for all. Of several, the first one creates it."""
    if not several():
        return
    file = folder / f".shared.{from_all('token', secrets.token_hex(8))[0]}"
    if is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise InputError(f"can't write to {folder}: {error.strerror}: choose another folder") from error
    wait_for_all("the token")
    deadline = time.monotonic() + SHOWN_WITHIN
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    hosts = from_all("token seen", "" if seen else socket.gethostname())
    if is_first():
        file.unlink()
    blind = [f"{index} on {host}" for index, host in enumerate(hosts) if host]
    if blind:
        what = f"{folder} is another folder in process 0 than in process {', '.join(blind)}"
        raise InputError(f"{what}: choose one on a file system that all processes share")


def _client() -> Any:
    return distributed.global_state.client
