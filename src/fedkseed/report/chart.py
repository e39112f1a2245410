"""A picture with its words, and what axes are called."""

from __future__ import annotations

from dataclasses import dataclass

from fedkseed.report.picture import Draw

LOSS, BYTES, TIME = "held-out loss (nats per token)", "bytes moved, all clients, both ways", "time of the rounds"
REWARD = "reward"
GRADIENT, CHANGE, MOVED = "projected gradients (rms)", "length of a change", "move of a weight (rms)"
"""What axes are called, in this report and in one of several runs."""


@dataclass(frozen=True)
class Chart:
    """A picture to be drawn.

    Attributes:
        name: of the PNG, and in the page's anchors.
        title: what is shown.
        alt: what is seen, for who does not see it.
        caption: what to look for, in a sentence.
        draw: None if there is nothing to draw yet; the caption then says why.
    """

    name: str
    title: str
    alt: str
    caption: str
    draw: Draw | None


def absent(name: str, title: str, why: str) -> Chart:
    """A chart of which there is nothing to draw yet."""
    return Chart(name, title, "", why, None)
