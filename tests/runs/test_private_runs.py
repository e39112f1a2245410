"""Runs with differential privacy: what they write down, when they end, how they go on, and what would void the promise."""

from pathlib import Path
from typing import Any

import pytest
from tests.support.runs import Watcher, read_metrics, simulation
from tests.support.tiny import tiny_settings

import fedkseed as fk
from fedkseed.errors import ConfigError
from fedkseed.kseed.ledger import Ledger
from fedkseed.privacy.accountant import get_epsilon
from fedkseed.report.model_card import About, model_card
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build
from fedkseed.runs.tuning import tune

RECORD: dict[str, Any] = {"dp": "record", "clip_norm": 1.0, "noise_multiplier": 1.5, "weighting": "equal", "num_seeds": 128}
CLIENT: dict[str, Any] = {**RECORD, "dp": "client", "noise_multiplier": 4.0}
both = pytest.mark.parametrize("private", [RECORD, CLIENT], ids=["record", "client"])


def rounds(path: Path) -> list[dict[str, Any]]:
    return [event for event in read_metrics(path) if event["event"] == "round"]


@both
@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-grad"])
def test_epsilon_is_in_the_metrics_the_ledgers_and_the_card(
    tiny: Path, tmp_path: Path, private: dict[str, Any], algorithm: str
) -> None:
    settings = tiny_settings(tiny, **private, algorithm=algorithm, fraction_train=1.0)
    result = fk.simulate(settings, tmp_path / "run")
    found = [event["epsilon"] for event in rounds(result.folder)]
    sizes = simulation(tmp_path / "sizes", settings)[0]._records.sizes
    rate = 1.0 if private is CLIENT else 2 / min(sizes.values())  # the smallest client spends most
    steps = 1 if private is CLIENT else 6
    expected = [get_epsilon(((private["noise_multiplier"], rate, steps * n),), 1e-5) for n in (1, 2, 3)]
    assert found == expected
    assert found[0] < found[1] < found[2]
    for event in rounds(result.folder):
        assert event["train_loss"] is None
        assert all(client["loss"] is None for client in event["clients"].values())

    checkpoint = Ledger.load(result.folder / "ledger.safetensors")
    published = Ledger.decode(checkpoint.published().encode())
    kept = Ledger.load(RunFolder.open(result.folder).ledgers.path(2))
    assert checkpoint.made_with is not None
    assert checkpoint.made_with["privacy"]["histories"]
    for ledger, epsilon in ((published, expected[2]), (kept, expected[1])):
        assert ledger.made_with is not None
        assert ledger.made_with.keys() == {"privacy"}  # who has spent what is not published
        assert ledger.made_with["privacy"].keys() == {"unit", "clip_norm", "noise_multiplier", "delta", "epsilon"}
        assert ledger.made_with["privacy"]["epsilon"] == epsilon
    assert f"epsilon {expected[2]:.3g} at delta 1e-05, of each {private['dp']}" in model_card("base", published, About())
    assert "differential" not in model_card("base", Ledger.decode(result.ledger.stamped(None).encode()), About())


@both
def test_a_budget_ends_the_run_in_time_and_a_larger_one_goes_on(tiny: Path, tmp_path: Path, private: dict[str, Any]) -> None:
    settings = tiny_settings(tiny, **private, fraction_train=1.0, eval_every=3)
    full, _ = simulation(tmp_path / "full", settings)
    full.train()
    spent = [event["epsilon"] for event in rounds(tmp_path / "full")]
    budget = (spent[1] + spent[2]) / 2

    cut, watcher = simulation(tmp_path / "cut", {**settings, "epsilon": budget})
    assert cut.train().round == 2
    assert [event["epsilon"] for event in rounds(tmp_path / "cut")] == spent[:2]
    assert any(f"another round would make it {spent[2]:.3f}, and --epsilon is {budget:g}" in note for note in watcher.notes)
    assert read_metrics(tmp_path / "cut")[-1]["event"] == "evaluation"  # of the round that it ended with

    again = fk.simulate({**settings, "epsilon": budget}, tmp_path / "cut")
    assert again.checkpoint.round == 2
    further = fk.simulate({**settings, "epsilon": spent[2]}, tmp_path / "cut")
    assert further.checkpoint.round == 3
    assert rounds(tmp_path / "cut")[-1]["epsilon"] == spent[2]


