"""`fedkseed audit`: whether a run's log leads to its ledger, and where the same replies lead without one client."""

from __future__ import annotations

from pathlib import Path

from fedkseed.cli.console import say, say_rows
from fedkseed.cli.outputs import make_folder_for, require_new, require_place
from fedkseed.errors import ConfigError
from fedkseed.kseed.distance import moved_rms, relative_distance
from fedkseed.kseed.ledger import LEDGER, Ledger
from fedkseed.runs.audit import Audit
from fedkseed.runs.audit import audit as replay
from fedkseed.runs.layout import AUDIT
from fedkseed.text import counted


def audit(run: Path, without: str | None, to: Path | None) -> None:
    """Print what the replay of a run's log finds.

    Args:
        run: the run's folder.
        without: a client whose replies are left out beside that.
        to: where the ledger without them goes, in its published form.

    Raises:
        ConfigError: a file is named, and no client.
        RunFolderError: there is no log, the client never replied, or the file exists.
        FedKSeedError: the file cannot be written, an entry of the log does not fit, or it does not lead to the run's ledger.
    """
    if to is not None and without is None:
        raise ConfigError(f"--to is {str(to)!r} and there is nothing to write; give --without CLIENT too, or leave it out")
    if to is not None:
        require_new(to)
        require_place(to)
    found = replay(run, without)
    replies = sum(found.rounds.values())
    rounds = f"rounds {found.begin + 1} to {found.ledger.round}" if found.ledger.round > found.begin else "no round done"
    say(
        f"{run / AUDIT}: {counted(found.entries, 'entry', 'entries')}, {rounds}, {counted(replies, 'reply', 'replies')} of "
        f"{counted(len(found.rounds), 'client')}, {found.refused} refused"
    )
    say_rows([("head", found.head), ("ledger", found.ledger.digest()), *(("note", note) for note in found.notes)])
    say(f"every entry fits, and they lead to {run / LEDGER}")
    if without is not None and found.without is not None:
        _show_without(found, without, found.without, to)


def _show_without(found: Audit, client: str, ledger: Ledger, to: Path | None) -> None:
    say()
    apart = relative_distance(found.ledger, ledger)
    say(f"without {client!r}: in {counted(found.rounds[client], 'round')} the others' weights are shared anew")
    say(
        f"the two models lie {apart * moved_rms(found.ledger):.3g} apart per weight (root mean square), {100 * apart:.3g} % "
        "of how far the run's lies from the base"
    )
    say(
        "these are the same replies, not another training: what the others answered after its first round was measured on a "
        "model that it had a part in"
    )
    if to is not None:
        make_folder_for(to)
        ledger.published().save(to)
        say(f"{to}: {to.stat().st_size:,} bytes, {counted(ledger.round, 'round')}, digest {ledger.published().digest()}")
