"""Where a baseline's run is: the averaged tensors after a round, and what they are tensors of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedkseed.baselines.parameters import Tensors
from fedkseed.errors import RunError
from fedkseed.files import safetensors_entry, safetensors_header, write_atomically

FORMAT = 1
METADATA = "fedkseed_baseline"


@dataclass(frozen=True, eq=False)
class TunedTensors:
    """The averaged tensors; immutable. Compare `digest()`.

    Attributes:
        algorithm: what they belong to.
        base: fingerprint of the base model, before anything was attached to it.
        round: number of rounds that have gone in.
        tensors: by name, float32.
    """

    algorithm: str
    base: str
    round: int
    tensors: Tensors

    def digest(self) -> str:
        """SHA-256 (hex) of the file's bytes."""
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """The bytes of the file; the same for equal content."""
        about = {"format": FORMAT, "algorithm": self.algorithm, "base": self.base, "round": self.round}
        metadata = {METADATA: json.dumps(about, sort_keys=True, separators=(",", ":"))}
        data: bytes = save({name: self.tensors[name] for name in sorted(self.tensors)}, metadata=metadata)
        return data

    def save(self, path: str | Path) -> None:
        """Write the file; the old one stays whole until the new one is on the disk.

        Raises:
            RunError: it cannot be written; an older file is as it was.
        """
        try:
            write_atomically(Path(path), self.encode())
        except OSError as error:
            raise RunError(
                f"{path}: cannot save the tensors of round {self.round} ({error.strerror}); "
                "those that lie there are whole: make room or choose another place, then resume"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> TunedTensors:
        """Read a file that `save` wrote.

        Raises:
            RunError: it is missing, damaged, or of another format.
        """
        try:
            with Path(path).open("rb") as file:
                about = safetensors_entry(safetensors_header(file)[0], METADATA)
                file.seek(0)
                tensors: dict[str, torch.Tensor] = load(file.read())
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}")
            return cls(str(about["algorithm"]), str(about["base"]), int(about["round"]), tensors)
        except OSError as error:
            raise RunError(f"{path}: cannot read the run's tensors ({error.strerror}); restore them from a copy") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError) as error:
            raise RunError(f"{path}: not a baseline's tensors, or damaged ({error!s:.80}); restore them from a copy") from error
