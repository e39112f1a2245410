"""The door from Python: what `import fedkseed as fk` offers, on the same records and models as the command line."""

import importlib
import json
import math
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import tomli_w
import torch

import fedkseed as fk
from fedkseed.errors import ConfigError, DataError, FedKSeedError, LedgerError, RunError
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.runs import tuning
from fedkseed.runs.rates import Rate
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Result
from tests.support.command_line import CommandLine, assert_one_line, contents, environment, flags
from tests.support.runs import Watcher, held_out, read_metrics
from tests.support.tiny import tiny_model, tiny_settings


@pytest.fixture(scope="module")
def run(fedkseed: CommandLine, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line: what all others must be to the bit."""
    folder = tmp_path_factory.mktemp("command-line") / "run"
    assert fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def expected(run: Path) -> str:
    return Ledger.load(run / "ledger.safetensors").digest()


@pytest.fixture(scope="module")
def rows(tiny: Path) -> list[dict[str, str]]:
    """The records of `tiny_settings`."""
    return [json.loads(line) for line in (tiny / "records.jsonl").read_text().splitlines()]


def loaded(tiny: Path) -> tuple[Any, Any]:
    return load_model(tiny / "model", "float32"), load_tokenizer(tiny / "model")


# --- Settings ---


def as_dict(settings: dict[str, Any], folder: Path) -> Any:
    return settings


def as_toml(settings: dict[str, Any], folder: Path) -> Any:
    (folder / "settings.toml").write_text(tomli_w.dumps(settings))
    return folder / "settings.toml"


SETTINGS_AS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "dict": as_dict,
    "path": as_toml,
    "text": lambda settings, folder: str(as_toml(settings, folder)),
    "settings": lambda settings, folder: fk.SimulationConfig(**settings),
}


@pytest.mark.parametrize("kind", SETTINGS_AS)
def test_settings_of_any_kind_give_the_run_of_the_command_line(
    tiny: Path, tmp_path: Path, run: Path, expected: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same files too; and nobody is told anything unless an observer is given."""
    settings = tiny_settings(tiny)
    before = dict(settings)
    result = fk.simulate(SETTINGS_AS[kind](settings, tmp_path), tmp_path / "run")
    assert settings == before
    assert isinstance(result, Result)
    assert result.folder == tmp_path / "run"
    assert result.ledger is result.checkpoint
    assert result.ledger.digest() == expected
    assert list(result.history.items()) == list(enumerate(held_out(read_metrics(run))))
    for name in ("config.toml", "ledger.safetensors"):
        assert (result.folder / name).read_bytes() == (run / name).read_bytes()
    assert capfd.readouterr() == ("", "")


def test_a_runs_own_config_is_settings_too(tiny: Path, tmp_path: Path, run: Path, expected: str) -> None:
    assert fk.simulate(run / "config.toml", tmp_path / "again").ledger.digest() == expected


def test_without_a_folder_one_is_made(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = fk.simulate(tiny_settings(tiny, num_rounds=1, local_steps=1))
    assert [path.parent for path in (tmp_path / "runs").glob("*/config.toml")] == [tmp_path / result.folder]


def test_a_baseline_has_tensors_and_no_ledger(tiny: Path, tmp_path: Path) -> None:
    own = {name: value for name, value in tiny_settings(tiny).items() if name not in ("eps", "num_seeds")}
    result = fk.simulate(own | {"algorithm": "fedavg", "num_rounds": 1}, tmp_path / "run")
    assert result.checkpoint.round == 1
    with pytest.raises(RunError, match=r"the run in .*run is of a baseline, which has no ledger; its tensors are `checkpoint`"):
        _ = result.ledger


# --- Records as objects ---


def as_dataset(rows: list[dict[str, str]]) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows)


RECORDS_AS: dict[str, Callable[[list[dict[str, str]]], Any]] = {
    "list": list,
    "tuple": tuple,
    "DataFrame": pandas.DataFrame,
    "DataFrame with an index of its own": lambda rows: pandas.DataFrame(rows, index=range(500, 500 + len(rows))),
    "dataset": as_dataset,
}


@pytest.mark.parametrize("kind", RECORDS_AS)
def test_records_of_any_kind_give_the_ledger_of_the_same_records_in_a_file(
    tiny: Path, tmp_path: Path, rows: list[dict[str, str]], expected: str, kind: str
) -> None:
    """The split and who holds what are drawn as ever; only the name in the settings differs, and it says which records."""
    result = fk.simulate(tiny_settings(tiny, data=RECORDS_AS[kind](rows)), tmp_path / "run")
    assert result.ledger.digest() == expected
    name = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["data"]
    assert name.startswith("in memory: 60 records, ")
    assert len(name) == len("in memory: 60 records, ") + 32


def test_other_records_have_another_name_and_are_another_run(tiny: Path, tmp_path: Path, rows: list[dict[str, str]]) -> None:
    settings = tiny_settings(tiny, num_rounds=1, local_steps=1)
    fk.simulate(settings | {"data": rows}, tmp_path / "run")
    changed = [*rows[:-1], rows[-1] | {"response": "red"}]
    assert changed != rows
    with pytest.raises(
        ConfigError, match=r"^the clients' records are others \(digest [0-9a-f]{8}, it was [0-9a-f]{8}\) when round 1"
    ):
        fk.simulate(settings | {"data": changed}, tmp_path / "run")


def test_held_out_records_may_be_objects_too(tiny: Path, tmp_path: Path, rows: list[dict[str, str]]) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    settings = tiny_settings(tiny, num_rounds=1, local_steps=1)
    file = fk.simulate(settings | {"eval_data": tmp_path / "held.jsonl"}, tmp_path / "file")
    frame = fk.simulate(settings | {"eval_data": pandas.DataFrame(rows[:9])}, tmp_path / "frame")
    assert file.history == frame.history
    assert file.ledger.digest() == frame.ledger.digest()


def test_columns_name_the_fields_of_objects_too(tiny: Path, tmp_path: Path, rows: list[dict[str, str]], expected: str) -> None:
    renamed = pandas.DataFrame(rows).rename(columns={"response": "answer", "instruction": "question"})
    settings = tiny_settings(tiny, data=renamed, columns="output=answer,instruction=question")
    assert fk.simulate(settings, tmp_path / "run").ledger.digest() == expected


def test_an_empty_cell_of_a_table_is_an_empty_field(tiny: Path, tmp_path: Path, rows: list[dict[str, str]]) -> None:
    """Which pandas calls NaN, whatever the column."""
    some = [{k: v for k, v in row.items() if k != "context" or i % 3} for i, row in enumerate(rows)]
    frame = pandas.DataFrame(some)
    assert frame["context"].isna().sum() == 20
    settings = tiny_settings(tiny, num_rounds=1, local_steps=1)
    digests = {
        fk.simulate(settings | {"data": data}, tmp_path / str(i)).ledger.digest()
        for i, data in enumerate((some, frame, frame.astype("string")))
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "data: no records; expected some with an instruction and a response"),
        (pandas.DataFrame(), "data: no records; expected some"),
        ([3], "data, record 1 is of type int; expected a dict"),
        (3, "data is of type int; expected a list of dicts, a DataFrame or a dataset"),
        ({"instruction": "a"}, "data is of type dict; expected a list of dicts, a DataFrame or a dataset"),
        (
            [{"instruction": "a", "response": "b"}, {"instruction": "a"}],
            r"data, record 2: no field 'output' or 'response' or 'completion' or 'chosen'; found",
        ),
        ([{"instruction": "a", "response": 3}], "data, record 1: field 'response' is a number; expected a string"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_records_that_are_none_are_refused(tiny: Path, tmp_path: Path, data: Any, text: str) -> None:
    for door in (lambda settings: fk.simulate(settings, tmp_path / "run"), fk.tune):
        with pytest.raises(DataError, match=text):
            door(tiny_settings(tiny, data=data))
    assert not (tmp_path / "run").exists()


# --- A loaded model ---


def test_a_loaded_model_gives_the_ledger_of_its_folder_and_is_tuned_in_place(
    tiny: Path, tmp_path: Path, rows: list[dict[str, str]], expected: str
) -> None:
    model, tokenizer = loaded(tiny)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    result = fk.simulate(tiny_settings(tiny, model=(model, tokenizer), data=rows), tmp_path / "run")
    assert result.ledger.digest() == expected
    other = load_model(tiny / "model", "float32")
    fk.apply(other, result.ledger)
    assert fk.bind(model, result.ledger.pool).digest() == fk.bind(other, result.ledger.pool).digest()
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["model"] == "in memory: LlamaForCausalLM"


def test_a_loaded_model_that_was_tuned_is_another_base(tiny: Path, tmp_path: Path) -> None:
    """A second call needs the model as it was; what the folder holds stays whole."""
    pair, settings = loaded(tiny), tiny_settings(tiny, num_rounds=1)
    first = fk.simulate(settings | {"model": pair}, tmp_path / "run").ledger.digest()
    with pytest.raises(LedgerError, match=r"is of another base model than in memory: LlamaForCausalLM: lm_head\.weight is the"):
        fk.simulate(settings | {"model": pair, "num_rounds": 2}, tmp_path / "run")
    assert Ledger.load(tmp_path / "run" / "ledger.safetensors").digest() == first
    again = fk.simulate(settings | {"model": loaded(tiny), "num_rounds": 2}, tmp_path / "run")
    assert again.ledger.digest() == fk.simulate(settings | {"num_rounds": 2}, tmp_path / "folder").ledger.digest()


@pytest.mark.parametrize("which", [0, 1])
def test_half_a_pair_is_no_model(tiny: Path, which: int) -> None:
    half = loaded(tiny)[which]
    with pytest.raises(ConfigError, match=rf"^model is of type {type(half).__name__}; expected a folder, a hub id, or a pair"):
        fk.simulate(tiny_settings(tiny, model=half))


def test_what_was_given_as_an_object_cannot_be_read_again_and_the_command_line_says_so(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    """With the object's place taken by a file, all goes on."""
    run = fk.simulate(tiny_settings(tiny, model=loaded(tiny), data=rows, num_rounds=1), tmp_path / "run").folder
    for command in (["simulate", "--resume", run, "--num-rounds", 2], ["evaluate", run], ["export", run, tmp_path / "tuned"]):
        assert_one_line(fedkseed(*command), 2, "in memory: ")
    assert fedkseed("inspect", run).code == 0
    assert fedkseed("export", run, tmp_path / "tuned", "--model", tiny / "model").code == 0
    assert fedkseed("evaluate", run, "--model", tiny / "model", "--data", tiny / "records.jsonl").code == 0


# --- Going on ---


def test_a_second_call_is_finished_at_once_and_more_rounds_go_on(tiny: Path, tmp_path: Path) -> None:
    settings, first, second = tiny_settings(tiny, num_rounds=2), Watcher(), Watcher()
    result = fk.simulate(settings, tmp_path / "run", first)
    before = contents(result.folder)
    again = fk.simulate(settings, tmp_path / "run", second)
    assert (again.ledger.digest(), again.history) == (result.ledger.digest(), result.history)
    assert contents(result.folder) == before
    assert (len(first.events), second.events, second.probes) == (5, [], [])
    third = Watcher()
    longer = fk.simulate(settings | {"num_rounds": 3}, tmp_path / "run", third)
    assert [(event["event"], event["server_round"]) for event in third.events] == [("round", 3), ("evaluation", 3)]
    assert longer.ledger.digest() == fk.simulate(settings | {"num_rounds": 3}, tmp_path / "whole").ledger.digest()
    assert list(longer.history) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"lr": 0.02},
            "--lr is 0.02, it was 0.01 when round 1 of RUN was made; go on with the run's own, or add --accept-changes (in "
            "Python accept_changes=True)",
        ),
        ({"loss_clip": 2.0}, "--loss-clip is 2.0, it was None when round 1 of RUN was made; go on"),
        (
            {"algorithm": "fedkseed-pro", "seed": 8},
            "--algorithm is fedkseed-pro, it was fedkseed when round 1 of RUN was made (and --seed too); go on",
        ),
    ],
    ids=str,
)
def test_another_setting_is_refused_and_the_run_left_alone(
    tiny: Path, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    settings = tiny_settings(tiny, num_rounds=1, local_steps=1)
    fk.simulate(settings, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        fk.simulate(settings | change, tmp_path / "run")
    assert text.replace("RUN", str(tmp_path / "run")) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"nonsense": 1}, "setting 'nonsense' is unknown; expected one of: aggregator, algorithm, "),
        ({"lr": -1}, "--lr is '-1': "),
        ({"fraction_train": 2}, "--fraction-train is '2': "),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(tiny: Path, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fk.simulate(tiny_settings(tiny, **change), tmp_path / "run")
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, FedKSeedError)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_no_path_and_a_place_without_gradients_are_one_line(tiny: Path, tmp_path: Path) -> None:
    for run in (3, b"run", ["run"]):
        with pytest.raises(FedKSeedError, match=r"is no path; expected a text or a pathlib\.Path$"):
            fk.simulate(tiny_settings(tiny), run)  # type: ignore[arg-type]
    settings = tiny_settings(tiny, algorithm="fedkseed-grad", num_seeds=128, lr=1e-3)
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"^--algorithm fedkseed-grad needs gradients; call this out"):
        fk.simulate(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- tune and evaluate ---


def test_tune_finds_what_the_command_line_finds_and_leaves_a_model_as_it_was(
    fedkseed: CommandLine, shared: Path, tiny: Path, rows: list[dict[str, str]]
) -> None:
    """A model that has learnt something: a random one lies on a saddle. It is measured without dropout, else by chance."""
    folder = shared / "models" / "stories260k"
    settings = {name: value for name, value in tiny_settings(tiny, model=str(folder)).items() if name not in ("lr", "eps")}
    shown = fedkseed("tune", *flags(settings))
    assert (shown.code, shown.stderr) == (0, "")
    model, tokenizer, modes = load_model(folder, "float32").train(), load_tokenizer(folder), set[bool]()
    before = fk.bind(model, fk.SeedPool(1, 8)).digest()
    model.get_submodule("model.layers.0").register_forward_hook(lambda module, *_: modes.add(module.training))
    found = fk.tune(settings | {"model": (model, tokenizer), "data": rows, "lr": 3.0, "eps": 1.0})
    assert shown.stdout.splitlines()[-1] == f"take: --lr {found.lr:g} --eps {found.eps:g}"
    assert f"{found.num_forward_passes} forward passes" in shown.stdout
    assert fk.bind(model, fk.SeedPool(1, 8)).digest() == before
    assert modes == {False}
    assert model.training


def test_a_rate_at_which_no_step_is_usable_is_no_rate_and_lower_ones_are_tried(shared: Path, tiny: Path) -> None:
    """Here since the changes that come of it are beyond what a reply may hold; a round without replies ended the search."""
    changes = {"algorithm": "fedkseed-grad", "local_optimizer": "adam", "max_value": 2e-3, "num_seeds": 128}
    settings = tiny_settings(tiny, model=str(shared / "models" / "stories260k"), **changes)
    found = fk.tune({name: value for name, value in settings.items() if name not in ("lr", "eps")})
    assert isinstance(found, Rate)
    unusable = [attempt.lr for attempt in found.attempts if math.isinf(attempt.after)]
    assert unusable
    assert found.lr < min(unusable)
    assert min(attempt.after for attempt in found.attempts) < found.before


def test_a_tune_that_stops_half_way_leaves_a_model_as_it_was(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, tokenizer), measured, calls = loaded(tiny), tuning.mean_loss, iter(range(10**6))
    before = fk.bind(model, fk.SeedPool(1, 8)).digest()
    monkeypatch.setattr(tuning, "mean_loss", lambda *args: measured(*args) * (torch.nan if next(calls) == 6 else 1))
    with pytest.raises(FedKSeedError, match="the loss of a batch is nan; expected a finite number"):
        fk.tune(tiny_settings(tiny, model=(model, tokenizer)))
    assert fk.bind(model, fk.SeedPool(1, 8)).digest() == before


def test_evaluate_measures_what_the_command_line_measures(fedkseed: CommandLine, run: Path, tiny: Path, tmp_path: Path) -> None:
    assert fedkseed("evaluate", run, "--answers", 2, "--output", tmp_path / "scores.json").code == 0
    written = json.loads((tmp_path / "scores.json").read_text())
    found = fk.evaluate(run, answers=2)
    for which in ("base", "tuned"):
        overall = getattr(found, which).overall
        for name, value in written[which]["overall"].items():
            assert getattr(overall, name) == value
    losses = held_out(read_metrics(run))
    assert [found.base.overall.loss, found.tuned.overall.loss] == pytest.approx([losses[0], losses[-1]], rel=1e-6)
    assert found.tuning.digest() == written["ledger"]
    # a published ledger, which knows no run
    Ledger.load(run / "ledger.safetensors").published().save(tmp_path / "published.safetensors")
    told = {"model": str(tiny / "model"), "data": str(tiny / "records.jsonl"), "max_length": 48}
    extra = flags({**told, "output": tmp_path / "published.json"})
    assert fedkseed("evaluate", tmp_path / "published.safetensors", *extra).code == 0
    published = fk.evaluate(ledger=tmp_path / "published.safetensors", **told)
    written = json.loads((tmp_path / "published.json").read_text())
    assert written["tuned"]["overall"]["loss"] == published.tuned.overall.loss


def test_evaluate_says_what_it_lacks(run: Path, tmp_path: Path, tiny: Path) -> None:
    Ledger.load(run / "ledger.safetensors").save(tmp_path / "ledger.safetensors")
    for lacking, text in (
        ({}, "no run and no --ledger; give a run folder"),
        ({"run": tmp_path / "ledger.safetensors"}, "--model is missing and .* has no config.toml beside it"),
        ({"run": tmp_path / "ledger.safetensors", "model": str(tiny / "model")}, "--data is missing and"),
    ):
        with pytest.raises(ConfigError, match=text):
            fk.evaluate(**lacking)  # type: ignore[arg-type]


def test_the_home_folder_is_meant_by_its_sign(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = fk.simulate(tiny_settings(tiny, num_rounds=1, local_steps=1), "~/run")
    assert result.folder == tmp_path / "run"
    for given in ({"run": "~/run"}, {"run": "~/run", "ledger": "~/run/ledger.safetensors"}):
        assert fk.evaluate(**given).tuning.digest() == result.ledger.digest()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["run", "ledger"])
def test_evaluate_takes_a_place_and_no_object(name: str) -> None:
    text = f"^{name} is a SeedPool; expected a run's folder or a ledger's file: .folder of a result, .save of a ledger$"
    with pytest.raises(ConfigError, match=text):
        fk.evaluate(**{name: fk.SeedPool(1, 8)})  # type: ignore[arg-type]


# --- Who watches ---


def test_progress_shows_rounds_and_losses_where_there_is_no_terminal(
    tiny: Path, tmp_path: Path, run: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fk.simulate(tiny_settings(tiny), tmp_path / "run", fk.Progress())
    assert result.ledger.digest() == expected
    out, err = capsys.readouterr()
    assert "model: " in out  # notes
    assert "training records: 57 used" in out
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("round 3: 3round")
    assert f"held-out={held_out(read_metrics(run))[-1]:.4f}" in last
    assert "training=" in last


def test_progress_hears_every_event(tiny: Path, tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Listening(fk.Progress):  # type: ignore[misc,name-defined]
        def event(self, event: dict[str, Any]) -> None:
            heard.append(event)
            super().event(event)

    fk.simulate(tiny_settings(tiny, loss_clip=1e-9, num_rounds=2), tmp_path / "run", Listening())
    assert heard == read_metrics(tmp_path / "run")
    assert [event["train_loss"] for event in heard if event["event"] == "round"] == [None, None]  # every step dropped


# --- Names ---


def test_completion_shows_every_public_name_and_each_is_there() -> None:
    assert dir(fk) == sorted(fk.__all__)
    assert len(set(fk.__all__)) == len(fk.__all__)
    for name in dir(fk):
        found = getattr(fk, name)
        assert found.__doc__
        if name != "__version__":
            assert getattr(importlib.import_module(found.__module__), name) is found
    assert {"simulate", "tune", "evaluate", "Progress", "Server", "Client", "Task", "Ledger", "bind", "apply"} <= set(dir(fk))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedkseed' has no attribute 'simulte'"):
        _ = fk.simulte
    with pytest.raises(ImportError, match="simulte"):
        from fedkseed import simulte  # noqa: F401


def test_names_are_loaded_when_first_used(tmp_path: Path) -> None:
    code = (
        "import sys, fedkseed as fk; dir(fk); print('torch' in sys.modules); "
        "fk.SimulationConfig; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.split()[0] == "False"
    assert done.stdout.split()[2] == "False"


def test_another_base_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=1, local_steps=1)
    fk.simulate(settings, tmp_path / "run")
    other = tiny_model(tmp_path / "other", seed=1)
    before = contents(tmp_path / "run")
    with pytest.raises(LedgerError, match=r"^ledger\.safetensors is of another base model than .*other: "):
        fk.simulate(settings | {"model": str(other)}, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_run_goes_on_with_moved_files_and_with_changes_that_are_accepted(
    tiny: Path, tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    """The same records from memory are the same; a rate that is asked for is taken, told, and then the run's own."""
    settings, watcher = tiny_settings(tiny, num_rounds=1, local_steps=1), Watcher()
    fk.simulate(settings, tmp_path / "run")
    moved = settings | {"data": rows, "model": str(shutil.copytree(tiny / "model", tmp_path / "moved")), "num_rounds": 2}
    result = fk.simulate(moved, tmp_path / "run", watcher)
    assert result.ledger.digest() == fk.simulate(settings | {"num_rounds": 2}, tmp_path / "whole").ledger.digest()
    assert not any("from here on" in note for note in watcher.notes)
    changed = settings | {"num_rounds": 3, "lr": 0.02}
    with pytest.raises(ConfigError, match=r"^--lr is 0.02, it was 0.01 when round 2 of"):
        fk.simulate(changed, tmp_path / "run")
    other = fk.simulate(changed, tmp_path / "run", watcher, accept_changes=True)
    assert "from here on --lr is 0.02, it was 0.01" in watcher.notes
    assert other.ledger.digest() != fk.simulate(settings | {"num_rounds": 3}, tmp_path / "whole").ledger.digest()
    assert fk.simulate(changed | {"num_rounds": 4}, tmp_path / "run").ledger.round == 4


def test_a_model_that_a_stopped_run_was_given_is_its_base_again(tiny: Path, tmp_path: Path) -> None:
    """So that the cell can be run again: it was left in the middle of a step, and taken for another base."""
    (model, tokenizer), before = loaded(tiny), fk.bind(loaded(tiny)[0], fk.SeedPool(1, 8)).digest()

    class Stops(Watcher):
        def probe(self, probe: Any) -> None:
            if probe.server_round == 2:
                raise KeyboardInterrupt

    for algorithm in ("fedkseed", "fedkseed-grad", "fedavg"):
        facts, settings = ALGORITHMS[algorithm], tiny_settings(tiny, algorithm=algorithm, num_seeds=128, num_rounds=3)
        takes = {name: value for name, value in settings.items() if facts.takes(name)}
        given = takes | {"model": (model, tokenizer)}
        with pytest.raises(KeyboardInterrupt):
            fk.simulate(given, tmp_path / algorithm, Stops())
        assert fk.bind(model, fk.SeedPool(1, 8)).digest() == before
        again = fk.simulate(given, tmp_path / algorithm)
        assert again.checkpoint.digest() == fk.simulate(takes, tmp_path / f"{algorithm} whole").checkpoint.digest()
        model.load_state_dict(loaded(tiny)[0].state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fk.simulate(None), r"settings are a NoneType; expected a dict"),  # type: ignore[arg-type]
        (lambda: fk.evaluate("run", limit=-1), r"limit is -1; expected an integer from 1 on"),
        (lambda: fk.evaluate("run", limit=0), r"limit is 0; expected an integer from 1 on"),
        (lambda: fk.evaluate("run", answers=True), r"answers is True; expected an integer from 0 on"),
        (lambda: fk.bind(5, fk.SeedPool(1, 8)), r"model is a int; expected a torch\.nn\.Module"),  # type: ignore[arg-type]
        (lambda: fk.bind(torch.nn.Linear(2, 2), 5), r"pool is a int; expected a fedkseed\.SeedPool"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_setting_model_or_number_is_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FedKSeedError, match=message):
        call()


def test_a_ledgers_coefficients_cannot_be_written_into() -> None:
    ledger = fk.Ledger.of(fk.bind(torch.nn.Linear(2, 2), fk.SeedPool(1, 8)), given := torch.ones(8).numpy())
    with pytest.raises(ValueError, match="read-only"):
        ledger.coefficients[2] = 3
    given[2] = 3  # whose array stays the caller's
    assert ledger.coefficients[2] == 1


def test_a_run_that_goes_on_has_the_rounds_that_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, local_steps=1)
    fk.simulate(settings | {"num_rounds": 1}, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("num_rounds = 1\n", "num_rounds = 6\n"))  # as of a run that was stopped
    assert fk.simulate(settings | {"num_rounds": 2}, tmp_path / "run").ledger.round == 2
    with pytest.raises(ConfigError, match=r"num_rounds is 1 and .* has 2 rounds already; give as many or more"):
        fk.simulate(settings | {"num_rounds": 1}, tmp_path / "run")
    assert "num_rounds = 2\n" in config.read_text()
    unsaid = build({name: value for name, value in settings.items() if name != "num_rounds"})
    assert fk.simulate(unsaid, tmp_path / "run").ledger.round == 2  # as many as the run wants, not the default


@pytest.mark.parametrize(
    ("given", "message"),
    [({"columns": 3}, "columns is 3; expected a text"), ({"columns": ["a"]}, r"columns is \['a'\]; expected a text")],
)
def test_columns_that_are_none_are_one_line(tiny: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fk.simulate(tiny_settings(tiny) | given)


@pytest.mark.parametrize("log", [None, "tensorboard", 3])
def test_trackers_are_a_list(tiny: Path, tmp_path: Path, log: Any) -> None:
    with pytest.raises(ConfigError, match=r"log is .*; expected a list of names, such as"):
        fk.simulate(tiny_settings(tiny), tmp_path / "run", log=log)


def test_a_template_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template is 3; expected a text"):
        fk.evaluate(tmp_path, template=3)
