"""fedkseed-grad on a grid in memory: the ledger of a simulation, whatever nodes keep, lose, cannot do or make up."""

import threading
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from tests.support.flower_deployment import EXAMPLE
from tests.support.flower_grid import Killed, MemoryGrid, die_after, federation, lying, node, renumbered, run_config, started
from tests.support.flower_sites import SITES, simulated
from tests.support.runs import read_metrics

from fedkseed.errors import ConfigError, ProtocolError
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.flower import client_app
from fedkseed.flower.config import EngineConfig, node_settings, read_config
from fedkseed.flower.envelope import Lacking, unwrap, wrap
from fedkseed.flower.kept import KeptPages
from fedkseed.flower.participant import Participant
from fedkseed.kseed.change_messages import ChangeReply, ChangeRequest
from fedkseed.kseed.change_server import ChangeServer
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.identity import BaseIdentity
from fedkseed.runs.algorithms import roles_of
from fedkseed.runs.task import TextTask

pytestmark = pytest.mark.usefixtures("in_a_task")

GRADIENTS: dict[str, Any] = {
    "algorithm": "fedkseed-grad",
    "num_seeds": 128,
    "local_steps": 2,
    "num_rounds": 5,
    "rounds_per_page": 2,
    "eval_every": 5,
}
WIRES = ("float16", "sign")


def settings(sites: Path, place: Path, **changes: Any) -> dict[str, Any]:
    return run_config(sites, place / "run", **{**GRADIENTS, **changes})


def nodes(sites: Path, config: dict[str, Any], place: Path) -> MemoryGrid:
    """A process for each message, as it were, and a disk for each node."""
    grid = MemoryGrid()
    for i, name in enumerate(SITES):
        grid.add(101 + i, node(sites, name, config, state=str(place / name)))
    return grid


def kept(place: Path, name: str) -> Path:
    (path,) = (place / name).glob("*.safetensors")
    return path


def asked(grid: MemoryGrid, server_round: int, node_id: int) -> list[ChangeRequest]:
    train = [message for message in grid.sent if message.metadata.message_type == "train"]
    mine = [m for m in train if (m.metadata.group_id, m.metadata.dst_node_id) == (str(server_round), node_id)]
    return [ChangeRequest.decode(unwrap(message)) for message in mine]


@pytest.fixture(scope="module")
def expected(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ledger]:
    """By wire."""
    place = tmp_path_factory.mktemp("simulated")
    return {wire: simulated(sites, place / wire, **GRADIENTS, wire=wire).train() for wire in WIRES}


# --- The same bits as a simulation ---


@pytest.mark.parametrize(
    "changes",
    [
        {"wire": "float16"},
        {"wire": "sign", "fraction_train": 0.7},  # who is not asked for some rounds lacks more than the last one's part
        {"wire": "int4", "movement": "proportional", "local_optimizer": "adam", "server_optimizer": "momentum"},
        {"basis": "coefficients", "checkpointing": "on", "rounds_per_page": 0, "fraction_train": 0.7},
    ],
    ids=str,
)
def test_the_ledger_is_that_of_a_simulation(sites: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(sites, tmp_path, **changes, min_replies=1)
    grid = nodes(sites, config, tmp_path)
    ledger = started(config, grid)
    run = simulated(sites, tmp_path / "simulated", **{**GRADIENTS, **changes}, min_replies=1)
    assert ledger.digest() == run.train().digest()
    assert len(ledger.pages) == (1 if changes.get("rounds_per_page") == 0 else 3)
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "simulated")
    for event in (*ours, *theirs):
        for name in ("seconds", "seconds_by", "peak_bytes"):
            event.pop(name, None)
    assert ours == theirs  # with the bytes that travelled: a node with a disk is sent what a client in memory is sent


