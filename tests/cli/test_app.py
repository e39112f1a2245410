"""The program itself: quick help, versions, exit codes, usage errors."""

import re
import sys
from pathlib import Path

import pytest
from tests.support.command_line import FEDKSEED, CommandLine, Result, assert_one_line, flags, shell
from tests.support.tiny import tiny_settings

import fedkseed as fk


def test_help_and_whoever_only_looks_at_a_run_wait_for_no_torch(finished: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['fedkseed', *sys.argv[1:]]\n"
        "from fedkseed.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "print(sorted({'torch', 'transformers', 'numba', 'scipy'} & set(sys.modules)))\n"
    )
    helps = [["--help"], ["simulate", "--help"], ["watch", "--help"]]
    looks = [
        ["status", finished],
        ["inspect", finished],
        ["report", finished, "--output", tmp_path],
        ["diff", finished, finished],
    ]
    for args in (*helps, *looks):
        done = shell(sys.executable, "-c", code, *args)
        assert done.code == 0, done
        assert done.stdout.endswith("[]\n"), args
        assert ("Usage: fedkseed" in done.stdout) == (args in helps)
    watched = "import sys, fedkseed.cli.watch; print('torch' in sys.modules)"
    assert shell(sys.executable, "-c", watched) == Result(0, "False\n", "")


def test_the_console_script_works_and_tells_its_version() -> None:
    assert shell(FEDKSEED, "--version") == Result(0, f"fedkseed {fk.__version__}\n", "")


def test_the_console_script_ends_with_the_exit_code_of_the_error() -> None:
    assert_one_line(shell(FEDKSEED, "simulate", "--model", "x"), 2, "are missing; give them on the command line")


def test_every_setting_has_a_flag_with_its_description(fedkseed: CommandLine) -> None:
    from fedkseed.runs.settings import SimulationConfig

    shown = fedkseed("simulate", "--help")
    assert shown.code == 0
    for name, field in SimulationConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown.stdout
        assert str(field.description).split()[0] in shown.stdout


@pytest.mark.parametrize(
    "args", [["simulate", "--nonsense", "1"], ["nonsense"], ["inspect"], ["watch", "x", "--port", "65536"]]
)
def test_a_wrong_command_line_is_a_usage_error(fedkseed: CommandLine, args: list[str]) -> None:
    result = fedkseed(*args)
    assert result.code == 2
    assert "Traceback" not in result.stderr
    assert "Usage: fedkseed" in result.stderr


def test_a_command_that_is_nearly_one_leads_to_it_once(fedkseed: CommandLine) -> None:
    assert fedkseed("simulat").stderr.count("'simulate'") == 1


@pytest.mark.parametrize(
    "command",
    [("inspect",), ("evaluate",), ("export", None, "out"), ("report",), ("watch",), ("status",), ("simulate", "--resume")],
    ids=lambda c: c[0],
)
@pytest.mark.parametrize("there", [False, True], ids=["nothing", "an empty folder"])
def test_a_run_that_is_missing_is_one_mistake_with_one_exit_code(
    fedkseed: CommandLine, tmp_path: Path, command: tuple[str | None, ...], there: bool
) -> None:
    run = tmp_path / "run\nfedkseed: forged\x1b[2J"
    if there:
        run.mkdir()
    words = [run if word is None else word for word in command]
    result = fedkseed(*(words if run in words else [*words, run]))
    assert_one_line(result, 2, r"run\nfedkseed: forged\x1b[2J")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("simulate", "--run", ""), "--run"),
        (("simulate", "--resume="), "--resume"),
        (("demo", "--run", ""), "--run"),
        (("report", "run", "--output", ""), "--output"),
        (("report", "run", ""), "RUN..."),
        (("merge", "one", "other", "--to", ""), "--to"),
        (("inspect", ""), "RUN|LEDGER"),
    ],
)
def test_an_empty_name_is_not_this_folder(fedkseed: CommandLine, tmp_path: Path, words: tuple[str, ...], what: str) -> None:
    assert_one_line(fedkseed(*words, cwd=tmp_path), 2, f"{what} is '': the name is empty; give one, or . for this folder")
    assert list(tmp_path.iterdir()) == []


def test_the_help_shows_the_ten_settings_that_matter_first() -> None:
    from typer.main import get_command

    from fedkseed.cli.app import app

    simulate = get_command(app).commands["simulate"]  # type: ignore[attr-defined]
    groups: dict[str | None, list[str]] = {}
    for option in simulate.params:
        groups.setdefault(option.rich_help_panel, []).append(option.opts[0])
        assert len(option.make_metavar(None)) < 30
        assert option.help[0].isupper()
        assert re.search(r"[.)](\\\[default: .*\]| \\\[default: .*\])?$", option.help), option.help
    assert next(iter(groups)) is None
    assert len(groups.pop(None)) == 10
    assert len(groups) >= 5
    assert all(groups.values())


def test_completion_offers_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"COMP_WORDS": "fedkseed simulate --partition d", "COMP_CWORD": "3", "_FEDKSEED_COMPLETE": "complete_bash"}
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    done = shell(FEDKSEED)
    assert done.stdout.split() == ["dirichlet"], done


@pytest.mark.parametrize("words", [("-q", "-v"), ("--verbose", "--quiet")])
def test_quiet_and_verbose_at_once_are_one_line(fedkseed: CommandLine, finished: Path, words: tuple[str, str]) -> None:
    assert_one_line(fedkseed("evaluate", finished, *words), 2, "--quiet and --verbose say less and more; give one of them")


def test_quiet_and_verbose(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    command = ["simulate", *flags(tiny_settings(tiny, num_rounds=1))]
    quiet = fedkseed(*command, "--run", tmp_path / "quiet", "-q")
    assert (quiet.code, quiet.stderr) == (0, "")
    assert [line.split(":")[0] for line in quiet.stdout.splitlines()] == ["done"]
    loud = fedkseed(*command, "--run", tmp_path / "loud", "-v")
    assert "client-" in loud.stdout
    assert "seconds: " in loud.stdout


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried"), MemoryError()])
def test_want_of_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it is met; another error of torch's is a fault, and not hidden."""
    from fedkseed.cli import app

    def fail() -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as end:
        app.main()
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("fedkseed: no memory for what was to be done (")
    assert printed.count("\n") <= 2  # the width of a captured terminal
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        app.main()
