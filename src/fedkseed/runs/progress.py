"""A progress bar over the rounds, in a terminal or a notebook."""

from __future__ import annotations

from typing import Any

from fedkseed.runs.observer import Nobody, Probe
from fedkseed.text import visible


class Progress(Nobody):
    """An observer for Python and notebooks: one bar over the rounds, with the last losses; notes below it.

    The bar is tqdm's, which chooses the form that a terminal or a notebook can show.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._losses: dict[str, str] = {}

    def note(self, text: str) -> None:
        """See `Observer`."""
        from tqdm.auto import tqdm

        tqdm.write(visible(text))

    def probe(self, probe: Probe) -> None:
        """See `Observer`."""
        self._show(f"{visible(probe.client)}, step {probe.step + 1} of {probe.steps}")

    def event(self, event: dict[str, Any]) -> None:
        """See `Observer`."""
        if event["event"] == "evaluation":
            self._losses["held-out"] = f"{event['eval_loss']:.4f}"
        elif event["train_loss"] is not None:
            self._losses["training"] = f"{event['train_loss']:.4f}"
        self._show(f"round {event['server_round']}")
        if event["event"] == "round":
            self._bar.update(1)

    def _show(self, text: str) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(unit="round", leave=True)
        self._bar.set_description_str(text, refresh=False)
        self._bar.set_postfix(self._losses)
