"""Secure sums on a grid in memory: the ledger of a simulation, whoever leaves when, and what a node does not answer."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from tests.support.flower_grid import Answer, MemoryGrid, engine, federation, node, run_config, started
from tests.support.flower_sites import SITES, simulated
from tests.support.runs import read_metrics

from fedkseed.errors import ConfigError, ProtocolError, TooFewRepliesError
from fedkseed.flower.config import node_settings
from fedkseed.flower.envelope import unwrap, wrap
from fedkseed.flower.summing import NodeIdentity
from fedkseed.kseed.ledger import Ledger
from fedkseed.secure.messages import KeysReply, MaskedReply, SharesReply, UnmaskReply

pytestmark = pytest.mark.usefixtures("in_a_task")

SUMS: dict[str, Any] = {"secure_sums": "on", "eval_every": 3}
GRADIENTS: dict[str, Any] = {"algorithm": "fedkseed-grad", "num_seeds": 128, "local_steps": 2, "rounds_per_page": 2}
PHASES = (KeysReply, SharesReply, MaskedReply, UnmaskReply)


def settings(sites: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return run_config(sites, run, **{**SUMS, **changes})


@pytest.fixture(scope="module")
def expected(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return simulated(sites, tmp_path_factory.mktemp("simulated") / "run", **SUMS).train()


@pytest.mark.parametrize("changes", [{}, GRADIENTS], ids=["scalars", "changes"])
def test_the_ledger_is_that_of_a_simulation(sites: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(sites, tmp_path / "run", **changes)
    grid = MemoryGrid()
    for i, name in enumerate(SITES):
        grid.add(101 + i, node(sites, name, config, state=str(tmp_path / name)))
    ledger = started(config, grid)
    run = simulated(sites, tmp_path / "simulated", **{**SUMS, **changes})
    assert ledger.digest() == run.train().digest()
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "simulated")
    for event in (*ours, *theirs):
        for name in ("seconds", "seconds_by", "peak_bytes"):
            event.pop(name, None)
    assert ours == theirs
    assert len([message for message in grid.sent if message.metadata.message_type == "train"]) == 3 * 3 * 4


def test_the_simulation_engine_gives_the_same(sites: Path, tmp_path: Path, expected: Ledger) -> None:
    config = settings(sites, tmp_path / "run", data=sites / "joint.jsonl", partition="client")
    del config["min-clients"], config["deadline"]
    assert started(config, engine(config, 3)).digest() == expected.digest()


def phase_of(message: Message) -> int:
    """Which phase a training message is of."""
    return b"abcd".index(unwrap(message)[2]) if message.metadata.message_type == "train" else -1


def meddled(answer: Answer, phase: int, meddle: Callable[[Message, bytes], Any]) -> Answer:
    """A node whose reply of a phase is another one."""

    def respond(message: Message) -> Any:
        reply = answer(message)
        assert isinstance(reply, Message)
        return meddle(message, unwrap(reply)) if phase_of(message) == phase else reply

    return respond


@pytest.mark.parametrize("phase", [2, 3])
def test_a_node_may_leave_when_keys_and_shares_are_exchanged(sites: Path, tmp_path: Path, phase: int) -> None:
    config = settings(sites, tmp_path / "run", num_rounds=1, deadline=0.3)
    grid = federation(sites, config)
    honest = grid.answers[103]
    grid.answers[103] = lambda message: None if phase_of(message) == phase else honest(message)
    assert started(config, grid).round == 1
    event = next(event for event in read_metrics(tmp_path / "run") if event["event"] == "round")
    assert event["missing"] == ["site-c"]
    assert list(event["clients"]) == list(SITES if phase == 3 else SITES[:2])
    assert sum(one["weight"] for one in event["clients"].values()) == pytest.approx(1)


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "noise": lambda data: b"\xc1junk",
    "cut short": lambda data: data[:-3],
    "longer": lambda data: data + b"\0",
    "another kind": lambda data: data[:2] + b"z" + data[3:],
    "another round": lambda data: data[:15] + b"\x09" + data[16:],
}


@pytest.mark.parametrize("phase", [2, 3])
@pytest.mark.parametrize("change", BYTES.values(), ids=BYTES)
def test_a_malformed_reply_is_refused_and_the_round_goes_on(
    sites: Path, tmp_path: Path, change: Callable[[bytes], bytes], phase: int
) -> None:
    config = settings(sites, tmp_path / "run", num_rounds=1, deadline=0.3, local_steps=1)
    grid = federation(sites, config)
    grid.answers[103] = meddled(grid.answers[103], phase, lambda message, data: Message(wrap(change(data)), reply_to=message))
    assert started(config, grid).round == 1
    event = next(event for event in read_metrics(tmp_path / "run") if event["event"] == "round")
    assert list(event["refused"]) == ["site-c"]
    assert len(event["refused"]["site-c"]) < 300


def test_two_of_three_cannot_go_on_alone(sites: Path, tmp_path: Path) -> None:
    config = settings(sites, tmp_path / "run", num_rounds=1, deadline=0.2, local_steps=1)
    grid = federation(sites, config)
    for node_id in (102, 103):
        grid.answers[node_id] = meddled(grid.answers[node_id], 2, lambda message, data: None)
    with pytest.raises(TooFewRepliesError, match="round 1 ended three times"):
        started(config, grid)


def test_a_node_that_has_lost_its_secrets_is_left_out_and_comes_back(sites: Path, tmp_path: Path) -> None:
    """A SuperNode that starts again has nothing of the state that it kept in memory."""
    config = settings(sites, tmp_path / "run", num_rounds=2, deadline=0.3)
    grid = federation(sites, config)
    grid.answers[102] = forgetful(sites, config)
    assert started(config, grid).round == 2
    first, second = (event for event in read_metrics(tmp_path / "run") if event["event"] == "round")
    assert "has answered phase 0" in first["refused"]["site-b"]
    assert list(second["clients"]) == list(SITES)


def forgetful(sites: Path, config: dict[str, Any]) -> Answer:
    before, after = node(sites, "site-b", config), node(sites, "site-b", config)
    broken = False

    def answer(message: Message) -> Any:
        nonlocal broken
        broken = broken or phase_of(message) == 2
        return (after if broken else before)(message)

    return answer


def test_lost_pages_are_sent_again_in_the_phase_that_trains(sites: Path, tmp_path: Path) -> None:
    config = settings(sites, tmp_path / "run", **GRADIENTS)
    grid = MemoryGrid()
    for i, name in enumerate(SITES):
        grid.add(101 + i, node(sites, name, config, state=str(tmp_path / name)))
    kept = node(sites, "site-a", config, state=str(tmp_path / "site-a"))

    def losing(message: Message) -> Any:
        if phase_of(message) == 2 and b"x" not in seen:
            for file in (tmp_path / "site-a").glob("*.safetensors"):
                file.unlink()
                seen.add(b"x")
        return kept(message)

    seen: set[bytes] = set()
    grid.answers[101] = losing
    run = simulated(sites, tmp_path / "simulated", **{**SUMS, **GRADIENTS})
    assert started(config, grid).digest() == run.train().digest()
    assert seen


def test_the_server_sees_no_number_of_one_node(sites: Path, tmp_path: Path) -> None:
    """What travels up are keys, sealed shares, masked numbers and shares: in no phase a reply of the algorithm's own."""
    config = settings(sites, tmp_path / "run", num_rounds=1)
    grid, seen = federation(sites, config), list[bytes]()

    def heard(answer: Answer) -> Answer:
        def respond(message: Message) -> Any:
            reply = answer(message)
            assert isinstance(reply, Message)
            if phase_of(message) >= 0:
                seen.append(unwrap(reply))
            return reply

        return respond

    grid.answers = {node_id: heard(answer) for node_id, answer in grid.answers.items()}
    started(config, grid)
    assert len(seen) == 12
    for data in seen:
        assert any(data[1:4] == b"\xa2" + kind.kind.encode() and kind.decode(data) for kind in PHASES)


