"""How processes find each other: what goes together, and what a single process is spared. See tests/scale for several."""

import threading
import time

import pytest
from helpers import one_line_error

from ddpm_jax import cli
from ddpm_jax.endings import last_words
from ddpm_jax.joining import PROCESS_OPTIONS, Processes, start_processes
from ddpm_jax.processes import anywhere, check_same, check_shared, from_all, is_first, several, wait_for_all


@pytest.mark.parametrize(
    ("options", "fragments"),
    [({"count": 2, "index": 2, "coordinator": "a:1"}, ["--processes.index 2", "0 ... 1", "--processes.count is 2"]),
     ({"count": 2, "index": -1, "coordinator": "a:1"}, ["--processes.index -1"]),
     ({"count": 0, "index": 0, "coordinator": "a:1"}, ["--processes.count 0", "1 or more"]),
     ({"count": 2, "index": 0}, ["--processes.coordinator missing"]),
     ({"coordinator": "a:1"}, ["--processes.count and --processes.index missing"]),
     ({"index": 1}, ["--processes.coordinator and --processes.count missing"]),
     ({"count": 2, "index": 0, "coordinator": "host"}, ["--processes.coordinator host", "HOST:PORT"]),
     ({"count": 2, "index": 0, "coordinator": "host:http"}, ["HOST:PORT"]),
     ({"count": 2, "index": 0, "coordinator": ":1234"}, ["HOST:PORT"]),
     ({"timeout": 0}, ["--processes.timeout 0", "1 second"])],
)  # fmt: skip
def test_options_that_don_t_go_together(options, fragments):
    one_line_error(start_processes, Processes(**options), fragments=fragments)


@pytest.mark.parametrize("processes", [Processes(), Processes(count=1), Processes("localhost:1", 1, 0)])
def test_a_single_process_starts_nothing(processes):
    before, began = threading.active_count(), time.perf_counter()
    start_processes(processes)
    assert time.perf_counter() - began < 0.1
    assert not several() and is_first()
    assert threading.active_count() == before


def test_a_single_process_agrees_with_itself(tmp_path):
    assert from_all("name", "value") == ["value"]
    assert anywhere(True) and not anywhere(False)
    wait_for_all("anything")
    check_same({"a": 1})
    check_shared(tmp_path / "not made")
    last_words("unheard")
    assert list(tmp_path.iterdir()) == []


def test_the_options_are_read_before_all_others():
    argv = ["--seed", "1", "--processes.count=3", "--processes.index", "2", "--processes.coordinator", "a:1", "--out", "x"]
    assert cli._processes(argv) == Processes("a:1", 3, 2)
    assert cli._processes([]) == Processes()
    assert {"processes.coordinator", "processes.count", "processes.index", "processes.timeout"} == PROCESS_OPTIONS
    one_line_error(cli._processes, ["--processes.count", "two"], fragments=["two"])