def test_a_budget_that_the_first_round_exceeds_is_refused_before_there_is_a_run(tiny: Path) -> None:
    for dp, noise in (("client", 0.5), ("client", 0.0), ("record", 0.3)):
        given = {**RECORD, "dp": dp, "noise_multiplier": noise, "epsilon": 0.2}
        with pytest.raises(
            ConfigError, match=rf"--epsilon is 0.2 and one round with --noise-multiplier {noise:g} costs .*raise"
        ):
            prepare(build(tiny_settings(tiny, **given)), Watcher())


def test_noise_is_found_for_a_budget_and_stays(tiny: Path, tmp_path: Path) -> None:
    chosen = {name: value for name, value in RECORD.items() if name != "noise_multiplier"}
    settings = tiny_settings(tiny, **chosen, epsilon=4.0)
    result = fk.simulate(settings, tmp_path / "run")
    assert result.checkpoint.round == 3
    assert 3.9 < rounds(result.folder)[-1]["epsilon"] <= 4.0
    noise = RunFolder.open(result.folder).config.noise_multiplier
    assert noise is not None
    more = fk.simulate({**settings, "num_rounds": 5}, tmp_path / "run")
    assert RunFolder.open(more.folder).config.noise_multiplier == noise
    assert rounds(more.folder)[-1]["epsilon"] <= 4.0


def test_two_private_runs_of_one_seed_are_two_draws(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, **RECORD, num_rounds=1)
    first, second = (fk.simulate(settings, tmp_path / name).ledger.digest() for name in "ab")
    assert first != second


def test_a_run_that_hid_nothing_is_not_gone_on_with_as_one_that_does(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=1, weighting="equal", num_seeds=128)
    fk.simulate(settings, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--dp is record, and the run's 1 round hid nothing; start a run of its own"):
        fk.simulate({**settings, **RECORD, "num_rounds": 2}, tmp_path / "run", accept_changes=True)


def test_a_promise_that_is_worth_little_is_said_to_be(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, **{**RECORD, "delta": 0.4, "noise_multiplier": 0.0})
    a_simulation, watcher = simulation(tmp_path / "run", settings)
    a_simulation.train()
    assert any("--noise-multiplier 0 is next to no noise: nothing is promised" in note for note in watcher.notes)
    assert any("--delta 0.4 is not below 1 in " in note for note in watcher.notes)
    assert [event["epsilon"] for event in rounds(tmp_path / "run")] == [None, None, None]
    _, watcher = simulation(tmp_path / "quiet", tiny_settings(tiny, **RECORD))
    assert not [note for note in watcher.notes if note.startswith("warning")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weighting": "examples"},
            r"--dp is record and --weighting examples, which tells how many records",
        ),
        ({"clip_norm": None}, r"--dp is record and --clip-norm is missing"),
        ({"noise_multiplier": None}, r"--dp is record and there is no noise; give --epsilon, which finds it, or"),
        ({"local_unit": "epochs"}, r"--dp is record and --local-unit epochs, which tells the number of records; count steps"),
        ({"loss_clip": 1.0}, r"--dp is record and --loss-clip 1, by which a record decides whether a step is dropped"),
        ({"algorithm": "fedavg", "num_seeds": None, "eps": None}, r"--dp is record and --algorithm fedavg sends tensors"),
        ({"dp": "client", "algorithm": "fedkseed-pro"}, r"--dp is client and --algorithm fedkseed-pro draws seeds by what"),
        ({"dp": "client", "audit_log": "on"}, r"--dp is client and --audit-log on, which keeps every reply as it came"),
        ({"dp": "client", "secure_sums": "on"}, r"--dp is client and --secure-sums on; a server that sees no single reply"),
        (
            {"dp": "client", "aggregator": "krum", "shared_seeds": "on"},
            r"--dp is client and --aggregator krum; what one client",
        ),
        ({"dp": None}, r"--clip-norm is 1 and there is no --dp; leave it out, or give --dp"),
        ({"dp": "everything"}, r"--dp is 'everything': input should be 'record' or 'client'"),
        ({"clip_norm": 0.0}, r"--clip-norm is '0.0': input should be greater than 0"),
        ({"delta": 1.0}, r"--delta is '1.0': input should be less than 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_void_the_promise_is_refused(changes: dict[str, Any], message: str) -> None:
    settings = {"model": "m", "lr": 1.0, **RECORD, **changes}
    with pytest.raises(ConfigError, match=message):
        build({name: value for name, value in settings.items() if value is not None})


def test_no_rate_is_looked_for_on_records_in_clear(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dp is record, and a rate is looked for on the records without noise; give --lr"):
        tune(tiny_settings(tiny, **RECORD))