def test_nodes_that_cannot_backpropagate_answer_with_scalars(sites: Path, tmp_path: Path) -> None:
    """Those that a simulation draws for its share say so here themselves."""
    run = simulated(sites, tmp_path / "simulated", **GRADIENTS, two_point_clients=0.5)
    assert isinstance(run.server, ChangeServer)
    unable = run.server.two_point_clients()
    assert len(unable) == 2
    config, grid = settings(sites, tmp_path), MemoryGrid()
    for i, name in enumerate(SITES):
        able = "no" if name in unable else "yes"
        grid.add(101 + i, node(sites, name, config, state=str(tmp_path / name), backpropagation=able))
    assert started(config, grid).digest() == run.train().digest()
    for i, name in enumerate(SITES):
        assert {r.measure for r in asked(grid, 1, 101 + i)} == {"two-point" if name in unable else "gradient"}


def test_simulated_nodes_are_asked_as_the_settings_share_says(sites: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"partition": "iid", "num_clients": 3, "two_point_clients": 0.5}
    config = settings(sites, tmp_path, **changes, data=str(sites / "joint.jsonl"), eval_data="")
    grid, app = MemoryGrid(), client_app()
    for i in range(3):
        own = {"partition-id": i, "num-partitions": 3}
        grid.add(i + 1, lambda m, own=own: app(m, Context(1, m.metadata.dst_node_id, own, RecordDict(), config)))  # type: ignore[misc]
    run = simulated(sites, tmp_path / "simulated", **{**GRADIENTS, **changes}, eval_data=None)
    assert started(config, grid).digest() == run.train().digest()
    assert sorted(r.measure for i in (1, 2, 3) for r in asked(grid, 1, i)) == ["gradient", "two-point", "two-point"]


