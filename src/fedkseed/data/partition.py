"""Who holds which examples: pure functions over counts or categories, with the generator as an argument.

Every partition is a list with one sorted int64 array of positions per client; each position is in exactly one.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import DataError, InvalidValueError

Indices = NDArray[np.int64]
MAX_DRAWS = 1000


def iid(num_examples: int, num_clients: int, rng: np.random.Generator) -> list[Indices]:
    """Deal the examples out evenly at random: sizes differ by at most 1.

    Raises:
        InvalidValueError: num_clients below 1.
        DataError: fewer examples than clients.
    """
    _check_enough(num_examples, num_clients, 1)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_examples), num_clients)]


def dirichlet(
    categories: Sequence[str], num_clients: int, alpha: float, rng: np.random.Generator, min_partition_size: int = 1
) -> list[Indices]:
    """Give the clients unlike mixtures: each category is shared out by proportions drawn from Dirichlet(alpha).

    Small alpha: few clients hold most of a category; large alpha: like `iid`. All proportions are drawn anew, at most
    MAX_DRAWS times, until every client has enough; so the sizes are Dirichlet's, given that. (Hsu et al., 2019,
    arXiv:1909.06335, draw over clients' mixtures; this is the common form that draws over each category's clients.)

    Args:
        categories: each example's category.
        num_clients: at least 1.
        alpha: > 0.
        rng: draws the proportions, then who gets which example of a category.
        min_partition_size: examples that each client must get; at least 0.

    Raises:
        InvalidValueError: an argument out of its range.
        DataError: too few examples, or alpha so small that no draw gave every client enough.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise InvalidValueError(f"alpha is {alpha}; expected a number > 0, such as 0.5")
    if min_partition_size < 0:
        raise InvalidValueError(f"min_partition_size is {min_partition_size}; expected at least 0")
    _check_enough(len(categories), num_clients, min_partition_size)
    _, category = np.unique(np.asarray(categories, dtype=np.str_), return_inverse=True)
    sizes = np.bincount(category)
    cuts = _draw_cuts(sizes, num_clients, alpha, rng, min_partition_size)
    parts: list[list[Indices]] = [[] for _ in range(num_clients)]
    for c in range(len(sizes)):
        pieces = np.split(rng.permutation(np.flatnonzero(category == c)), cuts[c])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def split_off(num_examples: int, fraction: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Hold a random share out: (the rest, the held-out positions), both sorted, at least one position in each.

    Args:
        num_examples: at least 2.
        fraction: of the examples to hold out, in (0, 1); rounded to the nearest count.
        rng: draws which.

    Raises:
        InvalidValueError: fraction outside (0, 1).
        DataError: fewer than 2 examples.
    """
    if not 0 < fraction < 1:
        raise InvalidValueError(f"the held-out fraction is {fraction}; expected a number between 0 and 1, such as 0.05")
    if num_examples < 2:
        raise DataError(f"{num_examples} examples cannot be split in two; give at least 2, or evaluation data of its own")
    num_held_out = min(max(round(num_examples * fraction), 1), num_examples - 1)
    order = rng.permutation(num_examples)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def _draw_cuts(
    sizes: NDArray[np.int64], num_clients: int, alpha: float, rng: np.random.Generator, min_partition_size: int
) -> Indices:
    """int64[categories, num_clients - 1]: where each category is cut so that every client gets enough in all."""
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(sizes))
        if not np.allclose(shares.sum(axis=1), 1):
            raise InvalidValueError(f"alpha is {alpha}, beyond what can be drawn from; expected a number such as 0.5")
        cuts = np.rint(np.minimum(np.cumsum(shares, axis=1)[:, :-1], 1) * sizes[:, None])
        edges = np.pad(cuts.astype(np.int64), ((0, 0), (1, 0)))
        counts = np.diff(edges, axis=1, append=sizes[:, None])
        if counts.sum(axis=0).min() >= min_partition_size:
            return edges[:, 1:]
    raise DataError(
        f"in {MAX_DRAWS} draws with alpha {alpha}, {num_clients} clients never all got {min_partition_size} of the "
        f"{sizes.sum()} examples in {len(sizes)} categories; raise --alpha or lower --num-clients or --min-partition-size"
    )


def _check_enough(num_examples: int, num_clients: int, min_partition_size: int) -> None:
    if num_clients < 1:
        raise InvalidValueError(f"num_clients is {num_clients}; expected at least 1")
    if num_examples < num_clients * max(min_partition_size, 0) or num_examples < 1:
        raise DataError(
            f"{num_examples} examples are too few for {num_clients} clients with at least {min_partition_size} each; "
            "lower --num-clients or give more data"
        )
