"""What the tests of the commands share: a run that is done."""

import shutil
from pathlib import Path

import pytest
from tests.support.command_line import CommandLine, flags
from tests.support.tiny import tiny_settings


@pytest.fixture(scope="session")
def finished(fedkseed: CommandLine, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done; tests leave it as it is."""
    run = tmp_path_factory.mktemp("finished") / "run"
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", run)
    assert (result.code, result.stderr) == (0, "")
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))
