"""Trackers: what TensorBoard's files hold, read as any reader would; what W&B and trackio are told; that none costs a run."""

import struct
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.drivers import in_simulation, on_flower
from tests.support.flower_grid import as_in_a_task
from tests.support.flower_sites import make_sites
from tests.support.runs import Watcher, read_metrics
from tests.support.tiny import tiny_settings

import fedkseed as fk
from fedkseed.errors import ConfigError, RunError
from fedkseed.flower.building import build_strategy
from fedkseed.flower.config import node_settings, read_config
from fedkseed.runs import trackers
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.settings import build
from fedkseed.runs.trackers import TRACKERS, Row, numbers, tracking

EVALUATION = {"event": "evaluation", "server_round": 2, "eval_loss": 1.5, "num_examples": 3, "seconds": 0.5}
ROUND = {
    "event": "round", "server_round": 2, "lr": 0.1, "train_loss": None, "bytes_up": 9.0, "projected_grad_rms": 4.0,
    "clients": {"a": {"weight": 0.5, "loss": 2.0, "projected_grad_rms": 4.0}, "b": {"weight": 0.5, "loss": None}},
    "refused": {"c": "because"}, "missing": [], "seconds": 3.0, "seconds_by": {"forward": 2.0},
}  # fmt: skip


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", build(tiny_settings(tiny)))


def event_files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").glob("events.*"), key=lambda file: int(file.name.rpartition("-")[2]))


def read_events(file: Path) -> Iterator[Any]:
    """Records of TensorFlow's framing: a length and its checksum, the data and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4


def scalars(run: Path) -> dict[tuple[str, int], float]:
    events = [event for file in event_files(run) for event in read_events(file)]
    found = ((event.step, value) for event in events for value in event.summary.value)
    return {(value.tag, step): value.simple_value for step, value in found if value.HasField("simple_value")}


def others(run: Path, field: str) -> dict[str, Any]:
    values = [v for file in event_files(run) for event in read_events(file) for v in event.summary.value if v.HasField(field)]
    return {value.tag: getattr(value, field) for value in values}


def test_numbers_of_events() -> None:
    assert numbers(EVALUATION) == {"evaluation/eval_loss": 1.5, "evaluation/num_examples": 3.0, "evaluation/seconds": 0.5}
    assert numbers(ROUND) == {
        "round/lr": 0.1, "round/bytes_up": 9.0, "round/projected_grad_rms": 4.0, "round/seconds": 3.0,
        "round/seconds_by/forward": 2.0, "round/refused": 1.0, "round/missing": 0.0,
    }  # fmt: skip


# --- TensorBoard ---


@pytest.fixture(scope="module")
def logged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logged") / "run"
    fk.simulate(tiny_settings(tiny, num_rounds=2), folder, log=["tensorboard", "tensorboard"])
    return folder


def test_tensorboard_has_every_number_of_every_event(logged: Path) -> None:
    expected = {
        (name, event["server_round"]): value for event in read_metrics(logged) for name, value in numbers(event).items()
    }
    assert len(event_files(logged)) == 1
    assert scalars(logged) == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}
    assert scalars(logged)["evaluation/eval_loss", 2] > 0


def test_tensorboard_has_the_settings_as_hyperparameters(logged: Path) -> None:
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    metadata = others(logged, "metadata")
    started = HParamsPluginData.FromString(metadata["_hparams_/session_start_info"].plugin_data.content).session_start_info
    assert started.hparams["lr"].number_value == 0.01
    assert started.hparams["algorithm"].string_value == "fedkseed"
    about = HParamsPluginData.FromString(metadata["_hparams_/experiment"].plugin_data.content).experiment
    assert [metric.name.tag for metric in about.metric_infos] == ["evaluation/eval_loss"]


def test_tensorboard_has_histograms_of_the_clients_and_of_the_coefficients(logged: Path) -> None:
    found = others(logged, "histo")
    assert set(found) == {"clients/loss", "clients/projected_grad_rms", "ledger/coefficients"}
    coefficients = fk.Ledger.load(logged / "ledger.safetensors").coefficients
    assert found["ledger/coefficients"].num == 64
    assert found["ledger/coefficients"].max == pytest.approx(float(coefficients.max()))
    losses = [client["loss"] for client in read_metrics(logged)[-2]["clients"].values()]
    assert found["clients/loss"].sum == pytest.approx(sum(losses))


def test_a_run_that_goes_on_hides_what_it_repeats(tiny: Path, tmp_path: Path) -> None:
    """The second file begins by hiding all from the first round that is repeated on."""
    folder = tmp_path / "run"
    for num_rounds in (1, 2):
        fk.simulate(tiny_settings(tiny, num_rounds=num_rounds), folder, log=["tensorboard"])
    first, second = event_files(folder)
    assert not any(event.HasField("session_log") for event in read_events(first))
    assert [event.step for event in read_events(second) if event.HasField("session_log")] == [2]


def test_a_loss_that_is_no_number_is_logged_and_left_out_of_histograms(run: RunFolder) -> None:
    with tracking(["tensorboard"], run, 0, print) as tell:
        tell(EVALUATION | {"eval_loss": float("nan")})
        tell(ROUND | {"clients": {"a": {"loss": float("inf")}, "b": {"loss": 2.0}}})
    assert str(scalars(run.path)["evaluation/eval_loss", 2]) == "nan"
    assert others(run.path, "histo")["clients/loss"].num == 1


# --- On Flower ---


def test_on_flower_the_server_logs_and_the_bits_are_those_of_a_simulation(tmp_path: Path) -> None:
    sites = make_sites(tmp_path)
    with as_in_a_task():
        driven = on_flower(sites, tmp_path / "run", num_rounds=1, log="tensorboard")
    assert ("evaluation/eval_loss", 1) in scalars(driven.folder)
    assert driven.ledger.digest() == in_simulation(sites, tmp_path / "simulated", num_rounds=1).ledger.digest()


def test_on_flower_a_tracker_is_the_servers_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be installed on nodes; a wrong one is named before anything is loaded."""
    monkeypatch.setitem(TRACKERS, "nowhere", Row("no_such_package", ""))
    for log, text in (("csv", "run-config log is 'csv': expected tensorboard"), ("tensorboard, nowhere", "needs an extra")):
        settings = {"run": str(tmp_path), "model": "m", "lr": 1.0, "log": log}
        if log != "csv":
            assert node_settings(settings, {"name": "a", "data": __file__}).config.trackers == ("tensorboard", "nowhere")
        with pytest.raises(ConfigError, match=text):
            build_strategy(read_config(settings))


