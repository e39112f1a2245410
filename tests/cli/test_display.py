"""What a person sees: plain lines where there is no terminal, a live display on one."""

import io
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from fedkseed.runs.observer import Probe

EVALUATION = {
    "event": "evaluation",
    "server_round": 2,
    "eval_loss": 1.23456,
    "num_examples": 3,
    "num_tokens": 9,
    "seconds": 0.1,
}
ROUND = {
    "event": "round",
    "server_round": 2,
    "lr": 1e-4,
    "num_replies": 2,
    "dropped_steps": 0,
    "train_loss": 2.34567,
    "clients": {},
    "refused": {},
    "missing": [],
    "bytes_down": 8392.0,
    "bytes_up": 165.5,
    "seconds": 4.04,
}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    from fedkseed.runs.settings import build

    (tmp_path / "data.jsonl").write_text("{}\n")
    return build(
        {
            "model": "a/b",
            "data": tmp_path / "data.jsonl",
            "lr": 1e-4,
            "num_rounds": 7,
            "local_steps": 4,
            "num_clients": 10,
            "fraction_train": 0.25,
        }
    )


def terminal(width: int = 120) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, color_system=None, legacy_windows=False), out


def plain_text(out: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_an_event_is_one_line_of_its_numbers() -> None:
    from fedkseed.cli.display import summary

    assert summary(EVALUATION, 7) == "round 2/7: held-out loss 1.2346"
    line = summary(ROUND, 7)
    assert line.startswith("round 2/7: loss 2.3457 at 2 clients")
    assert "8,392 bytes down" in line
    assert "166 up" in line
    assert "4.0 s" in line
    assert "dropped" not in line
    assert "refused" not in line


def test_what_went_wrong_is_in_the_line() -> None:
    from fedkseed.cli.display import summary

    line = summary(ROUND | {"dropped_steps": 3, "train_loss": None, "refused": {"client-1": "why"}}, 7)
    assert "loss - at" in line
    assert "3 steps dropped" in line
    assert "1 replies refused" in line


def test_plain_lines_where_there_is_no_terminal(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedkseed.cli.display import LiveDisplay, watching

    with watching(config) as observer:
        assert not isinstance(observer, LiveDisplay)
        observer.note("a note with [brackets] and a long tail " + "x" * 300)
        for step in range(4):
            observer.probe(Probe(1, "client-3", 1, 2, step, 4, 2.5))
        observer.event(EVALUATION)
        observer.event(ROUND)
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.split("\n")
    assert lines[0] == "a note with [brackets] and a long tail " + "x" * 300
    assert lines[1] == "round 2/7: held-out loss 1.2346"
    assert lines[2].startswith("round 2/7: loss 2.3457")
    assert lines[3:] == [""]
    assert "\x1b" not in captured.out


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_live_display_shows_round_client_step_and_loss(config: Any, width: int) -> None:
    from fedkseed.cli.display import LiveDisplay

    console, out = terminal(width)
    with Progress(TextColumn("{task.description}"), console=console, auto_refresh=False) as progress:
        display = LiveDisplay(config, progress)
        display.note("a note")
        display.event(EVALUATION)
        for place in (1, 2):
            for step in range(4):
                display.probe(Probe(3, "client-3", place, 2, step, 4, 2.5 + step))
                progress.refresh()
        display.event(ROUND)
        task = progress.tasks[0]
        assert "round 3/7" in task.description
        assert task.description.endswith("2/2 client-3")
        assert "step 4/4" in task.description
        assert "loss 5.500" in task.description
        assert "held-out 1.2346" in task.description
    text = plain_text(out)
    assert "a note" in text
    if width == 200:
        assert "round 2/7: held-out loss 1.2346" in text
        assert "round 3/7  step 1/4  loss 2.500  held-out 1.2346  1/2 client-3" in text


def test_the_bar_counts_the_steps_of_all_rounds(config: Any) -> None:
    from fedkseed.cli.display import LiveDisplay

    console, _ = terminal()
    with Progress(console=console, auto_refresh=False) as progress:
        display = LiveDisplay(config, progress)
        task = progress.tasks[0]
        done = []
        for server_round in range(1, 8):
            for place in (1, 2):
                for step in range(4):
                    display.probe(Probe(server_round, "c", place, 2, step, 4, 1.0))
                    done.append(task.completed)
        assert done == [i / 8 for i in range(56)]  # 2 clients, 4 steps: never back
        assert task.total == 7


def test_a_resumed_run_starts_its_bar_where_it_is(config: Any) -> None:
    """The time left must not be reckoned from rounds that an earlier process did."""
    from fedkseed.cli.display import LiveDisplay

    console, _ = terminal()
    with Progress(console=console, auto_refresh=False) as progress:
        display = LiveDisplay(config, progress)
        task = progress.tasks[0]
        assert not task.visible
        display.probe(Probe(6, "c", 1, 2, 0, 4, 1.0))
        assert task.visible
        assert task.completed == 5
        assert task.speed is None or task.speed < 1


def test_on_a_terminal_the_display_is_live(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedkseed.cli import display

    console, out = terminal()
    monkeypatch.setattr(display, "new_console", lambda: console)
    with display.watching(config) as observer:
        assert isinstance(observer, display.LiveDisplay)
        observer.note("a note with [brackets]")
        observer.event(EVALUATION)
        observer.probe(Probe(3, "client-3", 1, 2, 0, 4, 2.5))
        observer.event(ROUND | {"train_loss": None})
    assert "a note with [brackets]" in plain_text(out)
    assert "round 2/7: held-out loss 1.2346" in plain_text(out)


def test_a_live_display_survives_odd_numbers(config: Any) -> None:
    from fedkseed.cli.display import LiveDisplay

    console, out = terminal()
    with Progress(console=console, auto_refresh=False) as progress:
        display = LiveDisplay(config, progress)
        for loss in (float("nan"), float("inf"), -1e300):
            display.probe(Probe(1, "client-3", 1, 2, 0, 4, loss))
            progress.refresh()
        display.event(EVALUATION | {"eval_loss": float("nan")})
    assert "held-out loss nan" in plain_text(out)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_clock_is_whole_however_long_a_name_is(config: Any, width: int) -> None:
    from fedkseed.cli.display import LiveDisplay, live

    console, out = terminal(width)
    with live(console) as bars:
        display = LiveDisplay(config, bars)
        for step in range(4):
            display.probe(Probe(3, "a-client-with-a-long-name-" * 8, 1, 2, step, 4, 2.5))
            bars.refresh()
        display.progress("tokenising training records", 1, 4)
        bars.refresh()
    lines = [line for line in re.split("[\r\n]", plain_text(out)) if "round 3/7" in line]
    assert lines
    assert all(re.search(r"\d:\d\d:\d\d( \(\d+:\d\d:\d\d left\)|, \d:\d\d:\d\d left)?$", line.rstrip()) for line in lines)
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(
    "name", ["[/]", "[link=http://evil]x[/link]", "a\x1b[2Jb", "a\nround 9/9: forged", "\u202egro", "\udc80"]
)
def test_a_name_is_text_whatever_it_holds(config: Any, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fedkseed.cli.console import say, show_table
    from fedkseed.cli.display import LiveDisplay, live, looking_on

    console, out = terminal(100)
    with live(console) as bars:
        display = LiveDisplay(config, bars)
        display.probe(Probe(3, name, 1, 2, 0, 4, 2.5))
        display.progress(name, 1, 4)
        bars.refresh()
        display.note(f"reply of {name} refused: {name}")
    shown = plain_text(out)
    with looking_on() as observer:
        observer.note(name)
    say(name)
    show_table(("name", name), [(name, name)])
    printed = capsys.readouterr().out
    for text in (shown, printed):
        assert "\x1b[2J" not in text
        assert not any(line.strip().startswith("round 9/9") for line in text.splitlines())
        assert not set(text) & set("\u202e\udc80")
    if name.startswith("["):
        assert f"reply of {name} refused: {name}" in shown
        assert printed.splitlines()[0] == name


@pytest.mark.parametrize("width", [40, 80])
def test_lines_break_between_words_only(width: int) -> None:
    from fedkseed.cli.console import say

    console, out = terminal(width)
    text = (
        "training records: 13,942 used, 319 dropped, 1,204 cut (88,211 tokens) in /some/folder/"
        + "deep/" * 20
        + " then 12,345,678"
    )
    say(text, console)
    lines = plain_text(out).splitlines()
    assert len(lines) > 2
    assert [word for line in lines for word in line.split()] == text.split()
    assert all(len(line) <= width or "/deep/" in line for line in lines)


def test_columns_without_room_come_in_further_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedkseed.cli import console as module

    header = ["method", *(f"measure {i}" for i in range(9))]
    rows = [["a method", *(f"1.2345 ± 0.00{i}" for i in range(9))], ["b | [/]", *["-"] * 9]]
    for width, tables in ((80, 2), (200, 1)):
        console, out = terminal(width)
        monkeypatch.setattr(module, "new_console", lambda console=console: console)
        module.show_table(header, rows)
        text = plain_text(out)
        assert sum("method" in line and "measure" in line for line in text.splitlines()) >= tables
        assert all(len(line) <= width for line in text.splitlines())
        assert all(f"1.2345 ± 0.00{i}" in text for i in range(9))
        assert "b | [/]" in text


@pytest.mark.parametrize("word", ["plain", "two words", "it's", "$HOME", "a\nb", "\x1b[2J", "ü", "\udcff"])
def test_a_command_can_be_pasted(word: str) -> None:
    from fedkseed.cli.console import shell_word
    from fedkseed.text import visible

    quoted = shell_word(word)
    assert visible(quoted) == quoted
    said = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
    assert said == os.fsencode(word)


@pytest.mark.parametrize("looking", ["watching", "looking_on"])
def test_a_line_said_while_there_is_a_bar_goes_above_it(config: Any, monkeypatch: pytest.MonkeyPatch, looking: str) -> None:
    from fedkseed.cli import display
    from fedkseed.cli.console import new_console, say

    console, out = terminal(60)
    monkeypatch.setattr(display, "new_console", lambda: console)
    with display.watching(config) if looking == "watching" else display.looking_on() as observer:
        observer.progress("evaluating", 1, 2)
        say("done: a ledger")
    assert "done: a ledger" in plain_text(out)  # on the bar's own console, which puts it above the bar
    assert new_console() is not console


def test_a_complaint_on_a_terminal_breaks_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedkseed.cli.console import complain

    text = "word " * 30 + "[/] /a/folder/whose/name/is/long"
    complain(text)
    assert capsys.readouterr().err == f"fedkseed: {text}\n"  # one line in a log
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    complain(text)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert all(len(line) <= 40 for line in lines)
    assert " ".join(line.strip() for line in lines) == f"fedkseed: {text}"
