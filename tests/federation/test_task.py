"""Which records a client's steps are about."""

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from fedkseed.federation.task import batches


def first(iterator: Iterable[NDArray[np.int64]], count: int) -> list[list[int]]:
    return [batch.tolist() for batch, _ in zip(iterator, range(count), strict=False)]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(7, 3), (6, 3), (5, 1), (3, 8), (1, 1)])
def test_every_pass_over_the_records_has_each_once(num_examples: int, batch_size: int) -> None:
    passes = -(-num_examples // batch_size)
    found = first(batches(num_examples, batch_size, np.random.default_rng(1)), 3 * passes)
    orders = []
    for i in range(3):
        part = found[i * passes : (i + 1) * passes]
        assert all(len(batch) <= batch_size for batch in part)
        orders.append([record for batch in part for record in batch])
        assert sorted(orders[-1]) == list(range(num_examples))
    if num_examples > 4:
        assert orders[0] != orders[1] != orders[2]
