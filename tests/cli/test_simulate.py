"""`fedkseed simulate` as a user meets it: exit codes, one line on stderr, nothing lost."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.support.command_line import CommandLine, assert_one_line, contents, flags
from tests.support.tiny import tiny_settings

import fedkseed as fk

# --- A whole run ---


def test_a_run_prints_plain_lines_and_leaves_its_files(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny, lr=3e-3)), "--run", tmp_path / "run")
    assert (result.code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert "\r" not in result.stdout
    lines, run = result.stdout.splitlines(), tmp_path / "run"
    assert [line.split(":")[0].split(" is ")[0] for line in lines] == [
        "training records",
        "held-out records",
        "evaluating on 3 of 3 held-out records",
        "model",
        "forecast",
        "forecast",
        "round 0/3",
        *[f"round {i}/3" for i in (1, 1, 2, 2, 3, 3)],
        "the smallest held-out loss",  # it was round 2's
        "done",
        "Look at it, ask it, use it",
        *(f"  fedkseed {command}" for command in (f"report {run}", f"evaluate {run} --answers 5", f"export {run} tuned")),
    ]
    ledger = fk.Ledger.load(tmp_path / "run" / "ledger.safetensors")
    assert ledger.digest() in lines[-5]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "config.toml",
        "ledger.safetensors",
        "ledgers",
        "metrics.jsonl",
    ]


def test_the_default_run_folder_is_under_runs(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny, num_rounds=1)), cwd=tmp_path)
    assert result.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "ledger.safetensors").is_file()


def test_a_relative_path_of_the_data_outlives_a_change_of_folder(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    """A run is gone on with from anywhere: "the last ledger plus the config is everything"."""
    settings = tiny_settings(tiny, num_rounds=1) | {"model": "model", "data": "records.jsonl"}
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run", cwd=tiny).code == 0
    result = fedkseed("simulate", "--resume", tmp_path / "run", "--num-rounds", 2, cwd=tmp_path)
    assert result.code == 0, result.stderr


# --- Bad input ---


BAD_SETTINGS = [
    ({"fraction_train": 0}, ["--fraction-train", "'0'"]),
    ({"fraction_train": -0.5}, ["--fraction-train", "'-0.5'"]),
    ({"fraction_train": 1.5}, ["--fraction-train", "'1.5'"]),
    ({"lr": 0}, ["--lr", "'0'"]),
    ({"lr": -1e-3}, ["--lr", "'-0.001'"]),
    ({"lr": "nan"}, ["--lr", "'nan'"]),
    ({"lr": "inf"}, ["--lr", "'inf'"]),
    ({"lr": "fast"}, ["--lr", "'fast'"]),
    ({"eps": 0}, ["--eps", "'0'"]),
    ({"eps": -1}, ["--eps", "'-1'"]),
    ({"eps": "1e-50"}, ["--eps", "1e-50"]),  # zero in float32, which the probes are computed in
    ({"eps": "1e39"}, ["--eps", "1e39"]),  # infinite in float32
    ({"num_seeds": 0}, ["--num-seeds", "'0'"]),
    ({"num_seeds": 65537}, ["--num-seeds", "'65537'"]),
    ({"num_rounds": 0}, ["--num-rounds", "'0'"]),
    ({"num_rounds": 1.5}, ["--num-rounds", "'1.5'"]),
    ({"num_clients": 0}, ["--num-clients", "'0'"]),
    ({"local_steps": 0}, ["--local-steps", "'0'"]),
    ({"local_steps": 65536}, ["--local-steps", "'65536'"]),
    ({"batch_size": 0}, ["--batch-size", "'0'"]),
    ({"max_length": 1}, ["--max-length", "'1'"]),
    ({"alpha": 0}, ["--alpha", "'0'"]),
    ({"loss_clip": 0}, ["--loss-clip", "'0'"]),
    ({"eval_every": 0}, ["--eval-every", "'0'"]),
    ({"eval_limit": 0}, ["--eval-limit", "'0'"]),
    ({"seed": -1}, ["--seed", "'-1'"]),
    ({"min_replies": 0}, ["--min-replies", "'0'"]),
    ({"noise": "uniform"}, ["--noise", "'uniform'", "hadamard", "gaussian"]),
    ({"algorithm": "nosuch"}, ["--algorithm", "'nosuch'", "fedkseed"]),
    ({"dtype": "float64"}, ["--dtype", "'float64'", "bfloat16"]),
    ({"schedule": "step"}, ["--schedule", "'step'", "cosine"]),
    ({"partition": "random"}, ["--partition", "'random'", "dirichlet"]),
    ({"template": "alpaka"}, ["--template", "'alpaka'", "plain"]),
    ({"weighting": "size"}, ["--weighting", "'size'", "examples"]),
    ({"wire": "int8"}, ["--wire", "'int8'", "float16"]),
    ({"data": "/no/where.jsonl"}, ["--data", "'/no/where.jsonl'", "no such file"]),
    ({"eval_data": "/no/where.jsonl"}, ["--eval-data", "'/no/where.jsonl'", "no such file"]),
    ({"device": "nonsense"}, ["--device", "'nonsense'", "expected cpu, cuda or cuda:N"]),
    ({"device": "cuda:"}, ["--device", "'cuda:'", "expected cpu, cuda or cuda:N"]),
    ({"device": "cuda:99"}, ["device 'cuda:99' cannot be used here", "try 'cpu'"]),
    ({"model": "/no/model"}, ["/no/model", "no such model folder"]),
    ({"model": ""}, ["--model is '': the name is empty; give a model's folder or hub id"]),
    ({"template": "chat"}, ["no chat template"]),
    ({"num_clients": 58}, ["57 examples are too few for 58 clients"]),
    ({"min_replies": 3}, ["--min-replies is 3", "--fraction-train"]),
    (
        {"secure_sums": "on"},
        ["--secure-sums is on and a round asks 2 of 4 clients", "among fewer than 3; raise --fraction-train"],
    ),
]


@pytest.mark.parametrize(("change", "wanted"), BAD_SETTINGS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_bad_setting_is_one_line_and_leaves_the_folder_free(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, change: dict[str, Any], wanted: list[str]
) -> None:
    """Exit code 2, flag and value named; and the same --run can be used once the call is mended."""
    result = fedkseed("simulate", *flags(tiny_settings(tiny, **change)), "--run", tmp_path / "run")
    assert_one_line(result, 2, *wanted)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["lr", "model", "data"])
def test_what_has_no_default_is_asked_for(fedkseed: CommandLine, tiny: Path, missing: str) -> None:
    settings = tiny_settings(tiny)
    del settings[missing]
    assert_one_line(fedkseed("simulate", *flags(settings)), 2, f"--{missing} is missing; give it on the command line")


def test_all_that_is_missing_is_asked_for_at_once(fedkseed: CommandLine) -> None:
    asked = "--model, --data and --lr are missing; give them on the command line or as model, data and lr in the --config file"
    assert_one_line(fedkseed("simulate"), 2, f"{asked}, or take --lr auto")
    assert_one_line(fedkseed("tune"), 2, "--model and --data are missing; give them")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", ["no records"]),
        ("\n\n", ["no records"]),
        ('{"instruction": "a", "response": "b"}\n{"instruction": "a", "response": \n', ["bad.jsonl:2", "not JSON"]),
        ('{"instruction": "a", "response": "b"}\n\n["a"]\n', ["bad.jsonl:3", "array"]),
        ('{"instruction": "a"}\n', ["bad.jsonl:1", "'response'"]),
        ('{"instruction": "a", "response": 7}\n', ["bad.jsonl:1", "'response'", "number"]),
        ('{"instruction": "a", "response": "b"}\n', ["1 record", "--eval-data"]),
        ('{"instruction": "a", "response": ""}\n' * 60, ["none of 57 records has a response token"]),
    ],
    ids=["empty", "blank", "broken", "array", "no response", "number", "one record", "no responses"],
)
def test_bad_data_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path, content: str, wanted: list[str]) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    settings = tiny_settings(tiny, data=str(tmp_path / "bad.jsonl"))
    assert_one_line(fedkseed("simulate", *flags(settings), "--run", tmp_path / "run"), 2, *wanted)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_weights_is_refused(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    result = fedkseed("simulate", *flags(tiny_settings(tiny, model=str(model))), "--run", tmp_path / "run")
    assert_one_line(result, 2, "no weights (model.safetensors) in this folder")


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(fedkseed: CommandLine, tiny: Path, copied: Path) -> None:
    before = contents(copied)
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", copied)
    assert_one_line(result, 2, str(copied), "holds a run already", "--resume")
    assert contents(copied) == before


def test_a_run_cannot_be_under_a_file(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", tmp_path / "file" / "run")
    assert_one_line(result, 1, "cannot write the run folder", "choose another --run")
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", tmp_path / "file")
    assert_one_line(result, 1, "cannot write the run folder")
    assert (tmp_path / "file").read_text() == "x"


# --- Full disks (a limit on the size of a file: the write fails as it does on a full disk) ---


def test_a_ledger_that_does_not_fit_leaves_the_last_one_whole(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=2, num_seeds=4096)
    run = tmp_path / "run"
    assert fedkseed("simulate", *flags(settings), "--run", run).code == 0
    before = (run / "ledger.safetensors").read_bytes()
    result = fedkseed("simulate", "--resume", run, "--num-rounds", 4, largest_file=50_000)
    assert_one_line(result, 1, "cannot save the ledger of round 3", "make room")
    assert (run / "ledger.safetensors").read_bytes() == before
    assert [path.name for path in run.glob(".*")] == [".lock"]
    assert fedkseed("simulate", "--resume", run).code == 0  # --num-rounds 4 was kept
    whole = tmp_path / "whole"
    assert fedkseed("simulate", *flags(settings | {"num_rounds": 4}), "--run", whole).code == 0
    assert (run / "ledger.safetensors").read_bytes() == (whole / "ledger.safetensors").read_bytes()


def test_metrics_that_do_not_fit_are_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=50, local_steps=1)
    result = fedkseed("simulate", *flags(settings), "--run", tmp_path / "run", largest_file=8_000)
    assert_one_line(result, 1, "metrics.jsonl: cannot write", "make room", "--resume")
    assert fk.Ledger.load(tmp_path / "run" / "ledger.safetensors").round > 3


def test_a_finished_run_is_told_so_before_anything_is_loaded(fedkseed: CommandLine, copied: Path) -> None:
    """Unless something of it was not written down, as by a kill: then it is gone on with."""
    before = contents(copied)
    at_once = f"all 3 rounds were done already\ndone: {copied}/ledger.safetensors, "
    for extra in ([], ["--num-rounds", 3]):
        result = fedkseed("simulate", "--resume", copied, *extra)
        assert (result.code, result.stderr) == (0, "")
        assert result.stdout.startswith(at_once)
    assert contents(copied) == before
    lines = before["metrics.jsonl"].splitlines(keepends=True)
    for left in (b"".join(lines[:-1]), b"".join(lines[:-1]) + lines[-1][:9], b"".join(lines) + b"{"):
        (copied / "metrics.jsonl").write_bytes(left)
        assert fedkseed("simulate", "--resume", copied).stdout.startswith("training records: ")
        assert fk.Ledger.load(copied / "ledger.safetensors").round == 3
        assert (copied / "metrics.jsonl").read_bytes().count(b"\n") == len(lines)


def test_fewer_rounds_than_are_done_change_nothing(fedkseed: CommandLine, copied: Path) -> None:
    before = contents(copied)
    result = fedkseed("simulate", "--resume", copied, "--num-rounds", 2)
    assert_one_line(result, 2, f"--num-rounds is 2 and {copied} has 3 rounds already; give as many or more")
    assert contents(copied) == before


def test_a_disk_that_is_full_from_the_start_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", tmp_path / "run", largest_file=10)
    assert_one_line(result, 1, "cannot write the run folder")


def test_resuming_on_a_full_disk_is_one_line(fedkseed: CommandLine, copied: Path) -> None:
    before = contents(copied)
    assert_one_line(fedkseed("simulate", "--resume", copied, "--num-rounds", 4, largest_file=100), 1, "cannot write")
    assert contents(copied) | {".lock": b""} == before | {".lock": b""}  # which says whose it was


# --- One run, one writer ---

HOLDING = (
    "import sys; from pathlib import Path; from fedkseed.files import Lock;"
    "print(Lock(Path(sys.argv[1])).acquire(), flush=True); sys.stdin.read()"
)


def test_a_run_that_is_being_written_is_read_by_all_and_written_by_nobody_else(
    fedkseed: CommandLine, copied: Path, tmp_path: Path
) -> None:
    """The lock is gone with its process, however that ends; the file that stands for it stays."""
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(copied / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "None\n"
    before = contents(copied)
    for extra in ([], ["--num-rounds", 4], ["--num-rounds", 4, "--accept-changes"]):
        result = fedkseed("simulate", "--resume", copied, *extra)
        assert_one_line(result, 2, f"{copied} is being written by process {writer.pid}; wait until it is done, or end it first")
        assert result.stdout == ""  # before anything is loaded
    for command in (["inspect", copied], ["report", copied], ["evaluate", copied, "--limit", 1]):
        assert fedkseed(*command).code == 0
    assert fedkseed("export", copied, tmp_path / "out", "--ledger-only").code == 0
    assert contents(copied) == before
    writer.kill()
    writer.communicate()
    assert fedkseed("simulate", "--resume", copied, "--num-rounds", 4).code == 0


# --- Resuming what cannot be resumed ---


@pytest.mark.parametrize("flag", [("--lr", 1), ("--seed", 8), ("--noise", "gaussian"), ("--num-clients", 5)])
def test_resume_takes_no_other_setting_unasked(fedkseed: CommandLine, copied: Path, flag: tuple[str, object]) -> None:
    before = contents(copied)
    result = fedkseed("simulate", "--resume", copied, *flag)
    assert_one_line(result, 2, f"{flag[0]} is {flag[1]}", f"when round 3 of {copied} was made", "or add --accept-changes")
    assert contents(copied) == before


@pytest.mark.parametrize("flag", [("--run", "elsewhere"), ("--config", "x.toml")])
def test_resume_takes_no_other_folder(fedkseed: CommandLine, copied: Path, flag: tuple[str, object]) -> None:
    assert_one_line(fedkseed("simulate", "--resume", copied, *flag), 2, f"{flag[0]} can't be given with --resume")


def test_resume_looks_for_no_learning_rate(fedkseed: CommandLine, copied: Path) -> None:
    result = fedkseed("simulate", "--resume", copied, "--lr", "auto")
    assert_one_line(result, 2, "--lr auto can't be given with --resume, which goes on at the run's own rate; leave --lr out")


def test_changes_are_accepted_of_a_resume_only(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", tmp_path / "run", "--accept-changes")
    assert_one_line(result, 2, "--accept-changes is of --resume, which is missing")
    assert not (tmp_path / "run").exists()


def test_a_moved_model_and_moved_data_are_named_and_checked(
    fedkseed: CommandLine, tiny: Path, other_model: Path, copied: Path, tmp_path: Path
) -> None:
    """Under their new names the run ends as it would have; others in their places are refused, and nothing is changed."""
    config = copied / "config.toml"
    config.write_text(config.read_text().replace(str(tiny), str(tmp_path / "gone")))
    assert_one_line(fedkseed("simulate", "--resume", copied), 2, "--model is ", "if it was moved, add --model NEW")
    new = ["--model", shutil.copytree(tiny / "model", tmp_path / "model")]
    assert_one_line(fedkseed("simulate", "--resume", copied, *new), 2, "--data is ", "if it was moved, add --data NEW")
    data = Path(shutil.copy(tiny / "records.jsonl", tmp_path / "moved.jsonl"))
    lines = data.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(["{}", *lines[1:]]).replace("{}", lines[1]))
    more = ["simulate", "--resume", copied, "--num-rounds", 4]
    before = contents(copied) | {".lock": b""}
    result = fedkseed(*more, *new, "--data", other)
    assert_one_line(result, 2, "the clients' records are others (digest", f"when round 3 of {copied} was made")
    result = fedkseed(*more, "--model", other_model, "--data", data)
    assert result.stderr.startswith("fedkseed: ledger.safetensors is of another base model than"), result
    assert contents(copied) | {".lock": b""} == before
    assert fedkseed(*more, *new, "--data", data).code == 0
    whole = tmp_path / "whole"
    assert fedkseed("simulate", *flags(tiny_settings(tiny, num_rounds=4)), "--run", whole).code == 0
    assert (copied / "ledger.safetensors").read_bytes() == (whole / "ledger.safetensors").read_bytes()
    assert str(tmp_path / "moved.jsonl") in config.read_text()


def test_resume_of_no_run_is_one_line(fedkseed: CommandLine, tmp_path: Path) -> None:
    assert_one_line(fedkseed("simulate", "--resume", tmp_path / "none"), 2, "holds no run (no config.toml)")
    assert_one_line(fedkseed("simulate", "--resume", tmp_path), 2, "holds no run (no config.toml)")


def edit_ledger(path: Path, change: Any) -> None:
    """Rewrite the metadata of a ledger's file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = json.loads(header["__metadata__"]["fedkseed"])
    change(metadata)
    header["__metadata__"]["fedkseed"] = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("version", [0, 5, "1"])
