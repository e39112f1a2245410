"""The ledger: K numbers over a known base, which are the tuned model, and what a run needs to go on.

The checkpoint of a run holds the float64 accumulators and what FedKSeed-Pro remembers; the published form holds the rounded
coefficients alone. The file: `fedkseed.kseed.ledger_format`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedkseed.errors import FedKSeedError, InvalidValueError, LedgerError
from fedkseed.files import placed, write_atomically
from fedkseed.kseed.ledger_format import History, damaged, digest_of, encoded, read_fields
from fedkseed.kseed.pages import Page
from fedkseed.kseed.rounding import PRECISIONS, Precision, rounded
from fedkseed.models.closed_page import Movement
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
from fedkseed.text import counted

LEDGER = "ledger.safetensors"
"""What a ledger's file is called in a folder, a run's or a hub's."""


@runtime_checkable
class Bound(Protocol):
    """What a ledger needs of a model; `fedkseed.Binding` has it."""

    pool: SeedPool
    movement: Movement

    @property
    def num_pages(self) -> int:
        """How many pages its weights are made of."""
        ...

    def identity(self) -> BaseIdentity:
        """Which base model it is."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Ledger:
    """A tuned model as coefficients over a base; immutable. Compare `digest()`.

    Attributes:
        pool: the pool of perturbations.
        base: the base model's identity.
        precision: what the coefficients were rounded to, or the wire of the pages; see `rounding` and `coding`.
        round: number of rounds that have gone in.
        coefficients: float32[K], the rounded values that everybody rebuilds from.
        history: what a run of scalars needs to go on; None in the published form.
        pages: of a run of changes all its pages; pool and coefficients are then those of the last one, which is open.
        state: what such a run needs to go on, columns by name: the open page's numbers before coding and the optimiser's
            state; None in the published form.
        made_with: what a run's checkpoint says of its settings and records (`fedkseed.runs.provenance`), and what its privacy
            cost; no part of the digest. The published form has the latter only, if anything.
        base_model: name of the base model, a hub id or a folder, where it is known; no part of the digest or of the file.

    Raises:
        InvalidValueError: the coefficients are not K numbers of that precision, or not those of the history or the last page;
            or there is no such precision, or the round is no count.
    """

    pool: SeedPool
    base: BaseIdentity
    precision: str
    round: int
    coefficients: NDArray[np.float32]
    history: History | None
    pages: tuple[Page, ...] = ()
    state: Mapping[str, NDArray[np.float64]] | None = None
    made_with: Mapping[str, Any] | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        if type(self.round) is not int or self.round < 0:
            raise InvalidValueError(f"round is {self.round!r}; expected an integer from 0 on")
        if not self.pages and self.precision not in PRECISIONS:
            raise InvalidValueError(f"precision is {self.precision!r:.40}; expected {' or '.join(PRECISIONS)}")
        coefficients = self.pool.check_coefficients(self.coefficients)
        if self.pages and not (
            self.pool == self.pages[-1].pool and np.array_equal(coefficients, self.pages[-1].coefficients())
        ):
            raise InvalidValueError(
                "pool and coefficients are not those of the ledger's last page, which models are rebuilt from; make one of "
                "other pages: Ledger.of_pages(base, round, pages, wire, None)"
            )
        if self.history is not None and not np.array_equal(coefficients, rounded(self.history.accumulators, self.precision)):
            raise InvalidValueError(
                "the coefficients are not those of the ledger's accumulators, which a run goes on from; change a published "
                'ledger: dataclasses.replace(ledger.published(), precision="float32", coefficients=...)'
            )
        if (
            self.history is None
            and not self.pages
            and (lost := np.flatnonzero(coefficients != rounded(coefficients, self.precision))).size
        ):
            raise InvalidValueError(
                f"coefficient {lost[0]} is {coefficients[lost[0]]}, which {self.precision} cannot hold beside the others; "
                'give precision="float32" too'
            )
        coefficients = coefficients.copy()
        coefficients.setflags(write=False)
        object.__setattr__(self, "coefficients", coefficients)

    __array_ufunc__ = None  # a number of NumPy times a ledger is the ledger's to say

    def __add__(self, other: Ledger) -> Ledger:
        """Both tunings on one base; see `fedkseed.merge`, also for what it raises."""
        return _merged([self, other], [1.0, 1.0]) if isinstance(other, Ledger) else NotImplemented

    def __sub__(self, other: Ledger) -> Ledger:
        """This tuning without the other one."""
        return _merged([self, other], [1.0, -1.0]) if isinstance(other, Ledger) else NotImplemented

    def __mul__(self, factor: float) -> Ledger:
        """So many times this tuning."""
        return _merged([self], [factor]) if isinstance(factor, (int, float, np.number)) else NotImplemented

    __rmul__ = __mul__

    def __repr__(self) -> str:
        kind = "checkpoint" if self.is_checkpoint else "published"
        size, used = self.pool.size, np.count_nonzero(self.coefficients)
        return (
            f"<Ledger, {kind}: {counted(self.round, 'round')}, {used:,} of K = {size:,} {self.pool.family} seeds in use, "
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
            InvalidValueError: see `Binding.rebuild`; or the model is not bound.
            LedgerError: the model has closed pages, or moves in proportion, which coefficients alone do not say.
        """
        if not isinstance(bound, Bound):
            raise InvalidValueError(f"bound is a {type(bound).__name__}; expected what fk.bind gives")
        if bound.num_pages > 1 or bound.movement != "absolute":
            raise LedgerError(
                f"coefficients alone do not say what {counted(bound.num_pages, 'page')} with {bound.movement} movement are; "
                "give a model without closed pages that moves absolutely, or write the pages by Ledger.of_pages"
            )
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
        """The same model without what only the run needs: 9 to 17 KB for K = 4096."""
        return replace(self, history=None, state=None, made_with=published(self.made_with))

    def stamped(self, made_with: Mapping[str, Any] | None) -> Ledger:
        """The same with what it was made with."""
        return replace(self, made_with=made_with)

    @property
    def is_checkpoint(self) -> bool:
        """Whether a run can go on from it."""
        return self.history is not None or self.state is not None

    @classmethod
    def of_pages(
        cls, base: BaseIdentity, round: int, pages: Sequence[Page], wire: str, state: Mapping[str, NDArray[np.float64]] | None
    ) -> Ledger:
        """A ledger of pages, at least one; see the attributes."""
        page = pages[-1]
        return cls(page.pool, base, wire, round, page.coefficients(), None, tuple(pages), state)

    def digest(self) -> str:
        """SHA-256 (hex) of everything the ledger holds but what it was made with; equal digests mean equal ledgers."""
        return digest_of(self)

    def encode(self) -> bytes:
        """The bytes of the ledger's file; the same for equal ledgers."""
        return encoded(self)

    def save(self, path: str | Path) -> None:
        """Write the ledger's file; the old file stays whole until the new one is on the disk.

        Raises:
            LedgerError: the file cannot be written (no space, no permission); an older file is as it was.
        """
        path = _file(path)
        try:
            write_atomically(path, self.encode())
        except OSError as error:
            if not path.parent.is_dir():
                raise LedgerError(f"{path}: cannot save a ledger there: {path.parent} is no folder; make it first") from error
            if path.is_dir():
                raise LedgerError(
                    f"{path}: cannot save a ledger there: it is a folder; give a file in it, such as {path / LEDGER}"
                ) from error
            there = "the ledger that lies there is whole: " if path.exists() else ""
            raise LedgerError(
                f"{path}: cannot save the ledger of round {self.round} ({error.strerror}); {there}make room or choose another "
                "place, then resume"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read a checkpoint or a published ledger.

        Raises:
            LedgerError: the file is missing, not a ledger, damaged, or of another format version.
        """
        path = _file(path)
        try:
            with path.open("rb") as file:
                return cls._of(file)
        except OSError as error:
            raise LedgerError(f"{path}: cannot read the ledger ({error.strerror}); expected a ledger.safetensors") from error
        except LedgerError as error:
            raise LedgerError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Ledger:
        """Read a ledger from a hub (`owner/name`, perhaps with `@revision`), a folder that holds one, or its file.

        Raises:
            LedgerError: there is none, or see `load`.
        """
        from fedkseed.kseed.sharing import find

        return find(source)

    def save_pretrained(self, folder: str | Path, base_model: str | None = None, **card: Any) -> Path:
        """Write a folder with the published ledger and its card, as hubs want it; see `fedkseed.kseed.sharing.save_folder`."""
        from fedkseed.kseed.sharing import save_folder

        return save_folder(self, folder, base_model, **card)

    def push_to_hub(self, repo_id: str, base_model: str | None = None, **options: Any) -> str:
        """Put what `save_pretrained` writes on the Hugging Face hub; see `fedkseed.kseed.sharing.push`."""
        from fedkseed.kseed.sharing import push

        return push(self, repo_id, base_model, **options)

    @classmethod
    def decode(cls, data: bytes) -> Ledger:
        """The ledger of a file's bytes; see `load`."""
        return cls._of(io.BytesIO(data))

    @classmethod
    def _of(cls, file: BinaryIO) -> Ledger:
        fields = read_fields(file)
        try:
            return cls(**fields)
        except (TypeError, ValueError, FedKSeedError) as error:
            raise damaged(error) from error


def _file(path: object) -> Path:
    """Where a ledger's file is.

    Raises:
        LedgerError: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip() or "\0" in str(path):
        raise LedgerError(f"a ledger's file is {path!r:.80}; expected a path, such as {LEDGER!r}")
    return placed(path)


def _merged(ledgers: list[Ledger], weights: list[float]) -> Ledger:
    from fedkseed.kseed.arithmetic import merge  # which needs this module

    return merge(ledgers, weights)


def published(made_with: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What may be published of what a checkpoint was made with: the cost of its privacy, without who has spent what."""
    privacy = (made_with or {}).get("privacy")
    if not isinstance(privacy, dict):
        return None
    return {"privacy": {name: value for name, value in privacy.items() if name != "histories"}}
