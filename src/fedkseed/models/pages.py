"""The closed pages of a bound model: what its open page starts from (docs/noise.md, "Pages")."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedkseed.models.base import Base, MemoryBase
from fedkseed.models.closed_page import ClosedPage, Movement
from fedkseed.models.parameters import NamedParameter, fit_again
from fedkseed.models.sweeps import Backends, Tensors, from_base, scaled
from fedkseed.noise import Mixture
from fedkseed.noise.pool import SeedPool


class ClosedPages:
    """What an open page starts from, made anew or gone on from where more pages are closed.

    The sum of base and closed pages is kept in float32 where that takes at most half of the available memory. Else every sweep
    adds all pages in its one pass. Where it cannot (pages that move in proportion, or of two families), or that costs a pass
    for every seed (gaussian noise), the sum is kept all the same.

    Args:
        backends: see `backends_for`.
        tunable: the parameters.
        base: their base weights.

    Attributes:
        start: what sweeps start from: the base weights, or the sum.
        mixtures: closed pages that are not in it, to be added in each sweep.
    """

    def __init__(self, backends: Backends, tunable: Sequence[NamedParameter], base: Base) -> None:
        self._backends, self._tunable, self._base = backends, tunable, base
        self._closed: list[ClosedPage] | None = []
        self._sum: dict[str, torch.Tensor] | None = None
        self.start, self.mixtures = base, tuple[Mixture, ...]()

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self._closed or ())

    def close(self, closed: Sequence[ClosedPage], pool: SeedPool, movement: Movement) -> bool:
        """Have these pages before an open one of that pool and movement; whether `start` or `mixtures` are others now."""
        cheap = movement == "absolute" and not pool.facts.pass_per_seed
        together = cheap and all(_kind(page) == (movement, pool.family) for page in closed)
        if list(closed) == self._closed and (together or not self.mixtures):
            return False
        known, total = self._closed or [], self._sum
        if total is None or known != list(closed[: len(known)]):
            known, total = [], None
        self._closed, self._sum, self.start, self.mixtures = None, None, self._base, ()  # what an interruption leaves
        if total is None and together and not fit_again(self._tunable, torch.float32):
            self.mixtures = tuple(page.mixture() for page in closed)
        elif closed:
            base = self._base if total is None else MemoryBase(total)
            total = total or {e.name: torch.empty_like(e.parameter, dtype=torch.float32) for e in self._tunable}
            add_pages(self._backends, base, total, closed[len(known) :])
            self._sum, self.start = total, MemoryBase(total)
        self._closed = list(closed)
        return True


def add_pages(backends: Backends, base: Base, outputs: Tensors, pages: Sequence[ClosedPage]) -> None:
    """`outputs <- base + pages`, in float32 or of one run of pages in any precision: each run of them is one pass."""
    for run in runs_of(pages):
        turn = from_base if run[0].movement == "absolute" else scaled
        turn(backends, base, outputs)(*(page.mixture() for page in run))
        base = MemoryBase(outputs)


def runs_of(pages: Sequence[ClosedPage]) -> list[list[ClosedPage]]:
    """Pages in their order, those together that one sweep can add."""
    runs: list[list[ClosedPage]] = []
    for page in pages:
        if runs and page.movement == "absolute" and _kind(runs[-1][-1]) == _kind(page):
            runs[-1].append(page)
        else:
            runs.append([page])
    return runs


def _kind(page: ClosedPage) -> tuple[str, str]:
    return page.movement, page.pool.family
