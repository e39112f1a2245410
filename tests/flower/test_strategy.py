"""The strategy against a grid in memory: the ledger of a simulation, whoever answers what, in whatever order."""

import json
import logging
import random
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from tests.support.flower_grid import (
    Answer,
    Killed,
    MemoryGrid,
    die_after,
    engine,
    federation,
    lying,
    node,
    renumbered,
    run_config,
    started,
)
from tests.support.flower_sites import CORRUPTIONS, another, simulated
from tests.support.runs import read_metrics

from fedkseed.errors import ConfigError, LedgerError, RunError
from fedkseed.flower import exchange
from fedkseed.flower.building import build_strategy
from fedkseed.flower.config import EngineConfig, node_settings, read_config
from fedkseed.flower.envelope import Evaluation, Hello, unwrap, wrap
from fedkseed.flower.server_app import server_app
from fedkseed.kseed.ledger import Ledger

pytestmark = pytest.mark.usefixtures("in_a_task")


@pytest.fixture(scope="module")
def expected(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return simulated(sites, tmp_path_factory.mktemp("simulated") / "run").train()


# --- The same bits as a simulation ---


@pytest.mark.parametrize(
    "changes", [{}, {"algorithm": "fedkseed-pro"}, {"noise": "gaussian"}, {"fraction_train": 0.7}], ids=str
)
def test_the_ledger_is_that_of_a_simulation(sites: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = run_config(sites, tmp_path / "run", **changes, **({"min_replies": 1} if changes else {}))
    ledger = started(config, federation(sites, config))
    run = simulated(sites, tmp_path / "simulated", **changes, **({"min_replies": 1} if changes else {}))
    assert ledger.digest() == run.train().digest()
    assert Ledger.load(tmp_path / "run" / "ledger.safetensors").digest() == ledger.digest()
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "simulated")
    for event in (*ours, *theirs):
        del event["seconds"]
        for name in ("seconds_by", "peak_bytes"):
            event.pop(name, None)
    assert ours == theirs


def test_order_of_requests_and_replies_changes_no_bit(sites: Path, tmp_path: Path, expected: Ledger) -> None:
    for seed in range(5):
        config = run_config(sites, tmp_path / str(seed), deadline=60.0)
        assert started(config, federation(sites, config, random.Random(seed))).digest() == expected.digest()


def test_messages_are_our_bytes_and_nothing_of_the_size_of_the_model(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run")
    grid = federation(sites, config)
    started(config, grid)
    assert {message.metadata.message_type for message in grid.sent} == {"query.hello", "train"}
    for message in grid.sent:
        assert list(message.content) == ["fedkseed"]
        assert len(unwrap(message)) < 400  # K = 64, float16


def test_the_server_app_reads_its_context(sites: Path, tmp_path: Path, expected: Ledger) -> None:
    config = run_config(sites, tmp_path / "run")
    server_app()(federation(sites, config), Context(1, 0, {}, RecordDict(), config))
    assert Ledger.load(tmp_path / "run" / "ledger.safetensors").digest() == expected.digest()


# --- Going on ---


@pytest.mark.parametrize("message", [1, 3, 4, 5, 8, 9, 11])
def test_a_killed_server_goes_on_to_the_same_digest(sites: Path, tmp_path: Path, expected: Ledger, message: int) -> None:
    config = run_config(sites, tmp_path / "run")
    grid = federation(sites, config)
    die_after(grid, message)
    with pytest.raises(Killed):
        started(config, grid)
    assert started(config, renumbered(grid)).digest() == expected.digest()
    kinds = [(event["event"], event["server_round"]) for event in read_metrics(tmp_path / "run")]
    assert kinds == [("evaluation", 0), *((kind, i) for i in (1, 2, 3) for kind in ("round", "evaluation"))]


def test_a_finished_run_is_left_as_it_is_and_more_rounds_go_on(sites: Path, tmp_path: Path, expected: Ledger) -> None:
    short = run_config(sites, tmp_path / "run", num_rounds=2)
    started(short, federation(sites, short))
    grid = federation(sites, short)
    assert started(short, grid).round == 2
    assert not grid.sent
    longer = run_config(sites, tmp_path / "run", deadline=3.0)
    assert started(longer, federation(sites, longer)).digest() == expected.digest()


def test_other_settings_are_refused(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", num_rounds=1)
    started(config, federation(sites, config))
    with pytest.raises(ConfigError, match=r"run-config lr is 0\.02, the run in .* was started with 0\.01"):
        build_strategy(read_config({**config, "lr": 0.02}))


def test_a_moved_model_is_taken_and_another_runs_ledger_is_not(sites: Path, tmp_path: Path, expected: Ledger) -> None:
    config = run_config(sites, tmp_path / "run", num_rounds=2)
    started(config, federation(sites, config))
    moved = run_config(sites, tmp_path / "run", model=str(shutil.copytree(sites / "model", tmp_path / "moved")))
    assert started(moved, federation(sites, moved)).digest() == expected.digest()
    other = run_config(sites, tmp_path / "other", num_rounds=1, lr=0.02)
    started(other, federation(sites, other))
    shutil.copy(tmp_path / "other" / "ledger.safetensors", tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"^--lr is 0\.01, it was 0\.02 when round 1 of .*; go on with the run's own settings, or"
    ):
        build_strategy(read_config(moved))


def test_another_base_model_is_refused(sites: Path, other_model: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", num_rounds=1)
    started(config, federation(sites, config))
    text = (tmp_path / "run" / "config.toml").read_text().replace(str(sites / "model"), str(other_model))
    (tmp_path / "run" / "config.toml").write_text(text)
    with pytest.raises(LedgerError, match="is of another base model"):
        build_strategy(read_config({**config, "model": str(other_model)}))


# --- Replies that are not what was asked for ---


@pytest.fixture(scope="module")
def without_site_b(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A run in which site-b never sends anything that can be used."""
    config = run_config(sites, tmp_path_factory.mktemp("without") / "run", deadline=0.05)
    grid = federation(sites, config)
    grid.answers[102] = lying(grid.answers[102], lambda message, data: None)
    return started(config, grid)


def test_a_bad_reply_is_refused_with_node_and_reason_and_the_round_goes_on(
    sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    """Each in a round of its own, and all of them leave what a site-b that never answers leaves."""
    made = [make for make, _ in CORRUPTIONS.values()]
    config = run_config(sites, tmp_path / "run", num_rounds=len(made), eval_every=len(made), lr=1e-3)
    grid = federation(sites, config)
    grid.answers[102] = lying(grid.answers[102], lambda m, data: made[int(m.metadata.group_id) - 1](m, data))
    ledger = started(config, grid)
    rounds = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    lines = [record.getMessage() for record in heard.records if record.levelno == logging.WARNING]
    for n, (event, (name, (_, reason))) in enumerate(zip(rounds, CORRUPTIONS.items(), strict=True), start=1):
        assert set(event["refused"]) == {"site-b"}, name
        assert reason in event["refused"]["site-b"], name
        assert event["missing"] == [], name
        assert event["num_replies"] == 2, name
        assert len([line for line in lines if line.startswith(f"round {n}: reply of site-b (node 102) refused: ")]) == 1, name
    silent = run_config(sites, tmp_path / "silent", num_rounds=len(made), eval_every=len(made), lr=1e-3, deadline=0.05)
    grid = federation(sites, silent)
    grid.answers[102] = lying(grid.answers[102], lambda message, data: None)
    assert started(silent, grid).digest() == ledger.digest()


def test_a_second_reply_counts_for_nothing(sites: Path, tmp_path: Path, expected: Ledger) -> None:
    """Of two replies to one request the first counts."""
    config = run_config(sites, tmp_path / "run")
    grid = federation(sites, config)
    grid.answers[102] = lying(grid.answers[102], lambda message, data: [Message(wrap(data), reply_to=message)] * 2)
    assert started(config, grid).digest() == expected.digest()
    events = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert all(event["refused"] == {"site-b": "a second reply to one request"} for event in events)


def test_a_reply_that_flower_cannot_unpack_takes_no_other_with_it(sites: Path, tmp_path: Path, without_site_b: Ledger) -> None:
    def broken(message: Message, data: bytes) -> Any:
        raise ValueError("Invalid object")

    config = run_config(sites, tmp_path / "run")
    grid = federation(sites, config)
    grid.answers[102] = lying(grid.answers[102], broken)
    assert started(config, grid).digest() == without_site_b.digest()


def test_a_client_that_claims_more_records_than_it_came_with_is_refused(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", num_rounds=1)
    grid = federation(sites, config)
    grid.answers[102] = lying(grid.answers[102], lambda m, data: Message(wrap(another(data, num_examples=9999)), reply_to=m))
    started(config, grid)
    (event,) = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert event["refused"] == {"site-b": "num_examples is 9999; this client came with 15"}


def test_the_number_of_records_holds_for_the_whole_run(
    sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture, expected: Ledger
) -> None:
    """Also for a server that was started again."""
    short = run_config(sites, tmp_path / "run", num_rounds=1)
    started(short, federation(sites, short))
    more = run_config(sites, tmp_path / "run", num_rounds=2, min_clients=2)
    grid = federation(sites, more)
    grid.answers[102] = node(sites, "site-b", more, data=str(sites / "all.jsonl"))
    started(more, grid)
    assert "'site-b' has 60 records, and 15 when the run met it" in heard.text
    assert [sorted(e["clients"]) for e in read_metrics(tmp_path / "run") if e["event"] == "round"][-1] == ["site-a", "site-c"]


# --- Deadline and number of replies ---


def test_a_round_closes_at_its_deadline_with_what_came(sites: Path, without_site_b: Ledger, expected: Ledger) -> None:
    assert without_site_b.round == 3
    assert without_site_b.digest() != expected.digest()


def test_too_few_replies_repeat_the_round_and_then_end_the_run_with_its_ledger_safe(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", deadline=0.05)
    grid = federation(sites, config)
    honest = dict(grid.answers)
    calls = 0

    def silent_from_round_2(message: Message) -> Any:
        nonlocal calls
        calls += message.metadata.message_type == "train" and message.metadata.group_id == "2"
        return None if message.metadata.group_id == "2" else honest[message.metadata.dst_node_id](message)

    for node_id in (101, 102):
        grid.answers[node_id] = silent_from_round_2
    with pytest.raises(RunError, match=r"round 2 ended three times with fewer than 2 accepted replies; .*round 1 is"):
        started(config, grid)
    attempts = [m for m in grid.sent if m.metadata.message_type == "train" and m.metadata.group_id == "2"]
    assert len(attempts) == 9
    assert Ledger.load(tmp_path / "run" / "ledger.safetensors").round == 1


# --- Who is let in ---


def greeting(hello: bytes) -> Answer:
    return lambda message: Message(wrap(hello), reply_to=message)


def hello(**changes: Any) -> bytes:
    return Hello(**{"name": "site-x", "base": "0" * 64, "num_examples": 3, "num_eval_examples": 0, **changes}).encode()


def test_strangers_are_turned_away_with_a_clear_line(
    sites: Path, other_model: Path, tmp_path: Path, expected: Ledger, heard: pytest.LogCaptureFixture
) -> None:
    config = run_config(sites, tmp_path / "run")
    grid = federation(sites, config)
    (tmp_path / "empty.jsonl").write_text("")
    turned_away: dict[int, tuple[Answer, str]] = {
        201: (node(sites, "site-b", config), "'site-b' is at node 102 already; names must be distinct"),
        202: (node(sites, "site-c", config, model=str(other_model)), "'site-c' has base model "),
        203: (greeting(b"{}"), "not a Hello message (name "),
        204: (greeting(b"junk"), "not a Hello message"),
        205: (greeting(hello().replace(b"site-x", b"site\\nx")), "client name is 'site\\nx'"),
        206: (greeting(hello().replace(b'"num_examples":3', b'"num_examples":-3')), "not a Hello message (num_examples "),
        207: (greeting(bytes(5000)), "at most 4096 are accepted"),
        208: (node(sites, "site-d", config), "site-d.jsonl': no such file"),
        210: (
            greeting(hello(name="Site-B", base=expected.base.fingerprint)),
            "'Site-B' differs from 'site-b' in capitals only, and files of keys are called by names; rename one",
        ),
        209: (
            node(sites, "site-e", config, data=str(tmp_path / "empty.jsonl")),
            "its records or its model cannot be used; the node's log says why",
        ),
    }
    for node_id, (answer, _) in turned_away.items():
        grid.add(node_id, answer)
    assert started(config, grid).digest() == expected.digest()
    lines = [record.getMessage() for record in heard.records if record.levelno == logging.WARNING]
    for node_id, (_, reason) in turned_away.items():
        (line,) = [line for line in lines if line.startswith(f"node {node_id} is turned away: ")]
        assert reason in line
        assert "\n" not in line
    assert len(lines) == len(turned_away)


def test_a_key_that_is_registered_for_another_name_is_turned_away(
    sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    config = run_config(sites, tmp_path / "run", num_rounds=1, min_clients=2)
    grid = MemoryGrid()
    grid.add(300, node(sites, "site-a", config), name="site-b")  # asked first, and would have the name
    for node_id, name in ((301, "site-a"), (302, "site-b")):
        grid.add(node_id, node(sites, name, config), name=name)
    started(config, grid)
    assert "node 300 is turned away: it says 'site-a' and its key is registered for 'site-b'" in heard.text


def test_a_client_that_comes_late_needs_one_request_and_one_that_left_is_not_asked(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", min_clients=2, num_rounds=4)
    grid = federation(sites, config)
    late = grid.answers.pop(103), grid.infos.pop(103)
    first = grid.answers[101]

    def coming(message: Message) -> Any:
        if message.metadata.group_id == "2":
            grid.answers[103], grid.infos[103] = late
        if message.metadata.group_id == "3":
            del grid.infos[102]
        return first(message)

    grid.answers[101] = coming
    started(config, grid)
    rounds = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert [sorted(event["clients"]) for event in rounds] == [
        ["site-a", "site-b"],
        ["site-a", "site-b"],
        ["site-a", "site-b", "site-c"],
        ["site-a", "site-c"],
    ]


def test_a_node_that_starts_again_keeps_its_name(sites: Path, tmp_path: Path, expected: Ledger) -> None:
    """Without node keys it comes back under another id."""
    config = run_config(sites, tmp_path / "run")
    grid = federation(sites, config)
    first = grid.answers[101]

    def moving(message: Message) -> Any:
        if message.metadata.group_id == "2" and 102 in grid.infos:
            grid.add(402, grid.answers[102])
            del grid.infos[102]
        return first(message)

    grid.answers[101] = moving
    assert started(config, grid).digest() == expected.digest()


def test_a_round_waits_for_its_clients(sites: Path, tmp_path: Path, expected: Ledger, heard: pytest.LogCaptureFixture) -> None:
    config = run_config(sites, tmp_path / "run")
    grid = federation(sites, config)
    late = grid.infos.pop(103)
    timer = threading.Timer(0.3, lambda: grid.infos.setdefault(103, late))
    timer.start()
    assert started(config, grid).digest() == expected.digest()
    timer.join()
    assert "waiting for clients: 2 of 3 are here" in heard.text


def test_a_wait_says_for_whose_replies(
    sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a round, and of an evaluation by the clients; the reply of site-b comes once the wait for it has been told."""
    monkeypatch.setattr(exchange, "NOTE_SECONDS", 0.0)
    config = run_config(sites, tmp_path / "run", num_rounds=1, eval_data="", deadline=600.0)
    grid = federation(sites, config)
    honest, begun = node(sites, "site-b", config, eval_data=str(sites / "held-out.jsonl")), dict[str, int]()

    def slow(message: Message) -> Any:
        """Nothing, until the server has said since it was first asked for this reply that it waits for it."""
        said = heard.text[begun.setdefault(message.metadata.message_id, len(heard.text)) :]
        return honest(message) if "(site-b)" in said or "hello" in message.metadata.message_type else None

    grid.answers[102] = slow
    started(config, grid)
    assert "round 1: 3 clients are asked" in heard.text
    assert re.search(r"\bround 1: waiting for 1 of 3 replies, \d+ s; at most 600 s \(site-b\)", heard.text)
    assert re.search(r"evaluation after round 1: waiting for 1 of 1 replies, \d+ s; at most 600 s \(site-b\)", heard.text)


# --- Evaluation by the clients ---


def test_clients_evaluate_their_own_records_and_every_token_weighs_the_same(
    sites: Path, tmp_path: Path, expected: Ledger
) -> None:
    lines = (sites / "held-out.jsonl").read_text().splitlines(keepends=True)
    parts = {"site-a": lines[:2], "site-b": lines[2:]}
    config = run_config(sites, tmp_path / "run", eval_data="")
    grid = federation(sites, config)
    for node_id, name in ((101, "site-a"), (102, "site-b")):
        (tmp_path / name).write_text("".join(parts[name]))
        grid.answers[node_id] = node(sites, name, config, eval_data=str(tmp_path / name))
    assert started(config, grid).digest() == expected.digest()
    run = simulated(sites, tmp_path / "simulated")
    run.train()
    ours, theirs = (
        [event for event in read_metrics(tmp_path / name) if event["event"] == "evaluation"] for name in ("run", "simulated")
    )
    assert [event["server_round"] for event in ours] == [0, 1, 2, 3]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
        assert (mine["num_tokens"], mine["num_examples"]) == (other["num_tokens"], other["num_examples"])
        assert sorted(mine["clients"]) == ["site-a", "site-b"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": float("nan")}, "must be finite"),
        ({"num_tokens": -1}, "num_tokens"),
        ({"num_tokens": 10**30}, "num_tokens"),
        ({"num_tokens": 10**6}, "it claims 1000000 response tokens; its hello said "),
        ({"num_examples": 100}, "it claims 100 records; its hello said 15"),
        ({"loss": -0.5}, "loss is -0.5; 0 to "),
        ({"loss": 1e9}, "loss is 1e+09; 0 to "),
        ({"reward": 1e6}, "it tells a reward, which objective loss has none of"),
        ({"ledger": "0" * 64}, "it is about ledger 0000000000000000"),
    ],
    ids=str,
)
def test_a_bad_evaluation_is_refused(
    sites: Path, tmp_path: Path, heard: pytest.LogCaptureFixture, change: dict[str, Any], reason: str
) -> None:
    config = run_config(sites, tmp_path / "run", eval_data="", num_rounds=1)
    grid = federation(sites, config, eval_data=str(sites / "held-out.jsonl"))
    honest = grid.answers[102]

    def answer(message: Message) -> Message:
        reply = honest(message)
        assert isinstance(reply, Message)
        if message.metadata.message_type != "evaluate":
            return reply
        changed = Evaluation.model_construct(**{**Evaluation.decode(unwrap(reply)).model_dump(), **change})
        return Message(wrap(json.dumps(changed.model_dump()).encode()), reply_to=message)

    grid.answers[102] = answer
    started(config, grid)
    events = [event for event in read_metrics(tmp_path / "run") if event["event"] == "evaluation"]
    assert [sorted(event["clients"]) for event in events] == [["site-a", "site-c"]] * 2
    assert "evaluation of site-b refused: " in heard.text
    assert reason in heard.text


# --- Settings ---


def test_settings_are_kebab_case_and_empty_means_unset(sites: Path, tmp_path: Path) -> None:
    config = read_config(run_config(sites, tmp_path / "run", loss_clip="", data=""))
    assert (config.num_rounds, config.loss_clip, config.expected_clients) == (3, None, 3)
    assert not isinstance(config, EngineConfig)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"nonsense": 1}, "run-config key 'nonsense' is unknown; expected one of: aggregator, algorithm, "),
        ({"lr": ""}, "run-config has no lr; set it in pyproject.toml or with flwr run --run-config"),
        ({"num-rounds": 0}, "run-config num-rounds is '0': "),
        ({"deadline": -1.0}, "run-config deadline is '-1.0': "),
        ({"eval-data": "/no/such"}, "run-config eval-data is '/no/such': no such file"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line(sites: Path, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config({**run_config(sites, tmp_path / "run"), **change})
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("node_config", "text"),
    [
        ({"data": "x.jsonl"}, "node-config has no name; start the SuperNode with --node-config"),
        ({"name": "x"}, "node-config has no data"),
        ({"name": "x", "data": "/no/such"}, "node-config data is '/no/such': no such file"),
        ({"name": "x", "data": "x", "lr": 1}, "node-config key 'lr' is unknown; expected one of: name, model, data, eval-data"),
        ({"partition-id": 0, "num-partitions": 3}, "run-config has no data; the simulation engine"),
    ],
    ids=str,
)
def test_bad_node_settings_are_one_line(sites: Path, tmp_path: Path, node_config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        node_settings(run_config(sites, tmp_path / "run"), node_config)
    assert text in str(caught.value)


def test_the_simulation_engine_needs_as_many_nodes_as_clients(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", data=str(sites / "all.jsonl"), num_clients=5)
    with pytest.raises(
        ConfigError, match=r"num-clients is 5, the federation has 3 SuperNodes; start it with .*num-supernodes=5"
    ):
        node_settings(config, {"partition-id": 0, "num-partitions": 3})


def test_simulated_nodes_hold_what_a_simulation_deals_out(sites: Path, tmp_path: Path) -> None:
    """As Flower's simulation engine numbers them; held-out records are evaluated on the server."""
    config = run_config(
        sites, tmp_path / "run", data=str(sites / "joint.jsonl"), num_clients=3, partition="iid", eval_data="", num_rounds=2
    )
    ledger = started(config, engine(config, 3))
    run = simulated(sites, tmp_path / "simulated", partition="iid", num_clients=3, eval_data=None, num_rounds=2)
    assert ledger.digest() == run.train().digest()
    losses = [[e["eval_loss"] for e in read_metrics(tmp_path / n) if e["event"] == "evaluation"] for n in ("run", "simulated")]
    assert losses[0] == losses[1]
