"""Ctrl-C in any command: what is safe, a command that goes on and can be pasted, exit code 130."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
from tests.support.command_line import FEDKSEED, flags
from tests.support.tiny import tiny_settings

from fedkseed.cli.console import say_command
from fedkseed.runs.status import status_of

RUN = "a run's folder"


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "where", "safe"),
    [
        (["evaluate", RUN, "--answers", "3"], "fedkseed.cli.evaluate.evaluate", "the run is as it was"),
        (["export", RUN, "tuned model"], "fedkseed.cli.export.export", "tuned model is whole or not there"),
        (["compare", "a file.toml"], "fedkseed.cli.compare.compare", "finished runs are kept"),
        (["demo", "--run", RUN], "fedkseed.cli.demo._write_data", "no run was begun yet"),
        (["report", RUN], "fedkseed.cli.report.report_command", "the run is as it was"),
        (["tune"], "fedkseed.runs.tuning.find", "keeps nothing"),
        (["simulate", "--lr", "auto"], "fedkseed.runs.tuning.find", "no run was begun yet"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_it_says_what_is_safe_and_how_to_go_on(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    where: str,
    safe: str,
) -> None:
    from fedkseed.cli import main

    settings = {name: value for name, value in tiny_settings(tiny).items() if name not in ("lr", "eps")}
    given = [*command, *(flags(settings) if command[0] in ("tune", "simulate") else [])]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, interrupt)
    monkeypatch.setattr(sys, "argv", ["fedkseed", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said, go_on = capsys.readouterr().err.splitlines()
    assert said.startswith("fedkseed: interrupted; ")
    assert said.endswith(". Go on with:")
    assert safe in said
    assert shlex.split(go_on) == ["fedkseed", *given]


def test_a_run_that_has_begun_is_gone_on_with_by_its_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedkseed.cli import main
    from fedkseed.runs.driver import Driver

    run, close, rounds = tmp_path / "it's here", Driver.close, []

    def second_is_cut(self: Driver, *args: object, **kwargs: object) -> object:
        rounds.append(self.round)
        if len(rounds) > 1:
            raise KeyboardInterrupt
        return close(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Driver, "close", second_is_cut)
    monkeypatch.setattr(sys, "argv", ["fedkseed", "simulate", *flags(tiny_settings(tiny)), "--run", str(run)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said, go_on = capsys.readouterr().err.splitlines()
    assert f"round 1 is safe in {run}" in said
    assert shlex.split(go_on) == ["fedkseed", "simulate", "--resume", str(run)]


def test_without_an_active_environment_commands_have_the_programs_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def told() -> str:
        say_command(("fedkseed", "status", "fedkseed"))
        return capsys.readouterr().out.strip()

    assert told() == "fedkseed status fedkseed"
    monkeypatch.setenv("PATH", "")
    assert told() == f"{FEDKSEED} status fedkseed"
    monkeypatch.chdir(FEDKSEED.parents[1])
    assert told() == f"{FEDKSEED.relative_to(Path.cwd())} status fedkseed"


def test_a_comparison_that_is_ended_leaves_no_run_behind(tiny: Path, tmp_path: Path) -> None:
    settings = {name: value for name, value in tiny_settings(tiny, num_rounds=5000).items() if name not in ("lr", "seed")}
    method = {"name": "A", "algorithm": "fedkseed", "lr": 1e-3}
    plan = tmp_path / "plan.toml"
    plan.write_text(tomli_w.dumps({"settings": settings, "seeds": [1], "control": False, "methods": [method]}))
    command = [FEDKSEED, "compare", plan, "--output", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ledger = tmp_path / "out" / "runs" / "a-seed1" / "ledger.safetensors"
    until = time.monotonic() + 100
    while not ledger.exists():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < until
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    assert "interrupted; finished runs are kept" in said
    assert status_of(ledger.parent).state == "stopped"
