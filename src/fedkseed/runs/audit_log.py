"""The log of a run that an auditor can replay: one line of JSON for each entry, with the digest of the one before.

`fedkseed.runs.audit` reads it; docs/security.md says what it shows, and to whom. An entry is a session, which says where a
server began, or an attempt at a round, with what was asked and what came. A round of sums, whose single replies nobody sees,
will be an entry of a kind of its own, in `KINDS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field

from fedkseed import __version__
from fedkseed.errors import RunError
from fedkseed.federation import FederationConfig, Outcome, Rounds
from fedkseed.federation.envelope import Request
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.layout import AUDIT

BEFORE_THE_FIRST = "0" * 64
"""In the first entry, in place of the digest of the one before."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """What every entry begins with.

    Attributes:
        entry: its number, from 0.
        before: SHA-256 of the line before, without its end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_bytes="base64", val_json_bytes="base64")

    entry: int
    before: Digest


class Roster(BaseModel):
    """The arguments of `Rounds.admit`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    clients: list[str]
    num_examples: dict[str, int]
    forward_only: list[str] | None


class Session(Entry):
    """A server begins, or goes on from a checkpoint.

    Attributes:
        format: of the log.
        version: of fedkseed.
        run_id: as in all messages.
        base: fingerprint of the base model.
        settings: those that the server goes by.
        guess_loss: see `Rounds`.
        server_round: how many rounds are done.
        ledger: digest of the ledger that it begins with.
        checkpoint: that ledger, as its file, compressed by zlib; only in the first entry, since others lead to it.
    """

    kind: Literal["session"] = "session"
    format: Literal[1] = 1
    version: str
    run_id: bytes
    base: Digest
    settings: dict[str, Any]
    guess_loss: float | None
    server_round: int
    ledger: Digest
    checkpoint: bytes | None


class Refused(BaseModel):
    """A reply that was not used: whose, why, and SHA-256 of its bytes, if it came to bytes at all."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    client: str
    reason: str
    sha256: Digest | None


class Attempt(Entry):
    """An attempt at a round.

    Attributes:
        server_round, attempt, status: see `Outcome`.
        roster: who might be asked, in a session's first attempt and where it has changed.
        request: the bytes of the request to the first client.
        own: those of each client, as far as they differ from these; see `own_fields`.
        again: who lacked what the request builds on, and was sent the whole.
        replies: the bytes of the accepted replies.
        refused: the others that came.
        missing: who sent nothing.
        ledger: digest of the ledger that these replies led to; None where the round is to be repeated.
    """

    kind: Literal["round"] = "round"
    server_round: int
    attempt: int
    status: Literal["closed", "repeat", "failed"]
    roster: Roster | None
    request: bytes
    own: dict[str, bytes]
    again: list[str]
    replies: dict[str, bytes]
    refused: list[Refused]
    missing: list[str]
    ledger: Digest | None


KINDS: dict[str, type[Session] | type[Attempt]] = {"session": Session, "round": Attempt}


def own_fields(first: bytes, message: bytes) -> bytes:
    """What a message of the same kind has of its own, as msgpack: its number of fields, then each other place and its value.

    Both are packed in the one way that `pack_fields` has, so that the message's bytes follow from this and the first's.
    """
    theirs, fields = (msgpack.unpackb(data, raw=False) for data in (first, message))
    others = [[i, value] for i, value in enumerate(fields) if i >= len(theirs) or value != theirs[i]]
    packed: bytes = msgpack.packb([len(fields), others], use_bin_type=True)
    return packed


def asked(requests: Iterable[tuple[Request, bytes]]) -> dict[str, Any]:
    """The requests of a round as an attempt has them: what they have in common once."""
    first, own = b"", {}
    for request, data in requests:
        first = first or data
        own[request.client] = own_fields(first, data)
    return {"request": first, "own": own}


def line_digest(line: bytes) -> str:
    """SHA-256 (hex) of an entry's line, without its end."""
    return hashlib.sha256(line).hexdigest()


