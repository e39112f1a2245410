"""Run folders that a test writes as a simulation leaves them, and a page as its reader gets it."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.ledger_format import History
from fedkseed.kseed.server import start
from fedkseed.models.identity import BaseIdentity
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.settings import build

WEIGHT_BYTES = 1_040_128
BASE = BaseIdentity.of({"w": bytes(range(32))})


def make_ledger(config: Any, num_rounds: int, steps: int = 40) -> Ledger:
    ledger = start(config, BASE)
    draw = np.random.default_rng(7)
    k = config.num_seeds
    for _ in range(num_rounds):
        counts = np.bincount(draw.integers(0, k, steps), minlength=k)
        assert ledger.history is not None
        moved = np.where(counts > 0, draw.normal(0, 1e-4, k), 0.0)
        ledger = ledger.advance(
            History(
                ledger.history.accumulators + moved,
                ledger.history.grad_sums + counts * draw.gamma(2.0, 3.0, k),
                ledger.history.grad_counts + counts,
            )
        )
    return ledger


def evaluation(n: int, value: float, **more: Any) -> dict[str, Any]:
    return {
        "event": "evaluation", "server_round": n, "eval_loss": value, "num_examples": 30, "num_tokens": 2312, "seconds": 0.5
    } | more  # fmt: skip


def closed(n: int, **more: Any) -> dict[str, Any]:
    names = [f"client-{(n + i) % 12:02}" for i in range(4)]
    losses = [4.1 - 0.01 * n, 3.8, 4.4, 3.3125]
    return {
        "event": "round",
        "server_round": n,
        "lr": 1e-4,
        "num_replies": 4,
        "num_steps": 20,
        "dropped_steps": 0,
        "projected_grad_rms": 3.5 + n,
        "moved_rms": 0.002 * n,
        "train_loss": sum(losses) / 4,
        "clients": {name: {"weight": 0.25, "loss": value} for name, value in zip(names, losses, strict=True)},
        "refused": {},
        "missing": [],
        "bytes_down": 682.0,
        "bytes_up": 135.5,
        "seconds": 2.0,
        "seconds_by": {"forward": 1.5, "noise": 0.25, "rebuild": 0.05},
    } | more


class Maker:
    """Makes run folders as a simulation leaves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data.jsonl"
        self.data.write_text("{}\n")

    def __call__(
        self, events: list[dict[str, Any]], num_ledger_rounds: int, name: str = "run", steps: int = 40, **settings: Any
    ) -> Path:
        given: dict[str, Any] = {
            "model": "some/model", "data": self.data, "num_clients": 20, "fraction_train": 0.2, "num_rounds": 6,
            "num_seeds": 256, "local_steps": 5, "lr": 1e-4, "algorithm": "fedkseed-pro",
        }  # fmt: skip
        run = RunFolder.create(self.folder / name, build(given | settings))
        for event in events:
            run.append_metrics(event)
        if num_ledger_rounds:
            make_ledger(run.config, num_ledger_rounds, steps).save(run.ledger_path)
        return run.path

    def complete(self, **settings: Any) -> Path:
        events = [evaluation(0, 3.9631, weight_bytes=WEIGHT_BYTES)]
        for n in range(1, 7):
            events += [closed(n), evaluation(n, 3.9631 - 0.0151 * n)]
        return self(events, 6, **settings)


class Outline(HTMLParser):
    """The page's elements, checked for balance; text as a reader gets it."""

    VOID = frozenset({"meta", "br", "img", "path", "use"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
