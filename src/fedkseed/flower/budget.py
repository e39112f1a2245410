"""What a node's privacy has cost, on its disk: counted before a reply leaves, over all runs that its records have been in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args
from urllib.parse import quote

from fedkseed.errors import PrivacyError
from fedkseed.files import alone, write_atomically
from fedkseed.privacy import Privacy, Unit
from fedkseed.privacy.accountant import History, added, get_epsilon
from fedkseed.text import one_line


class KeptHistory:
    """The releases of one client.

    A file that is gone is an empty history: whoever deletes it promises that its records were in no release, or forgets them.

    Args:
        folder: where it is; made when something is spent first.
        client: whose it is.
    """

    def __init__(self, folder: Path, client: str) -> None:
        self.path = folder / f"privacy-{quote(client, safe='')}.json"

    def load(self) -> tuple[History, Unit | None]:
        """What was released so far, and what each release hid: a record, if some hid no more; None if it is not known.

        Raises:
            PrivacyError: the file cannot be read; it is never taken for an empty one.
        """
        try:
            content = json.loads(self.path.read_bytes())
            # the list alone, of before the unit was kept: what hid a client had all its records each time
            unit, entries = (None, content) if isinstance(content, list) else (content["unit"], content["releases"])
            history = tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in entries)
            if not history or unit not in (None, *get_args(Unit)):
                raise ValueError("it holds no release")
            if not all(0 <= noise < math.inf and 0 < rate <= 1 and steps > 0 for noise, rate, steps in history):
                raise ValueError("an entry is out of its range")
            if unit is None and any(rate < 1 for _, rate, _ in history):
                unit = "record"
        except FileNotFoundError:
            return (), None
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise PrivacyError(
                f"{self.path}: the account of what was released cannot be read ({one_line(error, 80)}); restore it from a copy"
            ) from error
        return history, unit

    def spend(self, privacy: Privacy, sample_rate: float, steps: int) -> float:
        """Count some steps, on the disk when this returns; epsilon afterwards.

        Raises:
            PrivacyError: they would exceed the budget, or the account cannot be read or written; nothing is counted then.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with alone(self.path.parent / ".lock"):
                before, unit = self.load()
                if (unit, privacy.unit) == ("record", "client"):
                    raise PrivacyError(
                        f"{self.path}: what was released hid single records, which says nothing of the client as a whole; keep "
                        "dp = record, or give another state folder to a node whose records were in no release"
                    )
                history = added(before, privacy.noise_multiplier, sample_rate, steps)
                epsilon = get_epsilon(history, privacy.delta)
                if privacy.epsilon is not None and epsilon > privacy.epsilon:
                    raise PrivacyError(
                        f"the privacy budget is spent: epsilon is {get_epsilon(before, privacy.delta):.3f} at delta "
                        f"{privacy.delta:g}, this round would make it {epsilon:.3f}, and the node allows {privacy.epsilon:g}"
                    )
                known = unit if before else privacy.unit
                content = {"unit": "record" if "record" in (known, privacy.unit) else known, "releases": history}
                write_atomically(self.path, json.dumps(content).encode(), private=True)
        except OSError as error:
            raise PrivacyError(
                f"{self.path}: the account of what is released cannot be kept ({error.strerror}); choose another folder: state "
                "in the node-config"
            ) from error
        return epsilon
