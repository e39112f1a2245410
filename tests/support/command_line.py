"""`fedkseed` as a user calls it, in processes that begin quickly."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_settings

FEDKSEED = Path(sys.executable).parent / "fedkseed"
SERVER = Path(__file__).with_name("command_server.py")


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


class CommandLine:
    """`fedkseed` in processes that are forked from one that has imported what takes seconds to import.

    Everything else is as from a shell: arguments, exit codes, standard streams, signals, limits.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-P", SERVER, json.dumps(tiny_settings(Path(self._folder.name))), self._folder.name]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=self._folder.name
        )

    def __call__(
        self,
        *args: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        largest_file: int | None = None,
        kill: tuple[int, str, str] | None = None,
        send: tuple[str, int, float, int] | None = None,
    ) -> Result:
        """Run one; `kill` and `send` are as in `kill_at` and `send_signal` of the server."""
        job = {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd or self._folder.name),
            "env": env or {},
            "largest_file": largest_file,
            "kill": kill,
            "send": send,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Result(*json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()
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
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
