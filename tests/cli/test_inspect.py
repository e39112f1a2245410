"""`fedkseed inspect`: what a ledger holds, or one line about what is none."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w
from tests.support.command_line import CommandLine, assert_one_line

import fedkseed as fk
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.metrics import best_round


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_inspect_shows_what_a_ledger_holds(fedkseed: CommandLine, finished: Path, columns: str) -> None:
    ledger = fk.Ledger.load(finished / "ledger.safetensors")
    shown = [fedkseed("inspect", path, env={"COLUMNS": columns}) for path in (finished, finished / "ledger.safetensors")]
    assert shown[0].stdout.startswith(shown[1].stdout)  # of the folder it shows more
    assert (shown[0].code, shown[0].stderr) == (0, "")
    for text in (ledger.digest(), ledger.base.fingerprint, f"{ledger.pool.key:#018x}"):
        assert text in shown[0].stdout  # whole, to be compared or copied, however narrow the terminal
    words = " ".join(shown[0].stdout.split())
    assert "rounds 3" in words
    assert "K = 64, hadamard" in words
    assert "36 taken" in words  # 3 rounds, 2 clients, 6 steps
    assert "checkpoint of a run" in words
    assert "aggregator clipped (a mean to which no reply brings more than the median one); least counted " in words


def test_inspect_says_what_a_private_run_promises(fedkseed: CommandLine, copied: Path) -> None:
    """Made so by its settings and events: what counts is in `tests/runs/test_private_runs.py`."""
    config, metrics = copied / "config.toml", copied / "metrics.jsonl"
    settings = tomllib.loads(config.read_text()) | {"dp": "client", "clip_norm": 1.0, "noise_multiplier": 2.0, "epsilon": 8.0}
    config.write_text(tomli_w.dumps(settings | {"weighting": "equal", "aggregator": "mean"}))
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    spent = [event | ({"epsilon": 1.5 * event["server_round"]} if event["event"] == "round" else {}) for event in events]
    metrics.write_text("".join(json.dumps(event) + "\n" for event in spent))
    for extra, epsilon in (([], 4.5), (["--round", 1], 1.5)):
        shown = fedkseed("inspect", copied, *extra)
        assert (shown.code, shown.stderr) == (0, "")
        assert f"privacy       epsilon {epsilon}, at delta 1e-05, of each client; the budget is 8\n" in shown.stdout


def test_inspect_takes_a_path_as_it_is(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    odd = tmp_path / "run[bold]x"
    shutil.copytree(finished, odd)
    result = fedkseed("inspect", odd)
    assert result.code == 0
    assert "run[bold]x" in result.stdout


def test_inspect_of_something_else_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    assert_one_line(fedkseed("inspect", tiny / "records.jsonl"), 1, "not a ledger, or damaged")
    assert_one_line(fedkseed("inspect", tiny / "model" / "model.safetensors"), 1, "not a ledger, or damaged")


def test_one_mistake_has_one_exit_code_in_every_command(fedkseed: CommandLine, copied: Path, tmp_path: Path) -> None:
    """2 where the call can be mended, 1 where the run is damaged."""

    def assert_every(where: Path, code: int, says: str, but: tuple[str, ...] = ()) -> None:
        commands: dict[str, tuple[object, ...]] = {
            "inspect": (where,),
            "evaluate": (where,),
            "export": (where, tmp_path / "out"),
            "report": (where,),
            "simulate": ("--resume", where),
        }
        for command in commands.keys() - set(but):
            assert_one_line(fedkseed(command, *commands[command]), code, says)

    assert_every(tmp_path / "none", 2, str(tmp_path / "none"))
    assert_every(tmp_path, 2, "holds no run (no config.toml)")
    (copied / "ledger.safetensors").write_bytes(b"junk")
    assert_every(copied, 1, "ledger.safetensors: not a ledger, or damaged")
    (copied / "ledger.safetensors").unlink()
    assert_every(copied, 2, "has lost its ledger.safetensors: 3 rounds or more were done", but=("report",))
    (copied / "config.toml").write_text("lr = ")
    assert_every(copied, 1, "config.toml is not TOML")
    (copied / "config.toml").write_text("lr = 1.0")
    assert_every(copied, 2, "--model is missing")


def test_a_round_of_a_run_can_be_shown_evaluated_exported_and_reported(
    fedkseed: CommandLine, copied: Path, tmp_path: Path
) -> None:
    shown = " ".join(fedkseed("inspect", copied).stdout.split())
    assert "kept the ledgers of 4 rounds, 0 to 3; --round N shows one" in shown
    best = best_round(RunFolder.open(copied).recorded().losses)
    assert f"best round {best}, held-out loss" in shown
    assert "rounds 2" in " ".join(fedkseed("inspect", copied, "--round", 2).stdout.split())
    assert fedkseed("export", copied, tmp_path / "one.ledger", "--round", 1, "--ledger-only").code == 0
    assert (tmp_path / "one.ledger").read_bytes() == (copied / "ledgers" / "round-00001.safetensors").read_bytes()
    assert "after 1 round" in fedkseed("evaluate", copied, "--round", 1, "--limit", 1).stdout
    assert fedkseed("report", copied, "--round", 2).code == 0
    assert "Round 2 of 3" in (copied / "report" / "index.html").read_text(encoding="utf-8")
    for command in (["inspect", copied], ["evaluate", copied], ["report", copied], ["export", copied, tmp_path / "other"]):
        assert_one_line(fedkseed(*command, "--round", 9), 2, "keeps no ledger of round 9; those that it keeps: 0, 1, 2, 3")
        assert_one_line(fedkseed(*command, "--round", "last"), 2, "--round is 'last'; expected the number of a round, or best")


def test_inspect_tells_of_damaged_metrics_in_a_line(fedkseed: CommandLine, copied: Path) -> None:
    with (copied / "metrics.jsonl").open("a") as file:
        file.write("17\n")
    result = fedkseed("inspect", copied)
    assert result.code == 0
    assert result.stderr.startswith("fedkseed: 1 line of ")
    assert result.stderr.count("\n") == 1
    assert "best round" in result.stdout
