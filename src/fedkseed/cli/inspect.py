"""`fedkseed inspect`: what a ledger holds."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from fedkseed.cli.console import complain, say_rows
from fedkseed.kseed.distance import moved_rms
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page
from fedkseed.report.reading import Round, read
from fedkseed.report.summary import noted_promise, participation, promise
from fedkseed.runs.checkpoints import TENSORS
from fedkseed.runs.folder import RunFolder, tuned_file
from fedkseed.runs.layout import CONFIG
from fedkseed.runs.metrics import best_round
from fedkseed.text import counted

LEAST = 3
"""Clients of whose replies the least counted, as many as are named."""


def inspect(path: Path, which: str | None = None) -> None:
    """Print a ledger's identity and the distribution of its coefficients, or what a baseline's tensors are.

    Args:
        path: a run's folder, or a ledger's file.
        which: the round whose ledger is shown, or "best"; None for the last.

    Raises:
        FedKSeedError: it cannot be read.
    """
    file = tuned_file(path, which)
    if file.name == TENSORS:
        _inspect_tensors(path, file)
        return
    ledger = Ledger.load(file)
    a = np.abs(ledger.coefficients)
    rows = {
        "file": f"{file}, {file.stat().st_size:,} bytes, {'checkpoint of a run' if ledger.is_checkpoint else 'published'}",
        "digest": ledger.digest(),
        "rounds": f"{ledger.round}",
        "pool": f"K = {ledger.pool.size}, {ledger.pool.family}, key {ledger.pool.key:#018x}",
        "base": f"{ledger.base.fingerprint} ({len(ledger.base.digests)} parameters, {len(ledger.base.frozen)} frozen)",
        "precision": ledger.precision,
        "coefficients": f"{np.count_nonzero(a)} of {a.size} not zero; |a|: mean {a.mean():.3g}, largest {a.max():.3g}",
        "distance": f"{moved_rms(ledger):.3g} per parameter (root of sum a^2)",
    }
    if ledger.pages:
        rows["pages"] = f"{len(ledger.pages)}, the last is shown above; " + "; ".join(_kinds(ledger.pages))
        rows["parts"] = f"{', '.join(str(len(one.parts)) for one in ledger.pages)}, of {ledger.precision}"
        rows["to publish"] = f"{len(ledger.published().encode()):,} bytes"
    if ledger.history is not None:
        counts = ledger.history.grad_counts
        rows["steps"] = f"{counts.sum():,} taken; a seed was used {counts.min()} to {counts.max()} times"
    if (promised := noted_promise(ledger.made_with)) is not None:
        rows["privacy"] = promised
    say_rows(rows | _of_run(path, which))


def _kinds(pages: Sequence[Page]) -> list[str]:
    """What pages hold, those that are alike together."""
    kinds = [
        f"{page.basis} numbers of K = {page.pool.size}, {page.movement}{'' if page.scale == 1 else f', times {page.scale:g}'}"
        for page in pages
    ]
    return [f"{len(list(alike))} of {kind}" for kind, alike in groupby(kinds)]


def _inspect_tensors(path: Path, file: Path) -> None:
    from fedkseed.baselines import TunedTensors  # with torch, which a ledger's numbers do without

    tuned = TunedTensors.load(file)
    count = sum(x.numel() for x in tuned.tensors.values())
    rows = {
        "file": f"{file}, {file.stat().st_size:,} bytes, checkpoint of a run",
        "digest": tuned.digest(),
        "rounds": f"{tuned.round}",
        "algorithm": tuned.algorithm,
        "base": tuned.base,
        "tensors": f"{len(tuned.tensors)} with {count:,} numbers",
    }
    say_rows(rows | _of_run(path))


def _of_run(path: Path, which: str | None = None) -> dict[str, str]:
    """What a run's folder says beside that: which rounds can be taken, and which was the best; what cannot be read."""
    if not (path / CONFIG).exists():
        return {}
    run = RunFolder.open(path)
    found, kept, rows = run.recorded(), run.ledgers.rounds, dict[str, str]()
    record = read(path, which)
    if run.config.facts.has_ledger:
        rows["aggregator"] = f"{run.config.rule.name} ({run.config.rule.about}){_cut(record.rounds)}"
    if (kept_to := promise(record)) is not None:
        rows["privacy"] = f"{kept_to.epsilon}, {kept_to.about}" + (kept_to.budget and f"; {kept_to.budget}")
    if kept:
        rows["kept"] = f"the ledgers of {counted(len(kept), 'round')}, {kept[0]} to {kept[-1]}; --round N shows one"
    if (best := best_round(found.losses)) is not None:
        rows["best round"] = f"{best}, held-out loss {found.losses[best]:.4f}"
    if found.damage:
        complain(f"{found.damage}; it is left out")
    return rows


def _cut(rounds: Sequence[Round]) -> str:
    """What the rule has cut so far, and of whose replies the least went in."""
    clipped = sum(r.clipped_scalars or 0 for r in rounds)
    known = [(p.counted, p.client) for p in participation(rounds) if p.counted is not None]
    told = [f"{clipped:,} scalars clipped"] if clipped else []
    if known:
        told.append("least counted " + ", ".join(f"{name} {100 * share:.0f} %" for share, name in sorted(known)[:LEAST]))
    return "".join(f"; {one}" for one in told)
