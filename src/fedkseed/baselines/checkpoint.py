"""Where a baseline's run is: the averaged tensors after a round, and what they are tensors of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedkseed.baselines.parameters import Tensors
from fedkseed.errors import RunError
from fedkseed.files import safetensors_entry, safetensors_header, write_atomically
from fedkseed.text import one_line

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
        made_with: what a run's checkpoint says of its settings and records (`fedkseed.runs.provenance`); no part of the
            digest.
    """

    algorithm: str
    base: str
    round: int
    tensors: Tensors
    made_with: Mapping[str, Any] | None = None

    def stamped(self, made_with: Mapping[str, Any] | None) -> TunedTensors:
        """The same with what it was made with."""
        return replace(self, made_with=made_with)

    def digest(self) -> str:
        """SHA-256 (hex) of the file's bytes, but for what it was made with."""
        return hashlib.sha256(self.stamped(None).encode()).hexdigest()

    def encode(self) -> bytes:
        """The bytes of the file; the same for equal content."""
        about: dict[str, Any] = {"format": FORMAT, "algorithm": self.algorithm, "base": self.base, "round": self.round}
        if self.made_with is not None:
            about["made_with"] = dict(self.made_with)
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
            if not isinstance(made_with := about.get("made_with"), dict | None):
                raise ValueError("made_with is no table")
            return cls(str(about["algorithm"]), str(about["base"]), int(about["round"]), tensors, made_with)
        except OSError as error:
            raise RunError(f"{path}: cannot read the run's tensors ({error.strerror}); restore them from a copy") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError) as error:
            raise RunError(
                f"{path}: not a baseline's tensors, or damaged ({one_line(error, 80)}); restore them from a copy"
            ) from error
