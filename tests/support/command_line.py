"""`fedkseed` as a user calls it, in processes that begin quickly."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_server import serve

FEDKSEED = Path(sys.executable).parent / "fedkseed"
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Of a process that is started: with the tests' own cache of token ids, which a fixture names."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


def shell(*command: object) -> Result:
    """Any command, in a process that begins as from a shell."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=environment())
    return Result(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """While it is open, processes that multiprocessing forks from a server begin at once: tests/support/warm.py is imported."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.support.warm", "pytest"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    try:
        yield
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # else nobody waits for it, nor counts its time


class CommandLine:
    """`fedkseed` in processes that are forked from one that has imported what takes seconds to import.

    Everything else is as from a shell: arguments, exit codes, standard streams, signals, limits.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._server, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("forkserver").Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def __call__(
        self,
        *args: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        largest_file: int | None = None,
        kill: tuple[int, str, str] | None = None,
        send: tuple[str, int, float, int] | None = None,
        nobody: bool = False,
    ) -> Result:
        """Run one, as a user whom permissions bind if `nobody`; `kill` and
        `send` are as in `kill_at` and `send_signal` of the server."""
        job = {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd or self._folder.name),
            "env": env or {},
            "largest_file": largest_file,
            "kill": kill,
            "send": send,
            "nobody": nobody,
        }
        self._server.send(job)
        return Result(*self._server.recv())

    def close(self) -> None:
        self._server.close()
        self._process.join()
        self._folder.cleanup()


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as they are given on the command line."""
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


def assert_one_line(result: Result, code: int, *wanted: str) -> None:
    assert result.code == code, result
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.startswith("fedkseed: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    for text in wanted:
        assert text in result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run's folder, but for the lock, which says who was there last."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name != ".lock"}
