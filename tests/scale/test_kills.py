"""40 kill -9 and 20 SIGTERM at random instants of training, preparing and sampling: no bit of the end results changes."""

import pytest
from faults import inject
from injections.kills import CAMPAIGNS, SEED

pytestmark = pytest.mark.scale


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return {fault.name: future for fault, future in inject(CAMPAIGNS, tmp_path_factory.mktemp("kills"), jobs=2)}


@pytest.mark.parametrize("name", [fault.name for fault in CAMPAIGNS])
def test_a_program_that_is_killed_again_and_again_ends_as_an_undisturbed_one(outcomes, name):
    print(f"seed of the instants: {SEED}")
    print(outcomes[name].result())
