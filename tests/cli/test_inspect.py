"""`fedkseed inspect`: what a ledger holds, or one line about what is none."""

import shutil
from pathlib import Path

import pytest
from tests.support.command_line import CommandLine, assert_one_line

import fedkseed as fk


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_inspect_shows_what_a_ledger_holds(fedkseed: CommandLine, finished: Path, columns: str) -> None:
    ledger = fk.Ledger.load(finished / "ledger.safetensors")
    shown = [fedkseed("inspect", path, env={"COLUMNS": columns}) for path in (finished, finished / "ledger.safetensors")]
    assert shown[0] == shown[1]
    assert (shown[0].code, shown[0].stderr) == (0, "")
    for text in (ledger.digest(), ledger.base.fingerprint, f"{ledger.pool.key:#018x}"):
        assert text in shown[0].stdout  # whole, to be compared or copied, however narrow the terminal
    words = " ".join(shown[0].stdout.split())
    assert "rounds 3" in words
    assert "K = 64, hadamard" in words
    assert "36 taken" in words  # 3 rounds, 2 clients, 6 steps
    assert "checkpoint of a run" in words


def test_inspect_takes_a_path_as_it_is(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    odd = tmp_path / "run[bold]x"
    shutil.copytree(finished, odd)
    result = fedkseed("inspect", odd)
    assert result.code == 0
    assert "run[bold]x" in result.stdout


def test_inspect_of_something_else_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    assert_one_line(fedkseed("inspect", tmp_path / "none"), 2, "nothing is there")
    assert_one_line(fedkseed("inspect", tmp_path), 2, "holds no ledger.safetensors")
    assert_one_line(fedkseed("inspect", tiny / "records.jsonl"), 1, "not a ledger, or damaged")
    assert_one_line(fedkseed("inspect", tiny / "model" / "model.safetensors"), 1, "not a ledger, or damaged")
