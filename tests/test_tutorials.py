"""The tutorials of docs/tutorials/ as a reader goes through them: blocks of Python and commands in turn, in one empty folder.

Every day they run with few rounds. What they say came out is held to in a slow test, with theirs.
"""

import re
import runpy
from pathlib import Path

import pytest

from fedkseed.demo import clients, model_folder
from tests.support.command_line import CommandLine
from tests.support.documents import ROOT, blocks, commands_in
from tests.support.tiny import write_records

TUTORIALS = ROOT / "docs" / "tutorials"
QUICK = {"simulate": ["--lr", "2e-3", "--num-rounds", "2", "--local-steps", "2"]}
"""Given after a tutorial's own flags, and the last one counts."""
LEFT_OUT = ("doctor", "report", "watch")
"""Commands with tests of their own; `watch` does not end by itself."""


def program(name: str) -> list[str]:
    """The blocks of Python of a tutorial."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    return [content for language, content in blocks(text) if language == "python"]


def quickly(block: str) -> str:
    """The same with one round of one step, on few records."""
    return re.sub(
        r'"batch_size": \d+', '"batch_size": 4', re.sub(r'"(num_rounds|local_steps|eval_every)": \d+', r'"\1": 1', block)
    )


def run_program(blocks: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    file = folder / "tutorial.py"
    file.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(file), run_name="__main__")


def test_your_own_model(fedkseed: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "MODEL").symlink_to(model_folder())
    write_records(tmp_path / "records.jsonl", [example for own in clients(seed=1).values() for example in own[:15]])
    ran = []
    for language, content in blocks((TUTORIALS / "your-model.md").read_text(encoding="utf-8")):
        if language == "python":
            run_program([content], tmp_path, monkeypatch)
        for _, command, *args in commands_in(language, content):
            if command in LEFT_OUT:
                continue
            result = fedkseed(command, *args, *(QUICK.get(command, []) if "--resume" not in args else []), cwd=tmp_path)
            assert (result.code, result.stderr) == (0, ""), (command, args)
            ran.append(command)
    assert ran == ["simulate", "simulate", "evaluate", "export", "export"]
    assert (tmp_path / "tuned.safetensors").stat().st_size < 16_000


def test_three_hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [quickly(block) for block in program("hospitals")]
    assert quick != program("hospitals")
    run_program(quick, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert re.search(r"north \d+ records\nsouth \d+ records\nwest \d+ records\n", said)
    assert "a hospital and round: " in said
    assert "opposite  " in said


def test_a_private_federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its noise is so large in so short a run that the loss says nothing; that the account does is what is looked at."""
    quick = [quickly(block) for block in (program("hospitals")[0], *program("private"))]
    run_program(quick, tmp_path, monkeypatch)
    spent = re.findall(r"^\[(\d\.\d+)\]$", capsys.readouterr().out, re.MULTILINE)
    assert len(spent) == 1
    assert 0 < float(spent[0]) <= 8


@pytest.mark.slow
def test_three_hospitals_know_together_what_none_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_program(program("hospitals"), tmp_path, monkeypatch)
    said = capsys.readouterr().out
    losses = {
        kind: (float(alone), float(together))
        for kind, alone, together in re.findall(r"^(\w+) +(\d\S+) +(\d\S+)$", said, re.MULTILINE)
    }
    assert losses.keys() == {"opposite", "plural", "letter", "after", "colour", "first", "last"}
    assert all(alone > 5 * together for alone, together in (losses["first"], losses["last"]))
    assert all(alone < together for alone, together in (losses["opposite"], losses["plural"], losses["letter"]))