class AuditLog:
    """The log of a run, as its driver writes it; each entry is on the disk before the checkpoint that it leads to.

    Args:
        folder: the run's.
        server: the rounds; nothing is planned yet.

    Raises:
        RunError: the log cannot be read or written; the checkpoint is safe.
    """

    def __init__(self, folder: Path, server: Rounds[Any, Any]) -> None:
        self._path, self._server = folder / AUDIT, server
        self._number, self._before = 0, BEFORE_THE_FIRST
        self._session: dict[str, Any] | None = None
        self._roster: dict[str, Any] | None = None
        self._sent: list[tuple[Request, bytes]] = []
        self._again: list[str] = []

    def cut(self) -> str | None:
        """Forget what a killed run wrote after its last checkpoint: a round that is not in it, or half a line.

        Returns:
            What is wrong with the rest, in which nothing is changed; None if nothing is.
        """
        server_round, last, wrong, end = self._server.checkpoint.round, 0, None, 0
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
            for line in lines:
                try:
                    entry = json.loads(line)
                    closed = entry["server_round"] if entry.get("status") == "closed" else last
                    last = closed if type(closed) is int else last
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    wrong = wrong or f"entry {self._number} cannot be read"
                if last > server_round:
                    break
                end, self._number, self._before = end + len(line) + 1, self._number + 1, line_digest(line)
            if self._path.exists():
                with self._path.open("r+b") as file:
                    file.truncate(end)
                    os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error
        if wrong is None and last < server_round:
            wrong = f"rounds {last + 1} to {server_round} are not in it"
        return wrong and f"{self._path}: {wrong}; the run goes on from its checkpoint, and fedkseed audit will say so too"

    def planned(self) -> None:
        """Requests are about to be sent."""
        if self._roster is None:
            self._session = _session(self._server, self._number == 0)
        self._sent, self._again = [], []

    def sent(self, request: Request, data: bytes) -> None:
        """A planned request, and its bytes."""
        self._sent.append((request, data))

    def repeated(self, client: str) -> None:
        """A client was sent the whole request."""
        self._again.append(client)

    def absorbed(self, outcome: Outcome, replies: Sequence[tuple[str, bytes]], others: Mapping[str, str]) -> None:
        """Write down what came of them; on the disk when this returns.

        Args:
            outcome: the server's.
            replies: all (sender, bytes), as the server got them.
            others: why what came from others is not even bytes, by sender.
        """
        roster = self._server.roster()
        closed = outcome.status == "closed"
        entry = {
            "server_round": outcome.server_round,
            "attempt": self._sent[0][0].attempt,
            "status": outcome.status,
            "roster": None if roster == self._roster else roster,
            **asked(self._sent),
            "again": self._again,
            "replies": dict(outcome.accepted),
            "refused": [*_refused(outcome, replies), *({"client": c, "reason": r, "sha256": None} for c, r in others.items())],
            "missing": [client for client in outcome.missing if client not in others],
            "ledger": self._server.checkpoint.digest() if closed else None,
        }
        self._append(([] if self._session is None else [(Session, self._session)]) + [(Attempt, entry)])
        self._session, self._roster = None, roster

    def _append(self, entries: Sequence[tuple[type[Session] | type[Attempt], dict[str, Any]]]) -> None:
        data = b""
        for kind, fields in entries:
            line = kind(entry=self._number, before=self._before, **fields).model_dump_json().encode()
            data += line + b"\n"
            self._number, self._before = self._number + 1, line_digest(line)
        try:
            self._path.touch(0o600)  # what each client sent is for its owner's eyes
            with self._path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> RunError:
        return RunError(f"{self._path}: cannot write ({error.strerror}); make room, then --resume {self._path.parent}")


def _session(server: Rounds[Any, Any], first: bool) -> dict[str, Any]:
    ledger, config = server.checkpoint, server.config
    assert isinstance(ledger, Ledger)  # only algorithms that have one take the setting
    settings = config.model_dump(mode="json", include=set(FederationConfig.model_fields))
    return {
        "version": __version__,
        "run_id": server.run_id,
        "base": ledger.base.fingerprint,
        "settings": {name: value for name, value in settings.items() if value is not None and config.facts.takes(name)},
        "guess_loss": server.guess_loss,
        "server_round": ledger.round,
        "ledger": ledger.digest(),
        "checkpoint": zlib.compress(ledger.stamped(None).encode()) if first else None,
    }


def _refused(outcome: Outcome, replies: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """The refusals with the digests of what was refused: a sender's replies, in their order, but for the accepted one."""
    accepted = dict(outcome.accepted)
    left = []
    for sender, data in sorted(replies, key=lambda reply: reply[0]):
        if accepted.get(sender) == data:
            del accepted[sender]
        else:
            left.append(hashlib.sha256(data).hexdigest())
    return [
        {"client": refusal.client, "reason": refusal.reason, "sha256": digest}
        for refusal, digest in zip(outcome.refusals, left, strict=True)
    ]
