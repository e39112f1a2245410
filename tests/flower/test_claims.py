"""What docs/security.md says of a federation in the field, where no other test says it; its last table names them all."""

import ast
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from tests.support.flower_grid import MemoryGrid, as_in_a_task, federation, node, run_config, started
from tests.support.flower_sites import SITES, make_sites

from fedkseed.errors import DataError, FedKSeedError, ModelError, ProtocolError
from fedkseed.flower.client_app import WITHHELD
from fedkseed.flower.envelope import unwrap, wrap
from fedkseed.flower.participant import Participant
from fedkseed.kseed.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
SECRET = "zebra-17"


@pytest.fixture(scope="module", autouse=True)
def in_a_task() -> Iterator[None]:
    with as_in_a_task():
        yield


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


def heard(grid: MemoryGrid) -> list[Message]:
    """Every reply, from now on."""
    replies: list[Message] = []

    def listening(answer: Callable[[Message], Any]) -> Callable[[Message], Any]:
        def answered(message: Message) -> Any:
            reply = answer(message)
            replies.append(reply)
            return reply

        return answered

    grid.answers = {node_id: listening(answer) for node_id, answer in grid.answers.items()}
    return replies


def sizes(messages: list[Message]) -> set[int]:
    return {len(unwrap(message)) for message in messages}


@pytest.mark.parametrize(
    ("changes", "request_bytes", "reply_bytes"),
    [
        ({"num_seeds": 4096, "local_steps": 200}, (8_600, 8_800), (450, 550)),
        ({"algorithm": "fedkseed-grad", "num_seeds": 65536, "wire": "sign"}, (8_192, 8_700), (8_192, 8_700)),
    ],
)
def test_messages_are_as_large_as_the_page_says(
    sites: Path, tmp_path: Path, changes: dict[str, Any], request_bytes: tuple[int, int], reply_bytes: tuple[int, int]
) -> None:
    """The request of a second round, which has all coefficients or what a node lacks; the reply; hello and evaluation."""
    config = run_config(sites, tmp_path / "run", num_rounds=2, min_clients=1, min_replies=1, eval_data="", **changes)
    grid = MemoryGrid()
    own = {"eval_data": str(sites / "held-out.jsonl"), "state": str(tmp_path / "state")}
    grid.add(101, node(sites, "site-a", config, **own))
    replies = heard(grid)
    started(config, grid)

    def of(kind: str) -> list[Message]:
        return [message for message in replies if message.metadata.message_type.startswith(kind)]

    asked = [message for message in grid.sent if message.metadata.message_type == "train"]
    assert all(request_bytes[0] < size < request_bytes[1] for size in sizes(asked[1:]))
    assert all(reply_bytes[0] < size < reply_bytes[1] for size in sizes(of("train")))
    assert all(100 < size < 220 for size in sizes(of("query")) | sizes(of("evaluate")))


