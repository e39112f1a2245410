"""What a federation on Flower leaves on the disk is a run like any other: every command takes it, or says what it lacks."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests.support.command_line import CommandLine, assert_one_line, contents
from tests.support.drivers import Driven, in_simulation, on_flower, on_flower_by_a_client, on_the_engine
from tests.support.flower_grid import as_in_a_task, engine, federation, run_config, started
from tests.support.flower_sites import SITES, make_sites
from tests.support.runs import held_out, read_metrics
from tests.support.tiny import write_records

import fedkseed as fk
from fedkseed.data import Example
from fedkseed.errors import ConfigError, RunFolderError
from fedkseed.flower.building import build_strategy
from fedkseed.flower.config import read_config
from fedkseed.flower.envelope import Hello
from fedkseed.flower.participant import Participant
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model
from fedkseed.report import reading
from fedkseed.report.charts import charts
from fedkseed.report.page import page
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.settings import RunConfig, SimulationConfig

RECORDS = {name: 12 + 3 * i for i, name in enumerate(SITES)}
DEALT = ("data", "num_clients", "partition", "alpha", "min_partition_size", "subsample", "responses", "held_out_category")


@pytest.fixture(scope="module", autouse=True)
def in_a_task() -> Iterator[None]:
    with as_in_a_task():
        yield


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture(scope="module")
def field(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Driven:
    """A finished run of nodes in the field."""
    return on_flower(sites, tmp_path_factory.mktemp("field") / "run")


@pytest.fixture(scope="module")
def by_clients(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Driven:
    """The same without records on the server."""
    return on_flower_by_a_client(sites, tmp_path_factory.mktemp("by-clients") / "run", num_rounds=1)


@pytest.fixture(scope="module")
def dealt(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Driven:
    """A finished run of Flower's simulation engine."""
    return on_the_engine(sites, tmp_path_factory.mktemp("engine") / "run")


@pytest.fixture(params=["field", "dealt"])
def driven(request: pytest.FixtureRequest) -> Driven:
    """Either."""
    found: Driven = request.getfixturevalue(request.param)
    return found


def settings_in(run: Path) -> dict[str, Any]:
    return tomllib.loads((run / "config.toml").read_text())


# --- Its settings ---


def test_the_config_of_a_run_in_the_field_names_the_clients_it_had_and_no_setting_of_dealing_out(field: Driven) -> None:
    found = settings_in(field.folder)
    assert found["driver"] == {"clients": RECORDS, "min_clients": 3, "deadline": 2.0, "run": str(field.folder)}
    assert not found.keys() & set(DEALT)
    run = RunFolder.open(field.folder)
    assert type(run.config) is RunConfig
    assert run.num_clients == 3
    assert reading.read(field.folder).num_clients == 3


def test_the_config_of_an_engines_run_says_how_its_records_were_dealt_out(dealt: Driven, sites: Path) -> None:
    found = settings_in(dealt.folder)
    assert found["driver"]["clients"] == RECORDS
    assert (found["data"], found["partition"], found["num_clients"]) == (str(sites / "joint.jsonl"), "client", 3)
    assert type(RunFolder.open(dealt.folder).config) is SimulationConfig


def test_a_client_that_came_and_was_never_asked_is_named_too(sites: Path, tmp_path: Path) -> None:
    run = on_flower(sites, tmp_path / "run", num_rounds=1, fraction_train=0.4, min_replies=1).folder
    (event,) = [event for event in read_metrics(run) if event["event"] == "round"]
    assert len(event["clients"]) == 1
    assert settings_in(run)["driver"]["clients"] == RECORDS


# --- Every command ---


def test_report(fedkseed: CommandLine, driven: Driven) -> None:
    result = fedkseed("report", driven.folder)
    assert (result.code, result.stderr) == (0, "")
    page = (driven.folder / "report" / "index.html").read_text()
    assert result.stdout.endswith(f"report: {driven.folder / 'report' / 'index.html'}\n")  # a slow machine says what it does
    assert driven.ledger.digest() in page
    assert "Columns of 3 clients: 3 were asked" in page
    for name in SITES:
        assert name in page
    first, last = (f"{loss:.4f}" for loss in (held_out(read_metrics(driven.folder))[i] for i in (0, -1)))
    assert f"{first} \N{RIGHTWARDS ARROW} {last}" in page.replace("\n", " ")


def test_inspect(fedkseed: CommandLine, driven: Driven) -> None:
    result = fedkseed("inspect", driven.folder)
    assert (result.code, result.stderr) == (0, "")
    assert driven.ledger.digest() in result.stdout


