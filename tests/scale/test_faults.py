"""Every fault of docs/reliability.md but the random kills: injected into real runs, with all that is promised checked."""

import pytest
from faults import FAULTS, inject
from injections.kills import CAMPAIGNS
from injections.table import NotInjected

pytestmark = pytest.mark.scale
CHOSEN = {name: fault for name, fault in FAULTS.items() if fault not in CAMPAIGNS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return {fault.name: future for fault, future in inject(list(CHOSEN.values()), tmp_path_factory.mktemp("faults"), jobs=2)}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_promised_of_a_fault_is_kept(outcomes, name):
    if isinstance(outcomes[name].exception(), NotInjected):
        pytest.skip(str(outcomes[name].exception()))
    outcomes[name].result()
