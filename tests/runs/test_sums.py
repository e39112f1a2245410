"""Simulations whose server sees sums only: the ledger of the same fixed-point sum without masks, and nothing of one client."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.runs import Watcher, read_metrics, simulation, trained
from tests.support.tiny import tiny_settings

from fedkseed.errors import ConfigError
from fedkseed.federation import Summed, shares
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs import extras
from fedkseed.runs.algorithms import roles_of
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation
from fedkseed.secure.client import Trained, coded
from fedkseed.secure.fixed_point import FixedPoint

GRADIENTS = {"algorithm": "fedkseed-grad", "num_seeds": 128, "rounds_per_page": 2, "lr": 0.05, "local_steps": 2}
SCORES = {
    "objective": "tests.support.rewards:length", "directions": 2, "local_steps": 2, "max_new_tokens": 3, "temperature": 1.0,
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "scalars": {"num_rounds": 2},
    "scores as z-scores": {**SCORES, "num_rounds": 2},
    "scores as ranks": {**SCORES, "num_rounds": 2, "scaling": "ranks"},
    "several directions, steps dropped": {
        "num_rounds": 2,
        "directions": 3,
        "local_steps": 2,
        "loss_clip": 0.06,
        "secure_clip": 3.0,
    },
    "changes": GRADIENTS,
    "changes of one bit, Adam on the server": {**GRADIENTS, "wire": "sign", "server_optimizer": "adam", "server_lr": 0.01},
}
rows = pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)


def settings_of(tiny: Path, **changes: Any) -> dict[str, Any]:
    return tiny_settings(tiny, **{"fraction_train": 1.0, "secure_sums": "on", "eval_every": 3, **changes})


def without_masks(path: Path, settings: dict[str, Any]) -> Ledger:
    """The same rounds, in which every client's fixed-point numbers lie open."""
    run, _ = simulation(path, settings)
    server, config = run.server, run.config
    while not server.finished:
        requests = server.plan()
        sizes = server.sizes()
        weights = shares(sizes, 0.5)
        coding, total = FixedPoint(config.secure_clip, len(requests)), np.zeros(config.num_seeds + 3, np.uint32)
        for request in reversed(requests):  # in any order
            data = request.encode()
            vector, reply = roles_of(config.facts).vector(data, run.clients[request.client].answer(data))
            total += coded(Trained(vector, reply.loss, reply.num_dropped), coding, weights[request.client])
        mean = coding.decode(total[: config.num_seeds], sum(weights.values()))
        server.absorb_sum(Summed(weights, mean, None, int(total[-1])), (), ())
    assert isinstance(server.checkpoint, Ledger)
    return server.checkpoint


