"""What replies of scalars say of K numbers, one reply at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.exact_sum import ExactSum, Sum
from fedkseed.federation.parts import Lengths, row_length
from fedkseed.federation.streams import Taken
from fedkseed.kseed.messages import TrainReply, TrainRequest
from fedkseed.kseed.scale import word

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Scalars:
    """Those of one reply: `places` int64[n], the seeds; `sent` and `values` float64[n], as they came and as they count.

    `kept`, bool[n], says which are not of dropped steps.
    """

    places: I64
    sent: F64
    values: F64
    kept: NDArray[np.bool_]

    def vector(self, size: int) -> F64:
        """Their sum at each seed, float64[K]."""
        total = np.zeros(size)
        np.add.at(total, self.places, self.values)
        return total


class ScalarsPart:
    """Accepted replies; see `Part`.

    Args:
        requests: what they answer, by client.
        replies: by client, in the order of the names.
        size: K.
        importance_clip: see the setting.
        follows: whether a scale of scalars is followed.
    """

    ROWS = 7

    def __init__(
        self,
        requests: Mapping[str, TrainRequest],
        replies: Mapping[str, TrainReply],
        size: int,
        importance_clip: float,
        follows: bool,
    ) -> None:
        self._requests, self._replies, self._size = requests, replies, size
        self._importance_clip, self._follows = importance_clip, follows
        self._rows = Taken(list(replies))

    def each(self, limit: float = np.inf) -> Iterator[Scalars]:
        """The replies' scalars, those beyond the limit cut to it."""
        for name in self._replies:
            places, numbers, kept = self._row(name)
            sent = numbers.astype(np.float64)
            yield Scalars(places.astype(np.int64), sent, np.clip(sent, -limit, limit), kept)

    def _row(self, name: str) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.bool_]]:
        """A reply's seeds and scalars, and which are not of dropped steps; laid by when first read."""
        if name not in self._rows:
            request, reply = self._requests[name], self._replies[name]
            sent = reply.projected_grads.unpack()
            places = np.array(request.indices[: len(sent)], np.uint16)
            self._rows.add(name, places.tobytes() + sent.tobytes() + kept_scalars(request, reply).tobytes())
        data = self._rows[name]
        n = len(data) // 7
        return (
            np.frombuffer(data, np.uint16, n),
            np.frombuffer(data[2 * n : 6 * n], np.float32),
            np.frombuffer(data, bool, n, 6 * n),
        )

    def words(self) -> F64:
        """See `Part`."""
        return np.array([word(one.sent) for one in self.each()]) if self._follows else np.zeros(0)

    def used(self) -> I64:
        """The seeds that any reply has a scalar of, ascending."""
        used = np.zeros(self._size, bool)
        for one in self.each():
            used[one.places] = True
        return np.flatnonzero(used)

    def lengths(self, limit: float, places: I64 | None = None) -> Lengths:
        """See `Part`; lengths over some places only give other bits."""
        lengths, clipped = [], []
        for one in self.each(limit):
            vector = one.vector(self._size)
            lengths.append(row_length(vector if places is None else vector[places]))
            clipped.append(np.count_nonzero(one.sent != one.values))
        return Lengths(np.array(lengths), np.array(clipped, np.int64))

    def add(self, limit: float, weights: F64, total: Sum, importances: Sum, counts: I64) -> None:
        """Add to the gradients' weighted sum, and to the sum of their magnitudes and their numbers at each seed."""
        for one, weight in zip(self.each(limit), weights, strict=True):
            total.add(weight * one.vector(self._size))
            self.remember(one, importances, counts)

    def remember(self, one: Scalars, importances: Sum, counts: I64) -> None:
        """Add a reply's magnitudes, each as if it were no larger than the setting has it, and their numbers."""
        places = one.places[one.kept]
        importances.add_at(places, np.minimum(np.abs(one.values[one.kept]), self._importance_clip))
        np.add.at(counts, places, 1)

    def rows(self, limit: float, weights: F64) -> I64:
        """See `Part`: three of the gradients' sum, three of their magnitudes', one of their numbers."""
        total, importances, counts = ExactSum.zeros(self._size), ExactSum.zeros(self._size), np.zeros(self._size, np.int64)
        self.add(limit, weights, total, importances, counts)
        return np.vstack([total.limbs, importances.limbs, counts])


def kept_scalars(request: TrainRequest, reply: TrainReply) -> NDArray[np.bool_]:
    """Which of a reply's scalars are not of dropped steps."""
    kept = np.ones((reply.num_scalars // request.directions, request.directions), bool)
    kept[list(reply.dropped)] = False
    return kept.reshape(-1)
