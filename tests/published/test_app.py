"""`python main.py`: the published flags, defaults, files and commands, and the same bits as `fedkseed simulate`.

Every day on a tiny model and tiny data in the published places; the four published commands on the shared data are slow.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from tests.support.command_line import CommandLine, environment
from tests.support.natural_instructions import in_words, task, write_folder
from tests.support.runs import held_out, read_metrics
from tests.support.tiny import write_records

from fedkseed.data import Example, read_examples
from fedkseed.errors import ConfigError
from fedkseed.kseed.ledger import Ledger
from fedkseed.published import main
from fedkseed.published.flags import PUBLISHED, parser
from fedkseed.published.outputs import write_final, write_results
from fedkseed.published.translation import translate
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.settings import SimulationConfig, flag

MAIN = Path(__file__).resolve().parents[2] / "main.py"
COMMANDS = """
python main.py --rounds 40 --model datajuicer/LLaMA-1B-dj-refine-150B --use_prompts --dataset instruct --lr 0.0000003 -K 1024 -m 0.05 --log
python main.py --rounds 60 --model datajuicer/LLaMA-1B-dj-refine-150B --use_prompts --dataset dolly --iid dir0.5 --num_clients 200 --lr 0.0000003 -K 1024 -m 0.05 --log
python main.py --rounds 40 --bias_sampling  --model datajuicer/LLaMA-1B-dj-refine-150B --use_prompts --dataset instruct --lr 0.0000003 -K 1024 -m 0.05 --log
python main.py --rounds 60 --bias_sampling  --model datajuicer/LLaMA-1B-dj-refine-150B --use_prompts --dataset dolly --iid dir0.5 --num_clients 200 --lr 0.0000003 -K 1024 -m 0.05 --log
""".strip().splitlines()  # noqa: E501
QUICK = ["--local_step", "2", "--max_length", "48", "--lr", "0.01", "--zo_eps", "0.01", "--noise", "hadamard", "-K", "64"]
DEFAULTS: dict[str, Any] = {
    "num_clients": 200,
    "m": 0.05,
    "rounds": 40,
    "local_step": 200,
    "batch_or_epoch": "batch",
    "equal_weight": False,
    "dataset": "instruct",
    "batch_size": 1,
    "max_length": 1024,
    "use_prompts": True,
    "iid": "dir0.5",
    "zerotask": 7,
    "dataset_subsample": 1.0,
    "model": "datajuicer/LLaMA-1B-dj-refine-150B",
    "lr": 0.001,
    "weight_decay": 0.0,
    "grad_clip": -100.0,
    "K": 4096,
    "zo_eps": 0.0005,
    "bias_sampling": False,
    "bias_loss_clip": 1000.0,
    "grad_initial": 0.0,
    "device": 0,
    "log": False,
    "log_root": Path("logs"),
    "seed": 42,
    "eval_metric": "rouge",
    "save": False,
}
"""The published flags (`-m` and `-K` by their letters) and defaults. The published code has no default for the model."""


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny data under the names that the published code looks for."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "databricks-dolly-15k.jsonl").symlink_to(tiny / "records.jsonl")
    tasks = {f"task00{i}_x": in_words(task([30] * 40, str(i))) for i in range(4)}
    write_folder(folder / "natural-instructions-2.8", tasks, {"task009_t": in_words(task([30] * 25, "t"))})
    return folder


@pytest.fixture
def home(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test: its own, with that data."""
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(tiny: Path, *args: object) -> None:
    main(["--model", str(tiny / "model"), *QUICK, *[str(arg) for arg in args]])


def the_run(home: Path) -> Path:
    (run,) = (home / "logs").iterdir()
    return run


def config_of(*args: str) -> SimulationConfig:
    return translate(parser().parse_args(["--model", "a/b", *args]))