def test_a_node_whose_backward_fails_says_so_and_answers_with_scalars(
    sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(sites, tmp_path / "said", num_rounds=2)
    grid = MemoryGrid()
    for i, name in enumerate(SITES):
        able = "no" if name == "site-b" else "yes"
        grid.add(101 + i, node(sites, name, config, state=str(tmp_path / "said" / name), backpropagation=able))
    said = started(config, grid)

    honest = TextTask.differentiable_loss

    def failing(task: TextTask, records: Any) -> Any:
        loss = honest(task, records)
        return loss.detach() if task.num_examples == 15 else loss  # site-b's

    monkeypatch.setattr(TextTask, "differentiable_loss", failing)
    config = settings(sites, tmp_path / "found", num_rounds=2)
    assert started(config, nodes(sites, config, tmp_path / "found")).digest() == said.digest()
    assert "site-b cannot backpropagate (its loss does not depend on the parameters by operations that" in heard.text


def test_every_algorithm_on_flower_has_a_server_and_a_client() -> None:
    for row in ALGORITHMS.values():
        if row.on_flower:
            assert roles_of(row).server is not None


# --- What a node keeps ---


def a_flipped_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "no ledger": lambda data: b"\xff" * 99,
    "a flipped byte": a_flipped_byte,  # of a closed page's numbers: a ledger, but another one
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_node_that_lost_its_pages_gets_them_again_in_the_same_round(
    sites: Path, tmp_path: Path, expected: dict[str, Ledger], wire: str, damage: str
) -> None:
    config = settings(sites, tmp_path, wire=wire)
    grid = nodes(sites, config, tmp_path)
    honest, lost = grid.answers[102], False

    def forgetful(message: Message) -> Any:
        nonlocal lost
        if message.metadata.group_id == "4" and not lost:
            lost = True
            path = kept(tmp_path, "site-b")
            data = DAMAGES[damage](path.read_bytes())
            path.unlink() if data is None else path.write_bytes(data)
        return honest(message)

    grid.answers[102] = forgetful
    assert started(config, grid).digest() == expected[wire].digest()
    first, *again = asked(grid, 4, 102)
    assert not first.is_whole
    assert [request.is_whole for request in again] == [True]
    assert [len(asked(grid, 4, node_id)) for node_id in (101, 103)] == [1, 1]
    assert len(asked(grid, 5, 102)) == 1
    assert not asked(grid, 5, 102)[0].is_whole
    (event,) = [e for e in read_metrics(tmp_path / "run") if e["event"] == "round" and e["server_round"] == 4]
    assert event["refused"] == {}
    down = [len(request.encode()) for i in (101, 102, 103) for request in asked(grid, 4, i)]
    assert event["bytes_down"] == sum(down) / 3


def test_a_node_that_cannot_write_is_sent_all_pages_each_round(
    sites: Path, tmp_path: Path, expected: dict[str, Ledger], heard: pytest.LogCaptureFixture
) -> None:
    config = settings(sites, tmp_path, wire="sign")
    grid = nodes(sites, config, tmp_path)
    (tmp_path / "site-b").mkdir()
    (tmp_path / "site-b" / ".lock").mkdir()  # permissions would not stop root
    assert started(config, grid).digest() == expected["sign"].digest()
    assert [len(asked(grid, i, 102)) for i in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 2]
    assert "site-b: pages cannot be kept (Is a directory)" in heard.text


def test_what_a_node_keeps_is_the_published_ledger_that_it_trained_from(sites: Path, tmp_path: Path) -> None:
    config = settings(sites, tmp_path, wire="sign", num_rounds=4)
    grid = nodes(sites, config, tmp_path)
    started(config, grid)
    config = {**config, "num-rounds": 3, "run": str(tmp_path / "short")}
    short = started(config, nodes(sites, config, tmp_path / "others"))
    assert Ledger.load(kept(tmp_path, "site-a")).digest() == short.published().digest()
    path = kept(tmp_path, "site-a")
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", path.name]


def test_two_processes_of_a_node_leave_a_whole_file(sites: Path, tmp_path: Path) -> None:
    config = settings(sites, tmp_path, wire="sign", num_rounds=3)
    grid = nodes(sites, config, tmp_path)
    started(config, grid)
    ledger = Ledger.load(kept(tmp_path, "site-a"))
    requests = [asked(grid, i, 101)[0] for i in (1, 3)]
    both = [ledger.pages[:1], ledger.pages]
    digests = {
        Ledger.of_pages(ledger.base, r.server_round - 1, p, r.wire, None).digest() for r, p in zip(requests, both, strict=True)
    }
    pages, errors = KeptPages(tmp_path / "shared", "a/../b", ledger.base), []

    def write(which: int) -> None:
        for _ in range(20):
            KeptPages(tmp_path / "shared", "a/../b", ledger.base).save(requests[which], both[which])

    writers = [threading.Thread(target=write, args=(i % 2,)) for i in range(4)]
    pages.save(requests[0], both[0])
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if Ledger.load(pages.path(requests[0].run_id)).digest() not in digests:
            errors.append("torn")
    for writer in writers:
        writer.join()
    assert errors == []
    assert {file.name for file in (tmp_path / "shared").iterdir()} == {".lock", pages.path(requests[0].run_id).name}


def test_pages_of_another_base_model_or_of_none_are_no_pages(sites: Path, tmp_path: Path) -> None:
    config = settings(sites, tmp_path, num_rounds=1)
    grid = nodes(sites, config, tmp_path)
    started(config, grid)
    ledger, run_id = Ledger.load(kept(tmp_path, "site-a")), asked(grid, 1, 101)[0].run_id
    assert KeptPages(tmp_path / "site-a", "site-a", ledger.base).load(run_id)
    assert KeptPages(tmp_path / "site-a", "site-a", BaseIdentity("0" * 64, ledger.base.digests, ())).load(run_id) == ()
    assert KeptPages(tmp_path / "site-a", "site-a", ledger.base).load(bytes(8)) == ()


# --- Nodes that come, servers that end ---


def test_a_node_that_comes_late_or_from_elsewhere_is_sent_all_pages(sites: Path, tmp_path: Path) -> None:
    config = settings(sites, tmp_path, wire="sign", min_clients=2)
    grid = nodes(sites, config, tmp_path)
    late = grid.answers.pop(103), grid.infos.pop(103)
    first = grid.answers[101]

    def coming(message: Message) -> Any:
        if message.metadata.group_id == "3" and 103 not in grid.infos:
            grid.answers[103], grid.infos[103] = late
            grid.add(202, node(sites, "site-b", config, state=str(tmp_path / "new-disk")))  # b starts again, on another machine
            del grid.infos[102]
        return first(message)

    grid.answers[101] = coming
    started(config, grid)
    rounds = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert [len(event["clients"]) for event in rounds] == [2, 2, 2, 3, 3]
    assert all(event["refused"] == {} for event in rounds)
    assert [request.is_whole for request in asked(grid, 4, 103)] == [True]
    assert [len(request.patches) for request in asked(grid, 4, 103)] == [2]
    assert [request.is_whole for request in asked(grid, 4, 202)] == [False, True]
    assert [request.is_whole for i in (103, 202) for request in asked(grid, 5, i)] == [False, False]


@pytest.mark.parametrize("pulls", [2, 7, 13])
@pytest.mark.parametrize("wire", WIRES)
def test_a_killed_server_goes_on_to_the_same_digest(
    sites: Path, tmp_path: Path, expected: dict[str, Ledger], wire: str, pulls: int
) -> None:
    config = settings(sites, tmp_path, wire=wire)
    grid = nodes(sites, config, tmp_path)
    die_after(grid, pulls)
    with pytest.raises(Killed):
        started(config, grid)
    assert started(config, renumbered(grid)).digest() == expected[wire].digest()


# --- Replies that are not what was asked for ---


def test_bad_replies_are_refused_and_the_round_goes_on(sites: Path, tmp_path: Path) -> None:
    def without(message: Message, data: bytes) -> Any:
        return None

    def endless(message: Message, data: bytes) -> Any:
        return Message(wrap(Lacking(pages=0).encode()), reply_to=message)

    def infinite(message: Message, data: bytes) -> Any:
        reply = ChangeReply.decode(data)
        numbers = np.frombuffer(reply.numbers.numbers, "<f2").copy()
        numbers[3] = np.inf
        coded = replace(reply.numbers, numbers=numbers.tobytes())
        return Message(wrap(replace(reply, numbers=coded).encode()), reply_to=message)

    config = settings(sites, tmp_path / "without", deadline=0.05)
    grid = nodes(sites, config, tmp_path / "without")
    grid.answers[102] = lying(grid.answers[102], without)
    ledger = started(config, grid)
    for lie, reason in ((endless, "message is not msgpack"), (infinite, "a number is not finite")):
        place = tmp_path / lie.__name__
        config = settings(sites, place)
        grid = nodes(sites, config, place)
        grid.answers[102] = lying(grid.answers[102], lie)
        assert started(config, grid).digest() == ledger.digest()
        for event in (event for event in read_metrics(place / "run") if event["event"] == "round"):
            assert list(event["refused"]) == ["site-b"]
            assert reason in event["refused"]["site-b"]
            assert len(asked(grid, event["server_round"], 102)) == 1


def test_a_claim_of_lost_pages_is_answered_once(sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    """A client that says so of every request is sent all once in a round, and then refused."""
    config = settings(sites, tmp_path, wire="sign", num_rounds=4)
    grid = nodes(sites, config, tmp_path)

    def from_round_3(message: Message, data: bytes) -> Any:
        claim = message.metadata.group_id in "34"
        return Message(wrap(Lacking(pages=9).encode() if claim else data), reply_to=message)

    grid.answers[102] = lying(grid.answers[102], from_round_3)
    assert started(config, grid).round == 4
    assert [[r.is_whole for r in asked(grid, i, 102)] for i in (3, 4)] == [[False, True], [True]]
    rounds = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert [list(event["refused"]) for event in rounds] == [[], [], ["site-b"], ["site-b"]]


# --- Evaluation by the clients ---


def test_clients_evaluate_a_ledger_of_pages(sites: Path, tmp_path: Path, expected: dict[str, Ledger]) -> None:
    config = settings(sites, tmp_path, eval_data="", eval_every=1)
    grid = federation(sites, config, eval_data=str(sites / "held-out.jsonl"), state=str(tmp_path / "state"))
    assert started(config, grid).digest() == expected["float16"].digest()
    run = simulated(sites, tmp_path / "simulated", **{**GRADIENTS, "eval_every": 1})
    run.train()
    ours, theirs = (
        [e["eval_loss"] for e in read_metrics(tmp_path / name) if e["event"] == "evaluation"] for name in ("run", "simulated")
    )
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_a_ledger_that_is_not_of_the_run_is_not_evaluated(sites: Path, tmp_path: Path) -> None:
    own = {"name": "site-a", "data": str(sites / "site-a.jsonl"), "eval-data": str(sites / "held-out.jsonl")}
    config = settings(sites, tmp_path, num_rounds=1)
    other = started({**config, "seed": 8}, federation(sites, {**config, "seed": 8}, state=str(tmp_path / "state")))
    plain = run_config(sites, tmp_path / "plain", num_rounds=1, num_seeds=128)
    without_pages = started(plain, federation(sites, plain))
    for ledger in (other, without_pages):
        with pytest.raises(ProtocolError, match="the ledger is of another base model or pool than 'site-a' has"):
            Participant(config, own).evaluate(ledger.published().encode())
    with pytest.raises(ProtocolError, match="the ledger is of another base model or pool than 'site-a' has"):
        Participant(plain, own).evaluate(other.published().encode())


# --- Settings ---


def test_a_share_of_two_point_clients_is_for_simulations(sites: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'two-point-clients is 0\.5, but each node says .*backpropagation = "no"'):
        read_config(settings(sites, tmp_path, two_point_clients=0.5))


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"backpropagation": "maybe"}, 'node-config backpropagation is \'maybe\'; expected "yes" or "no"'),
        ({"backpropagation": True}, 'node-config backpropagation is True; expected "yes" or "no"'),
        ({"state": "FILE"}, "no folder; give one that the node may write"),
    ],
    ids=str,
)
def test_bad_node_settings_are_one_line(sites: Path, tmp_path: Path, own: dict[str, Any], text: str) -> None:
    file = str(sites / "site-a.jsonl")
    own = {key: file if value == "FILE" else value for key, value in own.items()}
    with pytest.raises(ConfigError) as caught:
        node_settings(settings(sites, tmp_path), {"name": "x", "data": file, **own})
    assert text in str(caught.value)


