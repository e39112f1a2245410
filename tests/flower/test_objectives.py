"""Scores and preferences on Flower: the ledger of a simulation, each node's own function, and no code that comes with a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.drivers import DRIVERS
from tests.support.flower_grid import federation, run_config, started
from tests.support.flower_sites import SITES, simulated
from tests.support.runs import read_metrics

from fedkseed.errors import ConfigError
from fedkseed.flower.config import node_settings, read_config
from fedkseed.flower.envelope import Evaluation, unwrap

pytestmark = pytest.mark.usefixtures("in_a_task")
SCORED = {"directions": 2, "local_steps": 2, "max_new_tokens": 3, "num_rounds": 2}
FUNCTION = "tests.support.rewards:shortness"


def rewards(run: Path) -> list[float]:
    return [event["eval_reward"] for event in read_metrics(run) if event["event"] == "evaluation"]


@pytest.mark.parametrize("driver", list(DRIVERS.values())[1:], ids=list(DRIVERS)[1:])
def test_scores_are_those_of_a_simulation_whoever_evaluates(sites: Path, tmp_path: Path, driver: Any) -> None:
    chosen = {**SCORED, "objective": "rouge-l"}
    expected = simulated(sites, tmp_path / "simulated", **chosen).train()
    assert expected.coefficients.any()
    found = driver(sites, tmp_path / "run", **chosen)
    assert found.ledger.digest() == expected.digest()
    assert rewards(tmp_path / "run") == pytest.approx(rewards(tmp_path / "simulated"))


def test_each_node_names_its_own_function_and_nothing_that_travels_does(sites: Path, tmp_path: Path) -> None:
    expected = simulated(sites, tmp_path / "simulated", **SCORED, objective=FUNCTION).train()
    assert expected.coefficients.any()
    config = run_config(sites, tmp_path / "run", **SCORED, objective="own")
    grid = federation(sites, config, objective=FUNCTION)
    assert started(config, grid).digest() == expected.digest()
    assert not any(word in unwrap(message) for message in grid.sent for word in (b"rewards", b"shortness", b"own"))


def test_a_run_that_names_code_is_refused_by_server_and_node(sites: Path, tmp_path: Path) -> None:
    config = run_config(sites, tmp_path / "run", objective="os:getcwd")
    with pytest.raises(ConfigError, match="objective 'os:getcwd' names code, which a run may not bring to its nodes"):
        read_config(config)
    with pytest.raises(ConfigError, match="names code"):
        node_settings(config, {"name": "a", "data": str(sites / "site-a.jsonl"), "objective": FUNCTION})


@pytest.mark.parametrize(("named", "message"), [(None, "node-config objective is None"), ("exact-match", "is 'exact-match'")])
def test_a_node_without_a_function_says_so(sites: Path, tmp_path: Path, named: str | None, message: str) -> None:
    config = run_config(sites, tmp_path / "run", **SCORED, objective="own")
    own = {"name": "a", "data": str(sites / "site-a.jsonl"), **({"objective": named} if named else {})}
    with pytest.raises(ConfigError, match=f"{message} and the run leaves its objective to the nodes"):
        node_settings(config, own)


def test_a_nodes_function_is_passed_over_where_the_run_has_an_objective(sites: Path, tmp_path: Path) -> None:
    own = {"name": "a", "data": str(sites / "site-a.jsonl"), "objective": "no_such_module:score"}
    assert node_settings(run_config(sites, tmp_path / "run"), own).config.objective == "loss"


@pytest.mark.parametrize("changes", [{}, {"algorithm": "fedkseed-grad", "rounds_per_page": 1}], ids=str)
def test_preferences_are_measured_against_the_base_wherever_a_node_is(
    sites: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The model of a node that lives on is at the last round's weights when the next message comes."""
    worse = {"dog": "cat", "cat": "dog", "red": "blue", "blue": "red", "apple": "pear", "pear": "apple"}
    for name in ("model", *(f"{name}.jsonl" for name in (*SITES, "joint", "held-out"))):
        if name == "model":
            (tmp_path / name).symlink_to(sites / name)
            continue
        lines = [json.loads(line) for line in (sites / name).read_text().splitlines()]
        pairs = [{**line, "rejected": worse[line["response"]]} for line in lines]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in pairs))
    chosen = {"objective": "dpo", "local_steps": 2, "num_seeds": 128, **changes}
    expected = simulated(tmp_path, tmp_path / "simulated", **chosen).train()
    assert expected.coefficients.any()
    config = run_config(tmp_path, tmp_path / "run", **chosen)
    assert started(config, federation(tmp_path, config)).digest() == expected.digest()
    assert rewards(tmp_path / "run") == rewards(tmp_path / "simulated")


def test_an_evaluation_without_a_reward_is_the_message_of_before() -> None:
    plain = Evaluation(ledger="ab" * 32, loss=1.0, num_examples=1, num_tokens=2)
    assert b"reward" not in plain.encode()
    assert Evaluation.decode(plain.encode()) == plain
    told = Evaluation(ledger="ab" * 32, loss=1.0, num_examples=1, num_tokens=2, reward=-0.5)
    assert Evaluation.decode(told.encode()).reward == -0.5