@pytest.mark.parametrize("named", [False, True], ids=["its own model", "--model"])
def test_export_writes_the_tuned_model_with_a_card_of_the_run(
    fedkseed: CommandLine, driven: Driven, sites: Path, tmp_path: Path, named: bool
) -> None:
    extra = ["--model", sites / "model"] if named else []
    result = fedkseed("export", driven.folder, tmp_path / "tuned", *extra)
    assert (result.code, result.stderr) == (0, "")
    tuned, base = load_model(tmp_path / "tuned", "float32"), load_model(sites / "model", "float32")
    fk.apply(base, driven.ledger)
    pool = driven.ledger.pool
    assert fk.bind(tuned, pool).digest() == fk.bind(base, pool).digest()
    card = (tmp_path / "tuned" / "README.md").read_text()
    losses = held_out(read_metrics(driven.folder))
    assert f"{losses[0]:.4f} before, {losses[-1]:.4f} after" in card
    assert "| learning rate | 0.01, constant |" in card


def test_export_ledger_only(fedkseed: CommandLine, driven: Driven, tmp_path: Path) -> None:
    result = fedkseed("export", driven.folder, tmp_path / "ledger.safetensors", "--ledger-only")
    assert (result.code, result.stderr) == (0, "")
    assert Ledger.load(tmp_path / "ledger.safetensors").digest() == driven.ledger.published().digest()


def test_evaluate_with_data(fedkseed: CommandLine, driven: Driven, sites: Path, tmp_path: Path) -> None:
    result = fedkseed("evaluate", driven.folder, "--data", sites / "held-out.jsonl", "--output", tmp_path / "scores.json")
    assert (result.code, result.stderr) == (0, "")
    scores = json.loads((tmp_path / "scores.json").read_text())
    losses = held_out(read_metrics(driven.folder))
    assert [scores[which]["overall"]["loss"] for which in ("base", "tuned")] == pytest.approx([losses[0], losses[-1]], rel=1e-6)
    assert scores["ledger"] == driven.ledger.digest()


def test_evaluate_without_data_takes_the_servers_own_where_it_had_some(
    fedkseed: CommandLine, driven: Driven, tmp_path: Path
) -> None:
    result = fedkseed("evaluate", driven.folder, "--output", tmp_path / "scores.json")
    assert (result.code, result.stderr) == (0, "")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["tuned"]["overall"]["loss"] == pytest.approx(held_out(read_metrics(driven.folder))[-1], rel=1e-6)


def test_evaluate_without_any_data_says_what_is_missing_and_how_to_give_it(
    fedkseed: CommandLine, by_clients: Driven, sites: Path
) -> None:
    run = by_clients.folder
    text = f"--data is missing: {run} is a run on Flower, whose records are its clients' own; give --data"
    assert_one_line(fedkseed("evaluate", run), 2, text)
    with pytest.raises(ConfigError) as caught:
        fk.evaluate(run)
    assert str(caught.value) == text
    assert fedkseed("evaluate", run, "--data", sites / "held-out.jsonl").code == 0
    assert [evaluation.loss for evaluation in reading.read(run).evaluations] == held_out(read_metrics(run))


def test_a_simulation_with_its_config_and_the_same_records_is_the_same_run(
    fedkseed: CommandLine, field: Driven, sites: Path, tmp_path: Path
) -> None:
    """The run in the field again, bit for bit, with what its config cannot say."""
    config = ["--config", field.folder / "config.toml"]
    records = ["--data", sites / "joint.jsonl", "--partition", "client"]
    result = fedkseed("simulate", *config, *records, "--run", tmp_path / "run")
    assert (result.code, result.stderr) == (0, "")
    assert Ledger.load(tmp_path / "run" / "ledger.safetensors").digest() == field.ledger.digest()
    assert "driver" not in settings_in(tmp_path / "run")
    # and with others, dealt out
    dealt_out = ["--data", sites / "all.jsonl", "--num-clients", 3, "--num-rounds", 1]
    assert fedkseed("simulate", *config, *dealt_out, "--run", tmp_path / "other").code == 0


def test_a_simulation_with_its_config_asks_for_the_records_that_it_does_not_name(
    fedkseed: CommandLine, field: Driven, sites: Path, tmp_path: Path
) -> None:
    start = ["simulate", "--config", field.folder / "config.toml", "--run", tmp_path / "run"]
    assert_one_line(fedkseed(*start), 2, "--data is missing; give it on the command line or as data in the --config file")
    result = fedkseed(*start, "--data", sites / "all.jsonl")
    assert_one_line(result, 2, "60 examples are too few for 200 clients", "lower --num-clients")
    assert not (tmp_path / "run").exists()


