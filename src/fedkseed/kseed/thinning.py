"""A published ledger in fewer bits: each page's numbers coded anew, in one part (docs/gradients.md, "Bits")."""

from __future__ import annotations

import numpy as np

from fedkseed.errors import InvalidValueError
from fedkseed.kseed.coding import BITS, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page

WIRES = {bits: wire for wire, bits in BITS.items() if bits <= 8}
"""By how many bits a number takes: 8, 4, 2, 1."""


def thinned(ledger: Ledger, bits: int) -> Ledger:
    """The published form with every page's numbers in so few bits; coefficients of scalars become a page.

    Args:
        ledger: a run's checkpoint, or a published one.
        bits: one of `WIRES`.

    Raises:
        InvalidValueError: another number of bits, or the published form is no larger as it is.
    """
    if bits not in WIRES:
        raise InvalidValueError(f"bits is {bits!r}; expected one of {', '.join(map(str, WIRES))}")
    whole = [page.numbers() for page in ledger.pages] or [ledger.coefficients.astype(np.float64)]
    pages = ledger.pages or (Page(ledger.pool, "coefficients", "absolute"),)
    thin = [
        Page(page.pool, page.basis, page.movement, (encode(numbers, WIRES[bits]),) if numbers.any() else ())
        for page, numbers in zip(pages, whole, strict=True)
    ]
    found = Ledger.of_pages(ledger.base, ledger.round, thin, WIRES[bits], None).stamped(ledger.made_with).published()
    before, after = len(ledger.published().encode()), len(found.encode())
    if after >= before:
        raise InvalidValueError(f"with {bits} bits the ledger takes {after:,} bytes, {before:,} as it is; choose fewer bits")
    return found
