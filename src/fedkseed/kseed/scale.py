"""How large honest scalars are: a running median of magnitudes over clients and rounds, which bounds each scalar.

A client's word is the median magnitude of its scalars in a round; the scale is the median of the last words. So neither a
few large scalars nor less than half of the words can lead it far from what the others measure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
WORDS = 64
"""So many words are remembered."""
FACTOR = 10.0
"""No scalar counts for more than this many times the scale."""


def followed(words: F64, scalars: Sequence[F64]) -> F64:
    """The words after a round, the newest last.

    Args:
        words: those before it, at most `WORDS`.
        scalars: of each client those of its steps that count; a client whose scalars are all 0 has no word.
    """
    new = [np.median(magnitudes) for one in scalars if (magnitudes := np.abs(one)[one != 0]).size]
    return np.concatenate([words, new])[-max(WORDS, len(new)) :]


def largest(words: F64) -> float:
    """The largest magnitude that counts; without a word there is none."""
    return FACTOR * float(np.median(words)) if words.size else np.inf
