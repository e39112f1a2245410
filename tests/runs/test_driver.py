"""What every loop over rounds shares, over both drivers: what is written when, what is repeated, what is said."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.baselines import row_settings
from tests.support.drivers import DRIVERS, Driver, drivers, in_simulation, on_evaluation, on_flower, on_the_engine
from tests.support.flower_grid import as_in_a_task
from tests.support.flower_sites import make_sites
from tests.support.natural_instructions import in_words, task, write_folder
from tests.support.runs import Watcher, read_metrics, trained
from tests.support.tiny import tiny_settings

from fedkseed.data import EncodedExample
from fedkseed.errors import TooFewRepliesError
from fedkseed.evaluation import EvalLoss
from fedkseed.kseed.client import Client
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.messages import TrainRequest
from fedkseed.runs.driver import Driver as Rounds
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.settings import build


@pytest.fixture(scope="module", autouse=True)
def in_a_task() -> Iterator[None]:
    with as_in_a_task():
        yield


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


# --- A run that goes the wrong way says so ---


def losses(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """What the evaluations of a run will measure, one after the other."""
    coming = iter(values)
    on_evaluation(monkeypatch, lambda examples: next(coming))


def diverging(notes: list[str]) -> list[str]:
    return [note.removeprefix("warning: ") for note in notes if "diverges" in note]


@drivers
def test_a_loss_that_rises_by_more_than_a_tenth_is_called_divergence(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    """Over the best so far, not the last: 2.1 is 5 % over it, 2.3 is 15 %."""
    losses(monkeypatch, 3.0, 2.0, 2.3, 2.1)
    (note,) = diverging(driver(sites, tmp_path / "run", local_steps=1).notes)
    assert note == (
        "round 2: the held-out loss is 2.3000, it was 2.0000: the run diverges. Start anew with a lower --lr than 0.01, "
        "or with --lr auto; fedkseed tune explains it"
    )


@drivers
def test_a_loss_that_falls_is_not(sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    losses(monkeypatch, 3.0, 2.9, 3.1, 2.8)
    assert driver(sites, tmp_path / "run", local_steps=1).notes == []


@drivers
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver, value: float
) -> None:
    """Also where a client measures it, whose word is not taken for a number."""
    losses(monkeypatch, 3.0, value, 2.9, 2.8)
    driven = driver(sites, tmp_path / "run", local_steps=1)
    (note,) = diverging(driven.notes)
    assert "round 1: " in note
    assert f"is {value:.4f}" in note
    assert "\n" not in note
    assert driven.ledger.round == 3
    assert not re.search("NaN|Infinity", (driven.folder / "metrics.jsonl").read_text())  # which are no JSON
    assert math.isnan(RunFolder.open(driven.folder).recorded().losses.get(1, math.nan))


def test_who_trains_by_gradients_is_told_of_auto_too(tiny: Path, tmp_path: Path) -> None:
    config = build(row_settings(tiny, "fedavg", lr=0.5))
    watcher = Watcher()
    rounds = Rounds(RunFolder.create(tmp_path / "run", config), Counting(1, done=1), watcher)  # type: ignore[arg-type]
    rounds.evaluated(EvalLoss.of(math.nan, 1, 1), 1, 0.1)
    (note,) = watcher.notes
    assert note.endswith("Start anew with a lower --lr than 0.5, or with --lr auto; fedkseed tune explains it")


# --- Evaluated are the same records ---


@drivers
@pytest.mark.parametrize("limit", [5, None])
def test_eval_limit_draws_the_same_records(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver, limit: int | None
) -> None:
    def evaluated(by: Driver, name: str, **changes: Any) -> list[list[list[int]]]:
        seen: list[list[list[int]]] = []

        def measure(examples: list[EncodedExample]) -> float:
            seen.append([example.input_ids.tolist() for example in examples])
            return 3.0

        with monkeypatch.context() as patch:
            on_evaluation(patch, measure)
            by(sites, tmp_path / name, local_steps=1, num_rounds=1, **changes)
        assert len(seen) == 2
        assert seen[0] == seen[1]
        return seen

    wanted = {} if limit is None else {"eval_limit": limit}
    found = evaluated(driver, "run", **wanted)[0]
    assert found == evaluated(in_simulation, "simulated", **wanted)[0]
    whole = evaluated(in_simulation, "whole")[0]
    assert len(found) == (limit or len(whole))
    assert (found == whole[:limit]) == (limit is None)  # drawn, not the first ones
    if limit is not None:
        assert found != evaluated(driver, "another seed", **wanted, seed=8)[0]


@pytest.mark.parametrize("driver", [in_simulation, on_flower, on_the_engine])
def test_of_natural_instructions_the_test_tasks_are_evaluated(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    tasks = {name: in_words(task([10] * count, name)) for name, count in (("task001_a", 30), ("task900_b", 4))}
    folder = write_folder(tmp_path / "tasks", {"task001_a": tasks["task001_a"]}, {"task900_b": tasks["task900_b"]})
    counts: list[int] = []

    def measure(examples: list[EncodedExample]) -> float:
        counts.append(len(examples))
        return 3.0

    on_evaluation(monkeypatch, measure)
    driver(sites, tmp_path / "run", local_steps=1, num_rounds=1, eval_data=str(folder))
    assert counts == [4, 4]


# --- Metrics first, then the checkpoint ---


class Killed(BaseException):
    pass


@pytest.mark.parametrize("driver", [in_simulation, on_flower])
def test_an_event_is_written_before_its_checkpoint_and_cut_when_the_run_goes_on(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    """A kill in between leaves a line too many, never one too few."""
    whole = driver(sites, tmp_path / "whole")
    run, save = tmp_path / "run", Ledger.save

    def dying(ledger: Ledger, path: str | Path) -> None:
        if ledger.round == 2:
            raise Killed
        save(ledger, path)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "save", dying)
        with pytest.raises(Killed):
            driver(sites, run)
    assert Ledger.load(run / "ledger.safetensors").round == 1
    assert [(e["event"], e["server_round"]) for e in read_metrics(run)][-1] == ("round", 2)
    assert driver(sites, run).ledger.digest() == whole.ledger.digest()
    assert timeless(run) == timeless(whole.folder)


def timeless(run: Path) -> list[dict[str, Any]]:
    of_the_machine = ("seconds", "seconds_by", "peak_bytes")
    return [{name: value for name, value in event.items() if name not in of_the_machine} for event in read_metrics(run)]


def test_all_drivers_write_the_same_events(sites: Path, tmp_path: Path) -> None:
    """But for whose losses they are, where clients measured them."""
    found = {name: timeless(driver(sites, tmp_path / name, num_rounds=2).folder) for name, driver in DRIVERS.items()}
    for event in found["flower, evaluated by a client"]:
        own = event.pop("clients") if event["event"] == "evaluation" else {"site-b": {"loss": event.get("eval_loss")}}
        assert own.get("site-b", {"loss": None})["loss"] == event.get("eval_loss")
    assert len({json.dumps(events) for events in found.values()}) == 1
    assert all(event["projected_grad_rms"] > 0 for event in found["simulation"] if event["event"] == "round")


# --- The loop itself, with a server that only counts ---


class Counting:
    """A server of which every round fails as often as it is told to; its checkpoint counts rounds."""

    def __init__(self, num_rounds: int, done: int = 0) -> None:
        self.round, self.num_rounds = done, num_rounds
        self.checkpoint = self

    @property
    def finished(self) -> bool:
        return self.round >= self.num_rounds


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", build(tiny_settings(tiny, num_rounds=4, eval_every=2)))


def test_an_attempt_that_is_not_closed_is_repeated_and_evaluations_are_where_they_are_due(run: RunFolder) -> None:
    server, done = Counting(4), list[str]()
    rounds = Rounds(run, server, Watcher())  # type: ignore[arg-type]
    answers = iter([True, False, False, True, True, False, True])

    def attempt() -> bool:
        closed = next(answers)
        server.round += closed
        done.append(f"{'closed' if closed else 'open'} {server.round}")
        return closed

    rounds.drive(attempt, lambda: done.append(f"evaluated {server.round}"))
    assert done == [
        *("evaluated 0", "closed 1", "open 1", "open 1", "closed 2", "evaluated 2"),
        *("closed 3", "open 3", "closed 4", "evaluated 4"),
    ]


def test_an_evaluation_that_is_written_down_is_not_repeated(run: RunFolder) -> None:
    """A run that was stopped after round 2: evaluated or not yet."""
    run.append_metrics({"event": "round", "server_round": 2})
    for written, expected in ((False, [2]), (True, [])):
        if written:
            Rounds(run, Counting(2, 2), Watcher()).evaluated(EvalLoss.of(3.0, 1, 1), 1, 0.1)  # type: ignore[arg-type]
        done: list[int] = []
        server = Counting(2, 2)
        Rounds(run, server, Watcher()).drive(lambda: True, lambda done=done: done.append(2))  # type: ignore[arg-type,misc]
        assert done == expected


def test_a_simulated_round_holds_one_request_at_a_time(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    encode, answer = TrainRequest.encode, Client.answer

    def encoded(request: TrainRequest) -> bytes:
        done.append(f"asked {request.client}")
        return encode(request)

    def answered(client: Client, data: bytes, *others: Any) -> bytes:
        done.append(f"heard {TrainRequest.decode(data).client}")
        return answer(client, data, *others)

    monkeypatch.setattr(TrainRequest, "encode", encoded)
    monkeypatch.setattr(Client, "answer", answered)
    _, metrics = trained(tmp_path / "run", tiny_settings(tiny, num_rounds=1, fraction_train=1.0))
    assert len(names := sorted(metrics[1]["clients"])) > 2
    assert done == [what for name in names for what in (f"asked {name}", f"heard {name}")]


def test_too_few_replies_three_times_are_an_error_with_what_is_safe(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same words, whoever drives."""
    texts = set()
    monkeypatch.setattr(Client, "answer", lambda *_: b"junk")
    for name, driver in DRIVERS.items():
        with pytest.raises(TooFewRepliesError) as caught:
            driver(sites, tmp_path / name)
        texts.add(str(caught.value).replace(str(tmp_path / name), "RUN"))
        assert not (tmp_path / name / "ledger.safetensors").exists()
    assert texts == {
        "round 1 ended three times with fewer than 2 accepted replies, 3 of 3 refused (message is not msgpack (ExtraData); "
        "expected the bytes of a reply); round 0 is safe in RUN: mend what they were refused for, then go on"
    }
