"""What a run is said to take: it leaves no trace, and its bytes are nearly those that are moved."""

from pathlib import Path
from typing import Any

import pytest
from tests.support.runs import read_metrics, simulation
from tests.support.tiny import tiny_settings

from fedkseed.federation.algorithms import ALGORITHMS

GRAD = {"algorithm": "fedkseed-grad", "noise": "hadamard"}
CASES: dict[str, dict[str, Any]] = {
    "scalars": {"local_steps": 40},
    "directions": {"local_steps": 40, "directions": 8, "lr": 1e-4},
    "int4": GRAD | {"wire": "int4"},
    "sign": GRAD | {"wire": "sign", "num_rounds": 6},
    "adam": GRAD | {"local_optimizer": "adam"},
    "two-point clients": GRAD | {"two_point_clients": 0.5},
    "pages": GRAD | {"wire": "int4", "rounds_per_page": 1, "num_rounds": 8},
    "fedavg": {"algorithm": "fedavg"},
    "fedzo": {"algorithm": "fedzo"},
    "fedit": {"algorithm": "fedit"},
    "fedprompt": {"algorithm": "fedprompt", "num_virtual_tokens": 4},
}


def settings(tiny: Path, case: dict[str, Any]) -> dict[str, Any]:
    facts = ALGORITHMS[case.get("algorithm", "fedkseed")]
    own = {name: value for name, value in tiny_settings(tiny).items() if facts.takes(name)}
    return own | {"num_seeds": 4096} | case if facts.takes("num_seeds") else own | case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_forecast_changes_no_bit_and_tells_what_is_moved(tiny: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    plain, _ = simulation(tmp_path / "plain", settings(tiny, case))
    asked, _ = simulation(tmp_path / "asked", settings(tiny, case))
    weights = {name: value.clone() for name, value in asked.model.state_dict().items()}
    found = asked.forecast()
    assert found is not None
    assert all(value.equal(weights[name]) for name, value in asked.model.state_dict().items())
    assert asked.train().digest() == plain.train().digest()
    losses = [
        [e["eval_loss"] for e in read_metrics(tmp_path / name) if e["event"] == "evaluation"] for name in ("plain", "asked")
    ]
    assert losses[0] == losses[1]
    rounds = [event for event in read_metrics(tmp_path / "asked") if event["event"] == "round"]
    near = 0.35 if case.get("wire") == "sign" else 0.15  # how many rounds' signs a client lacks is chance
    assert found.bytes_down == pytest.approx(sum(event["bytes_down"] for event in rounds) / len(rounds), rel=near)
    if "two_point_clients" not in case:  # whose replies differ
        assert found.bytes_up == pytest.approx(sum(event["bytes_up"] for event in rounds) / len(rounds), rel=near)
    assert found.replies == len(rounds) * 2
    assert set(found.seconds) == {"passes", "noise", "rebuild", "evaluation"}
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert found.total_seconds > 0


def test_a_run_that_goes_on_is_told_what_is_left(tiny: Path, tmp_path: Path) -> None:
    run, _ = simulation(tmp_path / "run", tiny_settings(tiny))
    before = run.forecast()
    run.train()
    assert before is not None
    assert run.forecast() is None
