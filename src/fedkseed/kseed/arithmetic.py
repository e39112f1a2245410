"""Arithmetic of ledgers: tuned models over one base added, subtracted and scaled, as K numbers (docs/ledgers.md).

A page that moves weights by its sum is linear in its numbers, so weighted sums of models are weighted sums of pages: those of
one pool are added up, those of several stand side by side. So is a page in proportion, where it is its ledger's first: it
moves each weight by the base's times its sum. A later one multiplies what the pages before it have led to, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from numbers import Real
from pathlib import Path

import numpy as np

from fedkseed.errors import InvalidValueError, LedgerError
from fedkseed.kseed.coding import LARGEST, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.paged_format import common_wire
from fedkseed.kseed.pages import Page, check_pages

Term = tuple[float, Page]


def merge(ledgers: Sequence[Ledger | str | Path], weights: Sequence[float] | None = None) -> Ledger:
    """The weighted sum of tuned models over one base, in the published form: `w0 + sum_i weights_i (w_i - w0)`.

    Numbers of one pool are multiplied by their weights in float64, added up as if exactly, and rounded to float32 once. A page
    whose pool no other ledger has keeps its numbers as they are, and its weight becomes its scale. Pages stand in the order of
    their keys, so that the order of the ledgers does not matter, to the bit.

    Args:
        ledgers: at least one; or their files, folders or names on a hub, as `fedkseed.apply` takes them.
        weights: a finite number for each; None for the mean.

    Returns:
        A ledger whose round is the latest of theirs.

    Raises:
        InvalidValueError: no ledgers, weights of another number or not finite, or a sum beyond what a ledger holds.
        LedgerError: a ledger cannot be read, is of another base model or tunes other tensors than the first, or has pages in
            proportion that do not add up.
    """
    ledgers = listed(ledgers)
    found = [ledger if isinstance(ledger, Ledger) else Ledger.from_pretrained(ledger) for ledger in ledgers]
    names = [f"ledger {i + 1}" if isinstance(x, Ledger) else str(x) for i, x in enumerate(ledgers)]
    factors = _checked([1 / len(found)] * len(found) if weights is None else weights, len(found))
    terms: dict[tuple[bool, int, int, str], list[Term]] = {}
    for name, ledger, factor in zip(names, found, factors, strict=True):
        check_same_base(found[0], ledger, names[0], name)
        for page in _pages_that_add_up(ledger, name):
            pool = page.pool
            terms.setdefault((page.movement == "absolute", pool.key, pool.size, pool.family), []).append((factor, page))
    if sum(not absolute for absolute, *_ in terms) > 1:
        raise LedgerError(
            "pages of several pools move weights in proportion, so their sum is no ledger; add up ledgers of one pool, "
            "or of runs with --movement absolute"
        )
    pages = [_sum(terms[key]) for key in sorted(terms)]
    pages = [page for page in pages if page.parts] or [replace(pages[0], parts=(), scale=1.0)]
    check_pages(pages)
    merged = Ledger.of_pages(found[0].base, max(x.round for x in found), pages, common_wire(pages), None)
    return replace(merged, base_model=next((x.base_model for x in found if x.base_model), None))


def listed(ledgers: object) -> list[Ledger | str | Path]:
    """Ledgers, or where they are, as a list.

    Raises:
        InvalidValueError: it is none, or an empty one, or holds something else.
    """
    given = list(ledgers) if isinstance(ledgers, Iterable) and not isinstance(ledgers, (str, bytes, Mapping)) else []
    if not given or not all(isinstance(one, (Ledger, str, Path)) for one in given):
        raise InvalidValueError(f"ledgers are {ledgers!r:.80}; expected a list of at least one ledger, file, folder or name")
    return given


def pages_of(ledger: Ledger) -> tuple[Page, ...]:
    """A ledger's pages; coefficients of scalars as the one page that they are, to the bit."""
    if ledger.pages:
        return ledger.pages
    values = ledger.coefficients.astype(np.float64)
    coded = encode(values, ledger.precision)
    if not np.array_equal(coded.decode(len(values)), values):  # too small for float16 under a step that float32 holds
        coded = encode(values, "float32")
    return (Page(ledger.pool, "coefficients", "absolute", (coded,) if values.any() else ()),)


def check_same_base(ledger: Ledger, other: Ledger, name: str, other_name: str) -> None:
    """Refuse ledgers that no sum or distance is of.

    Raises:
        LedgerError: they have different bases, or one tunes a tensor that the other leaves alone.
    """
    if other.base.fingerprint != ledger.base.fingerprint:
        raise LedgerError(
            f"{other_name} is over the base model {other.base.fingerprint[:16]}, {name} over {ledger.base.fingerprint[:16]}; "
            "give ledgers of one base model"
        )
    if odd := set(other.base.frozen) ^ set(ledger.base.frozen):
        tuned, not_tuned = (name, other_name) if min(odd) in other.base.frozen else (other_name, name)
        raise LedgerError(f"{tuned} tunes {min(odd)!r:.80} and {not_tuned} does not; give ledgers that tune the same tensors")


def _checked(weights: Sequence[float], count: int) -> list[float]:
    try:
        if isinstance(weights, (Mapping, Set)):  # whose keys, or in whatever order, they would be
            raise TypeError
        given = list(weights)
    except TypeError:
        raise InvalidValueError(f"weights are {weights!r:.80}; expected a number for each ledger") from None
    if len(given) != count:
        raise InvalidValueError(f"{len(given)} weights came with {count} ledgers; expected one for each")
    return [_finite(weight) for weight in given]


def _finite(weight: object) -> float:
    try:
        if isinstance(weight, Real) and not isinstance(weight, bool) and math.isfinite(weight):
            return float(weight)
    except OverflowError:  # an integer beyond float64
        pass
    raise InvalidValueError(f"a weight is {weight!r:.80}; expected a finite number")


def _pages_that_add_up(ledger: Ledger, name: str) -> tuple[Page, ...]:
    pages = pages_of(ledger)
    if any(page.movement == "proportional" for page in pages[1:]):
        raise LedgerError(
            f"{name} has {len(pages)} pages, of which a later one moves weights in proportion: they multiply, and do not "
            "add up; take a ledger of one page, or of a run with --movement absolute"
        )
    return pages


def _sum(terms: Sequence[Term]) -> Page:
    """Weighted pages of one pool and movement as one."""
    first = terms[0][1]
    if len(terms) == 1:
        scale = terms[0][0] * first.scale
        if not math.isfinite(scale):
            raise InvalidValueError(f"a page's scale would be {scale}; give smaller weights")
        return replace(first, scale=scale, parts=first.parts if scale else ())
    basis = first.basis if all(page.basis == first.basis for _, page in terms) else "coefficients"
    with np.errstate(over="ignore"):
        columns = np.stack(
            [
                factor * (page.numbers() if page.basis == basis else page.coefficients().astype(np.float64))
                for factor, page in terms
            ],
            axis=1,
        )
        too_large = not (np.abs(columns).sum(1) <= LARGEST).all()
    if too_large:
        raise InvalidValueError(
            f"a number would be larger than {LARGEST:g}, the most that a ledger holds; give smaller weights"
        )
    numbers = np.array([math.fsum(column) for column in columns.tolist()])
    return Page(first.pool, basis, first.movement, (encode(numbers, "float32"),) if numbers.any() else ())
