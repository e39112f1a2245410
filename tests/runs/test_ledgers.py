"""The ledgers that a run keeps, one for each evaluation: which there are, which is the best, and what asks for one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.baselines import row_settings
from tests.support.runs import simulation
from tests.support.tiny import tiny_settings

import fedkseed as fk
from fedkseed.errors import ConfigError, FedKSeedError, LedgerError, RunError, RunFolderError
from fedkseed.evaluation import EvalLoss
from fedkseed.kseed.ledger import Ledger
from fedkseed.report.reading import read
from fedkseed.runs import simulation as simulation_module
from fedkseed.runs.folder import RunFolder, tuned_file


def with_losses(patch: pytest.MonkeyPatch, *losses: float) -> None:
    """What the evaluations will measure, one after the other."""
    coming = iter(losses)
    patch.setattr(simulation_module, "evaluate_loss", lambda *_: EvalLoss.of(next(coming), 3, 9))


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Four rounds, evaluated after 0, 2 and 4; the best is 2."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        with_losses(patch, 3.0, 2.5, 2.75)
        simulation(folder, tiny_settings(tiny, num_rounds=4, local_steps=1, eval_every=2))[0].train()
    return RunFolder.open(folder)


def test_each_evaluation_keeps_a_published_ledger_of_its_round(run: RunFolder) -> None:
    assert run.ledgers.rounds == [0, 2, 4]
    kept = {i: Ledger.load(run.ledgers.path(i)) for i in (0, 2, 4)}
    assert [kept[i].round for i in kept] == [0, 2, 4]
    assert not any(ledger.is_checkpoint for ledger in kept.values())
    last = run.load_ledger()
    assert last is not None
    assert kept[4].digest() == last.published().digest()
    assert not kept[0].coefficients.any()
    assert (kept[2].coefficients != kept[4].coefficients).any()


def test_a_round_or_the_best_names_its_file(run: RunFolder) -> None:
    assert tuned_file(run.path) == tuned_file(run.path, None) == run.ledger_path
    assert tuned_file(run.path, "2") == tuned_file(run.path, 2) == tuned_file(run.path, "best") == run.ledgers.path(2)
    assert tuned_file(run.ledgers.path(2)) == run.ledgers.path(2)


@pytest.mark.parametrize(
    ("which", "error", "says"),
    [
        ("1", RunFolderError, "--round 1: RUN keeps no ledger of round 1; those that it keeps: 0, 2, 4"),
        ("5", RunFolderError, "--round 5: RUN keeps no ledger of round 5; those"),
        (3, RunFolderError, "--round 3: RUN keeps no ledger of round 3; those"),
        *[(x, ConfigError, "expected the number of a round, or best") for x in ("last", "-1", "1.5", "", -1, "Best")],
    ],
)
def test_other_rounds_are_refused(run: RunFolder, which: Any, error: type[FedKSeedError], says: str) -> None:
    for ask in ASKING.values():
        with pytest.raises(error) as caught:
            ask(run.path, which)
        assert says.replace("RUN", str(run.path)) in str(caught.value)


ASKING: dict[str, Callable[[Path, Any], object]] = {
    "file": tuned_file,
    "report": read,
    "evaluate": lambda path, which: fk.evaluate(path, round=which),
}


def test_no_file_has_rounds(run: RunFolder, tmp_path: Path) -> None:
    for path in (run.ledger_path, tmp_path):
        with pytest.raises(ConfigError, match=r"--round is of a run's folder, which .* is not"):
            tuned_file(path, "best")
    with pytest.raises(ConfigError, match="--round is of a run, and --ledger is another ledger"):
        fk.evaluate(run.path, ledger=run.ledger_path, round=2)


def test_a_run_as_it_was_after_a_round_has_no_later_events(run: RunFolder) -> None:
    record = read(run.path, "best")
    assert [e.server_round for e in record.evaluations] == [0, 2]
    assert [r.server_round for r in record.rounds] == [1, 2]
    assert record.ledger is not None
    assert record.rounds_done == record.ledger.round == 2
    assert record.ledger_size == run.ledgers.path(2).stat().st_size


def test_evaluating_a_round_is_evaluating_its_ledger(run: RunFolder) -> None:
    best = fk.evaluate(run.path, round="best", limit=2)
    assert best.tuning.digest() == Ledger.load(run.ledgers.path(2)).digest()
    assert best.tuned.overall.loss == fk.evaluate(run.path, ledger=run.ledgers.path(2), limit=2).tuned.overall.loss


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ((3.0, 2.5, 2.75), "the smallest held-out loss is 2.5000, after round 1; --round best takes its ledger"),
        ((3.0, 3.1, 3.2), "the smallest held-out loss is 3.0000, the base model's; --round best takes its ledger"),
        ((3.0, 2.9, 2.8), None),
        ((3.0, math.nan, 2.9), None),
    ],
)
def test_the_best_is_named_where_it_is_not_the_last(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...], told: str | None
) -> None:
    with_losses(monkeypatch, *losses)
    ready, watcher = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=2, local_steps=1))
    ready.train()
    assert [note for note in watcher.notes if "smallest" in note] == ([told] if told else [])


def test_a_resume_cuts_what_is_later_than_the_checkpoint_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    """Also where the events that tell of it are gone."""
    ready, _ = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=2, local_steps=1))
    ready.train()
    run = RunFolder.open(tmp_path / "run")
    before = {i: run.ledgers.path(i).read_bytes() for i in run.ledgers.rounds}
    run.ledgers.path(7).write_bytes(b"of a run that went on elsewhere")
    (run.path / "ledgers" / "notes.txt").write_text("mine")
    (run.path / "metrics.jsonl").unlink()
    ready.train()
    assert {i: run.ledgers.path(i).read_bytes() for i in run.ledgers.rounds} == before
    assert (run.path / "ledgers" / "notes.txt").read_text() == "mine"


def test_a_baseline_keeps_its_last_tensors_only(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses(monkeypatch, 2.0, 3.0)
    ready, watcher = simulation(tmp_path / "run", row_settings(tiny, "fedavg", num_rounds=1, local_steps=1))
    ready.train()
    assert not (tmp_path / "run" / "ledgers").exists()
    with pytest.raises(ConfigError, match=r"--round: .* is the run of a baseline, which keeps its last tensors only"):
        tuned_file(tmp_path / "run", "best")
    assert "the base model's; of a baseline only the last tensors are kept" in " ".join(watcher.notes)


def test_what_is_no_run_or_has_no_round_yet_is_told_apart(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"none: no such run or ledger; give a run's folder, or a ledger's file"):
        tuned_file(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"holds no run \(no config\.toml\)"):
        tuned_file(tmp_path)
    begun = RunFolder.create(tmp_path / "begun", run.simulation)
    with pytest.raises(RunFolderError, match=r"has no ledger\.safetensors yet: no round is done"):
        tuned_file(begun.path)
    (tmp_path / "ledger.safetensors").write_bytes(run.ledger_path.read_bytes())
    assert tuned_file(tmp_path) == tmp_path / "ledger.safetensors"


def test_a_run_of_before_has_but_its_last_round(run: RunFolder, tmp_path: Path) -> None:
    old = RunFolder.create(tmp_path / "old", run.simulation)
    old.ledger_path.write_bytes(run.ledger_path.read_bytes())
    assert tuned_file(old.path, "4") == old.ledger_path
    with pytest.raises(RunFolderError, match="those that it keeps: none"):
        tuned_file(old.path, "2")
    with pytest.raises(RunFolderError, match=r"--round best: .* has no held-out loss that is a number"):
        tuned_file(old.path, "best")
    old.append_metrics({"event": "evaluation", "server_round": 2, "eval_loss": 1.0})
    with pytest.raises(RunFolderError, match=r"--round best: .* keeps no ledger of round 2"):
        tuned_file(old.path, "best")


def test_a_ledger_that_cannot_be_kept_is_an_error_and_the_checkpoint_is_safe(tiny: Path, tmp_path: Path) -> None:
    ready, _ = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=1, local_steps=1))
    (tmp_path / "run" / "ledgers").write_text("a file in its way")
    with pytest.raises(RunError, match=r"ledgers: cannot write \(.*\); make room, then --resume"):
        ready.train()
    (tmp_path / "run" / "ledgers").unlink()
    (tmp_path / "run" / "ledgers" / "round-00000.safetensors").mkdir(parents=True)
    with pytest.raises(LedgerError, match=r"round-00000\.safetensors: cannot save a ledger there: it is a folder"):
        ready.train()
    (tmp_path / "run" / "ledgers" / "round-00000.safetensors").rmdir()
    ready.train()
    assert RunFolder.open(tmp_path / "run").ledgers.rounds == [0, 1]
