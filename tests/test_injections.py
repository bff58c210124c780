"""What the checks behind the fault table notice: a promise that is broken must not pass."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from faults import inject
from injections.bench import EVERY, contents, different, different_runs, records
from injections.damage import cut, flip
from injections.endings import error_line
from injections.kills import inspect_training
from injections.table import Broken, Fault, Outcome
from orbax.checkpoint import v1 as ocp
from runs import Missed, Running

GOOD = [{"step": 1, "loss": 0.5, "images_per_second": 3.0}, {"step": 2, "loss": 0.25}]


def make_run(folder, weight=1.0, lines=GOOD, step=2):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = {"params": {"kernel": np.full((3, 2), weight, np.float32)}, "training": {"step": np.array(step, np.int32)}}
    ocp.save_checkpointables(folder / "checkpoints" / str(step), items)
    return folder


def test_runs_that_end_alike_do_not_differ(tmp_path):
    faster = [{**GOOD[0], "images_per_second": 4.0}, {"step": 2, "loss": 9.0}, GOOD[1]]  # step 2 made twice
    assert different_runs(make_run(tmp_path / "one"), make_run(tmp_path / "other", lines=faster)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"weight": np.nextafter(np.float32(1), np.float32(2))}, "['params']['kernel']"),
     ({"lines": [GOOD[0], {"step": 2, "loss": 0.25000001}]}, "record of step 2"), ({"lines": GOOD[:1]}, "record of step 2"),
     ({"step": 1}, "newest checkpoint 2, not 1")],
)  # fmt: skip
def test_runs_that_differ_are_told_apart(tmp_path, changes, expected):
    assert different_runs(make_run(tmp_path / "one"), make_run(tmp_path / "other", **changes)) == [expected]


def test_torn_records_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert sorted(records(run)) == [1, 2]


@pytest.mark.parametrize("damage", [cut, flip])
def test_damage_changes_one_file(tmp_path, damage):
    for name in ("one", "other"):
        (tmp_path / name).write_bytes(bytes(1000))
    before = contents(tmp_path)
    damage(tmp_path / "one")
    assert different(contents(tmp_path), before) == ["one"]


def ended(status, errors):
    return SimpleNamespace(wait=lambda limit: status, errors=errors)


def test_one_line_is_what_is_asked_for():
    found = error_line(ended(2, "step 3\nerror: /tmp/x/run/metrics.jsonl: no room\n"), "no room")
    assert found == "status 2: “error: run/metrics.jsonl: no room”"


@pytest.mark.parametrize(
    ("status", "errors"),
    [(0, "error: no room\n"), (1, "error: no room\n"), (2, "error: no room\nerror: no room\n"), (2, "error: too large\n"),
     (2, "no room\n"), (2, "Traceback (most recent call last):\n  File\nerror: no room\n"),
     (2, "error: no room\nException ignored in: <function>\n")],
)  # fmt: skip
def test_other_endings_are_broken_promises(status, errors):
    with pytest.raises(Broken):
        error_line(ended(status, errors), "no room")


def test_lost_steps_are_counted_and_limited(tmp_path):
    run = make_run(tmp_path / "run", lines=[{"step": step} for step in range(1, 6)])
    assert inspect_training(run, "", saved=0) == 3
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2 + 2 * EVERY + 1}) + "\n")
    with pytest.raises(Broken, match="steps lost"):
        inspect_training(run, "", saved=0)


@pytest.mark.parametrize(
    "errors", ["stopped at step 3 of 9 and saved", "resuming run from step 1\nstep 2/9  loss 0.5", "step 1/9  loss 0.5"]
)
def test_a_run_that_does_not_go_on_from_what_was_saved_is_noticed(tmp_path, errors):
    with pytest.raises(Broken):
        inspect_training(make_run(tmp_path / "run"), errors, saved=2)


@pytest.mark.parametrize(("error", "attempts"), [(Missed("too late"), 3), (RuntimeError("ended with status 1"), 1)])
def test_only_a_fault_that_came_too_late_is_injected_again(tmp_path, error, attempts):
    folders = []

    def inject_third(bench, folder):
        folders.append(folder)
        if len(folders) < 3:
            raise error
        return Outcome("as promised", "nothing")

    ((_, future),) = inject([Fault("late", "", "", inject_third)], tmp_path, jobs=1)
    assert isinstance(future.exception(), RuntimeError if attempts == 1 else type(None))
    assert len(set(folders)) == len(folders) == attempts and all(folder.is_dir() for folder in folders)


def test_a_program_that_is_through_was_missed(tmp_path):
    running = Running([sys.executable, "-c", ""], tmp_path, os.environ, None)
    for moment in (lambda: running.wait_for("never"), lambda: running.held(bool).__enter__()):
        with pytest.raises(Missed):
            moment()
    failing = Running([sys.executable, "-c", "raise ValueError"], tmp_path, os.environ, None)
    for moment in (lambda: failing.wait_for("never"), lambda: failing.held(bool).__enter__()):
        with pytest.raises(RuntimeError, match="status 1") as error:
            moment()
        assert error.type is RuntimeError
