"""Pages: a tuned model as several pools' numbers, one after the other; only the last page still changes (docs/round.md).

A page's numbers are a sum of parts, each as it travelled. On a wire of four bits or more a page has one part, which every
round replaces; on one of two bits or a sign it has one for each of its rounds, and whoever has some needs only the others.
A run's pages have the scale 1; arithmetic of ledgers gives them others (docs/ledgers.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError
from fedkseed.federation.envelope import MAX_NUMBERS
from fedkseed.kseed.coding import BITS, Coded
from fedkseed.models.closed_page import ClosedPage, Movement
from fedkseed.noise.families import FAMILIES, block_size, transform
from fedkseed.noise.pool import SeedPool

F64 = NDArray[np.float64]
Basis = Literal["table", "coefficients"]
"""Which K numbers a page holds: the seeds' coefficients a, or the table A = H a, of which each weight moves by one entry."""


def check_basis(size: int, family: str, basis: Basis) -> None:
    """Refuse a table where a pool has none of K numbers.

    Raises:
        InvalidValueError: the family has no table, or its table has more than K numbers.
    """
    if basis == "table" and not (FAMILIES[family].has_table and block_size(size) == size):
        raise InvalidValueError(f"{size} {family} seeds have no table of as many numbers; expected basis coefficients")


def to_coefficients(numbers: F64, basis: Basis) -> NDArray[np.float32]:
    """The seeds' coefficients of a page's numbers, float32[K]; of a table a = H A / K, in float64, rounded once."""
    return (numbers if basis == "coefficients" else transform(numbers) / len(numbers)).astype(np.float32)


def gradient_to_basis(gradient: F64, basis: Basis) -> F64:
    """A gradient by the coefficients, u = Z'g, as one by a page's numbers: itself, or T = H u / K by the table."""
    return gradient if basis == "coefficients" else transform(gradient) / len(gradient)


@dataclass(frozen=True, eq=False)
class Page:
    """One page.

    Attributes:
        pool: its perturbations.
        basis: which numbers it holds.
        movement: how it moves a weight; see `fedkseed.Binding.open_page`.
        parts: the numbers are their sum, in float64 and in this order, times the scale; all of one wire.
        scale: any finite number.

    Raises:
        InvalidValueError: the pool has no table, and the basis is that.
    """

    pool: SeedPool
    basis: Basis
    movement: Movement
    parts: tuple[Coded, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_basis(self.pool.size, self.pool.family, self.basis)

    def numbers(self) -> F64:
        """The page's numbers, float64[K]."""
        total = np.zeros(self.pool.size)
        for part in self.parts:
            total += part.decode(self.pool.size)
        return total * self.scale if self.scale != 1 else total

    def coefficients(self) -> NDArray[np.float32]:
        """What a model is rebuilt from, float32[K], not to be written to."""
        return self._coefficients

    @cached_property
    def _coefficients(self) -> NDArray[np.float32]:
        """Decoded once: a closed page is asked for in every round."""
        coefficients = to_coefficients(self.numbers(), self.basis)
        coefficients.flags.writeable = False
        return coefficients

    @property
    def wire(self) -> str:
        """That of its parts; of a page without any float32, on which nothing is nothing too."""
        return self.parts[0].wire if self.parts else "float32"

    def closed(self) -> ClosedPage:
        """As a binding takes it, once it no longer changes."""
        return ClosedPage(self.pool, self.coefficients(), self.movement)


def check_total(sizes: Iterable[int]) -> None:
    """Refuse pages of these pools, if they are too many for one ledger.

    Raises:
        InvalidValueError: they hold more than `MAX_NUMBERS`.
    """
    each = [*sizes]
    if (total := sum(each)) > MAX_NUMBERS:
        raise InvalidValueError(f"{len(each):,} pages hold {total:,} numbers; a ledger has at most {MAX_NUMBERS:,}")


def check_pages(pages: Sequence[Page]) -> None:
    """Refuse pages that no model can be rebuilt from, by what their scales make of them.

    Raises:
        InvalidValueError: a coefficient is beyond float32, or they hold more than `MAX_NUMBERS`.
    """
    check_total(page.pool.size for page in pages)
    for i, page in enumerate(pages):
        with np.errstate(over="ignore", invalid="ignore"):
            coefficients = page.coefficients() if page.parts else np.zeros(1, np.float32)
        if not np.isfinite(coefficients).all():
            raise InvalidValueError(
                f"page {i + 1} of {len(pages)} times {page.scale:g} has a coefficient beyond float32; give smaller weights"
            )


def pages_digest(pages: Sequence[Page]) -> bytes:
    """SHA-256 of pages of a run: their pools and all their parts."""
    digest = hashlib.sha256()
    for page in pages:
        pool = page.pool
        digest.update(f"{pool.key:016x} {pool.size} {pool.family} {page.basis} {page.movement} {len(page.parts)}\n".encode())
        for part in page.parts:
            digest.update(f"{part.wire} {part.step.hex()}\n".encode() + part.numbers)
    return digest.digest()


def is_replaced(wire: str) -> bool:
    """Whether a page on this wire has one part that every round replaces; else it gets one more in each round."""
    return BITS[wire] >= 4
