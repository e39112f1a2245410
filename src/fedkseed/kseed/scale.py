"""How large honest scalars are: a running median of magnitudes over clients and rounds, which bounds each scalar.

A client's word is the median magnitude of its scalars in a round; the scale is the median of the last words. So neither a
few large scalars nor less than half of the words can lead it far from what the others measure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
WORDS = 64
"""So many words are remembered."""
FACTOR = 10.0
"""No scalar counts for more than this many times the scale."""


def word(scalars: F64) -> float:
    """A client's word: the median magnitude of its scalars that are not 0; 0, which is none, where all are."""
    magnitudes = np.abs(scalars)[scalars != 0]
    return float(np.median(magnitudes)) if magnitudes.size else 0.0


def followed(words: F64, new: F64) -> F64:
    """The words after a round, the newest last.

    Args:
        words: those before it, at most `WORDS`.
        new: those of its clients, in the order of their names; 0 of one that has none.
    """
    said = new[new > 0]
    return np.concatenate([words, said])[-max(WORDS, len(said)) :]


def largest(words: F64) -> float:
    """The largest magnitude that counts; without a word there is none."""
    return FACTOR * float(np.median(words)) if words.size else np.inf
