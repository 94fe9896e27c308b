"""Tests of the service in examples/serving, which share one running service."""

import pytest
from services import NAMES, Oracle, running, until


@pytest.fixture(scope="session")
def oracle():
    return Oracle()


@pytest.fixture(scope="session")
def shared(oracle, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        oracle.save(directory / name, seed, params=oracle.params)
    (directory / "no-adapter").mkdir()
    (directory / "..hidden").mkdir()
    options = "--rows 3 --slots 4 --queue 8 --context 128 --max-tokens 64"
    with running(directory, *options.split()) as found:
        yield found


@pytest.fixture
def service(shared):
    """After each test nothing is in use, and no program was compiled."""
    before = shared.service.engine.programs.compiled
    yield shared
    shared.wait_until_idle()
    assert shared.service.engine.programs.compiled == before
    held = [one for one in shared.service.adapters._slots if one is not None]
    until(lambda: not any(one.users for one in held))
    assert shared.service.engine.error is None
