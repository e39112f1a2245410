"""The log that an auditor can replay: exact, whole after any kill, and no change of it goes unnamed."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from tests.support.command_line import CommandLine, assert_one_line, environment
from tests.support.drivers import in_simulation, on_flower
from tests.support.flower_grid import as_in_a_task, federation, lying, run_config, started
from tests.support.flower_sites import CORRUPTIONS, make_sites

from fedkseed.errors import AuditError, ConfigError, RunError, RunFolderError, TooFewRepliesError
from fedkseed.federation import Rounds
from fedkseed.federation.algorithms import ALGORITHMS as ALGORITHM_ROWS
from fedkseed.federation.algorithms import Algorithm
from fedkseed.kseed.client import Client
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.messages import TrainReply, TrainRequest
from fedkseed.runs.algorithms import roles_of
from fedkseed.runs.audit import SERVERS, Replay, audit

PAGES = {
    "algorithm": "fedkseed-grad", "num_seeds": 128, "lr": 0.003, "wire": "sign", "rounds_per_page": 2,
    "server_optimizer": "adam", "server_lr": 0.01,
}  # fmt: skip
ALGORITHMS: dict[str, dict[str, Any]] = {
    "scalars": {},
    "pro, directions, epochs": {"algorithm": "fedkseed-pro", "directions": 2, "local_unit": "epochs", "local_steps": 1},
    "changes": PAGES,
}
algorithms = pytest.mark.parametrize("changes", ALGORITHMS.values(), ids=ALGORITHMS)
Entries = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def in_a_task() -> Iterator[None]:
    with as_in_a_task():
        yield


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture(scope="module")
def logged(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of scalars on Flower: site-c sends too large a scalar in round 2, and an error in round 3."""
    folder = tmp_path_factory.mktemp("logged") / "run"
    config = run_config(sites, folder, audit_log="on", aggregator="mean")
    grid = federation(sites, config)
    honest, lies = grid.answers[103], {2: "beyond max_grad", 3: "an error"}
    liar = {server_round: lying(honest, CORRUPTIONS[name][0]) for server_round, name in lies.items()}
    grid.answers[103] = lambda message: liar.get(int(message.metadata.group_id or 0), honest)(message)
    started(config, grid)
    return folder


def read(run: Path) -> Entries:
    return [json.loads(line) for line in (run / "audit.jsonl").read_bytes().splitlines()]


def raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text)


def chained(run: Path, entries: Entries) -> Path:
    """The log of these entries, numbered and chained anew as who wants to deceive would."""
    lines, before = [], "0" * 64
    for number, entry in enumerate(entries):
        lines.append(json.dumps({**entry, "entry": number, "before": before}).encode())
        before = hashlib.sha256(lines[-1]).hexdigest()
    (run / "audit.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return run


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "copy"))


# --- What is written ---


@algorithms
def test_it_leads_to_the_ledger_whoever_drives(sites: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """And both drivers write the same entries."""
    runs = {}
    for driver in (in_simulation, on_flower):
        run = tmp_path / driver.__name__
        ledger = driver(sites, run, audit_log="on", **changes).ledger
        found = audit(run)
        assert found.ledger.digest() == ledger.digest()
        assert (found.entries, found.begin, found.refused, found.notes) == (1 + 3, 0, 0, ())
        assert found.rounds == {f"site-{x}": 3 for x in "abc"}
        runs[driver.__name__] = read(run)
    simulated, flower = runs.values()
    for one, other in zip(simulated[1:], flower[1:], strict=True):
        left = {name for name in one if one[name] != other[name]} - {"before"}
        assert not left or (left == {"roster"} and one["roster"]["forward_only"] is None)  # which only nodes say


def test_messages_are_in_it_byte_for_byte_and_what_they_share_once(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, bytes]] = []
    came: list[dict[str, bytes]] = []
    plan, absorb = Rounds.plan, Rounds.absorb

    def planned(rounds: Any) -> Any:
        requests = plan(rounds)
        sent.append({request.client: request.encode() for request in requests})
        return requests

    def absorbed(rounds: Any, replies: Any) -> Any:
        came.append(dict(replies := list(replies)))
        return absorb(rounds, replies)

    monkeypatch.setattr(Rounds, "plan", planned)
    monkeypatch.setattr(Rounds, "absorb", absorbed)
    in_simulation(sites, tmp_path / "run", audit_log="on", num_seeds=4096)
    session, *rounds = read(tmp_path / "run")
    assert session["kind"] == "session"
    for entry, requests, replies in zip(rounds, sent, came, strict=True):
        first = msgpack.unpackb(raw(entry["request"]))
        for client, own in entry["own"].items():
            count, others = msgpack.unpackb(raw(own))
            fields = (first + [None] * count)[:count]
            for place, value in others:
                fields[place] = value
            assert msgpack.packb(fields) == requests[client]
        assert {client: raw(data) for client, data in entry["replies"].items()} == replies
        size = len(json.dumps(entry))
        assert size < 1.4 * (8192 + 1000) + 1.4 * 3 * 600 < 1.4 * sum(map(len, requests.values()))


