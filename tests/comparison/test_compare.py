"""`fedkseed compare`: what its file may say, that its numbers are those of the runs, and that nothing is done twice."""

import functools
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from tests.support.runs import Watcher, read_metrics
from tests.support.tiny import tiny_settings

from fedkseed.cli.app import app
from fedkseed.comparison import Comparison, Entry, carry_out, read_comparison, write_report
from fedkseed.comparison.measured import Measured, Point, _at
from fedkseed.comparison.trials import Row, Trial, _check_same, _trial
from fedkseed.data.source import source_digest
from fedkseed.errors import ConfigError, RunError
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation

NOTHING = functools.partial(sys.exit, 3)  # a command that only fails: whoever calls it ends with a RunError
NAMES = ("FedAvg", "FedKSeed K64")
SLUGS = ("fedavg", "fedkseed-k64")
SEEDS = (1, 2)
BATCH, ROUNDS, COHORT = 2, 2, 2
STEPS = {"FedAvg": 4, "FedKSeed K64": 5}
PASSES = {"FedAvg": 3, "FedKSeed K64": 2}


def content(folder: Path) -> dict[str, Any]:
    """A comparison's file: two methods, two seeds, grids of two; the first method's second rate is absurd."""
    tiny = tiny_settings(folder)
    common = ("model", "data", "num_clients", "fraction_train", "num_rounds", "batch_size", "max_length")
    return {
        "seeds": list(SEEDS),
        "tuning_seed": 9,
        "tuning_rounds": 1,
        "answers": 2,
        "settings": {name: tiny[name] for name in common} | {"num_rounds": ROUNDS, "batch_size": BATCH},
        "methods": [
            {"name": NAMES[0], "algorithm": "fedavg", "lr": [0.1, 1e30], "local_steps": STEPS[NAMES[0]]},
            {
                "name": NAMES[1],
                "algorithm": "fedkseed",
                "lr": [1e-7, 0.002],
                "local_steps": STEPS[NAMES[1]],
                "num_seeds": 64,
                "eps": 0.01,
            },
        ],
    }


def written(folder: Path, what: dict[str, Any]) -> Path:
    path = folder / "comparison.toml"
    path.write_text(tomli_w.dumps(what))
    return path


# --- Reading ---


def change(what: dict[str, Any], at: tuple[Any, ...], value: Any) -> None:
    for part in at[:-1]:
        what = what[part]
    if value is None:
        del what[at[-1]]
    else:
        what[at[-1]] = value