def test_without_further_words_a_node_keeps_its_pages_in_the_users_cache(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDKSEED_CACHE", str(tmp_path / "cache"))
    found = node_settings(settings(sites, tmp_path), {"name": "x", "data": str(sites / "site-a.jsonl"), "state": ""})
    assert (found.state, found.backpropagation) == (tmp_path / "cache" / "pages", True)


def test_a_node_that_cannot_backpropagate_is_turned_away_where_scalars_are_of_no_use(
    sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    config = settings(sites, tmp_path, local_optimizer="adam", num_rounds=1, min_clients=2)
    grid = nodes(sites, config, tmp_path)
    grid.add(102, node(sites, "site-b", config, backpropagation="no"))
    started(config, grid)
    assert "node 102 is turned away: 'site-b' cannot backpropagate, and local-optimizer adam has no use" in heard.text
    (event,) = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert sorted(event["clients"]) == ["site-a", "site-c"]


def test_the_example_lists_every_setting_of_what_runs_on_flower() -> None:
    """Flower refuses a key after --run-config that does not stand there."""
    app = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    rows = [row for row in ALGORITHMS.values() if row.on_flower]
    taken = {name for name in EngineConfig.model_fields if any(row.takes(name) for row in rows)} - {"edges"}
    assert {name.replace("_", "-") for name in taken} == set(app)
