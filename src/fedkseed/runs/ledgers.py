"""The ledgers that a run keeps: one for each evaluation, in its published form, so that any of them can be taken later."""

from __future__ import annotations

import re
from pathlib import Path

from fedkseed.errors import RunError
from fedkseed.federation import Checkpoint
from fedkseed.kseed.ledger import Ledger


class KeptLedgers:
    """A folder with a file for each round that was evaluated.

    Args:
        folder: made when the first one is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, server_round: int) -> Path:
        """A round's file."""
        return self._folder / f"round-{server_round:05}.safetensors"

    @property
    def rounds(self) -> list[int]:
        """Those that there are, ascending."""
        names = [re.fullmatch(r"round-(\d{5,9})\.safetensors", path.name) for path in self._folder.glob("round-*")]
        return sorted(int(name[1]) for name in names if name)

    def keep(self, checkpoint: Checkpoint) -> None:
        """Keep the ledger of a round; not the tensors of a baseline, which are too large to keep one for each evaluation.

        Raises:
            FedKSeedError: it cannot be written; the run's checkpoint is safe.
        """
        if not isinstance(checkpoint, Ledger):
            return
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from error
        checkpoint.published().save(self.path(checkpoint.round))

    def cut(self, server_round: int) -> None:
        """Forget those after a round, which a run that goes on from there makes anew.

        Raises:
            RunError: they cannot be removed.
        """
        try:
            for kept in self.rounds:
                if kept > server_round:
                    self.path(kept).unlink()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> RunError:
        return RunError(f"{self._folder}: cannot write ({error.strerror}); make room, then --resume {self._folder.parent}")
