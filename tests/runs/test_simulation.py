"""A federation in one process, end to end: it learns, it counts its bytes, it is a function of its settings.

Here too, for the other files: a tiny random model with its own tokenizer, and records for it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.runs import Watcher, held_out, read_metrics, simulation, trained
from tests.support.tiny import WORDS, tiny_records, tiny_settings, write_records

import fedkseed as fk
from fedkseed.data import read_examples
from fedkseed.errors import DataError, LedgerError, ModelError, RunError
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.messages import TrainReply, TrainRequest
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import client_names, prepare
from fedkseed.runs.settings import SimulationConfig, build
from fedkseed.runs.simulation import Simulation

# --- It learns ---


COMBINATIONS = [
    (noise, algorithm, dtype)
    for noise in ("hadamard", "gaussian")
    for algorithm in ("fedkseed", "fedkseed-pro")
    for dtype in ("float32", "bfloat16")
]


EVERY_DAY = [COMBINATIONS[i] for i in (0, 3, 5, 6)]  # each value of each setting twice, with each of the others once


@pytest.mark.parametrize(
    ("noise", "algorithm", "dtype"),
    [row if row in EVERY_DAY else pytest.param(*row, marks=pytest.mark.slow) for row in COMBINATIONS],
)
def test_the_held_out_loss_of_a_tiny_model_falls(tiny: Path, tmp_path: Path, noise: str, algorithm: str, dtype: str) -> None:
    eps = 0.01 if dtype == "float32" else 0.05
    settings = tiny_settings(
        tiny, noise=noise, algorithm=algorithm, dtype=dtype, eps=eps, local_steps=25, lr=0.004, fraction_train=0.75
    )
    ledger, metrics = trained(tmp_path / "run", settings)
    losses = held_out(metrics)
    assert ledger.round == 3
    assert losses[-1] < losses[0] - 0.1
    assert losses[0] == pytest.approx(math.log(len(WORDS) + 4), abs=0.5)  # a random model guesses


def dolly(shared: Path, folder: Path, count: int) -> Path:
    """The first records of Dolly with a short prompt."""
    source = shared / "data" / "databricks-dolly-15k.jsonl"
    if not source.is_file():
        pytest.skip(f"no {source}")
    short = [e for e in read_examples(source) if len(e.instruction) + len(e.input) < 100 and 0 < len(e.output) < 120]
    return write_records(folder / "dolly.jsonl", short[:count])


def stories(shared: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    model = shared / "models" / "stories260k"
    if not model.is_dir():
        pytest.skip(f"no {model}")
    settings = {
        "model": str(model),
        "data": str(dolly(shared, folder, 400)),
        "num_clients": 8,
        "fraction_train": 0.25,
        "num_rounds": 2,
        "local_steps": 30,
        "batch_size": 2,
        "lr": 1e-4,
        "eps": 1e-3,
        "max_length": 96,
        "eval_limit": 20,
    }
    return settings | changes


@pytest.mark.parametrize(
    ("noise", "algorithm", "dtype"),
    [("hadamard", "fedkseed", "float32"), *[pytest.param(*row, marks=pytest.mark.slow) for row in COMBINATIONS[1:]]],
)
def test_the_held_out_loss_of_a_real_model_falls_on_dolly(
    shared: Path, tmp_path: Path, noise: str, algorithm: str, dtype: str
) -> None:
    changes = {"eps": 1e-2} if dtype == "bfloat16" else {}
    settings = stories(shared, tmp_path, noise=noise, algorithm=algorithm, dtype=dtype, **changes)
    losses = held_out(trained(tmp_path / "run", settings)[1])
    assert losses[-1] < losses[0] - 0.02
    assert all(map(math.isfinite, losses))


# --- metrics.jsonl ---


ROUND_FIELDS = {
    "event": str,
    "server_round": int,
    "bytes_down": float,
    "bytes_up": float,
    "num_replies": int,
    "num_steps": int,
    "dropped_steps": int,
    "seconds": float,
    "peak_bytes": int,
}
EVALUATION_FIELDS = {"event": str, "server_round": int, "eval_loss": float, "seconds": float}


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_metrics_hold_what_the_design_says(tiny: Path, tmp_path: Path, num_rounds: int) -> None:
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=num_rounds))
    run.train()
    metrics = read_metrics(tmp_path / "run")
    assert watcher.events == metrics
    kinds = [(event["event"], event["server_round"]) for event in metrics]
    expected = [("evaluation", 0)]
    for server_round in range(1, num_rounds + 1):
        expected += [("round", server_round), ("evaluation", server_round)]
    assert kinds == expected
    for event in metrics:
        fields = ROUND_FIELDS if event["event"] == "round" else EVALUATION_FIELDS
        assert {name: type(event[name]) for name in fields} == fields
    for event in metrics:
        if event["event"] == "round":
            assert event["num_replies"] == 2  # int(0.5 * 4)
            assert event["dropped_steps"] == 0
            assert event["lr"] == 0.01
            assert sum(client["weight"] for client in event["clients"].values()) == pytest.approx(1)
            assert event["seconds"] > 0
            assert math.isfinite(event["train_loss"])


def test_evaluations_are_where_they_are_due(tiny: Path, tmp_path: Path) -> None:
    _, metrics = trained(tmp_path / "run", tiny_settings(tiny, num_rounds=5, eval_every=2, local_steps=2))
    assert [e["server_round"] for e in metrics if e["event"] == "evaluation"] == [0, 2, 4, 5]


def test_reported_bytes_are_the_encoded_lengths(tiny: Path, tmp_path: Path) -> None:
    run, _ = simulation(tmp_path / "run", tiny_settings(tiny, fraction_train=0.75))
    lengths: dict[int, list[tuple[int, int]]] = {}

    def listen(answer: Callable[..., bytes]) -> Callable[..., bytes]:
        def heard(data: bytes, *rest: Any) -> bytes:
            reply = answer(data, *rest)
            request = TrainRequest.decode(data)
            assert request.encode() == data
            assert TrainReply.decode(reply).encode() == reply
            lengths.setdefault(request.server_round, []).append((len(data), len(reply)))
            return reply

        return heard

    for client in run.clients.values():
        client.answer = listen(client.answer)  # type: ignore[method-assign]
    run.train()
    rounds = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert len(rounds) == 3
    for event in rounds:
        down, up = np.array(lengths[event["server_round"]]).T
        assert len(down) == event["num_replies"] == 3
        assert event["bytes_down"] == down.sum() / 3
        assert event["bytes_up"] == up.sum() / 3


def test_every_probe_is_heard(tiny: Path, tmp_path: Path) -> None:
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=2, local_steps=3))
    run.train()
    heard = [(p.server_round, p.place, p.cohort, p.step, p.steps) for p in watcher.probes]
    assert heard == [(r, place, 2, step, 3) for r in (1, 2) for place in (1, 2) for step in range(3) for _ in range(2)]
    assert {probe.client for probe in watcher.probes} <= set(run.clients)


def test_the_ledger_on_the_disk_is_the_tuned_model(tiny: Path, tmp_path: Path) -> None:
    """`fk.apply` on a fresh base gives the weights that the last evaluation saw."""
    from fedkseed.models.loading import load_model

    run, _ = simulation(tmp_path / "run", tiny_settings(tiny))
    ledger = run.train()
    model = load_model(tiny / "model", "float32")
    assert fk.apply(model, tmp_path / "run" / "ledger.safetensors").digest() == ledger.digest()
    tuned = fk.bind(model, ledger.pool).digest()
    run.restore()
    assert fk.bind(run.model, ledger.pool).digest() == tuned
    assert fk.bind(load_model(tiny / "model", "float32"), ledger.pool).digest() != tuned


@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-grad"])
def test_what_is_not_tuned_keeps_the_bits_of_the_base(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    """In the run, in the ledger's names, and in what the published ledger makes of a fresh base."""
    from fedkseed.models.loading import load_model

    settings = tiny_settings(tiny, algorithm=algorithm, num_seeds=128, num_rounds=2, train="*.v_proj.*,*norm.weight")
    ledger, _ = trained(tmp_path / "run", settings)
    before = {name: x.clone() for name, x in load_model(tiny / "model", "float32").named_parameters()}
    frozen = {name for name in before if "v_proj" not in name and "norm" not in name}
    assert set(ledger.base.frozen) == frozen
    assert 0 < len(frozen) < len(before)
    ledger.published().save(tmp_path / "published.safetensors")
    model = load_model(tiny / "model", "float32")
    fk.apply(model, tmp_path / "published.safetensors")
    assert {name for name, x in model.named_parameters() if torch.equal(x, before[name])} == frozen

    config = build(settings | {"num_rounds": 3, "train": "*.v_proj.*"})
    with pytest.raises(LedgerError, match=r"norm\.weight is tuned on one side and frozen on the other"):
        Simulation(RunFolder(tmp_path / "run", config), prepare(config, Watcher()), Watcher(), accept_changes=True)


