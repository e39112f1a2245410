"""The program itself: quick help, versions, exit codes, usage errors."""

import sys

import pytest
from tests.support.command_line import FEDKSEED, CommandLine, Result, assert_one_line, shell

import fedkseed as fk


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['fedkseed', *sys.argv[1:]]\n"
        "from fedkseed.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "print(sorted({'torch', 'transformers', 'numba', 'scipy'} & set(sys.modules)))\n"
    )
    for args in (["--help"], ["simulate", "--help"]):
        done = shell(sys.executable, "-c", code, *args)
        assert done.code == 0, done
        assert done.stdout.endswith("[]\n")
        assert "Usage: fedkseed" in done.stdout


def test_the_console_script_works_and_tells_its_version() -> None:
    assert shell(FEDKSEED, "--version") == Result(0, f"fedkseed {fk.__version__}\n", "")


def test_the_console_script_ends_with_the_exit_code_of_the_error() -> None:
    assert_one_line(shell(FEDKSEED, "simulate", "--model", "x"), 2, "is missing; give it on the command line")


def test_every_setting_has_a_flag_with_its_description(fedkseed: CommandLine) -> None:
    from fedkseed.runs.settings import SimulationConfig

    shown = fedkseed("simulate", "--help")
    assert shown.code == 0
    for name, field in SimulationConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown.stdout
        assert str(field.description).split()[0] in shown.stdout


@pytest.mark.parametrize("args", [["simulate", "--nonsense", "1"], ["nonsense"], ["inspect"]])
def test_a_wrong_command_line_is_a_usage_error(fedkseed: CommandLine, args: list[str]) -> None:
    result = fedkseed(*args)
    assert result.code == 2
    assert "Traceback" not in result.stderr
    assert "Usage: fedkseed" in result.stderr