REFUSED: list[tuple[tuple[Any, ...], Any, str]] = [
    (("sedes",), [1], "key 'sedes' is unknown; expected one of: answers, control, methods, seeds, settings, tuning_rounds"),
    (("settings", "num_round"), 3, "method 'FedAvg': setting 'num_round' is unknown; expected one of"),
    (("methods", 1, "num_sedes"), 3, "method 'FedKSeed K64': setting 'num_sedes' is unknown; expected one of"),
    (("methods", 1, "algorithm"), "fedavgg", "method 'FedKSeed K64': --algorithm is 'fedavgg': input should be 'fedkseed'"),
    (("methods", 1, "lora_rank"), 4, "method 'FedKSeed K64': --lora-rank is 4 and --algorithm fedkseed does not take it"),
    (("settings", "eps"), 0.5, "method 'FedAvg': --eps is 0.5 and --algorithm fedavg does not take it"),
    (("settings", "batch_size"), 0, "method 'FedAvg': --batch-size is '0': input should be greater than or equal to 1"),
    (("methods", 1, "lr"), [1e-3], "method 'FedKSeed K64' has 1 learning rates and 'FedAvg' has 2; give each as many"),
    (("methods", 1, "lr"), 1e-3, "method 'FedKSeed K64' has 1 learning rates and 'FedAvg' has 2; give each as many"),
    (("methods", 1, "lr"), None, "method 'FedKSeed K64': lr is missing; give it"),
    (("methods", 1, "lr"), [], "method 'FedKSeed K64': lr is []: list should have at least 1 item"),
    (("methods", 1, "lr"), ["x", 1.0], "method 'FedKSeed K64': lr is 'x': input should be a valid number"),
    (("methods", 1, "lr"), [0.1, -1.0], "method 'FedKSeed K64': --lr is '-1.0': input should be greater than"),
    (("methods", 1, "name"), None, "method 'number 2': name is missing; give it"),
    (("methods", 1, "name"), "", "method 'number 2': name is '': string should have at least 1 character"),
    (("methods", 1, "name"), "FedAvg", "two methods are called 'FedAvg', or nearly so; give each a name of its own"),
    (("methods", 1, "name"), "-fedavg!", "two methods are called 'FedAvg', or nearly so; give each a name of its own"),
    (("methods",), None, "methods are missing; give each as a table [[methods]] with name, algorithm and lr"),
    (("methods",), {"name": "x"}, "methods are missing; give each as a table [[methods]]"),
    (("methods",), [], "methods is []: list should have at least 1 item"),
    (("seeds",), [1, 9], "tuning_seed 9 is one of the seeds; give another"),
    (("seeds",), [1, 2, 1], "seeds are [1, 2, 1]; expected distinct ones"),
    (("seeds",), [], "seeds is []: list should have at least 1 item"),
    (("seeds",), [1, -2], "seeds is -2: input should be greater than or equal to 0"),
    (("tuning_rounds",), 0, "tuning_rounds is 0: input should be greater than or equal to 1"),
    (("answers",), -1, "answers is -1: input should be greater than or equal to 0"),
    (("control",), "perhaps", "control is 'perhaps': input should be a valid boolean"),
    (("settings", "seed"), 5, "settings: seed is the comparison's to set; give seeds, control, or lr in a method"),
    (("settings", "lr"), 0.1, "settings: lr is the comparison's to set; give seeds, control, or lr in a method"),
    (("methods", 0, "responses"), "shuffled", "FedAvg: responses is the comparison's to set; give seeds, control, or lr"),
    (("seeds",), [1, 2**63], "method 'FedAvg': --seed is '9223372036854775808'"),
    (("seeds",), [True, 2], "seeds is True: input should be a valid integer"),
    (("answers",), True, "answers is True: input should be a valid integer"),
    (("control",), "no", "control is 'no': input should be a valid boolean"),
    (("methods", 1, "lr"), [True, 0.5], "method 'FedKSeed K64': lr is True: input should be a valid number"),
    (("settings", "model"), None, "method 'FedAvg': --model is missing; give it on the command line or as model"),
]


