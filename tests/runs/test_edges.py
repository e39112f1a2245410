"""Simulations with edges: the ledger and the metrics of one without, bit for bit; what is refused beside them."""

from pathlib import Path
from typing import Any

import pytest
from tests.support.runs import Watcher, read_metrics, simulation, trained
from tests.support.tiny import tiny_settings

from fedkseed.errors import ConfigError
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation

GRADIENTS = {"algorithm": "fedkseed-grad", "num_seeds": 128, "rounds_per_page": 2, "lr": 0.05, "local_steps": 2}
ROWS: dict[str, dict[str, Any]] = {
    "scalars": {"num_rounds": 3},
    "pro, mean": {"algorithm": "fedkseed-pro", "aggregator": "mean", "num_rounds": 3},
    "changes": GRADIENTS,
}
BYTES = ("bytes_down", "bytes_up", "edges", "edge_bytes_down", "edge_bytes_up", "seconds", "seconds_by", "peak_bytes")


def settings_of(tiny: Path, **changes: Any) -> dict[str, Any]:
    return tiny_settings(tiny, **{"fraction_train": 1.0, "eval_every": 3, **changes})


def without_bytes(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if name not in BYTES} for event in metrics]


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)
def test_edges_change_no_bit_of_the_ledger_and_of_what_is_told(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    alone, told = trained(tmp_path / "alone", settings_of(tiny, summation="exact", **changes))
    clients = len(told[1]["clients"])
    for edges in (1, 2, clients + 2):
        ledger, metrics = trained(tmp_path / str(edges), settings_of(tiny, edges=edges, **changes))
        assert ledger.digest() == alone.digest()
        assert without_bytes(metrics) == without_bytes(told)
        for one, other in zip(metrics, told, strict=True):
            if one["event"] == "round":
                assert (one["bytes_down"], one["bytes_up"]) == (other["bytes_down"], other["bytes_up"])
                assert one["edges"] == min(edges, clients)
                assert one["edge_bytes_down"] > 0 < one["edge_bytes_up"]


def test_sums_in_order_are_others_in_the_last_bits_only(tiny: Path, tmp_path: Path) -> None:
    """Why the summation is a setting; a run that does not name it keeps its bits."""
    ledgers = {
        kind: trained(tmp_path / kind, settings_of(tiny, summation=kind, num_rounds=1))[0] for kind in ("ordered", "exact")
    }
    one, other = (ledger.history.accumulators for ledger in ledgers.values() if ledger.history is not None)
    assert abs(one - other).max() <= 1e-12 * abs(one).max()
    default, _ = trained(tmp_path / "default", settings_of(tiny, num_rounds=1))
    assert default.digest() == ledgers["ordered"].digest()


def test_a_run_goes_on_with_other_edges_or_none_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny, edges=2, num_rounds=3)
    alone, _ = trained(tmp_path / "alone", settings)
    run, _ = simulation(tmp_path / "cut", settings)
    run._attempt()
    for edges in (3, 0):
        folder = RunFolder.open(tmp_path / "cut")
        config = build({**folder.simulation.model_dump(), "edges": edges})
        go_on = Simulation(folder, prepare(config, Watcher()), Watcher(), config=config)
        go_on._attempt()
    assert go_on.server.checkpoint.digest() == alone.digest()
    assert [event.get("edges") for event in read_metrics(tmp_path / "cut") if event["event"] == "round"] == [2, 3, None]


@pytest.mark.parametrize("none", [0, "0", "00", "-0", "+0", "0.0"])
def test_no_edges_are_none_however_they_are_written(tiny: Path, none: object) -> None:
    assert build(settings_of(tiny, edges=none)) == build(settings_of(tiny))


@pytest.mark.parametrize("some", [2, "2", "02", "2.0"])
def test_edges_sum_exactly(tiny: Path, some: object) -> None:
    assert build(settings_of(tiny, edges=some)).summation == "exact"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "in order": ({"summation": "ordered"}, "sums of sums differ; start a run with --summation exact, the default"),
    "median": ({"aggregator": "median", "shared_seeds": "on"}, "--summation is exact and --aggregator median, which is no sum"),
    "krum": ({"aggregator": "krum", **GRADIENTS}, "--aggregator krum, which is no sum"),
    "secure sums": ({"secure_sums": "on"}, "--summation is exact and --secure-sums on, whose sums are another kind"),
    "hidden clients": (
        {"dp": "client", "clip_norm": 1.0, "noise_multiplier": 1.0, "weighting": "equal"},
        "--summation is exact and --dp client",
    ),
    "a log": ({"audit_log": "on"}, "--edges is 2 and --audit-log on, which keeps each client's reply"),
    "two-point clients": ({**GRADIENTS, "two_point_clients": 0.5}, "--edges is 2 and --two-point-clients 0.5"),
    "shared seeds of epochs": ({"shared_seeds": "on", "local_unit": "epochs"}, "--edges is 2 and --shared-seeds on with"),
    "a baseline": ({"algorithm": "fedavg"}, "--algorithm fedavg does not take it"),
    "large numbers": ({**GRADIENTS, "max_value": 1e10}, "--summation is exact and --max-value 1e"),
    "fewer than none": ({"edges": -1}, "--edges is '?-1"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_edges_cannot_do_is_refused_in_one_line(tiny: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build(settings_of(tiny, **{"edges": 2, **changes}))
    assert "\n" not in str(error.value)
