"""What a run of any algorithm leaves behind and goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self


class Checkpoint(Protocol):
    """Everything that a run needs to go on, beside its settings; `fedkseed.Ledger` is one."""

    @property
    def round(self) -> int:
        """How many rounds have gone in."""
        ...

    @property
    def made_with(self) -> Mapping[str, Any] | None:
        """What it says of the settings and records that it was made with, if anything."""
        ...

    def stamped(self, made_with: Mapping[str, Any] | None) -> Self:
        """The same with what it was made with."""
        ...

    def digest(self) -> str:
        """Equal digests mean equal checkpoints, whatever they were made with."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the file, atomically."""
        ...
