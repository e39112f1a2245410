"""Nodes in the field that hide their records: their own choice, an account on their disk, and a budget that holds."""

from pathlib import Path
from typing import Any

import pytest
from tests.support.flower_grid import federation, run_config, started
from tests.support.flower_sites import SITES
from tests.support.runs import read_metrics

from fedkseed.errors import ConfigError, PrivacyError
from fedkseed.flower.budget import KeptHistory
from fedkseed.flower.config import node_settings, read_config
from fedkseed.flower.envelope import Hello, unwrap
from fedkseed.kseed.messages import TrainReply
from fedkseed.privacy import Privacy
from fedkseed.privacy.accountant import get_epsilon

pytestmark = pytest.mark.usefixtures("in_a_task")

NODE: dict[str, Any] = {"dp": "record", "clip_norm": 1.0, "noise_multiplier": 2.0}
PRIVACY = Privacy(unit="record", clip_norm=1.0, noise_multiplier=2.0, epsilon=3.0)


def test_nodes_tell_nothing_in_clear_and_count_what_they_spend(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", weighting="equal")
    grid = federation(sites, config, **NODE, state=str(tmp_path / "state"))
    heard: list[Any] = []
    for node_id, answer in list(grid.answers.items()):
        grid.answers[node_id] = lambda message, answer=answer: heard.append(answer(message)) or heard[-1]  # type: ignore[misc]
    assert started(config, grid).round == 3
    said = [unwrap(reply) for reply in heard]
    hellos = [Hello.decode(data) for data in said if data.startswith(b"{")]
    replies = [TrainReply.decode(data) for data in said if not data.startswith(b"{")]
    assert {hello.num_examples for hello in hellos} == {reply.num_examples for reply in replies} == {1}
    assert {reply.loss for reply in replies} == {None}
    assert len(replies) == 9
    assert KeptHistory(tmp_path / "state", SITES[0]).load() == (((2.0, 2 / 12, 18),), "record")
    assert [event["train_loss"] for event in read_metrics(tmp_path / "run") if event["event"] == "round"] == [None] * 3


def test_a_node_whose_budget_is_spent_answers_no_more(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", weighting="equal", min_replies=1)
    budget = (get_epsilon(((2.0, 2 / 12, 6),), 1e-5) + get_epsilon(((2.0, 2 / 12, 12),), 1e-5)) / 2
    grid = federation(sites, config, **NODE, epsilon=budget, state=str(tmp_path / "state"))
    started(config, grid)
    first, *later = (event["refused"] for event in read_metrics(tmp_path / "run") if event["event"] == "round")
    assert first == {}
    assert len(later) == 2
    for refused in later:  # the smallest site; the others' records are drawn less often
        assert f"this round would make it {get_epsilon(((2.0, 2 / 12, 12),), 1e-5):.3f}" in refused[SITES[0]]
    assert KeptHistory(tmp_path / "state", SITES[0]).load() == (((2.0, 2 / 12, 6),), "record")


def test_a_server_that_is_trusted_hides_clients_and_counts(sites: Path, tmp_path: Path) -> None:
    config = run_config(
        sites, tmp_path / "run", weighting="equal", dp="client", clip_norm=1.0, noise_multiplier=5.0, epsilon=1.2
    )
    ledger = started(config, federation(sites, config))
    found = [event["epsilon"] for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    expected = [get_epsilon(((5.0, 1.0, n),), 1e-5) for n in (1, 2, 3)]
    assert found == expected[: len(found)]
    assert ledger.round == len(found) == 2
    assert expected[1] <= 1.2 < expected[2]


def test_an_account_holds_over_runs_and_is_never_taken_for_an_empty_one(tmp_path: Path) -> None:
    kept = KeptHistory(tmp_path / "state", "a/b")
    first = kept.spend(PRIVACY, 0.1, 20)
    assert first == get_epsilon(((2.0, 0.1, 20),), 1e-5)
    other = KeptHistory(tmp_path / "state", "a/b")
    assert other.spend(PRIVACY.model_copy(update={"noise_multiplier": 3.0}), 0.1, 5) > first
    before = kept.load()
    assert before == (((2.0, 0.1, 20), (3.0, 0.1, 5)), "record")
    with pytest.raises(PrivacyError, match=r"the privacy budget is spent: epsilon is .* and the node allows 3"):
        kept.spend(PRIVACY, 1.0, 50)
    assert kept.load() == before
    assert KeptHistory(tmp_path / "state", "b").load() == ((), None)
    damaged = (b"", b"[[2.0, 0.1", b"[[2.0, 0.1, -3]]", b'{"a": 1}', b"[[2, 0.1, 1], 3]", b"{}", b"[]", b'""', b"null")
    infinite = (b"[[2.0, 0.1, 1e999]]", b"[[Infinity, 1.0, 9]]", b'{"unit": "all", "releases": [[2.0, 0.1, 1]]}')
    for damage in (*damaged, *infinite):
        kept.path.write_bytes(damage)
        with pytest.raises(PrivacyError, match="the account of what was released cannot be read"):
            kept.spend(PRIVACY, 0.1, 1)


def test_an_account_of_records_is_none_of_the_client(tmp_path: Path) -> None:
    """What hid single records bounds nothing for the client as a whole; what hid the client hid each record too."""
    client = Privacy(unit="client", clip_norm=1.0, noise_multiplier=8.0, epsilon=10.0)
    kept = KeptHistory(tmp_path, "a")
    kept.spend(client, 1.0, 1)
    assert kept.load() == (((8.0, 1.0, 1),), "client")
    kept.spend(PRIVACY, 0.1, 1)
    assert kept.load() == (((8.0, 1.0, 1), (2.0, 0.1, 1)), "record")
    with pytest.raises(PrivacyError, match="what was released hid single records, which says nothing of the client as a whole"):
        kept.spend(client, 1.0, 1)
    assert kept.load() == (((8.0, 1.0, 1), (2.0, 0.1, 1)), "record")
    kept.path.write_text("[[2.0, 0.1, 20]]")  # of before the unit was kept: of a tenth of the records
    with pytest.raises(PrivacyError, match="what was released hid single records"):
        kept.spend(client, 1.0, 1)
    kept.path.write_text("[[8.0, 1.0, 2]]")  # of the client, or of records that were all drawn
    kept.spend(client, 1.0, 1)
    assert kept.load() == (((8.0, 1.0, 3),), None)
    kept.spend(PRIVACY, 0.1, 1)
    assert kept.load()[1] == "record"


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({"dp": "record"}, "node-config has no clip-norm; dp, clip-norm and noise-multiplier belong together"),
        ({"clip-norm": 1.0}, "node-config has no dp; dp, clip-norm and noise-multiplier belong together"),
        ({"dp": "all", "clip-norm": 1.0, "noise-multiplier": 1.0}, "node-config dp is 'all': input should be 'record' or"),
        ({"dp": "record", "clip-norm": -1.0, "noise-multiplier": 1.0}, "node-config clip-norm is '-1.0': input should be"),
        (
            {"dp": "record", "clip-norm": 1.0, "noise-multiplier": 1.0, "eval-data": "site-a.jsonl"},
            "and dp is record: an evaluation tells the loss of its records as it is; leave one of them out",
        ),
    ],
)
def test_half_a_choice_is_refused(sites: Path, tmp_path: Path, node_config: dict[str, Any], message: str) -> None:
    own = {"name": "a", "data": str(sites / "site-a.jsonl"), **node_config}
    if "eval-data" in own:
        own["eval-data"] = str(sites / own["eval-data"])
    with pytest.raises(ConfigError, match=message):
        node_settings(run_config(sites, tmp_path / "run"), own)


def test_a_choice_is_read_as_a_script_writes_it(sites: Path, tmp_path: Path) -> None:
    """Empty texts are no choice; numbers may be texts."""
    own = {"name": "a", "data": str(sites / "site-a.jsonl")}
    keys = ("dp", "clip-norm", "noise-multiplier", "epsilon", "delta")
    config = run_config(sites, tmp_path / "run", weighting="equal")
    assert node_settings(config, own | dict.fromkeys(keys, "")).privacy is None
    found = node_settings(config, own | dict(zip(keys, ("record", "1.0", "2", "3", ""), strict=True))).privacy
    assert found == PRIVACY


def test_a_private_node_does_not_count_epochs_by_what_it_hides(sites: Path, tmp_path: Path) -> None:
    own = {"name": "a", "data": str(sites / "site-a.jsonl"), "dp": "record", "clip-norm": 1.0, "noise-multiplier": 2.0}
    config = run_config(sites, tmp_path / "run", weighting="equal", local_unit="epochs", local_steps=1)
    with pytest.raises(ConfigError, match=r"^node-config dp is record, .* local-unit is epochs, .* local-unit steps$"):
        node_settings(config, own)


def test_a_private_node_is_not_weighed_by_what_it_hides(sites: Path, tmp_path: Path) -> None:
    """It says that it has 1 record, and would count for next to nothing beside others, without a word."""
    own = {"name": "a", "data": str(sites / "site-a.jsonl"), "dp": "record", "clip-norm": 1.0, "noise-multiplier": 2.0}
    with pytest.raises(ConfigError, match=r"^node-config dp is record, .* weighting is examples, .* weighting equal$"):
        node_settings(run_config(sites, tmp_path / "run"), own)


def test_no_request_and_no_run_chooses_for_a_node(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", weighting="equal", dp="record", clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ConfigError, match="dp is record, which is for each node to say; leave it out, and give dp"):
        read_config(config)
    config = run_config(sites, tmp_path / "run", weighting="equal", dp="client", clip_norm=1.0, epsilon=1.0)
    with pytest.raises(ConfigError, match="dp is client and noise-multiplier is missing"):
        read_config(config)
