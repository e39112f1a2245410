"""What replies of changes say of K numbers, one reply at a time, and what they amount to together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.aggregators import AGGREGATORS, Aggregator, clip_shares
from fedkseed.federation.config import Summation
from fedkseed.federation.exact_sum import LIMBS, ExactSum, OrderedSum, Sum
from fedkseed.federation.parts import Lengths, row_length
from fedkseed.kseed.change_messages import CHANGE, ChangeReply, ChangeRequest, seeds_of
from fedkseed.kseed.pages import Basis, gradient_to_basis

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class ChangesPart:
    """Accepted replies; see `Part`. Those of scalars among them are passed over.

    Args:
        replies: by client, in the order of the names.
        size: K.
    """

    ROWS = LIMBS

    def __init__(self, replies: Mapping[str, ChangeReply], size: int) -> None:
        self._replies, self._size = replies, size

    def each(self) -> Iterator[F64]:
        """The changes, float64[K]."""
        return (reply.numbers.decode(self._size) for reply in self._replies.values() if reply.kind == CHANGE)

    def words(self) -> F64:
        """See `Part`."""
        return np.zeros(0)

    def lengths(self, limit: float) -> Lengths:
        """See `Part`."""
        lengths = np.array([row_length(vector) for vector in self.each()])
        return Lengths(lengths, np.zeros(len(lengths), np.int64))

    def add(self, weights: F64, total: Sum) -> None:
        """Add to the weighted sum of the changes."""
        for vector, weight in zip(self.each(), weights, strict=True):
            total.add(weight * vector)

    def rows(self, limit: float, weights: F64) -> I64:
        """See `Part`."""
        total = ExactSum.zeros(self._size)
        self.add(weights, total)
        return total.limbs


def combined(
    requests: Mapping[str, ChangeRequest],
    replies: Mapping[str, ChangeReply],
    weights: Mapping[str, float],
    basis: Basis,
    rule: Aggregator = AGGREGATORS["mean"],
    summation: Summation = "ordered",
) -> tuple[F64, dict[str, float]]:
    """The change that a round's replies amount to, float64[K], and the share of each reply that went in.

    A gradient client's change of n steps averages n gradients. A two-point step along one of K seeds, times K, has a
    gradient's expectation and about K times its variance, so it is worth 1/K of a gradient step; scalars of m steps are
    m / (K n) of a change. The best linear unbiased mean weighs by these (docs/gradients.md). Scalars alone are not blown up
    to a whole step: they move the numbers by `-lr sum_t g_t` at their seeds, as FedKSeed does.

    The rule makes one of the changes. Scalars, of other seeds at each client, are added up whatever it is; unless that is the
    mean, no client's bring in more than the median of all replies, with scalars taken to be sqrt(K) times as long as they are,
    since a two-point step goes as far as 1 / sqrt(K) of a gradient step.

    Args:
        requests: by client.
        replies: by client, in the order of their names.
        weights: the clients' shares p_i, by their numbers of examples.
        basis: which numbers these are.
        rule: how changes become one.
        summation: see the setting.
    """
    size = next(iter(requests.values())).size
    part = ChangesPart(replies, size)
    moves = {
        name: -requests[name].lr * reply.numbers.decode(reply.steps) for name, reply in replies.items() if reply.kind != CHANGE
    }
    dropped = {name: replies[name].num_dropped for name in moves}
    changed = [name for name in replies if name not in moves]
    counted, change, amount = dict.fromkeys(replies, 1.0), np.zeros(size), 0.0
    if changed:
        own = np.array([weights[name] for name in changed])
        if rule.weigh is None:
            change, shares = rule.combine(np.array([*part.each()]), own)
        else:
            kept, shares = rule.weigh(own, part.lengths(np.inf).lengths if rule.needs_each_reply else own)
            change = added(summation, size, lambda total: part.add(kept, total))
        counted |= dict(zip(changed, shares.tolist(), strict=True))
    for name in changed:
        amount += weights[name]
    if not moves:
        return change, counted
    if rule.needs_each_reply:
        longer = 1.0 if basis == "table" else np.sqrt(size)
        lengths = [weights[name] * np.linalg.norm(vector) for name, vector in zip(changed, part.each(), strict=True)]
        lengths += [weights[name] * longer * np.linalg.norm(one) for name, one in moves.items()]
        counted |= dict(zip(moves, clip_shares(np.array(lengths))[len(changed) :].tolist(), strict=True))

    def add_moves(total: Sum) -> None:
        for name, one in moves.items():
            total.add_at(np.array(seeds_of(requests[name])), weights[name] * one * counted[name])

    small = 0.0
    for name, one in moves.items():
        small += weights[name] * (len(one) - dropped[name]) / (size * requests[name].steps)
    turned = gradient_to_basis(added(summation, size, add_moves), basis)
    return (change + turned) / (amount + small) if changed else turned, counted


def added(summation: Summation, size: int, add: Callable[[Sum], None]) -> F64:
    """What somebody adds to K sums, float64[K]."""
    total = OrderedSum(np.zeros(size)) if summation == "ordered" else ExactSum.zeros(size)
    add(total)
    return total.value