def test_a_simulation_with_an_engines_config_is_the_same_run(fedkseed: CommandLine, dealt: Driven, tmp_path: Path) -> None:
    result = fedkseed("simulate", "--config", dealt.folder / "config.toml", "--run", tmp_path / "run")
    assert (result.code, result.stderr) == (0, "")
    assert Ledger.load(tmp_path / "run" / "ledger.safetensors").digest() == dealt.ledger.digest()


def test_resume_of_a_run_in_the_field_says_how_to_go_on_and_that_works(
    fedkseed: CommandLine, field: Driven, sites: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(field.folder, tmp_path / "run")
    before = contents(run)
    for extra in ([], ["--num-rounds", 4]):
        result = fedkseed("simulate", "--resume", run, *extra)
        assert_one_line(result, 2, f"{run} is a run on Flower", f"go on with it by starting its app again with run = {run}")
    assert contents(run) == before
    config = run_config(sites, run, num_rounds=4)
    whole = in_simulation(sites, tmp_path / "whole", num_rounds=4).ledger
    assert started(config, federation(sites, config)).digest() == whole.digest()
    assert settings_in(run)["driver"]["clients"] == RECORDS


def test_an_engines_run_goes_on_either_way(fedkseed: CommandLine, dealt: Driven, sites: Path, tmp_path: Path) -> None:
    """`simulate --resume` has all that it needs; what the engine noted stays, and the engine can go on after it."""
    run, whole = shutil.copytree(dealt.folder, tmp_path / "run"), {}
    for num_rounds in (4, 5):
        whole[num_rounds] = in_simulation(sites, tmp_path / str(num_rounds), num_rounds=num_rounds).ledger.digest()
    result = fedkseed("simulate", "--resume", run, "--num-rounds", 4)
    assert (result.code, result.stderr) == (0, "")
    assert Ledger.load(run / "ledger.safetensors").digest() == whole[4]
    assert settings_in(run)["driver"] == settings_in(dealt.folder)["driver"]
    config = run_config(sites, run, data=sites / "joint.jsonl", partition="client", num_rounds=5)
    del config["min-clients"], config["deadline"]
    assert started(config, engine(config, 3)).digest() == whole[5]


def test_python_takes_its_folder_too(field: Driven, dealt: Driven, sites: Path) -> None:
    assert fk.evaluate(field.folder).tuned.overall.loss == pytest.approx(held_out(read_metrics(field.folder))[-1], rel=1e-6)
    with pytest.raises(RunFolderError, match="is a run on Flower, whose records are its clients' own"):
        _ = RunFolder.open(field.folder).simulation
    assert RunFolder.open(dealt.folder).simulation.num_clients == 3


# --- On another machine ---


def test_a_folder_that_was_moved_without_its_files_can_still_be_looked_at(
    fedkseed: CommandLine, sites: Path, driven: Driven, tmp_path: Path
) -> None:
    """What the settings name may lie elsewhere: the held-out records, the training records, the model."""
    run = shutil.copytree(driven.folder, tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(sites), "/no/such/folder"))
    assert reading.read(run).num_clients == 3  # what a report is made of
    for command in (["inspect", run], ["export", run, tmp_path / "tuned", "--model", sites / "model"]):
        result = fedkseed(*command)
        assert (result.code, result.stderr) == (0, "")
    model = ["--model", sites / "model"]
    assert fedkseed("evaluate", run, *model, "--data", sites / "held-out.jsonl").code == 0
    for lacking in (["evaluate", run, *model], ["evaluate", run, "--data", sites / "held-out.jsonl"]):
        assert_one_line(fedkseed(*lacking), 2, "/no/such/folder")


