"""What a node keeps on its disk between messages: the pages that it has seen, since a process may end with each message."""

from __future__ import annotations

from collections.abc import Sequence
from logging import WARNING
from pathlib import Path
from urllib.parse import quote

from fedkseed.errors import LedgerError
from fedkseed.files import alone, write_atomically
from fedkseed.flower.log import log
from fedkseed.kseed.change_messages import ChangeRequest
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page
from fedkseed.models.identity import BaseIdentity


class KeptPages:
    """The pages that one client has seen: for each run a file, which is a published ledger.

    Nothing depends on it. A client whose file is missing, damaged or of another run is sent all pages again.

    Args:
        folder: where the files are; made when the first one is written.
        client: whose they are.
        base: identity of its base weights.
    """

    def __init__(self, folder: Path, client: str, base: BaseIdentity) -> None:
        self.folder, self._client, self._base = folder, client, base

    def path(self, run_id: bytes) -> Path:
        """A run's file."""
        return self.folder / f"{run_id.hex()}-{quote(self._client, safe='')}.safetensors"

    def load(self, run_id: bytes) -> tuple[Page, ...]:
        """The pages of a run; none if there is no file, or it is damaged or of another base model."""
        path = self.path(run_id)
        if not path.exists():
            return ()
        try:
            ledger = Ledger.load(path)
        except LedgerError as error:
            log(WARNING, "%s; all pages will be sent again", error)
            return ()
        return ledger.pages if ledger.base.fingerprint == self._base.fingerprint else ()

    def save(self, request: ChangeRequest, pages: Sequence[Page]) -> None:
        """Keep the pages that a request has led to, readable for this user only; what cannot be written costs a warning."""
        data = Ledger.of_pages(self._base, request.server_round - 1, pages, request.wire, None).published().encode()
        path = self.path(request.run_id)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with alone(self.folder / ".lock"):
                write_atomically(path, data, private=True)
        except OSError as error:
            log(
                WARNING, "%s: pages cannot be kept (%s), all are sent again each round; choose another folder: state in the "
                "node-config", self.folder, error.strerror,
            )  # fmt: skip
