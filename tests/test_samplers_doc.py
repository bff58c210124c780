"""docs/samplers.md: its example runs as it stands, its table is the one that is printed."""

import re
from pathlib import Path

import numpy as np
import pytest

import sample
from ddpm_jax import SAMPLERS

TEXT = (Path(__file__).parents[1] / "docs/samplers.md").read_text()


def test_the_example_runs_and_is_short():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.splitlines()) <= 30
    names: dict = {}
    exec(compile(code, "docs/samplers.md", "exec"), names)
    assert names["images"].shape == (4, 8, 8, 1)
    assert np.abs(np.asarray(names["images"])).max() <= 1.5  # x0 lies within 1/2, and eps extrapolated adds little
    assert np.isfinite(names["images"]).all()


def test_the_table_is_the_one_that_is_printed(capsys):
    sample.main(["--list-samplers"])
    printed = capsys.readouterr().out.strip()
    assert printed in TEXT
    assert len(printed.splitlines()) == len(SAMPLERS) + 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_says_what_it_is(name):
    row = next(line for line in sample.sampler_table().splitlines() if line.split()[0] == name)
    assert len(row[45:].strip()) > 20