def test_a_folder_of_before_knows_no_clients_and_settings_that_nobody_heard_and_is_a_run_all_the_same(
    fedkseed: CommandLine, field: Driven, sites: Path, tmp_path: Path
) -> None:
    """Until issue 14 a run in the field noted `num_clients = 10` and the like, and not who was there."""
    run = shutil.copytree(field.folder, tmp_path / "run")
    found = settings_in(run)
    found |= {"num_clients": 10, "partition": "dirichlet", "alpha": 0.5, "min_partition_size": 1, "subsample": 1.0}
    found |= {"responses": "own", "driver": {"run": str(run), "min_clients": 3, "deadline": 2.0}}
    (run / "config.toml").write_text(tomli_w.dumps(found))
    record = reading.read(run)
    assert record.num_clients is None
    assert driven_words(run, record).count("3 were asked") == 1
    assert fedkseed("evaluate", run).code == 0
    config = run_config(sites, run, num_rounds=4)
    whole = in_simulation(sites, tmp_path / "whole", num_rounds=4).ledger
    assert started(config, federation(sites, config)).digest() == whole.digest()
    assert settings_in(run)["driver"]["clients"] == RECORDS
    assert not settings_in(run).keys() & set(DEALT)


def driven_words(run: Path, record: reading.RunRecord) -> str:
    """A report's page without the time that pictures take."""
    return page(run, record, charts(record), {}) + " ".join(chart.alt for chart in charts(record))


# --- Settings that nobody would hear ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num-clients", 10),
        ("partition", "iid"),
        ("alpha", 0.5),
        ("min-partition-size", 2),
        ("subsample", 0.5),
        ("held-out-category", "animal"),
        ("responses", "shuffled"),
    ],
)
def test_a_setting_that_a_run_in_the_field_does_not_take_is_refused_by_name(
    sites: Path, tmp_path: Path, name: str, value: Any
) -> None:
    assert name.replace("-", "_") in DEALT
    with pytest.raises(ConfigError) as caught:
        read_config(run_config(sites, tmp_path / "run", **{name: value}))
    assert str(caught.value) == (
        f"run-config {name} is {value!r}, but nodes have records of their own; leave it empty, "
        "or give data, which Flower's simulation engine deals out"
    )
    assert not isinstance(read_config(run_config(sites, tmp_path / "run", **{name: ""})), SimulationConfig)


def test_every_setting_of_dealing_out_is_refused() -> None:
    assert {*DEALT, "edges"} == SimulationConfig.model_fields.keys() - RunConfig.model_fields.keys()


@pytest.mark.parametrize("data", ["", "joint.jsonl"])
def test_edges_are_refused_wherever_nodes_are(sites: Path, tmp_path: Path, data: str) -> None:
    given = run_config(sites, tmp_path / "run", edges=3, data=str(sites / data) if data else "")
    with pytest.raises(
        ConfigError, match=r"run-config edges is 3, but Flower has one tier of nodes, and edges are of fedkseed"
    ):
        read_config(given)


def test_a_setting_that_the_algorithm_does_not_take_is_refused_by_name(sites: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^run-config: --lora-rank is 4 and --algorithm fedkseed does not take it"):
        read_config(run_config(sites, tmp_path / "run", lora_rank=4))


def test_a_run_that_was_started_otherwise_is_refused_and_its_folder_left_alone(
    sites: Path, field: Driven, dealt: Driven
) -> None:
    """An engine's run is none of nodes in the field, and the other way round."""
    before = contents(field.folder), contents(dealt.folder)
    own = run_config(sites, dealt.folder, deadline=3600.0, min_clients=1)
    with pytest.raises(ConfigError, match=r"run-config alpha is None, the run in .* was started with 0\.5; go on with the"):
        build_strategy(read_config(own))
    other = run_config(sites, field.folder, data=sites / "joint.jsonl", partition="client")
    with pytest.raises(ConfigError, match=r"run-config alpha is 0\.5, the run in .* was started with None; go on with the"):
        build_strategy(read_config(other))
    assert (contents(field.folder), contents(dealt.folder)) == before


def test_a_node_cuts_or_drops_long_prompts_as_the_run_says(sites: Path, tmp_path: Path) -> None:
    examples = [Example("name the animal", text, "dog", "animal") for text in ("", "", "a big dog and " * 20)]
    own = {"name": "site-a", "data": str(write_records(tmp_path / "d.jsonl", examples))}
    for changes, number in (({}, 3), ({"long_prompts": "drop"}, 2)):
        node = Participant(run_config(sites, tmp_path / "run", **changes), own)
        assert Hello.decode(node.hello(b"")).num_examples == number


def test_a_node_in_the_field_need_not_know_how_an_engine_deals_out(sites: Path, tmp_path: Path) -> None:
    """The negative control of the refusals: with data all of these settings are taken."""
    config = read_config(run_config(sites, tmp_path / "run", data=sites / "all.jsonl", num_clients=3, alpha=2.0))
    assert isinstance(config, SimulationConfig)
    assert (config.num_clients, config.alpha, config.expected_clients) == (3, 2.0, 3)