@pytest.mark.parametrize(("at", "value", "reason"), REFUSED, ids=str)
def test_a_file_that_is_not_a_comparison_is_refused_in_one_line(
    tiny: Path, tmp_path: Path, at: tuple[Any, ...], value: Any, reason: str
) -> None:
    what = content(tiny)  # good as it stands: `finished` reads it
    change(what, at, value)
    path = written(tmp_path, what)
    with pytest.raises(ConfigError) as told:
        read_comparison(path)
    assert str(told.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(told.value)


def test_a_method_may_be_called_another_ones_control(tiny: Path, tmp_path: Path) -> None:
    what = content(tiny)
    what["methods"][1]["name"] = f"{what['methods'][0]['name']} control"
    comparison = read_comparison(written(tmp_path, what))
    trials = [
        _trial(comparison, entry, tmp_path, 1, 0.1, responses)
        for entry in comparison.methods
        for responses in ("own", "shuffled")
    ]
    assert len({trial.folder for trial in trials}) == 4


def test_rounds_of_no_grid_are_refused(tiny: Path, tmp_path: Path) -> None:
    what = content(tiny) | {"tuning_rounds": 2}
    for method in what["methods"]:
        method["lr"] = method["lr"][:1]
    with pytest.raises(ConfigError, match="tuning_rounds is 2 and no method has several learning rates; leave it out"):
        read_comparison(written(tmp_path, what))


def test_a_learning_rate_twice_in_a_grid_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Two runs in one folder, and a grid of one that passes for a grid of two."""
    what = content(tiny)
    what["methods"][1]["lr"] = [0.002, 0.002]
    with pytest.raises(ConfigError, match=r"FedKSeed K64.*0\.002"):
        read_comparison(written(tmp_path, what))


@pytest.mark.parametrize("raw", [b"seeds = [1,", b"\xff\xfe", b"seeds = 1\nseeds = 2"])
def test_a_file_that_is_not_toml_is_told(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"x\.toml: not TOML \(.+\); expected \[settings\] and \[\[methods\]\]") as told:
        read_comparison(path)
    assert "\n" not in str(told.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.toml: cannot read \(No such file or directory\); give the TOML file"):
        read_comparison(tmp_path / "x.toml")


def test_a_file_is_read_with_its_defaults(tiny: Path, tmp_path: Path) -> None:
    what = content(tiny)
    what["methods"] = what["methods"][1:]
    what["methods"][0]["lr"] = 0.5
    del what["seeds"], what["tuning_seed"], what["tuning_rounds"], what["answers"]
    comparison = read_comparison(written(tmp_path, what))
    assert (comparison.seeds, comparison.tuning_seed, comparison.tuning_rounds) == ([1, 2, 3], 0, None)
    assert (comparison.answers, comparison.control) == (0, True)
    (entry,) = comparison.methods
    assert (entry.name, entry.slug, entry.lr) == (NAMES[1], SLUGS[1], [0.5])
    config = comparison.config(entry, 2, 0.25, "shuffled")
    assert (config.algorithm, config.num_seeds, config.seed, config.lr, config.responses) == (
        "fedkseed",
        64,
        2,
        0.25,
        "shuffled",
    )
    assert (config.num_rounds, config.batch_size, config.local_steps) == (ROUNDS, BATCH, STEPS[NAMES[1]])


# --- Carrying out ---


@dataclass(frozen=True)
class Finished:
    """A comparison that is done; tests leave its folder as it is."""

    comparison: Comparison
    output: Path
    rows: list[Row]
    notes: list[str]
    table: str


@pytest.fixture(scope="module")
def finished(fork_server: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("compared")
    comparison, notes = read_comparison(written(folder, content(tiny))), []
    rows = carry_out(comparison, folder / "out", 1, app, notes.append)
    return Finished(comparison, folder / "out", rows, notes, write_report(comparison, rows, folder / "out").markdown())


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A copy of its folder that a test may change."""
    return Path(shutil.copytree(finished.output, tmp_path / "out"))


def changed(finished: Finished, tmp_path: Path, tiny: Path, *at: Any, value: Any) -> Comparison:
    what = content(tiny)
    change(what, at, value)
    return read_comparison(written(tmp_path, what))


def states(folder: Path) -> dict[str, tuple[int, str]]:
    """When each file was written, and a digest of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}


def run_folder(output: Path, slug: str, seed: int, control: bool = False) -> Path:
    return output / ("controls" if control else "runs") / f"{slug}-seed{seed}"


def test_every_run_is_there_with_its_settings(finished: Finished) -> None:
    grid = sorted(path.name for path in (finished.output / "grid").iterdir() if path.is_dir())
    assert grid == ["fedavg-lr0.1", "fedavg-lr1e+30", "fedkseed-k64-lr0.002", "fedkseed-k64-lr1e-07"]
    for name in grid:
        config = RunFolder.open(finished.output / "grid" / name).config
        assert (config.seed, config.num_rounds, f"{config.lr:g}") == (9, 1, name.split("-lr")[1])
        assert config.responses == "own"
    runs = {path.name for path in (finished.output / "runs").iterdir() if path.is_dir()}
    assert runs == {run_folder(finished.output, slug, seed, c).name for slug in SLUGS for seed in SEEDS for c in (False, True)}
    for row, slug, lr in zip(finished.rows, SLUGS, (0.1, 0.002), strict=True):
        for seed in SEEDS:
            for control in (False, True):
                config = RunFolder.open(run_folder(finished.output, slug, seed, control)).config
                assert (config.seed, config.lr, config.num_rounds) == (seed, lr, ROUNDS)
                assert config.responses == ("shuffled" if control else "own")
        assert row.lr == lr
        assert [trial.folder.name for trial in row.runs] == [f"{slug}-seed{seed}" for seed in SEEDS]


def test_an_absurd_learning_rate_is_a_failure_and_loses_its_grid(finished: Finished) -> None:
    row = finished.rows[0]
    assert [trial.failed for trial in row.grid] == [False, True]
    assert row.grid[1].final_loss() == math.inf
    reason = (row.grid[1].folder / "failed.txt").read_text()
    assert "round 1 ended three times with fewer than 1 accepted replies" in reason
    assert any(note.startswith("FedAvg, lr 1e+30: failed: ") for note in finished.notes)
    assert row.lr == 0.1
    assert "FedAvg: learning rate 0.1 of 0.1, 1e+30" in finished.notes
    assert not any(trial.failed for row in finished.rows for trial in (*row.runs, *row.controls))
    # and of two that do not fail, the one with the lower loss
    losses = [read_metrics(trial.folder)[-1]["eval_loss"] for trial in finished.rows[1].grid]
    assert finished.rows[1].lr == [1e-7, 0.002][int(np.argmin(losses))] == 0.002


@dataclass(frozen=True)
class Counted:
    """One run's numbers, from the lines of its metrics alone."""

    curve: list[tuple[int, float]]
    num_bytes: list[float]
    peak: int
    seconds: float


def counted(folder: Path, name: str) -> Counted:
    """Examples and losses; every client did all of its steps, so that they can be counted from the settings."""
    events = read_metrics(folder)
    rounds = [event for event in events if event["event"] == "round"]
    losses = [event["eval_loss"] for event in events if event["event"] == "evaluation"]
    assert len(losses) == len(rounds) + 1 == ROUNDS + 1
    curve = [(n * COHORT * STEPS[name] * BATCH, loss) for n, loss in enumerate(losses)]
    moved = [COHORT * (event["bytes_down"] + event["bytes_up"]) for event in rounds]
    return Counted(curve, [0, *accumulate(moved)], max(e["peak_bytes"] for e in rounds), sum(e["seconds"] for e in rounds))


def last_within(curve: list[tuple[int, float]], budget: int) -> float:
    return next(loss for spent, loss in reversed(curve) if spent <= budget)


def spread(values: list[float], digits: int = 4) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def test_the_numbers_are_those_of_the_runs(finished: Finished) -> None:
    found = json.loads((finished.output / "comparison.json").read_text())
    runs = {n: [counted(run_folder(finished.output, s, seed), n) for seed in SEEDS] for n, s in zip(NAMES, SLUGS, strict=True)}
    controls = {
        n: [counted(run_folder(finished.output, s, seed, True), n) for seed in SEEDS] for n, s in zip(NAMES, SLUGS, strict=True)
    }
    examples = min(ROUNDS * COHORT * BATCH * STEPS[n] for n in NAMES)
    passes = min(ROUNDS * COHORT * BATCH * STEPS[n] * PASSES[n] for n in NAMES)
    assert (found["equal_examples"], found["equal_passes"]) == (examples, passes)
    assert (examples, passes) == (32, 80)
    scores = {
        (n, seed): json.loads((run_folder(finished.output, s, seed) / "scores.json").read_text())
        for n, s in zip(NAMES, SLUGS, strict=True)
        for seed in SEEDS
    }
    base = [score["base"]["overall"]["loss"] for score in scores.values()]
    assert found["base"] == pytest.approx(np.mean(base))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in finished.table.splitlines() if line.startswith("|")]
    assert (finished.output / "table.md").read_text() == finished.table
    assert len(table) == 3 + len(NAMES)
    assert len({len(line) for line in table}) == 1
    base_rouge = np.mean([score["base"]["overall"]["rouge_l"] for score in scores.values()])
    assert table[2][:3] == ["base model", "\N{EN DASH}", f"{np.mean(base):.4f}"]
    assert table[2][7] == f"{100 * base_rouge:.2f}"
    for method, line, name in zip(found["methods"], table[3:], NAMES, strict=True):
        at_examples = [last_within(run.curve, examples) for run in runs[name]]
        at_passes = [last_within([(s * PASSES[name], loss) for s, loss in run.curve], passes) for run in runs[name]]
        final, of_control = ([run.curve[-1][1] for run in these] for these in (runs[name], controls[name]))
        rouge = [scores[name, seed]["tuned"]["overall"]["rouge_l"] for seed in SEEDS]
        row = next(row for row in finished.rows if row.entry.name == name)
        assert method["method"] == name
        assert method["lr"] == row.lr
        assert method["at_equal_examples"] == at_examples
        assert method["at_equal_passes"] == at_passes
        assert method["control"] == of_control
        assert method["rouge_l"] == rouge
        assert method["failed"] == 0
        assert method["bytes"] == pytest.approx([run.num_bytes[-1] for run in runs[name]])
        assert method["bytes_per_round"] == pytest.approx([run.num_bytes[-1] / ROUNDS / COHORT for run in runs[name]])
        assert method["peak_bytes"] == [run.peak for run in runs[name]]
        assert method["seconds"] == pytest.approx([run.seconds for run in runs[name]])
        assert line[0] == name
        assert line[1] == f"{row.lr:g}"
        minus = [a - b for a, b in zip(final, of_control, strict=True)]
        assert method["final"] == final
        assert method["minus_control"] == minus
        numbers = [final, of_control, minus, at_examples, at_passes]
        assert line[2:8] == [*map(spread, numbers), spread([100 * x for x in rouge], 2)]
        assert final != of_control
    grid = {NAMES[0]: {"0.1": 0, "1e+30": None}, NAMES[1]: {"1e-07": 0, "0.002": 0}}
    for method in found["methods"]:
        assert method["grid"].keys() == grid[method["method"]].keys()
        for lr, wanted in grid[method["method"]].items():
            folder = finished.output / "grid" / f"{SLUGS[NAMES.index(method['method'])]}-lr{lr}"
            assert method["grid"][lr] == (None if wanted is None else read_metrics(folder)[-1]["eval_loss"])
    # the two budgets are two questions: here each cuts another method short
    assert all(method["at_equal_examples"] != method["at_equal_passes"] for method in found["methods"])
    notes = finished.table.split("\n\n")[1]
    assert "Equal examples: 32 in all (steps times batch size); equal passes: 80 forward passes of a record" in notes
    assert "over seeds 1, 2" in notes
    assert "best of 2 by the held-out loss with seed 9" in notes
    assert "At an end of its grid, so that a wider one may do better: FedAvg, FedKSeed K64." in notes
    for name in ("loss_by_examples", "loss_by_passes", "loss_by_bytes"):
        assert (finished.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_started_again_nothing_is_repeated(finished: Finished) -> None:
    before, notes = states(finished.output), []
    rows = carry_out(finished.comparison, finished.output, 1, NOTHING, notes.append)
    assert states(finished.output) == before
    assert rows == finished.rows
    assert not [note for note in notes if "runs to do" in note]
    assert sum("runs to do" in note for note in finished.notes) == 3  # grids, runs, controls: the first time there were


class Stop(Exception):  # noqa: N818
    """What a watcher raises to stop a run."""


def test_damaged_events_and_scores_cost_a_line_and_no_number(finished: Finished, copied: Path) -> None:
    """The damaged line is left out; scores are made anew, which here nobody can."""
    metrics = run_folder(copied, SLUGS[0], SEEDS[0]) / "metrics.jsonl"
    metrics.write_text("17\n" + metrics.read_text())
    notes: list[str] = []
    rows = carry_out(finished.comparison, copied, 1, NOTHING, notes.append)
    assert [note for note in notes if "cannot be read" in note] == [
        f"FedAvg, seed 1: 1 line of {metrics} cannot be read (line 1: no event); it is left out"
    ]
    assert write_report(finished.comparison, rows, copied).markdown() == finished.table
    (run_folder(copied, SLUGS[0], SEEDS[0]) / "scores.json").write_text("[" * 2000)
    with pytest.raises(RunError, match="could not be scored"):
        carry_out(finished.comparison, copied, 1, NOTHING, notes.append)


def stopped_after_a_round(folder: Path) -> None:
    """The run in a folder as if it had been killed after its first round."""
    config = RunFolder.open(folder).config
    shutil.rmtree(folder)
    watcher = Watcher()

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            raise Stop

    watcher.event = stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        Simulation(RunFolder.create(folder, config), prepare(config, watcher), watcher).train()


def numbers(output: Path) -> dict[str, Any]:
    """What a comparison found, without what a clock and the machine say."""
    found: dict[str, Any] = json.loads((output / "comparison.json").read_text())
    for method in found["methods"]:
        del method["seconds"], method["peak_bytes"]
    return found


def test_interrupted_it_goes_on_to_the_same_numbers(finished: Finished, copied: Path) -> None:
    gone, cut, untried = (run_folder(copied, *which) for which in ((SLUGS[0], 1), (SLUGS[1], 2), (SLUGS[1], 1, True)))
    shutil.rmtree(gone)
    stopped_after_a_round(cut)
    (untried / "metrics.jsonl").unlink()
    (untried / "ledger.safetensors").unlink()
    shutil.rmtree(untried / "ledgers")
    for name in ("comparison.json", "table.md"):
        (copied / name).unlink()
    with pytest.raises(RunError, match=r"FedAvg, seed 1 ended with exit code 3: .*; see .*fedavg-seed1\.log"):
        carry_out(finished.comparison, copied, 1, NOTHING, lambda _: None)
    before, notes = states(copied), []
    rows = carry_out(finished.comparison, copied, 1, app, notes.append)
    write_report(finished.comparison, rows, copied)
    assert numbers(copied) == numbers(finished.output)
    assert [note for note in notes if "runs to do" in note] == [
        "2 runs to do, the first is FedAvg, seed 1",
        "1 runs to do, the first is FedKSeed K64, control, seed 1",
    ]
    now = states(copied)
    redone = {
        Path(name).parts[1].removesuffix(".log")
        for name in now
        if name.startswith(("runs", "controls", "grid")) and now[name] != before.get(name)
    }
    assert redone == {gone.name, cut.name, untried.name}


# --- What goes wrong ---


def test_other_settings_than_those_of_a_begun_run_are_refused(
    finished: Finished, copied: Path, tiny: Path, tmp_path: Path
) -> None:
    RunFolder.open(run_folder(copied, SLUGS[1], 2)).cut_metrics(1)
    other = changed(finished, tmp_path, tiny, "methods", 1, "eps", value=0.02)
    before = states(copied)
    with pytest.raises(ConfigError, match=r"was begun with eps = 0\.01, the comparison says 0\.02; choose another --output"):
        carry_out(other, copied, 1, NOTHING, lambda _: None)
    assert states(copied) == before


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("methods", 1, "eps"), 0.02),
        (("methods", 0, "weighting"), "equal"),
        (("settings", "num_rounds"), ROUNDS - 1),
        (("settings", "max_length"), 40),
    ],
    ids=str,
)
def test_other_settings_than_those_of_a_finished_run_are_refused(
    finished: Finished, copied: Path, tiny: Path, tmp_path: Path, at: tuple[Any, ...], value: Any
) -> None:
    """Else its numbers would stand in the table of settings that they are not of."""
    other = changed(finished, tmp_path, tiny, *at, value=value)
    before = states(copied)
    with pytest.raises(ConfigError, match=rf"was begun with {at[-1]} = "):
        carry_out(other, copied, 1, NOTHING, lambda _: None)
    assert states(copied) == before


