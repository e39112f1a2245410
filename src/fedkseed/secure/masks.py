"""The masks of a client's vector: one of its own, and one in common with each other client, which cancel in the sum."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fedkseed.secure.messages import Roster
from fedkseed.secure.primitives import KeyPair, derived, keystream

U32 = NDArray[np.uint32]


def own_mask(seed: bytes, count: int) -> U32:
    """A client's own mask, uint32[count], of the seed that is given up if the client stays."""
    return keystream(derived(seed, b"own mask"), count)


def common_masks(keys: KeyPair, position: int, others: Collection[int], roster: Roster, about: bytes, count: int) -> U32:
    """The sum of a client's masks with some others, uint32[count]: of each two the first adds and the second subtracts theirs.

    Args:
        keys: the client's mask key.
        position: the client's place in the roster.
        others: the others' places.
        roster: with the others' keys.
        about: the roster's digest, which makes the masks those of one attempt.
        count: how many numbers.

    Raises:
        ProtocolError: a key of the roster is none.
    """
    total = np.zeros(count, np.uint32)
    for other in others:
        mask = keystream(keys.agree(roster.mask_keys[other], b"mask " + about), count)
        total = total + mask if position < other else total - mask
    return total
