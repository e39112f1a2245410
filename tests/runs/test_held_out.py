"""How many records are evaluated on where nobody says, and that a run keeps to it."""

from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.runs import Watcher
from tests.support.tiny import tiny_records, tiny_settings

from fedkseed.runs.folder import RunFolder
from fedkseed.runs.held_out import FEWEST, affordable, num_evaluations
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build

SIZES = {f"client-{i}": 40 for i in range(20)}


def config(tiny: Path, **changes: Any) -> Any:
    return build(tiny_settings(tiny, num_clients=20, num_seeds=128, **changes))


@pytest.mark.parametrize("eval_every", [1, 3, 100])
@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-grad"])
@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_evaluation_costs_at_most_a_tenth_of_the_training(tiny: Path, eval_every: int, algorithm: str, unit: str) -> None:
    settings = config(tiny, num_rounds=40, local_steps=50, eval_every=eval_every, algorithm=algorithm, local_unit=unit)
    steps = 50 if unit == "steps" else 50 * 40 // settings.batch_size
    trained = 40 * settings.cohort_size(20) * steps * settings.batch_size * settings.passes_per_step
    found = affordable(settings, SIZES)
    evaluations = {1: 41, 3: 15, 100: 2}[eval_every]
    assert num_evaluations(settings) == evaluations
    assert found > FEWEST
    assert found * evaluations <= trained / 10 < (found + 1) * evaluations


def test_several_directions_a_step_pay_for_more_records(tiny: Path) -> None:
    """Eight one-sided slopes are nine passes, where two points are two."""
    few, many = (affordable(config(tiny, num_rounds=40, local_steps=50, directions=n), SIZES) for n in (1, 8))
    assert abs(many - 4.5 * few) < 5


def test_a_short_run_is_evaluated_on_the_fewest(tiny: Path) -> None:
    assert affordable(config(tiny, num_rounds=1, local_steps=1), SIZES) == FEWEST


def test_what_was_found_out_is_the_runs_and_said(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    data = tiny_records(tmp_path / "many.jsonl", 200)
    settings = tiny_settings(tiny, eval_data=data, num_rounds=1)
    done = fedkseed("simulate", *flags(settings), "--run", tmp_path / "run")
    assert f"evaluating on {FEWEST} of 200 held-out records, a seeded draw" in done.stdout
    assert "--eval-limit all" in done.stdout
    assert RunFolder.open(tmp_path / "run").config.eval_limit == FEWEST
    more = fedkseed("simulate", "--resume", tmp_path / "run", "--num-rounds", 2)
    assert f"evaluating on {FEWEST} of 200" in more.stdout  # although more could be afforded now
    assert "records of 200" in fedkseed("evaluate", tmp_path / "run").stdout


def test_all_of_them_can_be_asked_for(tiny: Path, tmp_path: Path) -> None:
    data = tiny_records(tmp_path / "many.jsonl", 200)
    for limit, number in ((None, FEWEST), (150, 150), ("all", 200), (500, 200)):
        watcher = Watcher()
        records = prepare(build(tiny_settings(tiny, eval_data=data, eval_limit=limit)), watcher)
        assert len(records.held_out) == len(records.references) == number
        assert records.config.eval_limit == (limit or number)
        assert any(note.startswith(f"evaluating on {number} of 200") for note in watcher.notes)


def test_a_word_that_is_no_number_is_one_line(fedkseed: CommandLine, tiny: Path) -> None:
    wrong = fedkseed("simulate", *flags(tiny_settings(tiny, eval_limit="most")))
    assert_one_line(wrong, 2, "--eval-limit is 'most'", "give a number of records, or all")
