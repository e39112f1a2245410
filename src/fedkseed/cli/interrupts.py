"""Ctrl-C: a command says what is safe and how to go on, in words that can be pasted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from fedkseed.cli.console import complain, say_command

INTERRUPTED = 130
"""The exit code of what Ctrl-C ended."""
Advice = tuple[str, Sequence[object]]
"""What is safe, and the command that goes on."""


class Interrupted(typer.Exit):
    """The end of a command by Ctrl-C, with what is to be said once its display is gone."""

    def __init__(self, safe: str, command: Sequence[object]) -> None:
        super().__init__(INTERRUPTED)
        self._safe, self._command = safe, command

    def tell(self) -> None:
        """Say it."""
        complain(f"interrupted; {self._safe}. Go on with:")
        say_command(self._command, Console(stderr=True))


@contextmanager
def interruptible(advice: str | Callable[[], Advice]) -> Iterator[None]:
    """Ctrl-C inside ends the command with an `Interrupted`, which says what is safe and how to go on.

    Args:
        advice: what is safe, where the same command is to be given again; or a function that says both.
    """
    try:
        yield
    except KeyboardInterrupt:
        safe, command = (advice, again()) if isinstance(advice, str) else advice()
        raise Interrupted(safe, command) from None


def again() -> list[str]:
    """The command as it was given."""
    return ["fedkseed", *sys.argv[1:]]


def with_run(folder: Path, command: Sequence[object]) -> Callable[[], Advice]:
    """How far a run is, and the command that goes on with it once it has begun."""

    def advice() -> Advice:
        from fedkseed.runs.folder import RunFolder
        from fedkseed.runs.layout import CONFIG

        if not (folder / CONFIG).exists():
            return "no run was begun yet", again()
        saved = RunFolder.open(folder).load_checkpoint()
        return f"round {saved.round} is safe in {folder}" if saved else f"no round was done yet in {folder}", command

    return advice