def fails(capsys: pytest.CaptureFixture[str], args: Sequence[str], *wanted: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("main.py: "), error
    assert error.count("\n") == 1
    for text in wanted:
        assert text in error


# --- Flags ---


def test_the_published_flags_and_defaults() -> None:
    found = vars(parser().parse_args([]))
    assert found == DEFAULTS | {"noise": "gaussian", "eval_limit": None, "resume": None}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_four_commands_parse(command: str) -> None:
    args = vars(parser().parse_args(command.split()[2:]))
    assert args["use_prompts"] is args["log"] is True
    assert (args["lr"], args["K"], args["m"]) == (3e-7, 1024, 0.05)
    assert (args["rounds"], args["dataset"]) in ((40, "instruct"), (60, "dolly"))


@pytest.mark.parametrize(
    ("words", "value"),
    [([], True), (["--use_prompts"], True), (["--use_prompts", "True"], True), (["--use_prompts", "False"], False)],
)
def test_use_prompts_false_means_no(home: Path, words: list[str], value: bool) -> None:
    assert parser().parse_args(words).use_prompts is value
    assert config_of(*words).template == ("alpaca" if value else "bare")
    assert config_of(*words, "--dataset", "dolly", "--zerotask", "0").template == "dolly"


def test_a_prompt_that_fills_the_length_is_dropped_as_in_the_published_code(home: Path) -> None:
    assert config_of().long_prompts == config_of("--dataset", "dolly", "--zerotask", "0").long_prompts == "drop"
    assert config_of().aggregator == "mean"


def test_it_runs_as_a_module_too(tmp_path: Path) -> None:
    """From any folder, as from an installed wheel; `main.py` is but a shim."""
    command = [sys.executable, "-m", "fedkseed.published"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith("usage: ")
    assert "--zerotask" in helped.stdout
    wrong = subprocess.run(
        [*command, "--no-such-flag"], capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False
    )
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_the_traps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The default is a trap: training diverges" in shown
    assert "only 0: decay cannot be written as a sum over seeds" in shown


def test_what_the_flags_translate_to(home: Path) -> None:
    found = config_of(
        *("--bias_sampling", "--grad_initial", "2", "--batch_or_epoch", "epoch", "--equal_weight"),
        *("--grad_clip", "5", "-m", "0.3", "-K", "9"),
    )
    assert (found.algorithm, found.local_unit, found.weighting, found.loss_clip) == ("fedkseed-pro", "epochs", "equal", 5)
    assert (found.fraction_train, found.num_seeds, found.partition, found.noise) == (0.3, 9, "client", "gaussian")
    assert found.importance_start == 2
    assert found.data == str((home / "data/natural-instructions-2.8").resolve())
    plain = config_of(
        "--dataset", "dolly", "--zerotask", "0", "--bias_loss_clip", "7", "--grad_initial", "2", "--noise", "hadamard"
    )
    assert (plain.algorithm, plain.local_unit, plain.weighting, plain.loss_clip) == ("fedkseed", "steps", "examples", None)
    assert (plain.importance_clip, plain.importance_start, plain.noise) == (7, 0, "hadamard")
    assert (plain.partition, plain.alpha, plain.min_partition_size) == ("dirichlet", 0.5, 10)
    even = config_of("--dataset", "dolly", "--zerotask", "0", "--iid", "iid", "--dataset_subsample", "0.5")
    assert (even.partition, even.subsample) == ("iid", 0.5)


def test_every_renamed_flag_exists() -> None:
    ours = {flag(name) for name in SimulationConfig.model_fields}
    theirs = set(parser()._option_string_actions)
    assert set(PUBLISHED) <= ours
    assert {name.split("'")[0] for name in PUBLISHED.values()} <= theirs


def assert_counts_as_pandas_does(zerotask: int) -> None:
    config = config_of("--dataset", "dolly", "--zerotask", str(zerotask))
    column = pandas.Series([example.category for example in read_examples(config.data)])
    codes = column.astype("category").cat.codes
    assert set(column[codes == zerotask]) == {config.held_out_category}


@pytest.mark.parametrize("zerotask", range(8))
def test_zerotask_counts_as_pandas_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zerotask: int) -> None:
    """Dolly's categories, each with a few records, in an order that is not theirs."""
    names = ("open_qa", "general_qa", "classification", "closed_qa", "brainstorming", "summarization", "creative_writing")
    records = [Example("i", "", "o", name) for name in (*names, "information_extraction", *names[::-1])]
    (tmp_path / "data").mkdir()
    write_records(tmp_path / "data" / "databricks-dolly-15k.jsonl", records)
    monkeypatch.chdir(tmp_path)
    assert_counts_as_pandas_does(zerotask)


def test_zerotask_counts_as_pandas_does_on_dolly(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(shared / "data")
    monkeypatch.chdir(tmp_path)
    assert_counts_as_pandas_does(DEFAULTS["zerotask"])


# --- Wrong calls ---


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--weight_decay", "0.1"], ["--weight_decay is 0.1; expected 0: the tuned model is the base plus a sum over seeds"]),
        (
            ["--dataset", "dolly", "--zerotask", "99"],
            ["--zerotask is 99; expected the number of a category: 0 animal, 1 colour"],
        ),
        (["--dataset", "dolly", "--zerotask", "-1"], ["--zerotask is -1"]),
        (
            ["--dataset", "dolly", "--zerotask", "0", "--iid", "dirx"],
            ["--iid is 'dirx'; expected dir and a number, such as dir0.5"],
        ),
        (["--dataset", "dolly", "--zerotask", "0", "--iid", "dir-1"], ["--iid's alpha is '-1.0'", "greater than 0"]),
        (["--dataset", "dolly", "--zerotask", "0", "--iid", "dir0"], ["--iid's alpha is '0.0'"]),
        (["--rounds", "0"], ["--rounds is '0'"]),
        (["--local_step", "0"], ["--local_step is '0'"]),
        (["-K", "0"], ["-K is '0'"]),
        (["-m", "0"], ["-m is '0.0'"]),
        (["--zo_eps", "0"], ["--zo_eps is '0.0'"]),
        (["--eval_limit", "0"], ["--eval_limit is '0'"]),
        (["--model", "/no/model"], ["/no/model: no such model folder"]),
        (["--resume", "nowhere"], ["nowhere has no readable config.yaml; give a folder that main.py made"]),
        (["--resume", "nowhere", "--rounds", "9"], ["--rounds can't be given with --resume, which keeps the run's flags"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_a_wrong_value_is_one_line(
    home: Path, tiny: Path, capsys: pytest.CaptureFixture[str], args: list[str], wanted: list[str]
) -> None:
    model = [] if "--model" in args or "--resume" in args else ["--model", str(tiny / "model")]
    fails(capsys, [*model, *args], *wanted)
    assert sorted(path.name for path in home.iterdir()) == ["data"]


@pytest.mark.parametrize("content", [b"[" * 3000, b"\xff", b"7", b"a: [", b"1: 2"])
def test_flags_that_cannot_be_read_are_one_line(home: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (home / "config.yaml").write_bytes(content)
    fails(capsys, ["--resume", str(home)], f"{home} has no readable config.yaml; give a folder that main.py made")


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        ("instruct", "needs data/natural-instructions-2.8; unpack"),
        ("dolly", "needs data/databricks-dolly-15k.jsonl; put Dolly-15K"),
    ],
)
def test_missing_data_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dataset: str, wanted: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["--dataset", dataset], f"--dataset {dataset} {wanted}", "or link to it")


def test_use_prompts_takes_only_yes_or_no(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--use_prompts", "maybe"])
    assert ended.value.code == 2
    assert "'maybe' is neither yes nor no; expected one of true, yes, 1, false, no, 0" in capsys.readouterr().err


def test_decay_that_is_zero_is_none() -> None:
    with pytest.raises(ConfigError, match="weight_decay is nan"):
        config_of("--weight_decay", "nan")


# --- Runs ---


def digest(output: str) -> str:
    return re.findall(r"digest (\w+)", output)[-1]


def assert_outputs(run: Path, rounds: int, metric: str) -> None:
    losses = json.loads((run / "results.json").read_text())
    assert losses == {"eval_avg_acc": held_out(read_metrics(run))}
    assert len(losses["eval_avg_acc"]) == rounds + 1
    (name, value), *others = json.loads((run / "final_eval.json").read_text()).items()
    assert (name, others) == (f"final_eval_{metric}", [])
    if metric == "loss":
        assert value == pytest.approx(losses["eval_avg_acc"][-1], rel=1e-5)
    else:
        assert 0 <= value <= 1


@pytest.mark.parametrize("dataset", ["instruct", "dolly"])
def test_a_run_leaves_the_published_files_and_names_the_same_run_of_fedkseed(
    home: Path, tiny: Path, capsys: pytest.CaptureFixture[str], fedkseed: CommandLine, dataset: str
) -> None:
    args = ["--dataset", dataset, "--rounds", 2, "--num_clients", 3, "--zerotask", 1, "--iid", "dir5", "-m", 0.7, "--log"]
    metric = "loss" if dataset == "dolly" else "rouge"
    call(tiny, *args, "--eval_metric", metric, "--eval_limit", 8, "--bias_sampling")
    printed = capsys.readouterr().out
    assert_outputs(the_run(home), 2, metric)
    flags = yaml.safe_load((the_run(home) / "config.yaml").read_text())
    assert flags == {name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}
    assert set(DEFAULTS) <= set(flags)
    assert (flags["rounds"], flags["dataset"], flags["bias_sampling"], flags["seed"]) == (2, dataset, True, 42)
    (same,) = re.findall("the same with fedkseed: fedkseed (.*)", printed)
    again = fedkseed(*shlex.split(same), "--run", home / "again")
    assert (again.code, again.stderr) == (0, "")
    assert digest(again.stdout) == digest(printed) == Ledger.load(the_run(home) / "ledger.safetensors").digest()
    costs = re.findall(
        r"cost here with (\w+) noise \((.*?)\): up to .* to rebuild the model, about .* a round, .* in all", printed
    )
    assert costs == [("hadamard", "chosen"), ("gaussian", "take it with --noise gaussian")]


def test_save_writes_the_tuned_model_and_a_finished_run_can_be_resumed(
    home: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tiny, "--rounds", 1, "-m", 0.5, "--log", "--save", "--eval_metric", "loss", "--eval_limit", 4)
    before = digest(capsys.readouterr().out)
    run = the_run(home)
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {
        path.name for path in (run / "model").iterdir()
    }
    (run / "results.json").unlink()
    (run / "final_eval.json").unlink()
    main(["--resume", str(run)])
    assert digest(capsys.readouterr().out) == before
    assert_outputs(run, 1, "loss")


def test_what_diverges_leaves_json(home: Path) -> None:
    """Which has no NaN."""
    (home / "metrics.jsonl").write_text('{"event": "evaluation", "server_round": 0, "eval_loss": null}\n')
    write_results(RunFolder(home, config_of()))
    write_final(home, "loss", math.nan)
    assert (home / "results.json").read_text() == '{"eval_avg_acc": [null]}'
    assert (home / "final_eval.json").read_text() == '{"final_eval_loss": null}'


def test_without_log_only_the_run_is_kept(home: Path, tiny: Path) -> None:
    call(tiny, "--rounds", 1, "-m", 0.5, "--eval_metric", "loss", "--eval_limit", 4)
    (run,) = (home / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "config.toml",
        "config.yaml",
        "ledger.safetensors",
        "ledgers",
        "metrics.jsonl",
    }
    assert not (home / "logs").exists()


def test_flags_with_resume_are_refused_and_missing_ones_have_their_defaults(
    home: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tiny, "--rounds", 1, "-m", 0.5, "--log", "--eval_metric", "loss", "--eval_limit", 4)
    run = the_run(home)
    fails(capsys, ["--resume", str(run), "--save"], "--save can't be given with --resume")
    fails(capsys, ["--resume", str(run), "--rounds", "40"], "--rounds can't be given with --resume")  # its default
    fails(capsys, ["--resume", str(run), "-K", "4096"], "-K can't be given with --resume")
    (run / "config.yaml").write_text("log: true\neval_metric: loss\n")
    main(["--resume", str(run)])
    assert_outputs(run, 1, "loss")


# --- Interrupted ---


def start(args: Sequence[object], folder: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, str(MAIN), *[str(arg) for arg in args]]
    return subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when_evaluated(process: "subprocess.Popen[str]", logs: Path, times: int) -> Path:
    """The run's folder, once it has been evaluated so often."""
    while process.poll() is None:
        for metrics in logs.glob("*/metrics.jsonl"):
            if metrics.read_text().count('"evaluation"') >= times:
                return metrics.parent
        time.sleep(0.005)
    raise AssertionError(process.communicate())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_cut_short_ends_with_the_same_digest(home: Path, tiny: Path, number: signal.Signals) -> None:
    args = ["--model", tiny / "model", *QUICK, "--rounds", 6, "--local_step", 200, "-m", 0.5, "--log", "--eval_metric", "loss"]
    whole = start([*args, "--log_root", "whole"], home)
    expected = digest(whole.communicate()[0])
    cut = start(args, home)
    run = when_evaluated(cut, home / "logs", 2)
    os.kill(cut.pid, number)
    error = cut.communicate()[1]
    if number == signal.SIGINT:
        assert cut.returncode == 130
        place = run.relative_to(home)
        assert f"is safe in {place}. Go on with: python main.py --resume {place}" in " ".join(error.split())
    else:
        assert (cut.returncode, error) == (-signal.SIGKILL, "")
    assert Ledger.load(run / "ledger.safetensors").round < 6
    again = start(["--resume", run.relative_to(home)], home)
    output, error = again.communicate()
    assert (again.returncode, error) == (0, "")
    assert digest(output) == expected
    assert_outputs(run, 6, "loss")


# --- The four commands ---


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=["instruct", "dolly", "instruct, Pro", "dolly, Pro"])
def test_a_published_command_runs_as_it_stands(shared: Path, tmp_path: Path, command: str) -> None:
    """Verbatim but for the model and the number of rounds and steps; later flags count, so the rest stands as it is."""
    for needed in ("data/databricks-dolly-15k.jsonl", "data/natural-instructions-2.8", "models/stories260k"):
        if not (shared / needed).exists():
            pytest.skip(f"no {shared / needed}")
    (tmp_path / "data").symlink_to(shared / "data")
    (tmp_path / "main.py").symlink_to(MAIN)
    quick = ["--rounds", "2", "--local_step", "2", "--model", str(shared / "models/stories260k")]
    small = ["--max_length", "256", "--eval_limit", "8"]
    done = subprocess.run(
        [sys.executable, *command.split()[1:], *quick, *small],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    run = the_run(tmp_path)
    assert_outputs(run, 2, "rouge")
    assert yaml.safe_load((run / "config.yaml").read_text())["K"] == 1024
    assert Ledger.load(run / "ledger.safetensors").pool.family == "gaussian"
    assert len(re.findall("cost here with", done.stdout)) == 2
    (same,) = re.findall("the same with fedkseed: fedkseed (.*)", done.stdout)
    fedkseed = [sys.executable, "-c", "from fedkseed.cli import main; main()", *shlex.split(same), "--run", "again"]
    again = subprocess.run(fedkseed, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert digest(again.stdout) == digest(done.stdout)
