"""What no run can begin with: folders that one may not enter, files that are nested without end. A line each."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core import caching
from tests.support.command_line import CommandLine, assert_one_line, environment, flags
from tests.support.tiny import tiny_settings

from fedkseed.errors import ConfigError
from fedkseed.noise import cpu
from fedkseed.runs.settings import build, read_settings_file

DEEP = "[" * 2000


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that only its owner may enter, who is not the one that commands run as here."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700 if os.getuid() == 0 else 0)
    return folder


def test_a_folder_that_one_may_not_enter_is_one_line_in_every_command(fedkseed: CommandLine, closed: Path) -> None:
    settings = {"lr": 1.0}
    run, model, data = closed / "run", closed / "model", closed / "data.jsonl"
    for command in (
        ("inspect", run),
        ("evaluate", run),
        ("report", run),
        ("export", run, "out"),
        ("simulate", "--resume", run),
        ("simulate", *flags(settings), "--model", model, "--data", data),
        ("simulate", *flags(settings), "--model", "owner/name", "--data", data),
        ("simulate", *flags(settings), "--model", "owner/name", "--data", f"{data},{data}"),
        ("simulate", *flags(settings), "--model", "owner/name", "--data", "owner/name", "--run", run),
        ("simulate", "--config", closed / "config.toml"),
        ("compare", closed / "comparison.toml"),
        ("demo", "--run", run),
    ):
        assert_one_line(fedkseed(*command, nobody=True, cwd=Path("/")), 2, "Permission denied", str(closed))


@pytest.mark.parametrize("text", [f"lr = {DEEP}", "lr." + "a." * 2000 + "a = 1"], ids=["lists", "tables"])
def test_a_config_nested_without_end_is_one_line(fedkseed: CommandLine, copied: Path, tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.toml"
    text = f'model = "a/b"\ndata = "a/b"\n{text}'
    config.write_text(text)
    assert_one_line(fedkseed("simulate", "--config", config), 2, "nested too deeply")
    assert_one_line(fedkseed("compare", config), 2)
    (copied / "config.toml").write_text(text)
    for command in (["inspect", copied], ["report", copied], ["simulate", "--resume", copied]):
        result = fedkseed(*command)
        assert_one_line(result, result.code, "nested too deeply")
        assert len(result.stderr) < 500


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("num_clients = inf", "--num-clients is 'inf'"),
        ("lr = inf", "--lr is 'inf'"),
        ("lr = nan", "--lr is 'nan'"),
        ("fraction_train = nan", "--fraction-train is 'nan'"),
        ("alpha = inf", "--alpha is 'inf'"),
    ],
)
def test_infinite_settings_are_refused_by_name(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "config.toml").write_text(f'model = "a/b"\ndata = "a/b"\n{line}\n' + ("" if "lr" in line else "lr = 1.0\n"))
    with pytest.raises(ConfigError, match=says):
        build(read_settings_file(tmp_path / "config.toml"))


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbfnum_rounds = 4\n")
    assert read_settings_file(tmp_path / "config.toml") == {"num_rounds": 4}


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"model": "a/b", "lr": "x" * 5000})
    assert len(str(caught.value)) < 400


def test_a_model_whose_configuration_is_nested_without_end_is_one_line(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny)
    model = tmp_path / "model"
    model.mkdir()
    for path in (tiny / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "config.json").write_text(DEEP)
    result = fedkseed("simulate", *flags(settings | {"model": model}), "--run", tmp_path / "run")
    assert_one_line(result, 2, str(model))


def test_where_nothing_can_be_kept_kernels_are_compiled_anew_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a package folder and a home folder that may not be written."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    cpu._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fedkseed"):
        kernels = [cpu.kernel(lambda x: x + 1), cpu.kernel(lambda x: x + 2)]
    assert [kernel.py_func(1) for kernel in kernels] == [2, 3]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("compiled kernels cannot be kept (cannot cache function")
    assert "NUMBA_CACHE_DIR" in caplog.messages[0]


def test_doctor_says_that_torch_is_not_here() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['fedkseed', 'doctor']; from fedkseed.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("fedkseed: torch is not here, or does not load (")
    assert done.stderr.count("\n") == 1
    assert "numpy " in done.stdout
