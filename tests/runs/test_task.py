"""How a run's model is loaded and bound: where its base weights are read from, on whatever device it lies."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.flower_grid import as_in_a_task, federation, run_config
from tests.support.flower_sites import make_sites, simulated_settings
from tests.support.runs import Watcher

import fedkseed as fk
from fedkseed.flower import holdings
from fedkseed.flower.building import build_strategy
from fedkseed.flower.config import read_config
from fedkseed.flower.participant import Participant
from fedkseed.models.base import FileBase, MemoryBase
from fedkseed.models.loading import load_model
from fedkseed.models.probing import Traits
from fedkseed.runs import learner, simulation, task
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import prepare
from fedkseed.runs.simulation import Simulation
from fedkseed.runs.task import bind_loaded

POOL = fk.SeedPool(7, 8)


@pytest.fixture(scope="module", autouse=True)
def in_a_task() -> Iterator[None]:
    with as_in_a_task():
        yield


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


class Bound(BaseException):
    """The model is bound, which is all that these tests want to see."""


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where `bind` is told to read the base weights from; the run ends there."""
    seen: list[Any] = []

    def bind(model: torch.nn.Module, pool: fk.SeedPool, base: Any = None) -> None:
        seen.append(base)
        raise Bound

    monkeypatch.setattr(task, "bind", bind)
    holdings.load_bound.cache_clear()
    return seen


@pytest.fixture
def every_file_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the meta device can't be compared with a file's; those of a GPU can, and are the same."""
    monkeypatch.setattr(task, "base_path", lambda source, model: Path(source))


# --- Whoever binds ---


def simulated(sites: Path, folder: Path) -> None:
    config = simulated_settings(sites)
    Simulation(RunFolder.create(folder / "run", config), prepare(config, Watcher()), Watcher())


def tuned(sites: Path, folder: Path) -> None:
    fk.tune(simulated_settings(sites).model_dump())


def node_on_flower(sites: Path, folder: Path) -> None:
    Participant(run_config(sites, folder / "run"), {"name": "site-a", "data": str(sites / "site-a.jsonl")})


def server_on_flower(sites: Path, folder: Path) -> None:
    build_strategy(read_config(run_config(sites, folder / "run")))


WHO = {"simulate": simulated, "tune": tuned, "a Flower node": node_on_flower, "the Flower server": server_on_flower}
everybody = pytest.mark.parametrize("bound_by", WHO.values(), ids=WHO)


@everybody
def test_on_a_cpu_the_base_is_read_again_from_the_models_own_file(
    sites: Path, tmp_path: Path, bases: list[Any], bound_by: Callable[[Path, Path], None]
) -> None:
    with pytest.raises(Bound):
        bound_by(sites, tmp_path)
    assert bases == [sites / "model"]


@everybody
@pytest.mark.usefixtures("every_file_fits")
def test_on_another_device_the_base_is_kept_in_memory(
    sites: Path, tmp_path: Path, bases: list[Any], monkeypatch: pytest.MonkeyPatch, bound_by: Callable[[Path, Path], None]
) -> None:
    """Else the file would go through the bus at every rebuild. The meta device stands for a GPU."""

    def elsewhere(source: Any, *rest: Any) -> torch.nn.Module:
        return load_model(source, *rest).to("meta")

    for module in (simulation, learner):
        monkeypatch.setattr(module, "load_model", elsewhere)
    monkeypatch.setattr(learner, "probe", lambda model, *_: Traits(64, 1000, True, ()))  # no values, no answers
    monkeypatch.setattr(learner, "frozen_names", lambda *_: ())
    with pytest.raises(Bound):
        bound_by(sites, tmp_path)
    assert bases == [None]


@pytest.mark.usefixtures("every_file_fits")
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_parameter_elsewhere_is_enough(sites: Path, bases: list[Any], name: str) -> None:
    """As of a model that is spread over devices."""
    model = load_model(sites / "model", "float32")
    owner, attribute = name.rsplit(".", 1)
    parameter = model.get_parameter(name)
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(parameter.detach().to("meta")))
    with pytest.raises(Bound):
        bind_loaded(sites / "model", model, POOL)
    assert bases == [None]


# --- What it is bound to ---


def test_a_file_and_a_copy_give_the_same_weights(sites: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded() -> task.BoundModel:
        return bind_loaded(sites / "model", load_model(sites / "model", "float32"), POOL)

    from_file = loaded()
    with monkeypatch.context() as patch:
        patch.setattr(task, "base_path", lambda source, model: None)
        from_memory = loaded()
    assert isinstance(from_file.bound._base, FileBase)
    assert isinstance(from_memory.bound._base, MemoryBase)
    assert from_file.identity == from_memory.identity
    for one in (from_file, from_memory):
        one.bound.rebuild([0.25] * 8)
    assert from_file.bound.digest() == from_memory.bound.digest()


def test_a_model_that_was_changed_since_it_was_loaded_is_no_longer_its_file(sites: Path) -> None:
    """The negative control: what the file has is compared, not believed."""
    model = load_model(sites / "model", "float32")
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    bound = bind_loaded(sites / "model", model, POOL).bound
    assert isinstance(bound._base, MemoryBase)
    before = bound.digest()
    bound.rebuild([0.0] * 8)
    assert bound.digest() == before


def test_what_is_tuned_is_said_not_loaded(sites: Path) -> None:
    """A run tunes all parameters but those that it is told to leave alone."""
    model = load_model(sites / "model", "float32").requires_grad_(False)
    assert bind_loaded(sites / "model", model, POOL).identity.frozen == ()
    assert bind_loaded(sites / "model", model, POOL, ["lm_head.weight"]).identity.frozen == ("lm_head.weight",)


def test_nodes_that_live_in_one_process_load_one_model(sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the simulation engine's actors do."""
    loads: list[Any] = []

    def counted(source: Any, *rest: Any) -> torch.nn.Module:
        loads.append(source)
        return load_model(source, *rest)

    monkeypatch.setattr(learner, "load_model", counted)
    holdings.load_bound.cache_clear()
    config = run_config(sites, tmp_path / "run", num_rounds=1)
    build_strategy(read_config(config)).start(federation(sites, config))
    assert loads == [str(sites / "model")]
