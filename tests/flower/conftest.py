"""What the tests of Flower share: three sites with records of their own, a task that messages are made in, what is logged."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.flower_grid import as_in_a_task
from tests.support.flower_sites import make_sites


@pytest.fixture(scope="module")
def in_a_task() -> Iterator[None]:
    with as_in_a_task():
        yield


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the strategy logs; Flower's logger tells its parents nothing unless told to."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog
