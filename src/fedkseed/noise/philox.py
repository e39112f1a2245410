"""Philox4x32-10 and tensor ids in NumPy: the integers that all noise is made of (docs/noise.md, "Terms")."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[ArrayLike, ArrayLike]) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al., SC'11), element by element over broadcast counters and keys.

    Args:
        counter: four words, each an integer or an array of integers in [0, 2^32).
        key: two words, likewise.

    Returns:
        uint32[4, ...]: the words r0 .. r3, in the broadcast shape of the arguments.
    """
    mask, shift = np.uint64(MASK32), np.uint64(32)
    c0, c1, c2, c3, k0, k1 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in (*counter, *key)))
    for _ in range(ROUNDS):
        p0, p1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & mask, (p0 >> shift) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + np.uint64(WEYL[0])) & mask, (k1 + np.uint64(WEYL[1])) & mask
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


@lru_cache(maxsize=1 << 16)
def tensor_id(name: str) -> int:
    """The 64-bit id of a tensor: BLAKE2b of its UTF-8 name, 8 bytes, little-endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def halves(x: int) -> tuple[int, int]:
    """(lo, hi): the two 32-bit halves of a 64-bit integer."""
    return x & MASK32, x >> 32