def test_a_ledger_of_another_version_is_refused(fedkseed: CommandLine, copied: Path, version: object) -> None:
    ledger = copied / "ledger.safetensors"
    edit_ledger(ledger, lambda metadata: metadata.update(format=version))
    before = contents(copied)
    for args in (["simulate", "--resume", copied, "--num-rounds", 4], ["inspect", copied], ["export", copied, copied / "out"]):
        assert_one_line(fedkseed(*args), 1, str(ledger), "ledger format is ", f"{version}", "this version reads 1")
    after = contents(copied)
    assert after["ledger.safetensors"] == before["ledger.safetensors"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]


def test_another_base_is_refused_by_name(fedkseed: CommandLine, tiny: Path, copied: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    config = copied / "config.toml"
    config.write_text(config.read_text().replace(str(tiny / "model"), str(model)))
    assert fedkseed("simulate", "--resume", copied).code == 0  # a copy with the same values is the same base
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    before = contents(copied)
    result = fedkseed("simulate", "--resume", copied, "--num-rounds", 9)
    assert_one_line(result, 1, "another base model", "model.norm.weight is the first of 1 parameters")
    after = contents(copied)
    assert after["ledger.safetensors"] == before["ledger.safetensors"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    result = fedkseed("export", copied, tmp_path / "out")
    assert_one_line(result, 1, "this model is not the ledger's base: model.norm.weight is the first")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_damaged_ledger_is_refused(fedkseed: CommandLine, copied: Path, content: bytes) -> None:
    (copied / "ledger.safetensors").write_bytes(content)
    assert_one_line(fedkseed("simulate", "--resume", copied), 1, "not a ledger, or damaged")
    assert_one_line(fedkseed("inspect", copied), 1, "not a ledger, or damaged")


def test_a_config_that_is_not_toml_is_refused(fedkseed: CommandLine, copied: Path) -> None:
    (copied / "config.toml").write_text("lr = = 3")
    assert_one_line(fedkseed("simulate", "--resume", copied), 1, "config.toml is not TOML", "restore it")
    (copied / "config.toml").write_bytes(b"lr = '\xff\xfe'")
    assert_one_line(fedkseed("simulate", "--resume", copied), 1, "config.toml is not TOML")


# --- Interrupted before there is anything to go on with ---


def test_an_interrupt_while_reading_data_exits_130_with_a_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fedkseed.runs.records
    from fedkseed.cli import main

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fedkseed.runs.records, "prepare", interrupt)
    monkeypatch.setattr(sys, "argv", ["fedkseed", "simulate", *flags(tiny_settings(tiny)), "--run", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said, command = capsys.readouterr().err.splitlines()
    assert said == "fedkseed: interrupted; no run was begun yet. Go on with:"
    assert shlex.split(command) == sys.argv


@pytest.mark.parametrize("lr", [None, "abc", "-1"])
def test_a_learning_rate_that_is_missing_or_none_leads_to_auto_and_tune(
    fedkseed: CommandLine, tiny: Path, lr: str | None
) -> None:
    settings = {name: value for name, value in tiny_settings(tiny).items() if name != "lr"} | ({"lr": lr} if lr else {})
    assert_one_line(fedkseed("simulate", *flags(settings)), 2, "--lr auto", "fedkseed tune", lr or "is missing")