def test_no_message_holds_a_word_of_a_record(sites: Path, tmp_path: Path) -> None:
    """Neither as text, nor as the ids that the tokenizer makes of it."""
    config = run_config(sites, tmp_path / "run", num_rounds=1, eval_data="")
    records = [json.loads(line) for line in (sites / "site-a.jsonl").read_text().splitlines()]
    secret = [record | {"context": f"{SECRET} {record['context']}"} for record in records]
    (tmp_path / "site-a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in secret))
    grid = federation(sites, config)
    grid.answers[101] = node(
        sites, "site-a", config, data=str(tmp_path / "site-a.jsonl"), eval_data=str(tmp_path / "site-a.jsonl")
    )
    replies = heard(grid)
    started(config, grid)
    words = {record["response"] for record in records} | {record["instruction"] for record in records} | {SECRET}
    assert {"query.hello", "train", "evaluate"} == {message.metadata.message_type for message in grid.sent}
    for message in [*grid.sent, *replies]:
        assert not [word for word in words if word.encode() in unwrap(message)]


BAD_DATA = {
    "a table without a header": ("d.csv", f"{SECRET},the answer\nanother,one\n"),
    "two columns of one name": ("d.csv", f"{SECRET},{SECRET}\n1,2\n"),
    "no JSON": ("d.jsonl", f'{{"instruction": "{SECRET}", \n'),
    "another key": ("d.jsonl", f'{{"{SECRET}": "x"}}\n'),
    "a number": ("d.jsonl", f'{{"instruction": "{SECRET}", "response": 7}}\n'),
    "no response": ("d.jsonl", f'{{"instruction": "{SECRET}", "response": ""}}\n'),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_an_error_of_a_nodes_data_tells_the_server_nothing_of_it(
    sites: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A header that is missing makes column names of a record's text: why it cannot be read stands in the node's own log."""
    file, text = BAD_DATA[name]
    (tmp_path / file).write_text(text)
    config = run_config(sites, tmp_path / "run", num_rounds=1, min_clients=2)
    grid = federation(sites, config)
    grid.answers[101] = node(sites, "site-a", config, data=str(tmp_path / file))
    replies = heard(grid)
    with caplog.at_level(logging.ERROR, "flwr"):
        started(config, grid)
    reasons = [reply.error.reason for reply in replies if reply.has_error()]
    assert reasons == [WITHHELD]
    assert str(tmp_path / file) in caplog.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError(SECRET), WITHHELD),
        (ModelError(SECRET), WITHHELD),
        (KeyError(SECRET), "KeyError; the node's log says what went wrong"),
        (ProtocolError("the request is of another base"), "the request is of another base"),
        (FedKSeedError("a line"), "a line"),
    ],
)
def test_what_a_node_tells_of_an_error(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def failing(participant: Participant, kind: str, data: bytes) -> bytes:
        raise error

    monkeypatch.setattr(Participant, "answer", failing)
    config = run_config(sites, tmp_path / "run")
    message = Message(wrap(b"hello"), 101, "query.hello", ttl=9.0)
    reply = node(sites, "site-a", config)(message)
    assert isinstance(reply, Message)
    assert reply.error.reason == told


def test_the_published_ledger_does_not_say_who_was_there(sites: Path, tmp_path: Path) -> None:
    """Nor does the checkpoint, whose settings name no client."""
    ledger = started(config := run_config(sites, tmp_path / "run"), federation(sites, config))
    for data in (ledger.published().encode(), (tmp_path / "run" / "ledger.safetensors").read_bytes()):
        assert not [name for name in SITES if name.encode() in data]
    assert Ledger.decode(ledger.published().encode()).digest() == ledger.published().digest()


def test_the_superlink_listens_to_its_own_machine_alone_and_installs_nothing() -> None:
    deployment = ROOT / "examples" / "flower" / "deployment"
    assert re.search(
        r"flower-superlink --host 127\.0\.0\.1 .*--enable-supernode-auth", (deployment / "superlink.sh").read_text()
    )
    environment = (deployment / "environment.sh").read_text()
    for line in (
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
        "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_DISABLE_UPDATE_CHECK=1",
    ):
        assert f"export {line}\n" in environment
    for script in ("superlink.sh", "supernode.sh"):
        assert "environment.sh" in (deployment / script).read_text()


# --- The page itself ---


def test_every_claim_of_the_page_names_a_test_that_there_is() -> None:
    """The table at the end of docs/security.md: each test is one of the file that stands before it."""
    page = (ROOT / "docs" / "security.md").read_text()
    _, table = page.split("\n## Which test holds what\n")
    rows = [row for row in table.splitlines() if row.startswith("| ") and "`tests/" in row]
    assert len(rows) > 20
    for row in rows:
        for file, names in re.findall(r"`(tests/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", row):
            tree = ast.parse((ROOT / file).read_text())
            there = {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)}
            missing = set(re.findall(r"`(\w+)`", names)) - there
            assert not missing, (file, missing)
        assert row.count("`tests/") == len(re.findall(r"`(tests/[\w/]+\.py)`: `", row)), row
