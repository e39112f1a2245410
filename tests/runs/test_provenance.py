"""What a checkpoint was made with: a resume with anything else is named, and refused unless it is asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.baselines import row_settings
from tests.support.runs import Watcher, simulation
from tests.support.tiny import tiny_settings

from fedkseed.baselines import TunedTensors
from fedkseed.data import EncodedExample
from fedkseed.errors import ConfigError, LedgerError, RunFolderError
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.provenance import FREE, check_same, made_with, records_digest
from fedkseed.runs.records import Records, prepare
from fedkseed.runs.settings import SimulationConfig, build
from fedkseed.runs.simulation import Simulation


def example(ids: list[int], prompt: int = 1) -> EncodedExample:
    return EncodedExample(np.array(ids, np.int32), prompt)


def records(**clients: list[EncodedExample]) -> Records:
    return Records(SimulationConfig.model_construct(), clients, [], [], 0, (), ())


KNOWN = records(a=[example([1, 2, 3]), example([4, 5])], b=[example([6, 7])])


@pytest.mark.parametrize(
    "other",
    [
        records(a=[example([1, 2, 3]), example([4, 5])], b=[example([6, 8])]),
        records(a=[example([4, 5]), example([1, 2, 3])], b=[example([6, 7])]),
        records(a=[example([1, 2]), example([3, 4, 5])], b=[example([6, 7])]),
        records(a=[example([1, 2, 3]), example([4, 5], 0)], b=[example([6, 7])]),
        records(a=[example([1, 2, 3])], b=[example([4, 5]), example([6, 7])]),
        records(a=[example([1, 2, 3]), example([4, 5])], c=[example([6, 7])]),
        records(a=[example([1, 2, 3]), example([4, 5])]),
    ],
)
def test_the_digest_tells_records_apart(other: Records) -> None:
    assert records_digest(other) != records_digest(KNOWN)


def test_the_digest_is_of_what_each_client_has_whatever_the_order_of_the_clients() -> None:
    again = records(b=[example([6, 7])], a=[example([1, 2, 3]), example([4, 5])])
    assert records_digest(again) == records_digest(KNOWN)


@pytest.fixture
def config(tiny: Path) -> SimulationConfig:
    return build(tiny_settings(tiny, num_rounds=1, local_steps=1))


def begun(folder: Path, settings: dict[str, Any]) -> RunFolder:
    simulation(folder, settings)[0].train()
    return RunFolder.open(folder)


def edited(run: RunFolder, **changes: Any) -> RunFolder:
    """As by hand in its config.toml."""
    run.write_config(build({**run.simulation.model_dump(), **changes}))
    return RunFolder.open(run.path)


def go_on(run: RunFolder, **options: Any) -> Any:
    watcher = Watcher()
    Simulation(run, prepare(run.simulation, watcher), watcher, **options).train()
    return watcher


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"lr": 0.02}, "--lr is 0.02, it was 0.01 when round 1 of RUN was made; go on"),
    ({"eps": 0.02}, "--eps is 0.02, it was 0.01"),
    ({"loss_clip": 3.0}, "--loss-clip is 3.0, it was None"),
    ({"num_clients": 5}, "--num-clients is 5, it was 4 when round 1 of RUN was made (and the records too); go on"),
    ({"max_length": 60, "lr": 1.0}, "--lr is 1.0, it was 0.01 when round 1 of RUN was made (and --max-length too); go on"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES, ids=str)
def test_a_changed_setting_is_named_and_refused(tiny: Path, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    run = begun(tmp_path / "run", tiny_settings(tiny, num_rounds=1, local_steps=1))
    before = run.checkpoint_path.read_bytes()
    run = edited(run, **change, num_rounds=2)
    with pytest.raises(ConfigError) as caught:
        go_on(run)
    assert str(caught.value).startswith(text.replace("RUN", str(run.path)))
    assert "\n" not in str(caught.value)
    assert run.checkpoint_path.read_bytes() == before


@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-grad", "fedavg"])
def test_what_is_accepted_is_told_once_and_then_the_runs_own(tiny: Path, tmp_path: Path, algorithm: str) -> None:
    common = {"num_rounds": 1, "local_steps": 1}
    if algorithm == "fedavg":
        settings = row_settings(tiny, algorithm, **common)
    else:
        settings = tiny_settings(tiny, algorithm=algorithm, num_seeds=128, **common)
    run = edited(begun(tmp_path / "run", settings), lr=0.5, num_rounds=2)
    with pytest.raises(ConfigError, match=r"^--lr is 0\.5, it was"):
        go_on(run)
    told = [note for note in go_on(run, accept_changes=True).notes if "from here on" in note]
    assert len(told) == 1
    assert told[0].startswith("from here on --lr is 0.5, it was")
    run = edited(run, num_rounds=3)
    assert not any("from here on" in note for note in go_on(run).notes)
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    assert checkpoint.round == 3


def test_a_kill_before_the_next_round_keeps_what_was_accepted(tiny: Path, tmp_path: Path) -> None:
    run = edited(begun(tmp_path / "run", tiny_settings(tiny, num_rounds=1, local_steps=1)), lr=0.5, num_rounds=2)
    Simulation(run, prepare(run.simulation, Watcher()), Watcher(), accept_changes=True)  # no round of it is ever done
    go_on(RunFolder.open(run.path))


def test_other_records_in_the_same_file_are_refused(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    data.write_bytes((tiny / "records.jsonl").read_bytes())
    settings = tiny_settings(tiny, data=str(data), num_rounds=1, local_steps=1)
    run = begun(tmp_path / "run", settings)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([lines[-1], *lines[1:]]))
    with pytest.raises(ConfigError, match=r"^the clients' records are others \(digest [0-9a-f]{8}, it was [0-9a-f]{8}\)"):
        go_on(edited(run, num_rounds=2))


def test_another_runs_ledger_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Of the same pool and base, so that nothing else tells them apart."""
    run = begun(tmp_path / "run", tiny_settings(tiny, num_rounds=1, local_steps=1))
    other = begun(tmp_path / "other", tiny_settings(tiny, num_rounds=1, local_steps=1, batch_size=1))
    run.checkpoint_path.write_bytes(other.checkpoint_path.read_bytes())
    with pytest.raises(ConfigError, match=r"^--batch-size is 2, it was 1 when round 1"):
        go_on(run)