# --- trackio and W&B, with something in their place ---


class Recorder:
    """What both packages have in common; remembers in which order it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **about: Any) -> "Recorder":
        self.calls.append(("init", about))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (values, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """In place of the package that the test's parameter names."""
    stand_in, recorder = ModuleType(request.param), Recorder()
    stand_in.__spec__ = ModuleSpec(request.param, None)
    stand_in.init = recorder.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    monkeypatch.delitem(sys.modules, f"fedkseed.runs.trackers.{request.param}", raising=False)
    monkeypatch.delattr(trackers, request.param, raising=False)
    return recorder


@pytest.mark.parametrize(("recorder", "name"), [("wandb", "wandb"), ("trackio", "trackio")], indirect=["recorder"])
def test_w_and_b_and_trackio_get_settings_and_numbers_and_know_a_run_again(
    recorder: Recorder, name: str, run: RunFolder
) -> None:
    for done in (0, 2):
        with tracking([name], run, done, print) as tell:
            tell(EVALUATION)
    (_, first), (_, logged), (last, _), (_, second), *_ = recorder.calls
    assert (first["project"], first["resume"], first["config"]["lr"]) == ("fedkseed", "allow", 0.01)
    assert logged == (numbers(EVALUATION), 2)
    assert last == "finish"
    assert first == second
    assert "run" in first["name"]
    other = RunFolder.create(run.path.with_name("other") / "run", run.config)
    with tracking([name], other, 0, print):
        pass
    about = recorder.calls[-2][1]
    assert (about["name"], about.get("id")) != (first["name"], first.get("id"))


# --- One that fails ---


@pytest.mark.parametrize("recorder", ["wandb"], indirect=True)
def test_a_tracker_that_cannot_be_opened_ends_the_run_before_its_first_round(
    recorder: Recorder, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**about: Any) -> None:
        raise TypeError("not\nlogged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    opening = tracking(["tensorboard", "wandb"], run, 0, print)
    with pytest.raises(
        RunError, match="--log wandb cannot be opened \\(TypeError: not logged in\\); mend that, or leave it out"
    ):
        opening.__enter__()


@pytest.mark.parametrize("recorder", ["wandb"], indirect=True)
def test_a_tracker_that_fails_later_costs_a_line_and_nothing_else(recorder: Recorder, tiny: Path, tmp_path: Path) -> None:
    def fail(values: dict[str, float], step: int) -> None:
        raise OSError("the network is gone")

    recorder.log = fail  # type: ignore[method-assign]
    watcher, folder = Watcher(), tmp_path / "run"
    result = fk.simulate(tiny_settings(tiny, num_rounds=1), folder, watcher, log=["wandb"])
    assert result.ledger.round == 1
    assert [note for note in watcher.notes if "--log" in note] == [
        f"--log wandb failed (OSError: the network is gone); the run goes on without it, {folder} has all numbers"
    ]
    assert len(read_metrics(folder)) == 3


def test_what_is_unknown_or_not_installed_is_one_line_before_anything_is_made(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "nowhere", Row("no_such_package", ""))
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[nowhere\]' in fedkseed's clone, or leave log out"):
        fk.simulate(tiny_settings(tiny), tmp_path / "run", log=["nowhere"])
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--log", "csv", "--run", tmp_path / "run")
    assert_one_line(result, 2, "--log is 'csv'; expected one of tensorboard, trackio, wandb")
    assert not (tmp_path / "run").exists()


def test_the_command_line_takes_it_when_a_run_is_gone_on_with_too(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = ["simulate", *flags(tiny_settings(tiny, num_rounds=1)), "--run", folder]
    for words in (first, ["simulate", "--resume", folder, "--num-rounds", "2"]):
        result = fedkseed(*words, "--log", "tensorboard")
        assert (result.code, result.stderr) == (0, "")
    assert {step for _, step in scalars(folder)} == {0, 1, 2}