# --- Determinism ---


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the ledger of a run that others differ from in one setting."""
    return trained(tmp_path_factory.mktemp("plain") / "run", tiny_settings(tiny, local_steps=12))[0].digest()


def test_the_same_seed_gives_the_same_ledger_and_another_seed_another(plain: str, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, local_steps=12)
    same, other = (trained(tmp_path / str(seed), settings | {"seed": seed})[0].digest() for seed in (7, 8))
    assert same == plain != other


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.011},
        {"eps": 0.011},
        {"noise": "gaussian"},
        {"num_seeds": 65},
        {"algorithm": "fedkseed-pro"},
        {"weighting": "equal"},
        {"schedule": "linear"},
        {"schedule": "cosine"},
        {"batch_size": 3},
        {"wire": "float32"},
        {"partition": "iid"},
        {"alpha": 5.0},
        {"max_length": 13},
        {"train": "*.mlp.*"},
        {"directions": 2},
    ],
    ids=str,
)
def test_a_setting_matters(plain: str, tiny: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    changed, _ = trained(tmp_path / "changed", tiny_settings(tiny, local_steps=12, **change))
    assert changed.digest() != plain


@pytest.mark.parametrize("change", [{"eval_every": 2}, {"eval_limit": 1}], ids=str)
def test_looking_changes_nothing(plain: str, tiny: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    changed, _ = trained(tmp_path / "changed", tiny_settings(tiny, local_steps=12, **change))
    assert changed.digest() == plain


# --- What goes wrong ---


def test_dropped_steps_are_counted(tiny: Path, tmp_path: Path) -> None:
    _, metrics = trained(tmp_path / "run", tiny_settings(tiny, loss_clip=1e-9, num_rounds=1))
    (event,) = [event for event in metrics if event["event"] == "round"]
    assert event["dropped_steps"] == 12
    assert event["train_loss"] is None
    first, last = held_out(metrics)
    assert first == last


def test_a_refused_reply_is_told_with_its_reason_and_costs_nothing_else(tiny: Path, tmp_path: Path) -> None:
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, fraction_train=1, num_rounds=1))
    liar = sorted(run.clients)[1]
    run.clients[liar].answer = lambda *_: b"junk"  # type: ignore[method-assign]
    assert run.train().round == 1
    (event,) = [event for event in watcher.events if event["event"] == "round"]
    assert event["num_replies"] == 3
    assert list(event["refused"]) == [liar]
    assert liar not in event["clients"]
    assert any(liar in note and "refused" in note and event["refused"][liar] in note for note in watcher.notes)


def test_three_failed_attempts_end_the_run_with_the_ledger_safe(tiny: Path, tmp_path: Path) -> None:
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, fraction_train=1, min_replies=4))
    liar = sorted(run.clients)[1]
    honest = run.clients[liar].answer
    asked = []

    def answer(data: bytes, *rest: Any) -> bytes:
        request = TrainRequest.decode(data)
        asked.append((request.server_round, request.attempt))
        return b"junk" if request.server_round == 2 else honest(data, *rest)

    run.clients[liar].answer = answer  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match=r"round 2 ended three times with fewer than 4 accepted replies, 1 of 4 refused .*; round 1 is"
    ):
        run.train()
    assert asked == [(1, 0), (2, 0), (2, 1), (2, 2)]
    assert Ledger.load(tmp_path / "run" / "ledger.safetensors").round == 1
    assert [e["server_round"] for e in watcher.events if e["event"] == "round"] == [1]
    assert sum("refused" in note for note in watcher.notes) == 3


def test_a_repeated_round_goes_on_where_the_next_attempt_succeeds(tiny: Path, tmp_path: Path) -> None:
    run, _ = simulation(tmp_path / "run", tiny_settings(tiny, fraction_train=1, min_replies=4, num_rounds=2))
    name = sorted(run.clients)[0]
    honest = run.clients[name].answer
    run.clients[name].answer = (  # type: ignore[method-assign]
        lambda data, *rest: b"" if TrainRequest.decode(data).attempt < 2 else honest(data, *rest)
    )
    assert run.train().round == 2
    rounds = [e for e in read_metrics(tmp_path / "run") if e["event"] == "round"]
    assert [(e["server_round"], e["num_replies"]) for e in rounds] == [(1, 4), (2, 4)]


def test_a_diverged_run_says_so(tiny: Path, tmp_path: Path) -> None:
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=1))
    run.train()
    run.restore = lambda: run.model.lm_head.weight.data.fill_(math.nan)
    run._evaluate()
    assert any("the run diverges. Start anew with a lower --lr" in note for note in watcher.notes)


def test_a_base_whose_loss_is_no_number_is_refused_before_the_first_round(tiny: Path, tmp_path: Path) -> None:
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, num_rounds=1))
    run.restore = lambda: run.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(
        ModelError, match=r"^the held-out loss of the base model is nan, so there is nothing to start from; give"
    ):
        run.train()
    assert (watcher.events, run.run.load_checkpoint()) == ([], None)


def test_another_base_is_refused_by_the_first_tensor_that_differs(tiny: Path, other_model: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", tiny_settings(tiny, num_rounds=1))
    config = build(tiny_settings(tiny, num_rounds=2, model=str(other_model)))
    watcher = Watcher()
    with pytest.raises(LedgerError, match=r"ledger\.safetensors is of another base model than .*other: lm_head\.weight is the"):
        Simulation(RunFolder(tmp_path / "run", config), prepare(config, watcher), watcher)


# --- Data ---


def test_clients_share_all_records_and_no_held_out_one(tiny: Path) -> None:
    watcher = Watcher()
    records = prepare(build(tiny_settings(tiny)), watcher)
    assert list(records.clients) == ["client-0", "client-1", "client-2", "client-3"]
    assert sum(len(part) for part in records.clients.values()) == 57
    assert len(records.held_out) == 3
    assert all(part for part in records.clients.values())
    assert watcher.notes[0].startswith("training records: 57 used, 0 dropped, 0 cut")
    assert watcher.notes[1].startswith("held-out records: 3 used")


def test_evaluation_data_of_its_own_is_used(tiny: Path, tmp_path: Path) -> None:
    held = tiny_records(tmp_path / "held.jsonl", 9)
    records = prepare(build(tiny_settings(tiny, eval_data=str(held))), Watcher())
    assert sum(len(part) for part in records.clients.values()) == 60
    assert len(records.held_out) == 9


def test_fewer_records_than_clients_are_refused(tiny: Path) -> None:
    with pytest.raises(DataError, match=r"57 examples are too few for 58 clients"):
        prepare(build(tiny_settings(tiny, num_clients=58)), Watcher())


@pytest.mark.parametrize(
    ("count", "names"),
    [(1, ["client-0"]), (10, [f"client-{i}" for i in range(10)]), (11, [f"client-{i:02}" for i in range(11)])],
)
def test_client_names_sort_as_they_count(count: int, names: list[str]) -> None:
    assert client_names(count) == names == sorted(names)


def test_the_config_is_frozen(tiny: Path) -> None:
    config = build(tiny_settings(tiny))
    assert isinstance(config, SimulationConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.lr = 1.0  # type: ignore[misc]