def test_a_checkpoint_of_another_kind_is_no_start_from_nothing(tiny: Path, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", tiny_settings(tiny, num_rounds=1, local_steps=1))
    text = (run.path / "config.toml").read_text().replace('"fedkseed"', '"fedavg"')
    (run.path / "config.toml").write_text("".join(x for x in text.splitlines(True) if x.split(" ")[0] not in DROPPED))
    with pytest.raises(RunFolderError, match=r"holds ledger\.safetensors, which --algorithm fedavg does not make"):
        go_on(RunFolder.open(run.path))


DROPPED = ("eps", "num_seeds", "noise", "importance_clip", "importance_start", "wire")


def test_an_old_checkpoint_is_gone_on_with_by_the_folders_settings(tiny: Path, tmp_path: Path) -> None:
    """What it was made with is not known: settings that are given are compared with the folder's, and so is the data's name."""
    run = begun(tmp_path / "run", tiny_settings(tiny, num_rounds=1, local_steps=1))
    ledger = Ledger.load(run.checkpoint_path)
    ledger.stamped(None).save(run.checkpoint_path)
    run = edited(run, num_rounds=2)
    with pytest.raises(ConfigError, match=r"^--lr is 0\.02, it was 0\.01"):
        check_same(run, run.load_checkpoint(), build({**run.simulation.model_dump(), "lr": 0.02}), KNOWN)
    moved = tmp_path / "records.jsonl"
    moved.write_bytes((tiny / "records.jsonl").read_bytes())
    with pytest.raises(ConfigError, match=r"^--data is .*, it was .* when round 1"):
        check_same(run, run.load_checkpoint(), build({**run.simulation.model_dump(), "data": moved}), KNOWN)
    go_on(run)
    assert Ledger.load(run.checkpoint_path).made_with == made_with(run.simulation, prepare(run.simulation, Watcher()))


def test_a_run_goes_on_whose_checkpoint_was_made_with_what_did_nothing(tiny: Path, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", tiny_settings(tiny, num_rounds=1, local_steps=1, partition="iid"))
    ledger = Ledger.load(run.checkpoint_path)
    assert ledger.made_with is not None
    ledger.made_with["settings"] |= {"alpha": 3.0, "min_partition_size": 2, "importance_start": 2.0}
    ledger.save(run.checkpoint_path)
    go_on(edited(run, num_rounds=2))
    assert Ledger.load(run.checkpoint_path).round == 2


def test_before_the_first_round_the_folders_settings_count(config: SimulationConfig, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config)
    check_same(run, None, config, KNOWN)
    check_same(run, None, config.model_copy(update={"num_rounds": 9, "eval_limit": 3}), KNOWN)
    for change in ({"lr": 0.5}, {"model": "elsewhere"}, {"data": "elsewhere.jsonl"}):
        with pytest.raises(ConfigError, match=rf"^--{next(iter(change))} is .* when {run.path} was begun; go on"):
            check_same(run, None, config.model_copy(update=change), KNOWN)


def test_a_setting_that_the_checkpoint_has_never_heard_of_is_at_its_default(config: SimulationConfig, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", config.model_dump())
    ledger = Ledger.load(run.checkpoint_path)
    assert ledger.made_with is not None
    settings = dict(ledger.made_with["settings"])
    del settings["weighting"]
    older = ledger.stamped({"settings": settings, "records": None})
    assert check_same(run, older, config, KNOWN) == []
    with pytest.raises(ConfigError, match=r"^--weighting is equal, it was examples"):
        check_same(run, older, config.model_copy(update={"weighting": "equal"}), KNOWN)
    newer = ledger.stamped({"settings": {**settings, "mood": "good"}, "records": None})
    with pytest.raises(ConfigError, match=r"^--mood is None, it was good"):
        check_same(run, newer, config, KNOWN)
    assert check_same(run, ledger.stamped({"settings": 5}), config, KNOWN, accept_changes=True)


def test_a_checkpoint_older_than_long_prompts_was_made_with_drop(config: SimulationConfig, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", config.model_dump())
    ledger = Ledger.load(run.checkpoint_path)
    assert ledger.made_with is not None
    settings = {name: value for name, value in ledger.made_with["settings"].items() if name != "long_prompts"}
    older = ledger.stamped({"settings": settings, "records": None})
    with pytest.raises(ConfigError, match=r"^--long-prompts is cut, it was drop when round 1 of"):
        check_same(run, older, config, KNOWN)
    assert check_same(run, older, config.model_copy(update={"long_prompts": "drop"}), KNOWN) == []


def test_no_setting_is_free_unknown_and_the_digest_is_the_ledgers_own(config: SimulationConfig, tmp_path: Path) -> None:
    assert SimulationConfig.model_fields.keys() >= FREE
    run = begun(tmp_path / "run", config.model_dump())
    ledger = Ledger.load(run.checkpoint_path)
    assert ledger.made_with is not None
    assert ledger.digest() == ledger.stamped(None).digest()
    assert str(tmp_path.parent) not in json.dumps(dict(ledger.made_with))  # no path of this machine
    published = ledger.published()
    assert published.made_with is None
    assert published.encode() == ledger.stamped(None).published().encode()
    assert Ledger.decode(ledger.encode()).made_with == ledger.made_with


@pytest.mark.parametrize("value", [5, "x", [1]])
def test_a_damaged_stamp_is_refused(config: SimulationConfig, tmp_path: Path, value: Any) -> None:
    ledger = Ledger.load(begun(tmp_path / "run", config.model_dump()).checkpoint_path)
    data = ledger.encode()
    at = data.index(rb"\"made_with\":{")
    end = data.index(b"}", data.index(rb"\"settings\":{", at)) + 2
    text = rb"\"made_with\":" + json.dumps(value).replace('"', r"\"").encode()
    assert len(text) <= end - at
    with pytest.raises(LedgerError, match="made_with is no table"):
        Ledger.decode(data[:at] + text + b" " * (end - at - len(text)) + data[end:])


def test_a_baselines_stamp_comes_back_and_is_no_part_of_its_digest(tiny: Path, tmp_path: Path) -> None:
    run = begun(tmp_path / "run", row_settings(tiny, "fedavg", num_rounds=1, local_steps=1))
    tuned = TunedTensors.load(run.checkpoint_path)
    assert tuned.made_with is not None
    assert tuned.made_with["settings"]["algorithm"] == "fedavg"
    assert tuned.digest() == tuned.stamped(None).digest()
