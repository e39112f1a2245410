"""Which base model a ledger or a message belongs to: a fingerprint of every parameter's values (docs/noise.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BaseIdentity:
    """The identity of base weights; two are equal when fingerprint and frozen names are.

    Attributes:
        fingerprint: SHA-256 (hex) over the digests of all parameters, tuned or not, in the order of their names.
        digests: the first four bytes of each of those digests, uint32[number of parameters], to say which one differs.
        frozen: names of the parameters that are not tuned, sorted.
    """

    fingerprint: str
    digests: NDArray[np.uint32] = field(compare=False)
    frozen: tuple[str, ...] = ()

    @property
    def has_adapter(self) -> bool:
        """Whether it is a base model with a LoRA adapter, which is tuned: PEFT calls what that is added to `base_layer`."""
        return any("base_layer" in name.split(".") for name in self.frozen)

    @classmethod
    def of(cls, digests: Mapping[str, bytes], frozen: Sequence[str] = ()) -> BaseIdentity:
        """The identity of a model from the digest of each parameter's base values, by canonical name."""
        ordered = [digests[name] for name in sorted(digests)]
        short = np.array([int.from_bytes(digest[:4], "little") for digest in ordered], np.uint32)
        return cls(hashlib.sha256(b"".join(ordered)).hexdigest(), short, tuple(sorted(frozen)))

    def difference(self, other: BaseIdentity, names: Sequence[str]) -> str | None:
        """How another identity, of a model with these parameters (sorted), differs from this one; None if it does not."""
        if len(self.digests) != len(other.digests):
            return f"the model has {len(other.digests)} parameters, expected {len(self.digests)}"
        if self.fingerprint != other.fingerprint:
            differing = np.flatnonzero(self.digests != other.digests)
            first = names[int(differing[0])] if differing.size else "a parameter"
            return f"{first} is the first of {max(1, differing.size)} parameters with another name, shape or values"
        if self.frozen != other.frozen:
            odd = min(set(self.frozen) ^ set(other.frozen))
            return f"{odd} is tuned on one side and frozen on the other"
        return None