def test_what_a_run_found_out_is_no_other_setting(tiny: Path, tmp_path: Path) -> None:
    left_open = build(tiny_settings(tiny) | {"max_length": None})
    RunFolder.create(tmp_path / "run", left_open.model_copy(update={"max_length": 64}))
    _check_same(Trial("a", tmp_path / "run", left_open))
    with pytest.raises(ConfigError, match=r"was begun with max_length = 64, the comparison says 48"):
        _check_same(Trial("a", tmp_path / "run", build(tiny_settings(tiny, max_length=48))))


def test_runs_that_dropped_long_prompts_are_not_gone_on_with_by_cutting_them(tiny: Path, tmp_path: Path) -> None:
    """A kept run's settings do not name what they are older than."""
    config = build(tiny_settings(tiny))
    file = RunFolder.create(tmp_path / "run", config).path / "config.toml"
    file.write_text(file.read_text().replace('long_prompts = "cut"\n', ""))
    _check_same(Trial("a", tmp_path / "run", config.model_copy(update={"long_prompts": "drop"})))
    with pytest.raises(ConfigError, match=r"was begun with long_prompts = 'drop', the comparison says 'cut'"):
        _check_same(Trial("a", tmp_path / "run", config))


def test_more_answers_are_scored(finished: Finished, copied: Path, tiny: Path, tmp_path: Path) -> None:
    """What was answered before is not what the file asks for now."""
    for path in copied.glob("runs/*/scores.json"):
        scores = json.loads(path.read_text())
        assert scores["tuned"]["overall"]["num_answers"] == 2
    other = changed(finished, tmp_path, tiny, "answers", value=3)
    with pytest.raises(RunError, match="could not be scored"):
        carry_out(other, copied, 1, NOTHING, lambda _: None)


