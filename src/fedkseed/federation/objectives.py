"""What a run can be tuned on: one row says all that the rest of the project must know of an objective.

What is scored, and by which code, is found where the records are (`fedkseed.runs.objectives`): no message names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["none", "z-scores", "ranks"]
"""What becomes of the scores of a step's probes before slopes are made of them; see `fedkseed.kseed.population`."""
SCALINGS: tuple[Scaling, ...] = ("none", "z-scores", "ranks")
OWN = "own"
"""The objective of a run on Flower whose nodes each name a function of their own."""
CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_<][\w.<>]*")
"""PACKAGE:FUNCTION, or what Python calls a function that it was given."""


@dataclass(frozen=True)
class Objective:
    """What is known of an objective.

    Attributes:
        name: what settings call it.
        about: a few words for the help.
        smooth: whether it has a gradient; if not, its slopes are taken by antithetic pairs and scaled.
        answers: whether the model answers, and the answers are scored.
        pairs: whether it is of records with a better and a worse response.
    """

    name: str
    about: str
    smooth: bool = False
    answers: bool = False
    pairs: bool = False

    @property
    def bounded_below(self) -> bool:
        """Whether its loss is that of tokens, so that no client can tell one below 0 or far above that of a guess."""
        return self.smooth and not self.pairs

    @property
    def has_reward(self) -> bool:
        """Whether evaluations measure a score beside the loss."""
        return self.answers or self.pairs

    @property
    def is_share(self) -> bool:
        """Whether that score is from 0 to 1, as all of ours are; a function's may be anything."""
        return self.has_reward and self.name in OBJECTIVES


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("loss", "of the response's tokens", smooth=True),
        Objective("exact-match", "share of answers that are the response", answers=True),
        Objective("rouge-l", "of answers and response", answers=True),
        Objective("dpo", "how much better it finds the better of two responses", smooth=True, pairs=True),
        Objective("dpo-sign", "how often it finds the better one better", pairs=True),
    )
}
"""Those that have a name of their own."""


def objective_named(name: str) -> Objective:
    """The facts of an objective; what is no name of ours is a function of answers."""
    return OBJECTIVES.get(name) or Objective(name, "a function of record and answer", answers=True)
