"""What became of a round's replies: who counted for how much, who was refused, who sent nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Status = Literal["closed", "repeat", "failed"]
PROJECTED_GRAD_RMS, CHANGE_NORM = "projected_grad_rms", "change_norm"
CLIPPED_SCALARS, COUNTED = "clipped_scalars", "counted"
"""Sizes of a contribution: the root mean square of a client's scalars, the length of its change of K coefficients, how many of
its scalars were bounded, the share of it that went in."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """An accepted reply: whose it is, its weight in the round, what the client reported, its sizes.

    Sizes are how large what it sent is, and what became of it (`fedkseed.federation.aggregators`), by the names above.
    """

    client: str
    weight: float
    num_examples: int
    num_steps: int
    dropped_steps: int
    loss: float | None
    sizes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """A reply that was not used, and why."""

    client: str
    reason: str


@dataclass(frozen=True)
class Summed:
    """What is known of a cohort's vectors where only their sum is (docs/secure-sums.md).

    Attributes:
        weights: p_i of those in it, by client in the order of the names; together 1.
        mean: the weighted mean of their vectors, float64[K].
        loss: the weighted mean of their training losses, None if there is none.
        dropped_steps: how many steps they dropped together.
    """

    weights: Mapping[str, float]
    mean: NDArray[np.float64]
    loss: float | None
    dropped_steps: int


@dataclass(frozen=True)
class Outcome:
    """What became of a round's replies.

    Attributes:
        server_round: the round, counted from 1.
        status: `closed` (the checkpoint has moved on), `repeat` (too few replies: plan again) or `failed` (no attempt is left).
        contributions: the accepted replies, sorted by client.
        refusals: the others that came.
        missing: clients that were asked and sent nothing.
        accepted: the bytes of the accepted replies, by client; laid by, and read when they are asked for.
        summed: the sum of the replies, where none of them is known.
    """

    server_round: int
    status: Status
    contributions: tuple[Contribution, ...]
    refusals: tuple[Refusal, ...]
    missing: tuple[str, ...]
    accepted: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    summed: Summed | None = None

    @property
    def dropped_steps(self) -> int:
        """Steps that the accepted clients dropped."""
        if self.summed is not None:
            return self.summed.dropped_steps
        return sum(contribution.dropped_steps for contribution in self.contributions)