def test_a_run_that_cannot_be_gone_on_with_is_an_error_and_no_result(finished: Finished, copied: Path) -> None:
    """Its ledger is damaged: that says nothing about its learning rate."""
    run = run_folder(copied, SLUGS[1], 1)
    RunFolder.open(run).cut_metrics(1)
    (run / "ledger.safetensors").write_bytes(b"junk")
    with pytest.raises(RunError, match=r"FedKSeed K64, seed 1 .*; see .*fedkseed-k64-seed1\.log"):
        carry_out(finished.comparison, copied, 1, app, lambda _: None)
    assert not (run / "failed.txt").exists()


def test_failed_runs_are_told_and_left_out(finished: Finished, copied: Path) -> None:
    (run_folder(copied, SLUGS[0], 1) / "failed.txt").write_text("no reply was usable\n")
    rows = carry_out(finished.comparison, copied, 1, NOTHING, lambda _: None)
    table = write_report(finished.comparison, rows, copied).markdown()
    left = counted(run_folder(copied, SLUGS[0], 2), NAMES[0])
    method = numbers(copied)["methods"][0]
    assert method["failed"] == 1
    assert method["at_equal_examples"] == [last_within(left.curve, 32)]
    (line,) = [line for line in table.splitlines() if line.startswith("| FedAvg")]
    assert line.startswith(f"| FedAvg (1 of 2 failed) | 0.1 | {left.curve[-1][1]:.4f} |")  # no deviation of one