def test_a_node_that_wants_sums_answers_nothing_else(sites: Path, tmp_path: Path) -> None:
    plain = settings(sites, tmp_path / "run", num_rounds=1, secure_sums="off", deadline=0.3)
    grid = federation(sites, plain, secure_sums="required")
    with pytest.raises(TooFewRepliesError):
        started(plain, grid)
    config = settings(sites, tmp_path / "sums", num_rounds=1)
    assert started(config, federation(sites, config, secure_sums="required")).round == 1


def test_a_node_that_cannot_backpropagate_is_turned_away(sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    config = settings(sites, tmp_path / "run", **GRADIENTS, num_rounds=1)
    grid = federation(sites, config, state=str(tmp_path / "state"))
    grid.add(104, node(sites, "site-c", config, backpropagation="no"))
    del grid.answers[103], grid.infos[103]
    grid.add(105, node(sites, "site-c", config, state=str(tmp_path / "c")))
    started(config, grid)
    assert "'site-c' cannot backpropagate, and its scalars have no place in a secure sum of changes" in heard.text


# --- Node keys ---


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in (*SITES, "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True)
    return folder


def signing(sites: Path, config: dict[str, Any], keys: Path, **own: str) -> MemoryGrid:
    grid = MemoryGrid()
    for i, name in enumerate(SITES):
        grid.add(101 + i, node(sites, name, config, key=str(keys / own.get(name, name)), keys=str(keys)))
    return grid


def test_keys_bound_to_node_keys_give_the_same_ledger(sites: Path, tmp_path: Path, keys: Path, expected: Ledger) -> None:
    config = settings(sites, tmp_path / "run")
    assert started(config, signing(sites, config, keys)).digest() == expected.digest()


def test_a_server_in_the_middle_is_found_out_by_node_keys(
    sites: Path, tmp_path: Path, keys: Path, heard: pytest.LogCaptureFixture
) -> None:
    """It puts its own keys in the place of one node's; without node keys, the control, nobody can tell."""

    def in_the_middle(grid: MemoryGrid) -> MemoryGrid:
        other = node(sites, "site-c", config)  # whose keys the server has made itself

        def respond(message: Message) -> Any:
            reply = honest(message)
            assert isinstance(reply, Message)
            if phase_of(message) != 0:
                return other(message) if phase_of(message) > 0 else reply
            mine, theirs = KeysReply.decode(unwrap(other(message))), KeysReply.decode(unwrap(reply))
            forged = KeysReply(*mine.where, mine.client, mine.mask_key, mine.share_key, theirs.signature)
            return Message(wrap(forged.encode()), reply_to=message)

        honest = grid.answers[103]
        grid.answers[103] = respond
        return grid

    config = settings(sites, tmp_path / "run", num_rounds=1, deadline=0.3)
    with pytest.raises(TooFewRepliesError):
        started(config, in_the_middle(signing(sites, config, keys)))
    assert "the keys that came for 'site-c' are not signed by site-c.pub: somebody between the nodes" in heard.text
    config = settings(sites, tmp_path / "trusting", num_rounds=1, deadline=0.3)
    assert started(config, in_the_middle(federation(sites, config))).round == 1


def test_a_key_of_another_node_is_no_signature(sites: Path, tmp_path: Path, keys: Path) -> None:
    config = settings(sites, tmp_path / "run", num_rounds=1, deadline=0.3)
    with pytest.raises(TooFewRepliesError):
        started(config, signing(sites, config, keys, **{"site-b": "stranger"}))


def test_files_that_are_no_keys_are_one_line(sites: Path, tmp_path: Path, keys: Path) -> None:
    (tmp_path / "text").write_text("no key")
    with pytest.raises(ConfigError, match=r"^node-config key is '.*text': no private key without a password"):
        NodeIdentity(tmp_path / "text", keys)
    with pytest.raises(ConfigError, match=r"^node-config key is '.*gone': cannot read \(No such file or directory\)"):
        NodeIdentity(tmp_path / "gone", keys)
    identity = NodeIdentity(keys / "site-a", keys)
    with pytest.raises(ProtocolError, match=r"no public key of 'nobody' here .*; put nobody\.pub into the folder"):
        identity.check("nobody", b"", bytes(96))
    with pytest.raises(ProtocolError, match="can be no file's"):
        identity.check("../site-a", b"", bytes(96))
    signature = identity.sign(b"data")
    identity.check("site-a", b"data", signature)
    for name, data, signed in (("site-a", b"dat", signature), ("site-b", b"data", signature), ("site-a", b"data", b"")):
        with pytest.raises(ProtocolError, match="are not signed by"):
            identity.check(name, data, signed)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"secure-sums": "on"}, 'node-config secure-sums is \'on\'; expected "allowed" or "required"'),
        ({"key": "site-a"}, "node-config has key alone; give key, this node's, and keys, the folder of all nodes'"),
        ({"keys": "folder"}, "node-config has keys alone"),
    ],
    ids=str,
)
def test_a_node_config_that_says_nothing_is_refused(sites: Path, tmp_path: Path, own: dict[str, str], reason: str) -> None:
    config = settings(sites, tmp_path / "run")
    with pytest.raises(ConfigError) as told:
        node_settings(config, {"name": "site-a", "data": str(sites / "site-a.jsonl"), **own})
    assert str(told.value).startswith(reason)