@rows
def test_the_ledger_is_that_of_the_sum_without_masks_bit_for_bit(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = settings_of(tiny, **changes)
    ledger, metrics = trained(tmp_path / "sums", settings)
    assert ledger.digest() == without_masks(tmp_path / "open", settings).digest()
    rounds = [event for event in metrics if event["event"] == "round"]
    scored = "objective" in changes
    assert all(event["train_reward" if scored else "train_loss"] > 0 for event in rounds)
    hidden = {"loss", "reward"} if scored else {"loss"}
    for event in rounds:
        assert all(set(one) == {"weight", *hidden} for one in event["clients"].values())
        assert all(one[name] is None for one in event["clients"].values() for name in hidden)
        assert "projected_grad_rms" not in event
        assert "change_norm" not in event


def test_no_client_is_alone_with_a_seed(tiny: Path, tmp_path: Path) -> None:
    """The server knows who steps along which seeds: of a seed that one client steps along, the sum is that client's number."""
    for sums, alike in (("on", True), ("off", False)):
        run, _ = simulation(tmp_path / sums, settings_of(tiny, secure_sums=sums))
        requests = run.server.plan()
        assert (len({request.indices for request in requests}) == 1) is alike
        assert (len({roles_of(run.config.facts).terms(request.encode()) for request in requests}) == 1) is alike


def test_changes_are_on_the_same_terms_whatever_pages_a_client_has(tiny: Path, tmp_path: Path) -> None:
    run, _ = simulation(tmp_path / "run", settings_of(tiny, **GRADIENTS))
    run.train()
    again, _ = simulation(tmp_path / "other", settings_of(tiny, **GRADIENTS, num_rounds=4))
    again.server.ledger, again.server._seen = run.server.ledger, {"client-1": (1, 0)}
    requests = again.server.plan()
    assert len({request.have + len(request.patches[0].parts) for request in requests}) == 2
    terms = roles_of(run.config.facts).terms
    assert len({terms(request.encode()) for request in requests}) == 1
    assert terms(requests[0].encode()) != terms(replace(requests[0], lr=1e-9).encode())


@pytest.mark.parametrize(
    "changes", [{"shared_seeds": "on"}, {"shared_seeds": "on", **SCORES}, GRADIENTS], ids=["scalars", "scores", "changes"]
)
def test_it_learns_what_a_run_without_sums_learns(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Beyond the rounding of 2^-31 of the clip, and where clients weigh less than a half, nothing differs."""
    changes = {**changes, "aggregator": "mean", "weighting": "equal", "num_rounds": 2}
    ledger, metrics = trained(tmp_path / "sums", settings_of(tiny, **changes))
    plain, usual = trained(tmp_path / "plain", settings_of(tiny, **changes, secure_sums="off"))
    moved = np.abs(plain.coefficients).max()
    assert np.abs(ledger.coefficients - plain.coefficients).max() < 0.01 * moved
    ours, theirs = ([event for event in each if event["event"] == "round"] for each in (metrics, usual))
    assert [event["dropped_steps"] for event in ours] == [event["dropped_steps"] for event in theirs]
    told = "train_reward" if "objective" in changes else "train_loss"
    assert [event[told] for event in ours] == pytest.approx([event[told] for event in theirs], rel=1e-3)


def test_numbers_are_clipped_before_they_are_summed(tiny: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny, num_rounds=1, secure_clip=1e-4, weighting="equal")
    ledger, _ = trained(tmp_path / "run", settings)
    lr = settings["lr"]
    assert np.abs(ledger.coefficients).max() <= lr * 1e-4 * 1.001
    assert np.count_nonzero(ledger.coefficients) > 1


def test_a_run_goes_on_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny, **GRADIENTS)
    expected, _ = trained(tmp_path / "whole", settings)
    trained(tmp_path / "parts", {**settings, "num_rounds": 2})
    config, watcher = build(settings), Watcher()
    run = Simulation(RunFolder.open(tmp_path / "parts"), prepare(config, watcher), watcher, config=config)
    run.train()
    assert run.server.checkpoint.digest() == expected.digest()


def test_bytes_that_travel_are_counted(tiny: Path, tmp_path: Path) -> None:
    _, metrics = trained(tmp_path / "run", settings_of(tiny, num_seeds=4096))
    event = next(event for event in metrics if event["event"] == "round")
    assert 4 * (4096 + 3) < event["bytes_up"] < 4 * (4096 + 3) + 1000
    assert 2 * 4096 < event["bytes_down"] < 2 * 4096 + 2000


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"algorithm": "fedkseed-pro"},
        "--secure-sums is 'on' and --algorithm fedkseed-pro does not take it; leave it out, or choose one of fedkseed, "
        "fedkseed-grad",
    ),
    ({**GRADIENTS, "two_point_clients": 0.5}, "--secure-sums is on and --two-point-clients 0.5"),
    ({"local_unit": "epochs", "local_steps": 1}, "--secure-sums is on and --local-unit epochs; whoever takes more steps"),
    ({"aggregator": "clipped"}, "--secure-sums is on and --aggregator clipped; a rule must see each reply, which a sum hides"),
    ({"max_share": 0.6}, "--secure-sums is on and --max-share 0.6; a sum that mostly is one client's tells of it"),
    ({"audit_log": "on"}, "--secure-sums and --audit-log are on; the log keeps each client's numbers"),
    ({"secure_clip": 1e-7}, "--secure-clip is '1e-07'"),
    ({"secure_clip": 1e10}, "--secure-clip is '10000000000.0'"),
    ({"secure_sums": "yes"}, "--secure-sums is 'yes'"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=str)
def test_settings_that_no_sum_hides_are_refused(tiny: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as told:
        build(settings_of(tiny, **changes))
    assert str(told.value).startswith(reason)


@pytest.mark.parametrize("missing", ["cryptography", "Crypto"])
def test_a_missing_extra_is_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(
        ConfigError,
        match=r"^--secure-sums on needs an extra; install it with: pip install -e '\.\[secure\]' in fedkseed's clone$",
    ):
        simulation(tmp_path / "run", settings_of(tiny))
    simulation(tmp_path / "plain", settings_of(tiny, secure_sums="off"))


def test_what_is_forecast_is_what_travels(tiny: Path, tmp_path: Path) -> None:
    run, _ = simulation(tmp_path / "run", settings_of(tiny, num_rounds=1))
    expected = run.forecast()
    assert expected is not None
    run.train()
    event = next(event for event in read_metrics(tmp_path / "run") if event["event"] == "round")
    assert event["bytes_up"] == pytest.approx(expected.bytes_up, rel=0.1)
    assert event["bytes_down"] == pytest.approx(expected.bytes_down, rel=0.1)