def test_a_method_whose_runs_all_failed_has_no_numbers(finished: Finished, copied: Path) -> None:
    for seed in SEEDS:
        (run_folder(copied, SLUGS[0], seed) / "failed.txt").write_text("no reply was usable\n")
    rows = carry_out(finished.comparison, copied, 1, NOTHING, lambda _: None)
    table = write_report(finished.comparison, rows, copied).markdown()
    (line,) = [line for line in table.splitlines() if line.startswith("| FedAvg")]
    assert [cell.strip() for cell in line.split("|")][3] == "\N{EN DASH}"
    assert numbers(copied)["methods"][0]["at_equal_examples"] == []
    # the budgets are now those of the other method alone
    assert numbers(copied)["equal_examples"] == ROUNDS * COHORT * BATCH * STEPS[NAMES[1]]
    for seed in SEEDS:
        (run_folder(copied, SLUGS[1], seed) / "failed.txt").write_text("no reply was usable\n")
    rows = carry_out(finished.comparison, copied, 1, NOTHING, lambda _: None)
    with pytest.raises(RunError, match=r"no run in .* has a held-out loss at its end; see the logs in .*runs"):
        write_report(finished.comparison, rows, copied)


def test_a_last_loss_that_is_not_a_number_is_a_failure(finished: Finished, copied: Path) -> None:
    path = run_folder(copied, SLUGS[0], 1) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {"eval_loss": math.nan})]) + "\n")
    rows = carry_out(finished.comparison, copied, 1, NOTHING, lambda _: None)
    assert [trial.final_loss() == math.inf for trial in rows[0].runs] == [True, False]


