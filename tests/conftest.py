"""What all tests share: the shared folder, Hypothesis without chance, torch's threads put back, Triton's interpreter."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# Before torch and NumPy: on tensors as small as these more threads only wait for each other. Laws of threads set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As in a shell where the environment is active: commands that are told to a user have the program's bare name.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
import torch

if TYPE_CHECKING:
    from tests.support.command_line import CommandLine

# Before anything imports Triton: without a GPU the gpu backend runs in Triton's interpreter, on tensors in main memory.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Derandomised: a failure repeats, and a run that passes today passes tomorrow.
settings.register_profile(
    "fedkseed", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fedkseed")
pytest.register_assert_rewrite("tests.support")


def pytest_configure(config: pytest.Config) -> None:
    from tests.support.cpu_times import CpuTimes

    config.pluginmanager.register(CpuTimes())


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token ids are kept in a folder of the tests' own, not in the home folder; subprocesses inherit it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FEDKSEED_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the shared models and vectors: $FEDKSEED_SHARED, or `shared` beside the checkout."""
    default = Path(__file__).resolve().parents[1].parent / "shared"
    path = Path(os.environ.get("FEDKSEED_SHARED", default))
    if not path.is_dir():
        pytest.skip(f"no shared folder at {path}; set FEDKSEED_SHARED to where it is")
    return path


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Lets a test set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """The folder of a real, small language model; tests write nothing into it."""
    path = shared / "models" / "stories260k"
    if not (path / "model.safetensors").is_file():
        pytest.skip(f"no model at {path}")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and records that `tiny_settings` names; tests write nothing into it."""
    from tests.support.tiny import tiny_settings

    folder = tmp_path_factory.mktemp("tiny")
    tiny_settings(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model like the tiny one with other values; tests write nothing into it."""
    from tests.support.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """Processes that multiprocessing forks from a server begin at once."""
    from tests.support import command_line

    with command_line.fork_server():
        yield


@pytest.fixture(scope="session")
def fedkseed(fork_server: None) -> Iterator["CommandLine"]:
    """`fedkseed` as a user calls it."""
    from tests.support.command_line import CommandLine

    line = CommandLine()
    yield line
    line.close()