def test_each_entry_holds_the_digest_of_the_line_before(logged: Path) -> None:
    """As anybody reckons it, without this project."""
    lines = (logged / "audit.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    before = ["0" * 64, *(hashlib.sha256(line).hexdigest() for line in lines)]
    assert [json.loads(line)["before"] for line in lines] == before[:-1]
    assert [json.loads(line)["entry"] for line in lines] == list(range(len(lines)))
    assert audit(logged).head == before[-1]


def test_refusals_have_their_reason_and_the_digest_of_what_was_refused(logged: Path) -> None:
    found = audit(logged)
    assert (found.refused, found.rounds) == (2, {"site-a": 3, "site-b": 3, "site-c": 1})
    first, second, third = (entry for entry in read(logged) if entry["kind"] == "round")
    assert (first["refused"], sorted(second["replies"]), sorted(third["replies"])) == (
        [],
        ["site-a", "site-b"],
        ["site-a", "site-b"],
    )
    (too_large,), (error,) = second["refused"], third["refused"]
    assert (too_large["client"], error["client"], error["sha256"]) == ("site-c", "site-c", None)
    assert "a projected gradient is 20000" in too_large["reason"]
    assert "I cannot" in error["reason"]
    honest = raw(first["replies"]["site-c"])
    assert len(too_large["sha256"]) == 64 != hashlib.sha256(honest).hexdigest()
    assert [entry["missing"] for entry in (first, second, third)] == [[], [], []]


def test_attempts_that_failed_are_in_it(sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, answer = tmp_path / "run", Client.answer
    with monkeypatch.context() as patch:
        patch.setattr(Client, "answer", lambda *_: b"junk")
        with pytest.raises(TooFewRepliesError):
            in_simulation(sites, run, audit_log="on")
    assert [entry.get("status") for entry in read(run)] == [None, "repeat", "repeat", "failed"]
    assert (audit(run).ledger.round, audit(run).refused) == (0, 9)

    def second_attempt(client: Client, data: bytes, *rest: Any) -> bytes:
        request = TrainRequest.decode(data)
        return b"junk" if (request.server_round, request.attempt) == (2, 0) else answer(client, data, *rest)

    monkeypatch.setattr(Client, "answer", second_attempt)
    ledger = in_simulation(sites, run, audit_log="on").ledger
    assert [entry.get("status") for entry in read(run)[4:]] == [None, "closed", "repeat", "closed", "closed"]
    assert audit(run).ledger.digest() == ledger.digest()


def test_it_is_for_its_owners_eyes_and_only_where_it_was_asked_for(logged: Path, sites: Path, tmp_path: Path) -> None:
    assert (logged / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    in_simulation(sites, tmp_path / "run", num_rounds=1)
    assert not (tmp_path / "run" / "audit.jsonl").exists()
    with pytest.raises(
        RunFolderError, match=r"has no audit\.jsonl: give the folder of a run that was started with --audit-log on"
    ):
        audit(tmp_path / "run")


def test_an_algorithm_without_a_ledger_has_no_such_log(sites: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--audit-log is 'on' and --algorithm fedavg does not take it; .* fedkseed, "):
        in_simulation(sites, tmp_path / "run", algorithm="fedavg", audit_log="on")


@pytest.mark.parametrize("row", [row for row in ALGORITHM_ROWS.values() if row.takes("audit_log")], ids=lambda row: row.name)
def test_a_replay_has_the_server_of_the_run(row: Algorithm) -> None:
    """Whose table of them is its own, so that it loads no torch."""
    assert SERVERS[row.sends] is roles_of(row).server


# --- No change goes unnamed ---


def with_reply(entry: dict[str, Any], change: Callable[[bytes], bytes]) -> None:
    entry["replies"]["site-b"] = base64.urlsafe_b64encode(change(raw(entry["replies"]["site-b"]))).decode()


def other_scalar(data: bytes) -> bytes:
    """An honest reply with one scalar that is a little larger."""
    fields = msgpack.unpackb(data)
    numbers = np.frombuffer(fields[12], "<f2").copy()
    numbers[0] += 1
    fields[12] = numbers.tobytes()
    packed: bytes = msgpack.packb(fields)
    return packed


CHANGES: dict[str, tuple[int, Callable[[Entries], Any], str]] = {
    "a scalar": (1, lambda e: with_reply(e[1], other_scalar), "round 1 is closed with ledger"),
    "a reply that would be refused": (2, lambda e: with_reply(e[2], lambda d: d[:-9]), "'site-b' would be refused now"),
    "another round's reply": (2, lambda e: e[2].update(replies=e[1]["replies"]), "refused now: reply to another request"),
    "a reply is gone": (1, lambda e: e[1]["replies"].pop("site-b"), "does not say what became of the reply of 'site-b'"),
    "a reply is gone, and missing": (
        1, lambda e: (e[1]["replies"].pop("site-b"), e[1]["missing"].append("site-b")), "round 1 is closed with ledger",
    ),
    "the ledger": (3, lambda e: e[3].update(ledger="ab" * 32), "round 3 is closed with ledger abab"),
    "the learning rate": (1, lambda e: e[0]["settings"].update(lr=0.02), "the request to 'site-a' is not the one"),
    "the run's seed": (0, lambda e: e[0]["settings"].update(seed=8), "the settings give"),
    "the run's id": (0, lambda e: e[0].update(run_id="AAAAAAAAAAA="), "its run id is 0000000000000000, its settings and"),
    "the base": (0, lambda e: e[0].update(base="ab" * 32), "its base is abab"),
    "a setting that there is not": (0, lambda e: e[0]["settings"].update(x=1), "its settings are none"),
    "the first ledger": (0, lambda e: e[0].update(checkpoint="AAAA"), "its checkpoint is no ledger"),
    "no first ledger": (0, lambda e: e[0].update(checkpoint=None), "the beginning of the log is missing"),
    "how many records a client has": (1, lambda e: e[1]["roster"]["num_examples"].update({"site-a": 13}), "now: num_exam"),
    "a client more": (1, lambda e: e[1]["roster"]["clients"].append("site-d"), "the server asks others than it says: 'site-d'"),
    "who is asked": (2, lambda e: e[2]["own"].pop("site-c"), "the server asks others than it says: 'site-c'"),
    "the seeds that a client was asked for": (2, lambda e: e[2]["own"].update({"site-b": e[1]["own"]["site-b"]}), "'site-b'"),
    "a round is gone": (2, lambda e: e.pop(2), "it is attempt 0 at round 3; attempt 0 at round 2 is next"),
    "rounds the other way round": (1, lambda e: e.insert(1, e.pop(2)), "nobody is here"),
    "a round twice": (3, lambda e: e.insert(3, e[2]), "it is attempt 0 at round 2"),
    "no session": (0, lambda e: e.pop(0), "a round comes before any session"),
    "another attempt": (1, lambda e: e[1].update(attempt=1), "it is attempt 1 at round 1"),
    "a status": (1, lambda e: e[1].update(status="repeat", ledger=None), "round 1 is repeat with ledger None"),
    "a session with a ledger of its own": (4, lambda e: e.append(e[0]), "it brings a ledger of its own"),
    "a session from elsewhere": (4, lambda e: e.append(e[0] | {"checkpoint": None}), "what came in between is not in the log"),
    "a field more": (2, lambda e: e[2].update(more=1), "more: Extra inputs"),
    "a field less": (2, lambda e: e[2].pop("replies"), "replies: Field required"),
    "another kind": (2, lambda e: e[2].update(kind="sum"), "it is of kind 'sum', which is unknown here"),
    "no kind": (2, lambda e: e[2].update(kind=["round"]), "it is no entry of a log"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_with_the_first_entry_that_does_not_fit(logged: Path, tmp_path: Path, name: str) -> None:
    """Though the chain was made anew."""
    number, change, reason = CHANGES[name]
    entries = read(logged)
    change(entries)
    with pytest.raises(AuditError) as caught:
        audit(chained(copied(logged, tmp_path), entries))
    assert f"audit.jsonl: entry {number} does not fit: " in str(caught.value)
    assert reason in str(caught.value)


def test_the_same_log_chained_anew_is_the_same(logged: Path, tmp_path: Path) -> None:
    """The control: what the changes above are refused for is not how they were written."""
    assert audit(chained(copied(logged, tmp_path), read(logged))).ledger.digest() == audit(logged).ledger.digest()


def test_a_change_without_a_new_chain_is_named_at_the_next_entry(logged: Path, tmp_path: Path) -> None:
    run = copied(logged, tmp_path)
    lines = (logged / "audit.jsonl").read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines[:-1]):
        changed = line.replace(b'"kind":', b'"kind": ')
        (run / "audit.jsonl").write_bytes(b"".join([*lines[:number], changed, *lines[number + 1 :]]))
        with pytest.raises(
            AuditError, match=f"entry {number + 1} does not fit: the chain is broken: it is numbered {number + 1}"
        ):
            audit(run)


def test_another_ledger_than_the_logs_is_told(logged: Path, tmp_path: Path, sites: Path) -> None:
    run = copied(logged, tmp_path)
    other = in_simulation(sites, tmp_path / "other", seed=8).folder / "ledger.safetensors"
    shutil.copy(other, run / "ledger.safetensors")
    with pytest.raises(AuditError, match=r"ledger\.safetensors is not what the log leads to: it is .* of round 3, expected"):
        audit(run)
    (run / "ledger.safetensors").unlink()
    with pytest.raises(AuditError, match="there is none, expected"):
        audit(run)
    chained(run, [])
    with pytest.raises(AuditError, match="has no entry"):
        audit(run)


def test_a_folder_in_place_of_the_log_is_one_line(logged: Path, tmp_path: Path) -> None:
    run = copied(logged, tmp_path)
    (run / "audit.jsonl").unlink()
    (run / "audit.jsonl").mkdir()
    with pytest.raises(RunError, match=r"audit\.jsonl: cannot be read \(Is a directory\); restore it from a copy"):
        audit(run)


def test_a_log_that_is_cut_off_is_what_is_to_be_restored(logged: Path, tmp_path: Path) -> None:
    run = copied(logged, tmp_path)
    (run / "audit.jsonl").write_bytes(b"\n".join((logged / "audit.jsonl").read_bytes().split(b"\n")[:4])[:-9])
    unfinished = r"\(the last line is unfinished, as a kill leaves it; a resume cuts it\)"
    with pytest.raises(
        AuditError, match=rf"audit\.jsonl ends after round 2 {unfinished} and .* is of round 3; restore the log$"
    ):
        audit(run)
    (run / "ledger.safetensors").unlink()
    with pytest.raises(AuditError, match=rf"is not what the log leads to {unfinished}: there is none, expected"):
        audit(run)


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"7", b"null", b"[" * 10000, b"\xff", b'{"kind":"round"}', b'{"kind":{}}'])
def test_a_line_that_is_no_entry_is_named(logged: Path, tmp_path: Path, junk: bytes) -> None:
    run = copied(logged, tmp_path)
    lines = (logged / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (run / "audit.jsonl").write_bytes(b"".join([*lines[:2], junk + b"\n", *lines[2:]]))
    with pytest.raises(AuditError, match="entry 2 does not fit: "):
        audit(run)


# --- Kills and resumes (tests/runs/test_resume.py kills at every write) ---


class Killed(BaseException):
    pass


def kill_before(monkeypatch: pytest.MonkeyPatch, server_round: int, run: Callable[[], Any]) -> None:
    """Kill a run before the checkpoint of a round is saved."""
    save = Ledger.save

    def saved(ledger: Ledger, path: str | Path) -> None:
        if ledger.round == server_round and Path(path).name == "ledger.safetensors":
            raise Killed
        save(ledger, path)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "save", saved)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize(("driver", "changes"), [(in_simulation, {}), (on_flower, PAGES)])
def test_a_kill_leaves_an_entry_too_many_which_a_resume_cuts(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Any, changes: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    for at, entries in ((1, 2), (2, 3)):  # before the first ledger, and before the second
        kill_before(monkeypatch, at, lambda: driver(sites, run, audit_log="on", **changes))
        assert audit(run).notes == ("the log is one round ahead of the ledger, as a kill leaves it; a resume cuts it",)
        assert len(read(run)) == entries + (at > 1)  # a session more, after what was cut
    with (run / "audit.jsonl").open("ab") as file:
        file.write(b'{"entry":9,"bef')
    assert "the last line is unfinished, as a kill leaves it; a resume cuts it" in audit(run).notes
    ledger = driver(sites, run, audit_log="on", **changes).ledger
    assert ledger.digest() == driver(sites, tmp_path / "whole", **changes).ledger.digest()
    found = audit(run)
    assert (found.ledger.digest(), found.notes) == (ledger.digest(), ())
    assert [entry["kind"] for entry in read(run)].count("session") == 3


def test_an_entry_too_few_is_told(sites: Path, tmp_path: Path) -> None:
    """The control: a log that lacks the last round of the ledger is no kill's."""
    run = in_simulation(sites, tmp_path / "run", audit_log="on").folder
    chained(run, read(run)[:-1])
    with pytest.raises(AuditError, match=r"audit\.jsonl ends after round 2 and .* is of round 3; restore the log"):
        audit(run)


@pytest.mark.parametrize("damage", ["gone", "line", "junk"])
def test_a_run_goes_on_whatever_became_of_its_log_and_says_so(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run = tmp_path / "run"
    kill_before(monkeypatch, 3, lambda: in_simulation(sites, run, audit_log="on", local_steps=1))
    lines = (run / "audit.jsonl").read_bytes().splitlines(keepends=True)
    kept = {"gone": lines[:2], "line": [lines[0], b"\n", lines[2]], "junk": [*lines[:2], bytes(9) + b"\n"]}[damage]
    (run / "audit.jsonl").write_bytes(b"".join(kept))
    driven = in_simulation(sites, run)
    assert driven.ledger.round == 3
    (note,) = (note for note in driven.notes if "audit" in note)
    assert note.startswith("warning: ")
    assert {"gone": "rounds 2 to 2 are not in it", "line": "entry 1 cannot", "junk": "entry 2 cannot"}[damage] in note
    assert (run / "audit.jsonl").read_bytes().startswith(b"".join(kept))
    with pytest.raises(AuditError, match="entry 2 does not fit: the server went on" if damage == "gone" else "does not fit"):
        audit(run)


# --- Without a client ---


@algorithms
def test_without_nobody_it_leads_to_the_same_ledger(sites: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The control of the two below: what closes rounds without checks is what closed them with."""
    run = in_simulation(sites, tmp_path / "run", audit_log="on", **changes).folder
    replay = Replay(run / "audit.jsonl", "nobody")
    replay.read()
    found = replay.found()
    assert found.without is not None
    assert found.without.digest() == found.ledger.digest() == Ledger.load(run / "ledger.safetensors").digest()
    with pytest.raises(RunFolderError, match="--without is 'nobody'; expected a client that replied: site-a, site-b, site-c"):
        audit(run, "nobody")


def summed(entries: Sequence[dict[str, Any]], without: str) -> np.ndarray[Any, Any]:
    """`a_k <- a_k - lr sum_i p_i sum g` over what the log holds, in plain loops."""
    a = np.zeros(64)
    for entry in entries:
        replies = {c: TrainReply.decode(raw(data)) for c, data in entry["replies"].items() if c != without}
        total = sum(
            reply.num_examples for reply in replies.values()
        )  # of which nobody has more than a half here, or one of two
        first = msgpack.unpackb(raw(entry["request"]))
        for client, reply in replies.items():
            fields = list(first)
            for place, value in msgpack.unpackb(raw(entry["own"][client]))[1]:
                fields[place] = value
            request = TrainRequest.decode(msgpack.packb(fields))
            for k, g in zip(request.indices, reply.projected_grads.unpack().tolist(), strict=True):
                a[k] -= 0.01 * reply.num_examples / total * g
    return a


@pytest.mark.parametrize("client", ["site-a", "site-c"])
def test_without_a_client_it_is_the_sum_of_the_others_replies(logged: Path, client: str) -> None:
    found = audit(logged, client)
    assert found.without is not None
    assert found.without.history is not None
    rounds = [entry for entry in read(logged) if entry["kind"] == "round"]
    np.testing.assert_allclose(found.without.history.accumulators, summed(rounds, client), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.ledger.history.accumulators, summed(rounds, "nobody"), rtol=1e-12, atol=1e-15)  # type: ignore[union-attr]
    assert found.without.round == 3
    assert found.without.digest() != found.ledger.digest()


def test_without_the_only_one_that_replied_the_model_stays(sites: Path, tmp_path: Path) -> None:
    """Of changes with an optimiser's state too: the rounds pass, and nothing moves."""
    for name, changes in (("scalars", {}), ("changes", PAGES | {"server_optimizer": "sgd", "wire": "float32"})):
        run = in_simulation(
            sites, tmp_path / name, audit_log="on", fraction_train=0.34, min_replies=1, num_rounds=1, **changes
        ).folder
        (client,) = audit(run).rounds
        found = audit(run, client)
        assert found.without is not None
        assert found.without.round == 1
        assert not found.without.coefficients.any()
        assert found.ledger.coefficients.any()


# --- The command ---


def test_the_command_says_what_fits_and_writes_the_other_ledger(fedkseed: CommandLine, logged: Path, tmp_path: Path) -> None:
    result = fedkseed("audit", logged)
    assert (result.code, result.stderr) == (0, "")
    assert "4 entries, rounds 1 to 3, 7 replies of 3 clients, 2 refused" in result.stdout
    assert audit(logged).head in result.stdout
    assert f"every entry fits, and they lead to {logged / 'ledger.safetensors'}" in result.stdout
    other_ledger = tmp_path / "made" / "other.safetensors"
    result = fedkseed("audit", logged, "--without", "site-c", "--to", other_ledger)
    assert (result.code, result.stderr) == (0, "")
    assert "without 'site-c': in 1 round the others' weights are shared anew" in result.stdout
    assert "these are the same replies, not another training" in result.stdout
    other = audit(logged, "site-c").without
    assert other is not None
    assert Ledger.load(other_ledger).digest() == other.published().digest()
    assert fedkseed("inspect", other_ledger).code == 0


def test_the_command_is_one_line_and_a_code_for_what_is_wrong(fedkseed: CommandLine, logged: Path, tmp_path: Path) -> None:
    run = copied(logged, tmp_path)
    (tmp_path / "here").touch()
    for words, code, wanted in (
        ([tmp_path], 2, "has no audit.jsonl"),
        ([tmp_path / "nowhere"], 2, "has no audit.jsonl"),
        ([logged, "--without", "x", "--to", tmp_path / "new" / "x"], 2, "expected a client that replied: site-a"),
        ([logged, "--to", tmp_path / "x"], 2, "give --without CLIENT too"),
        ([logged, "--without", "site-a", "--to", tmp_path / "here"], 2, "exists; give an output that does not"),
        (
            [logged, "--without", "site-a", "--to", tmp_path / "here" / "x"],
            1,
            "here: cannot be made or written into (Not a directory)",
        ),
    ):
        assert_one_line(fedkseed("audit", *words), code, wanted)
    assert not (tmp_path / "new").exists()
    for entries, wanted in (
        (read(logged)[:3], "audit.jsonl ends after round 2 and"),
        (read(logged)[1:], "entry 0 does not fit"),
    ):
        assert_one_line(fedkseed("audit", chained(run, entries)), 1, wanted)
    (run / "ledger.safetensors").write_bytes(b"junk")
    assert_one_line(fedkseed("audit", chained(run, read(logged))), 1, "not a ledger")


def test_a_replay_loads_no_torch(logged: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedkseed.runs.audit import audit; import fedkseed.cli.audit\n"
        f"audit(Path({str(logged)!r}))\n"
        "assert not {'torch', 'transformers', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