# --- Budgets ---


def measured(points: list[Point]) -> Measured:
    return Measured(tuple(points), None, None, None, 0.0, 0, 0.0)


@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9)), min_size=1, max_size=12),
    factor=st.sampled_from([2, 3]),
    budget=st.integers(0, 200),
)
def test_the_loss_at_a_budget_is_the_last_one_that_it_pays_for(
    steps: list[tuple[int, float]], factor: int, budget: int
) -> None:
    spent = [0, *accumulate(count for count, _ in steps[1:])]
    points = [Point(n, factor * n, 10.0 * n, loss) for n, (_, loss) in zip(spent, steps, strict=True)]
    ways: list[tuple[Callable[[Point], int], int]] = [(lambda p: p.examples, 1), (lambda p: p.passes, factor)]
    for of, times in ways:
        affordable = [i for i, n in enumerate(spent) if times * n <= budget]
        assert _at(measured(points), budget, of) == steps[affordable[-1]][1]
        assert _at(measured(points), of(points[-1]), of) == steps[-1][1]  # a whole run's own budget pays for all of it
        assert _at(measured(points), 0, of) == steps[max(i for i, n in enumerate(spent) if n == 0)][1]


def test_other_records_than_those_it_was_begun_with_are_refused(finished: Finished, copied: Path, tmp_path: Path) -> None:
    """Else a seed more would share a row with runs over the old ones."""
    (copied / "data.json").write_text(json.dumps({str(finished.comparison.settings["data"]): "0" * 64}))
    with pytest.raises(ConfigError, match=r"holds other records than when .* was begun; choose another --output, or put the"):
        carry_out(finished.comparison, copied, 1, NOTHING, lambda note: None)
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("x\n")
    other.write_text("y\n")
    digests = {source_digest(f"{one},{other}"), source_digest(str(one)), source_digest(str(tmp_path)), source_digest("a/b")}
    assert len(digests) == 4
    before = source_digest(str(tmp_path))
    other.write_text("z\n")
    assert source_digest(str(tmp_path)) != before


def test_methods_that_evaluate_on_other_records_are_no_comparison(finished: Finished, tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval_limit differs between methods \(.*3.*\); losses of different records are no"):
        changed(finished, tmp_path, tiny, "methods", 1, "eval_limit", value=3)


@pytest.mark.parametrize("name", ["方法", "метод", "!?", "x" * 300])
def test_a_name_of_any_script_or_length_makes_a_folder_of_its_own(name: str) -> None:
    slugs = {Entry(name=given, lr=[1.0], settings={}).slug for given in (name, name + "a", name + "b")}
    assert len(slugs) == 3
    assert all(0 < len(slug.encode()) <= 80 and "/" not in slug for slug in slugs)


def test_an_output_that_cannot_be_made_is_one_line(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file: cannot be written \(File exists\); choose another --output"):
        carry_out(finished.comparison, tmp_path / "file", 1, NOTHING, lambda note: None)
