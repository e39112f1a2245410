"""The replay of a run's log: the same replies through the same server, to the ledger, or to the entry that is wrong."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedkseed.errors import AuditError, FedKSeedError, LedgerError, RunError, RunFolderError
from fedkseed.federation import FederationConfig
from fedkseed.kseed.change_server import ChangeServer
from fedkseed.kseed.ledger import LEDGER, Ledger
from fedkseed.kseed.server import Server
from fedkseed.runs.audit_log import BEFORE_THE_FIRST, KINDS, Attempt, Session, asked, line_digest
from fedkseed.runs.folder import exists
from fedkseed.runs.layout import AUDIT
from fedkseed.runs.settings import without_void

SERVERS: dict[str, type[Server] | type[ChangeServer]] = {"scalars": Server, "changes": ChangeServer}
"""By what clients send; the registry of algorithms has the same, and loads torch."""
MAX_CHECKPOINT = 1 << 30
"""Bytes of the largest ledger that is unpacked."""


@dataclass(frozen=True)
class Audit:
    """What the replay of a log has found; all of it fits.

    Attributes:
        entries: how many there are.
        head: the digest of the last one.
        begin: the round that the log begins after.
        ledger: where it leads to.
        without: where it leads to without one client, if that was asked for.
        rounds: in how many rounds each client's reply went in.
        refused: how many replies were refused.
        notes: what an auditor should know of, and is no fault.
    """

    entries: int
    head: str
    begin: int
    ledger: Ledger
    without: Ledger | None
    rounds: Counter[str]
    refused: int
    notes: tuple[str, ...]


def audit(run: Path, without: str | None = None) -> Audit:
    """Replay the log of a run's folder, and compare where it leads with the run's ledger.

    Args:
        run: the folder.
        without: a client whose replies are left out of a second ledger.

    Raises:
        RunFolderError: there is no log, or the client never replied.
        RunError: the log cannot be read.
        AuditError: an entry does not fit, or the ledger is another one; the message names the first.
        LedgerError: the ledger cannot be read.
    """
    path, file = run / AUDIT, run / LEDGER
    if not exists(path):
        raise RunFolderError(
            f"{run} has no {AUDIT}: give the folder of a run that was started with --audit-log on and has asked its clients"
        )
    replay = Replay(path, without)
    try:
        replay.read()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); restore it from a copy") from error
    replay.compare(file)
    found = replay.found()
    if without is not None and not found.rounds[without]:
        raise RunFolderError(f"--without is {without!r}; expected a client that replied: {', '.join(sorted(found.rounds))}")
    return found


class Replay:
    """The replay of one log.

    Args:
        path: the log.
        without: a client whose replies are left out of a second ledger.

    """

    def __init__(self, path: Path, without: str | None = None) -> None:
        self._path, self._without = path, without
        self._server: Server | ChangeServer | None = None
        self._other: Server | ChangeServer | None = None
        self._settings: dict[str, Any] | None = None
        self._led_to: list[Ledger] = []  # the last two
        self._began = 0
        self._entries, self._head, self._refused = 0, BEFORE_THE_FIRST, 0
        self._rounds, self._notes = Counter[str](), list[str]()

    def read(self) -> None:
        """Replay every entry, in turn.

        Raises:
            AuditError: one does not fit, or there is none.
        """
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._notes.append("the last line is unfinished, as a kill leaves it; a resume cuts it")
                    break
                entry = self._entry(line[:-1])
                try:
                    self._begin(entry) if isinstance(entry, Session) else self._absorb(entry)
                except AuditError:
                    raise
                except FedKSeedError as error:  # of the server: such a round cannot have been
                    raise self._misfit(str(error)) from error
                self._entries, self._head = self._entries + 1, line_digest(line[:-1])
        if not self._entries:
            raise AuditError(f"{self._path} has no entry; expected those of the run's rounds")

    def compare(self, file: Path) -> None:
        """Whether the log leads to the ledger in a file or, of a run that was killed, one round further.

        Raises:
            AuditError: it does not.
            LedgerError: the file cannot be read.
        """
        ledger = Ledger.load(file) if file.exists() else None
        last = self._led_to[-1]
        if self._is(ledger, last):
            return
        if len(self._led_to) > 1 and self._is(ledger, self._led_to[-2]):
            self._notes.append("the log is one round ahead of the ledger, as a kill leaves it; a resume cuts it")
            return
        notes = f" ({'; '.join(self._notes)})" if self._notes else ""
        if ledger is not None and ledger.round > last.round:
            raise AuditError(
                f"{self._path} ends after round {last.round}{notes} and {file} is of round {ledger.round}; restore the log"
            )
        found = "there is none" if ledger is None else f"it is {ledger.digest()} of round {ledger.round}"
        raise AuditError(
            f"{file} is not what the log leads to{notes}: {found}, expected {last.digest()} of round {last.round}; restore it"
        )

    @staticmethod
    def _is(ledger: Ledger | None, wanted: Ledger) -> bool:
        """Whether a ledger is the one of the log; before the first round is done, none lies there."""
        return wanted.round == 0 if ledger is None else ledger.digest() == wanted.digest()

    def found(self) -> Audit:
        """What was found when everything was read."""
        other = None if self._other is None else self._other.ledger
        return Audit(
            self._entries, self._head, self._began, self._led_to[-1], other, self._rounds, self._refused, tuple(self._notes)
        )

    def _misfit(self, what: str) -> AuditError:
        return AuditError(f"{self._path}: entry {self._entries} does not fit: {what}")

    def _entry(self, line: bytes) -> Session | Attempt:
        """The next entry, which must follow the one before."""
        try:
            kind = json.loads(line)["kind"]
            known = KINDS.get(kind)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._misfit("it is no entry of a log") from None
        if known is None:
            raise self._misfit(f"it is of kind {kind!r:.40}, which is unknown here; use the fedkseed that wrote it")
        try:
            entry = known.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]
            raise self._misfit(f"{'.'.join(map(str, problem['loc'])):.80}: {problem['msg']:.120}") from None
        if entry.entry != self._entries or entry.before != self._head:
            raise self._misfit(
                f"the chain is broken: it is numbered {entry.entry} and follows {entry.before[:16]}..., the one before is "
                f"{self._head[:16]}..."
            )
        return entry

    def _begin(self, entry: Session) -> None:
        config = self._config(entry)
        if self._server is None:
            ledger = self._unpacked(entry)
            self._led_to, self._began = [ledger], ledger.round
            if ledger.round:
                self._notes.append(f"the log begins after round {ledger.round}; what led there is not in it")
        elif entry.checkpoint is not None:
            raise self._misfit("it brings a ledger of its own; expected to go on from the entries before")
        else:
            ledger = self._server.ledger
        self._server = SERVERS[config.facts.sends](config, ledger, None, entry.guess_loss, None)
        self._check_start(entry, self._server)
        if self._without is not None:
            other = ledger if self._other is None else self._other.ledger
            self._other = SERVERS[config.facts.sends](config, other, None, entry.guess_loss, None)

    def _config(self, entry: Session) -> FederationConfig:
        try:
            config = FederationConfig(**without_void(entry.settings))
        except (ValidationError, TypeError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise self._misfit(f"its settings are none ({why}); use the fedkseed that wrote it") from None
        if config.facts.sends not in SERVERS:
            raise self._misfit(f"{config.algorithm} has no ledger")
        before = self._settings or entry.settings
        changed = [
            name for name in sorted(before.keys() | entry.settings.keys()) if before.get(name) != entry.settings.get(name)
        ]
        for name in changed:
            self._notes.append(
                f"from entry {entry.entry} on {name} is {entry.settings.get(name)!r:.60}, it was {before.get(name)!r:.60}"
            )
        self._settings = entry.settings
        return config

    def _unpacked(self, entry: Session) -> Ledger:
        if entry.checkpoint is None:
            raise self._misfit("it has no checkpoint, which the first entry must; the beginning of the log is missing")
        try:
            unpacking = zlib.decompressobj()
            return Ledger.decode(unpacking.decompress(entry.checkpoint, MAX_CHECKPOINT))
        except (zlib.error, LedgerError) as error:
            raise self._misfit(f"its checkpoint is no ledger ({error})") from None

    def _check_start(self, entry: Session, server: Server | ChangeServer) -> None:
        ledger = server.ledger
        if entry.ledger != ledger.digest():
            raise self._misfit(
                f"the server went on from ledger {entry.ledger[:16]}... of round {entry.server_round}, the entries before "
                f"lead to {ledger.digest()[:16]}... of round {ledger.round}: what came in between is not in the log",
            )
        for what, said, expected in (
            ("round", entry.server_round, ledger.round),
            ("base", entry.base, ledger.base.fingerprint),
            ("run id", entry.run_id.hex(), server.run_id.hex()),
        ):
            if said != expected:
                raise self._misfit(f"its {what} is {said}, its settings and ledger give {expected}")

    def _absorb(self, entry: Attempt) -> None:
        server = self._server
        if server is None:
            raise self._misfit("a round comes before any session; the beginning of the log is missing")
        if entry.roster is not None:
            server.admit(entry.roster.clients, entry.roster.num_examples, entry.roster.forward_only)
        planned = {request.client: request for request in server.plan()}
        encoded = [(request, request.encode()) for request in planned.values()]
        where = encoded[0][0]
        if (entry.server_round, entry.attempt) != (where.server_round, where.attempt):
            raise self._misfit(
                f"it is attempt {entry.attempt} at round {entry.server_round}; attempt {where.attempt} at round "
                f"{where.server_round} is next",
            )
        self._check_requests(entry, asked(encoded))
        outcome = server.absorb(entry.replies.items())
        for refusal in outcome.refusals:
            raise self._misfit(f"the reply of {refusal.client!r} would be refused now: {refusal.reason}")
        others = {refused.client for refused in entry.refused} | set(entry.missing)
        if unheard := sorted(set(outcome.missing) - others):
            raise self._misfit(f"it does not say what became of the reply of {unheard[0]!r}")
        ledger = server.ledger.digest() if outcome.status == "closed" else None
        if (entry.status, entry.ledger) != (outcome.status, ledger):
            raise self._misfit(
                f"round {entry.server_round} is {entry.status} with ledger {entry.ledger}; these replies make it "
                f"{outcome.status} with {ledger}",
            )
        self._refused += len(entry.refused)
        if outcome.status != "closed":
            return
        self._led_to = [self._led_to[-1], server.ledger]
        self._rounds.update(entry.replies.keys())
        if self._other is not None:
            self._other.admit(server.clients, server.roster()["num_examples"], server.forward_only)
            left = {client: data for client, data in entry.replies.items() if client != self._without}
            self._other.close_with(planned, left)  # type: ignore[arg-type]

    def _check_requests(self, entry: Attempt, expected: dict[str, Any]) -> None:
        if entry.own.keys() != expected["own"].keys():
            odd = min(entry.own.keys() ^ expected["own"].keys())
            raise self._misfit(f"the server asks others than it says: {odd!r} is among one of both only")
        for client, own in expected["own"].items():
            if entry.request != expected["request"] or entry.own[client] != own:
                raise self._misfit(f"the request to {client!r} is not the one that the server makes")
