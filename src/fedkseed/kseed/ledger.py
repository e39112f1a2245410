"""The ledger: K numbers over a known base, which are the tuned model, and what a run needs to go on.

A ledger file is a safetensors file with one metadata entry of canonical JSON. The checkpoint of a run holds the float64
accumulators and what FedKSeed-Pro remembers; the published form holds the rounded coefficients alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedkseed.errors import FedKSeedError, InvalidValueError, LedgerError
from fedkseed.files import safetensors_metadata, write_atomically
from fedkseed.kseed.rounding import DTYPES, MAX_EXPONENT, PRECISIONS, Packed, Precision, pack, rounded
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool

FORMAT = 1
METADATA = "fedkseed"
SHORT_DIGEST: np.dtype[Any] = np.dtype("<u4")


class Bound(Protocol):
    """What a ledger needs of a model; `fedkseed.Binding` has it."""

    pool: SeedPool

    def identity(self) -> BaseIdentity:
        """Which base model it is."""
        ...


@dataclass(frozen=True, eq=False)
class History:
    """What a run needs beside the coefficients.

    Attributes:
        accumulators: the coefficients before rounding, float64[K].
        grad_sums: sums of |clipped projected gradient| for each seed, float64[K].
        grad_counts: how many went into each sum, int64[K].
    """

    accumulators: NDArray[np.float64]
    grad_sums: NDArray[np.float64]
    grad_counts: NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class Ledger:
    """A tuned model as coefficients over a base; immutable. Compare `digest()`.

    Attributes:
        pool: the pool of perturbations.
        base: the base model's identity.
        precision: what the coefficients are rounded to; see `fedkseed.kseed.rounding`.
        round: number of rounds that have gone in.
        coefficients: float32[K], the rounded values that everybody rebuilds from.
        history: what the run needs to go on; None in the published form.

    Raises:
        InvalidValueError: the coefficients are not K numbers of that precision, or not those of the history; or the round is
            no count.
    """

    pool: SeedPool
    base: BaseIdentity
    precision: Precision
    round: int
    coefficients: NDArray[np.float32]
    history: History | None

    def __post_init__(self) -> None:
        if type(self.round) is not int or self.round < 0:
            raise InvalidValueError(f"round is {self.round!r}; expected an integer from 0 on")
        coefficients = self.pool.check_coefficients(self.coefficients)
        if self.history is not None and not np.array_equal(coefficients, rounded(self.history.accumulators, self.precision)):
            raise InvalidValueError(
                "the coefficients are not those of the ledger's accumulators, which a run goes on from; change a published "
                'ledger: dataclasses.replace(ledger.published(), precision="float32", coefficients=...)'
            )
        if self.history is None and (lost := np.flatnonzero(coefficients != rounded(coefficients, self.precision))).size:
            raise InvalidValueError(
                f"coefficient {lost[0]} is {coefficients[lost[0]]}, which {self.precision} cannot hold beside the others; "
                'give precision="float32" too'
            )
        object.__setattr__(self, "coefficients", coefficients)

    def __repr__(self) -> str:
        kind = "checkpoint" if self.history else "published"
        size, used = self.pool.size, np.count_nonzero(self.coefficients)
        return (
            f"<Ledger, {kind}: {self.round} rounds, {used:,} of K = {size:,} {self.pool.family} seeds in use, "
            f"base {self.base.fingerprint[:16]}>"
        )

    @classmethod
    def of(cls, bound: Bound, coefficients: ArrayLike, round: int = 0) -> Ledger:
        """A published ledger of coefficients that were found in any way, such as by a loop of one's own.

        Args:
            bound: the model that they are of, as `fedkseed.bind` gives it.
            coefficients: a, K finite numbers that float32 holds.
            round: how many rounds led to them, if that means something.

        Raises:
            InvalidValueError: see `Binding.rebuild`.
        """
        return cls(bound.pool, bound.identity(), "float32", round, bound.pool.check_coefficients(coefficients), None)

    @classmethod
    def start(cls, pool: SeedPool, base: BaseIdentity, precision: Precision) -> Ledger:
        """The ledger of the base model itself, before the first round."""
        zeros = np.zeros(pool.size)
        history = History(zeros, zeros.copy(), np.zeros(pool.size, np.int64))
        return cls(pool, base, precision, 0, rounded(zeros, precision), history)

    def advance(self, history: History) -> Ledger:
        """The ledger one round later."""
        coefficients = rounded(history.accumulators, self.precision)
        return replace(self, round=self.round + 1, coefficients=coefficients, history=history)

    def published(self) -> Ledger:
        """The same model without what only the run needs: 8 to 16 KB for K = 4096."""
        return replace(self, history=None)

    def digest(self) -> str:
        """SHA-256 (hex) of everything the ledger holds; equal digests mean equal ledgers."""
        metadata, tensors = self._content()
        digest = hashlib.sha256(metadata.encode())
        for name in sorted(tensors):
            digest.update(f"\n{name} {tensors[name].dtype.str} {tensors[name].shape}\n".encode())
            digest.update(tensors[name].tobytes())
        return digest.hexdigest()

    def encode(self) -> bytes:
        """The bytes of the ledger's file; the same for equal ledgers."""
        metadata, tensors = self._content()
        data: bytes = save_tensors(tensors, metadata={METADATA: metadata})
        return data

    def save(self, path: str | Path) -> None:
        """Write the ledger's file; the old file stays whole until the new one is on the disk.

        Raises:
            LedgerError: the file cannot be written (no space, no permission); an older file is as it was.
        """
        try:
            write_atomically(Path(path), self.encode())
        except OSError as error:
            raise LedgerError(
                f"{path}: cannot save the ledger of round {self.round} ({error.strerror}); "
                "the ledger that lies there is whole: make room or choose another place, then resume"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read a checkpoint or a published ledger.

        Raises:
            LedgerError: the file is missing, not a ledger, damaged, or of another format version.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise LedgerError(f"{path}: cannot read the ledger ({error.strerror}); expected a ledger.safetensors") from error
        try:
            return cls.decode(data)
        except LedgerError as error:
            raise LedgerError(f"{path}: {error}") from error

    @classmethod
    def decode(cls, data: bytes) -> Ledger:
        """The ledger of a file's bytes; see `load`."""
        try:
            metadata = safetensors_metadata(data, METADATA)
            tensors = load_tensors(data)
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise LedgerError("not a ledger, or damaged; expected a file that fedkseed wrote") from error
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            found = metadata.get("format") if isinstance(metadata, dict) else None
            raise LedgerError(f"ledger format is {found!s:.40}; this version reads {FORMAT}: use the fedkseed that wrote it")
        try:
            return cls._from_content(metadata, tensors)
        except (KeyError, TypeError, ValueError, FedKSeedError) as error:
            raise LedgerError(f"ledger is damaged ({error!s:.200}); restore it from a copy") from error

    def _content(self) -> tuple[str, dict[str, NDArray[Any]]]:
        metadata: dict[str, Any] = {
            "format": FORMAT,
            "pool": {"key": f"{self.pool.key:016x}", "size": self.pool.size, "family": self.pool.family},
            "base": {"fingerprint": self.base.fingerprint, "frozen": list(self.base.frozen)},
            "precision": self.precision,
            "round": self.round,
        }
        tensors: dict[str, NDArray[Any]] = {"base_digests": self.base.digests.astype(SHORT_DIGEST)}
        if self.history is not None:
            tensors["accumulators"] = self.history.accumulators.astype("<f8")
            tensors["grad_sums"] = self.history.grad_sums.astype("<f8")
            tensors["grad_counts"] = self.history.grad_counts.astype("<i8")
        else:
            packed = pack(self.coefficients, self.precision)
            metadata["exponent"] = packed.exponent
            tensors["coefficients"] = np.frombuffer(packed.numbers, DTYPES[self.precision])
        return json.dumps(metadata, sort_keys=True, separators=(",", ":")), tensors

    @classmethod
    def _from_content(cls, metadata: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Ledger:
        pool = SeedPool(int(metadata["pool"]["key"], 16), metadata["pool"]["size"], metadata["pool"]["family"])
        identity, precision = metadata["base"], metadata["precision"]
        if precision not in PRECISIONS or not isinstance(metadata["round"], int) or metadata["round"] < 0:
            raise ValueError(f"precision {precision!r} and round {metadata['round']!r}")
        frozen, fingerprint = identity["frozen"], identity["fingerprint"]
        if not (isinstance(frozen, list) and all(isinstance(name, str) for name in frozen)):
            raise ValueError("frozen is not a list of names")
        if not (isinstance(fingerprint, str) and re.fullmatch("[0-9a-f]{64}", fingerprint)):
            raise ValueError("the base's fingerprint is not 64 hexadecimal digits")
        base = BaseIdentity(fingerprint, _tensor(tensors, "base_digests", SHORT_DIGEST, None), tuple(frozen))
        if "accumulators" not in tensors:
            numbers = _tensor(tensors, "coefficients", DTYPES[precision], pool.size)
            exponent = metadata["exponent"]
            if type(exponent) is not int or abs(exponent) > MAX_EXPONENT:
                raise ValueError(f"exponent {exponent!r:.40}")
            coefficients = Packed(precision, exponent, numbers.tobytes()).unpack()
            return cls(pool, base, precision, metadata["round"], pool.check_coefficients(coefficients), None)
        columns: dict[str, str] = {"accumulators": "<f8", "grad_sums": "<f8", "grad_counts": "<i8"}
        history = History(**{name: _tensor(tensors, name, np.dtype(kind), pool.size) for name, kind in columns.items()})
        sums = history.grad_sums
        if not np.isfinite(sums).all() or sums.min() < 0 or history.grad_counts.min() < 0:
            raise ValueError("a seed's sum or number of gradients is negative or not finite")
        return cls(pool, base, precision, metadata["round"], rounded(history.accumulators, precision), history)


def _tensor(tensors: dict[str, NDArray[Any]], name: str, dtype: np.dtype[Any], size: int | None) -> NDArray[Any]:
    array = tensors[name]
    if array.dtype != dtype or array.ndim != 1 or size not in (None, len(array)):
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, expected {dtype}[{size or 'n'}]")
    return array
