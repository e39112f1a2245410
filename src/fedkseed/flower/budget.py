"""What a node's privacy has cost, on its disk: counted before a reply leaves, over all runs that its records have been in."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

from fedkseed.errors import PrivacyError
from fedkseed.files import alone, write_atomically
from fedkseed.privacy import Privacy
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

    def load(self) -> History:
        """What was released so far.

        Raises:
            PrivacyError: the file cannot be read; it is never taken for an empty one.
        """
        try:
            entries = json.loads(self.path.read_bytes())
            history = tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in entries)
            if not all(noise >= 0 and 0 < rate <= 1 and steps > 0 for noise, rate, steps in history):
                raise ValueError("an entry is out of its range")
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PrivacyError(
                f"{self.path}: the account of what was released cannot be read ({one_line(error, 80)}); restore it from a copy"
            ) from error
        return history

    def spend(self, privacy: Privacy, sample_rate: float, steps: int) -> float:
        """Count some steps, on the disk when this returns; epsilon afterwards.

        Raises:
            PrivacyError: they would exceed the budget, or the account cannot be read or written; nothing is counted then.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with alone(self.path.parent / ".lock"):
                before = self.load()
                history = added(before, privacy.noise_multiplier, sample_rate, steps)
                epsilon = get_epsilon(history, privacy.delta)
                if privacy.epsilon is not None and epsilon > privacy.epsilon:
                    raise PrivacyError(
                        f"the privacy budget is spent: epsilon is {get_epsilon(before, privacy.delta):.3f} at delta "
                        f"{privacy.delta:g}, this round would make it {epsilon:.3f}, and the node allows {privacy.epsilon:g}"
                    )
                write_atomically(self.path, json.dumps(history).encode(), private=True)
        except OSError as error:
            raise PrivacyError(
                f"{self.path}: the account of what is released cannot be kept ({error.strerror}); choose another folder: state "
                "in the node-config"
            ) from error
        return epsilon
