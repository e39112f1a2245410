"""The command line as a user meets it: exit codes, one line on stderr, nothing lost. And how the other files call it."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import laws
from tests.support.command_line import (
    ENVIRONMENT,
    FEDKSEED,
    CommandLine,
    Result,
    assert_one_line,
    command_line,
    contents,
    flags,
)
from tests.support.runs import read_metrics
from tests.support.tiny import tiny_model, tiny_records, tiny_settings

import fedkseed as fk
from fedkseed.models.loading import load_model

# click 8.5 deprecates names that typer 0.20 takes from it on import
OLD_TYPER = pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")


@pytest.fixture(scope="module")
def fedkseed() -> CommandLine:
    return command_line()


@pytest.fixture(scope="module")
def finished(fedkseed: CommandLine, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done; tests leave it as it is."""
    run = tmp_path_factory.mktemp("finished") / "run"
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", run)
    assert (result.code, result.stderr) == (0, "")
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


# --- Quick and plain ---


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['fedkseed', *sys.argv[1:]]\n"
        "from fedkseed.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "print(sorted({'torch', 'transformers', 'numba', 'scipy'} & set(sys.modules)))\n"
    )
    for args in (["--help"], ["simulate", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, env=ENVIRONMENT)
        assert done.stdout.endswith("[]\n")
        assert "Usage: fedkseed" in done.stdout


def test_the_console_script_works_and_tells_its_version() -> None:
    done = subprocess.run([FEDKSEED, "--version"], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout == f"fedkseed {fk.__version__}\n"
    assert done.stderr == ""


def test_the_console_script_ends_with_the_exit_code_of_the_error() -> None:
    done = subprocess.run([FEDKSEED, "simulate", "--model", "x"], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert_one_line(Result(done.returncode, done.stdout, done.stderr), 2, "is missing; give it on the command line")


def test_every_setting_has_a_flag_with_its_description(fedkseed: CommandLine) -> None:
    from fedkseed.runs.settings import SimulationConfig

    shown = fedkseed("simulate", "--help")
    assert shown.code == 0
    for name, field in SimulationConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown.stdout
        assert str(field.description).split()[0] in shown.stdout


@pytest.mark.parametrize("args", [["simulate", "--nonsense", "1"], ["nonsense"], ["inspect"]])
def test_a_wrong_command_line_is_a_usage_error(fedkseed: CommandLine, args: list[str]) -> None:
    result = fedkseed(*args)
    assert result.code == 2
    assert "Traceback" not in result.stderr
    assert "Usage: fedkseed" in result.stderr


# --- A whole run ---


def test_a_run_prints_plain_lines_and_leaves_its_files(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", tmp_path / "run")
    assert (result.code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert "\r" not in result.stdout
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "training records",
        "held-out records",
        "model",
        "round 0/3",
        *[f"round {i}/3" for i in (1, 1, 2, 2, 3, 3)],
        "done",
    ]
    ledger = fk.Ledger.load(tmp_path / "run" / "ledger.safetensors")
    assert ledger.digest() in lines[-1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.toml", "ledger.safetensors", "metrics.jsonl"]


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
    ({"model": ""}, ["model"]),
    ({"template": "chat"}, ["no chat template"]),
    ({"num_clients": 58}, ["57 examples are too few for 58 clients"]),
    ({"min_replies": 3}, ["--min-replies is 3", "--fraction-train"]),
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


def test_tensorboard_that_is_not_installed_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401  # type: ignore[import-untyped]
    except ImportError:
        result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--tensorboard", "--run", tmp_path / "run")
        assert_one_line(result, 2, "--tensorboard needs an extra", "pip install")
        assert not (tmp_path / "run").exists()
    else:
        pytest.skip("tensorboard is installed")


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
    assert not list(run.glob(".*"))
    assert fedkseed("simulate", "--resume", run).code == 0  # --num-rounds 4 was kept
    whole = tmp_path / "whole"
    assert fedkseed("simulate", *flags(settings | {"num_rounds": 4}), "--run", whole).code == 0
    assert (run / "ledger.safetensors").read_bytes() == (whole / "ledger.safetensors").read_bytes()


def test_metrics_that_do_not_fit_are_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=50, local_steps=1)
    result = fedkseed("simulate", *flags(settings), "--run", tmp_path / "run", largest_file=8_000)
    assert_one_line(result, 1, "metrics.jsonl: cannot write", "make room", "--resume")
    assert fk.Ledger.load(tmp_path / "run" / "ledger.safetensors").round > 3


def test_a_disk_that_is_full_from_the_start_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny)), "--run", tmp_path / "run", largest_file=10)
    assert_one_line(result, 1, "cannot write the run folder")


def test_resuming_on_a_full_disk_is_one_line(fedkseed: CommandLine, copied: Path) -> None:
    before = contents(copied)
    assert_one_line(fedkseed("simulate", "--resume", copied, largest_file=100), 1, "cannot write")
    assert contents(copied) == before


# --- Resuming what cannot be resumed ---


@pytest.mark.parametrize(
    "flag", [("--lr", 1), ("--seed", 8), ("--run", "elsewhere"), ("--config", "x.toml"), ("--noise", "gaussian")]
)
def test_resume_takes_no_other_setting(fedkseed: CommandLine, copied: Path, flag: tuple[str, object]) -> None:
    before = contents(copied)
    result = fedkseed("simulate", "--resume", copied, *flag)
    assert_one_line(result, 2, f"{flag[0]} can't be given with --resume", "only --num-rounds can")
    assert contents(copied) == before


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


@pytest.mark.parametrize("version", [0, 2, "1"])
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


# --- inspect, doctor ---


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_inspect_shows_what_a_ledger_holds(fedkseed: CommandLine, finished: Path, columns: str) -> None:
    ledger = fk.Ledger.load(finished / "ledger.safetensors")
    shown = [fedkseed("inspect", path, env={"COLUMNS": columns}) for path in (finished, finished / "ledger.safetensors")]
    assert shown[0] == shown[1]
    assert (shown[0].code, shown[0].stderr) == (0, "")
    for text in (ledger.digest(), ledger.base.fingerprint, f"{ledger.pool.key:#018x}"):
        assert text in shown[0].stdout  # whole, to be compared or copied, however narrow the terminal
    words = " ".join(shown[0].stdout.split())
    assert "rounds 3" in words
    assert "K = 64, hadamard" in words
    assert "36 taken" in words  # 3 rounds, 2 clients, 6 steps
    assert "checkpoint of a run" in words


def test_inspect_takes_a_path_as_it_is(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    odd = tmp_path / "run[bold]x"
    shutil.copytree(finished, odd)
    result = fedkseed("inspect", odd)
    assert result.code == 0
    assert "run[bold]x" in result.stdout


def test_inspect_of_something_else_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    assert_one_line(fedkseed("inspect", tmp_path / "none"), 1, "cannot read the ledger", "No such file")
    assert_one_line(fedkseed("inspect", tmp_path), 1, "cannot read the ledger")
    assert_one_line(fedkseed("inspect", tiny / "records.jsonl"), 1, "not a ledger, or damaged")
    assert_one_line(fedkseed("inspect", tiny / "model" / "model.safetensors"), 1, "not a ledger, or damaged")


def test_doctor_finds_the_bits_right(fedkseed: CommandLine) -> None:
    result = fedkseed("doctor")
    assert (result.code, result.stderr) == (0, "")
    for backend in laws.BACKENDS:
        for family in ("hadamard", "gaussian"):
            assert f"noise backend {backend}, {family}: bits are right" in result.stdout
    assert result.stdout.endswith("all is well\n")


@OLD_TYPER
def test_doctor_finds_wrong_bits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fedkseed.cli import doctor
    from fedkseed.errors import RunError

    monkeypatch.setitem(doctor.EXPECTED, "gaussian", "0" * 64)
    with pytest.raises(RunError, match=r"reference/gaussian, cpu/gaussian.* compute other bits"):
        doctor.doctor()
    assert "reference, gaussian: BITS ARE WRONG" in capsys.readouterr().out


@OLD_TYPER
def test_the_doctors_expectation_is_the_oracles() -> None:
    from fedkseed.cli.doctor import EXPECTED

    a = (np.arange(64, dtype=np.float32) - 31) * np.float32(0.001)
    for family in laws.FAMILIES:
        assert laws.sha256(laws.noise_sum(family, 0x0123456789ABCDEF, "model.norm.weight", 1000, a)) == EXPECTED[family]


# --- export ---


def test_an_exported_folder_loads_in_a_fresh_process_with_the_tuned_weights(
    fedkseed: CommandLine, tiny: Path, finished: Path, tmp_path: Path
) -> None:
    result = fedkseed("export", finished, tmp_path / "tuned")
    assert result.code == 0, result.stderr
    assert str(tmp_path / "tuned") in result.stdout
    assert "after 3 rounds" in result.stdout
    code = (
        "import sys, transformers as t\n"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); k = t.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = k('name the animal', return_tensors='pt')\n"
        "assert m(input_ids=ids['input_ids']).logits.isfinite().all()\n"
        "from safetensors.torch import save_file\n"
        "save_file({n: p.detach().clone() for n, p in m.named_parameters()}, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "tuned", tmp_path / "seen"], check=True, env=ENVIRONMENT)
    model = load_model(tiny / "model", "float32")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    fk.apply(model, finished / "ledger.safetensors")
    seen = load_file(tmp_path / "seen")
    assert set(seen) == set(base)
    for name, parameter in model.named_parameters():
        assert torch.equal(seen[name], parameter.detach())
    assert any(not torch.equal(seen[name], base[name]) for name in base)


def test_an_exported_folder_has_a_card_of_its_run(fedkseed: CommandLine, tiny: Path, copied: Path, tmp_path: Path) -> None:
    assert fedkseed("export", copied, tmp_path / "tuned").code == 0
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    ledger = fk.Ledger.load(copied / "ledger.safetensors")
    losses = [event["eval_loss"] for event in read_metrics(copied) if event["event"] == "evaluation"]
    assert len(losses) == 4
    assert f"{losses[0]:.4f} before, {losses[-1]:.4f} after" in card
    assert "6 local steps of 2 records" in card
    for digest in (ledger.digest(), ledger.published().digest(), ledger.base.fingerprint):
        assert digest in card
    assert 'base_model: "model"\n' in card
    for folder in (tiny, copied, tmp_path):
        assert str(folder) not in card
    # the settings alone are enough: the records may lie elsewhere by now
    config = copied / "config.toml"
    config.write_text(config.read_text().replace("records.jsonl", "gone.jsonl"))
    assert fedkseed("export", copied, tmp_path / "again").code == 0
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == card


def test_a_card_tells_of_a_run_only_what_is_known_of_this_ledger(
    fedkseed: CommandLine, tiny: Path, copied: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "model.ledger"
    assert fedkseed("export", copied, ledger, "--ledger-only").code == 0

    def card(*args: object) -> str:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        result = fedkseed("export", args[0], out, *args[1:])
        assert result.code == 0, result.stderr
        return (out / "README.md").read_text(encoding="utf-8")

    (tmp_path / "config.toml").write_text("of = 'something else'\n")
    whole, bare = card(copied), card(ledger, "--model", tiny / "model")
    for text in ("local steps of", "learning rate", "held-out loss", "the run's ledger"):
        assert text in whole
        assert text not in bare
    assert fk.Ledger.load(ledger).digest() in bare
    assert fk.Ledger.load(ledger).digest() in whole
    # another ledger beside a run's settings
    run = fk.Ledger.load(copied / "ledger.safetensors")
    dataclasses.replace(run.published(), coefficients=np.zeros_like(run.coefficients)).save(copied / "other.ledger")
    assert "local steps of" not in card(copied / "other.ledger")
    # a run that measured the base model's loss no more
    metrics = copied / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if '"server_round": 0,' not in line))
    whole = card(copied)
    assert "local steps of" in whole
    assert "held-out loss" not in whole


def test_the_card_of_the_built_in_model_has_its_name(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    from fedkseed.demo import model_folder

    settings = tiny_settings(tiny, model=str(model_folder()), num_rounds=1, local_steps=1)
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run").code == 0
    assert fedkseed("export", tmp_path / "run", tmp_path / "out").code == 0
    assert 'base_model: "fedkseed-demo"\n' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_an_export_of_damaged_metrics_is_one_line(fedkseed: CommandLine, copied: Path, tmp_path: Path) -> None:
    (copied / "metrics.jsonl").write_text("junk\n")
    assert_one_line(fedkseed("export", copied, tmp_path / "out"), 1, "metrics.jsonl is damaged", "restore it")
    assert not (tmp_path / "out").exists()


def test_an_export_in_half_precision_is_the_float32_one_cast_once(
    fedkseed: CommandLine, tiny: Path, finished: Path, tmp_path: Path
) -> None:
    """The base of this run is float32, so its bfloat16 load is another base: refused, or else exact."""
    result = fedkseed("export", finished, tmp_path / "tuned", "--dtype", "bfloat16")
    if result.code:
        assert_one_line(result, 1, "this model is not the ledger's base")
        assert not (tmp_path / "tuned").exists()
        return
    model = load_model(tiny / "model", "float32")
    fk.apply(model, finished / "ledger.safetensors")
    found = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(found[name], p.detach().bfloat16()) for name, p in model.named_parameters())


def test_the_published_ledger_is_small_and_enough(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fedkseed("simulate", *flags(tiny_settings(tiny, num_seeds=4096, num_rounds=1)), "--run", run).code == 0
    result = fedkseed("export", run, tmp_path / "model.ledger", "--ledger-only")
    assert (result.code, result.stderr) == (0, "")
    size = (tmp_path / "model.ledger").stat().st_size
    assert 8192 < size < 9500
    assert f"{size:,} bytes, 1 rounds, K = 4096" in result.stdout
    digests = []
    for path in (run / "ledger.safetensors", tmp_path / "model.ledger"):
        model = load_model(tiny / "model", "float32")
        digests.append(fk.bind(model, fk.apply(model, path).pool).digest())
    assert digests[0] == digests[1]
    shown = fedkseed("inspect", tmp_path / "model.ledger")
    assert "published" in shown.stdout
    assert "taken" not in shown.stdout
    # a published ledger lies in a folder without config.toml
    assert_one_line(fedkseed("export", tmp_path / "model.ledger", tmp_path / "out"), 2, "--model is missing", "give --model")
    assert fedkseed("export", tmp_path / "model.ledger", tmp_path / "out", "--model", tiny / "model").code == 0
    # and a run cannot go on from it
    shutil.copyfile(tmp_path / "model.ledger", run / "ledger.safetensors")
    assert_one_line(fedkseed("simulate", "--resume", run, "--num-rounds", 2), 1, "published ledger has no accumulators")


@pytest.mark.parametrize("extra", [[], ["--ledger-only"]])
def test_export_overwrites_nothing(fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        assert_one_line(fedkseed("export", finished, tmp_path / name, *extra), 2, str(tmp_path / name), "exists")
    assert (tmp_path / "file").read_text() == "x"
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("extra", [[], ["--ledger-only"]], ids=["folder", "ledger"])
def test_an_export_that_cannot_be_written_is_one_line(
    fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str]
) -> None:
    (tmp_path / "file").write_text("x")
    result = fedkseed("export", finished, tmp_path / "file" / "out", *extra)
    assert_one_line(result, 1 if extra else result.code or 1, str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("extra", [[], ["--ledger-only"]], ids=["folder", "ledger"])
def test_an_export_onto_a_full_disk_is_one_line(
    fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str]
) -> None:
    """A failure (1), not a usage error (2): the same call is right once there is room."""
    assert_one_line(fedkseed("export", finished, tmp_path / "out", *extra, largest_file=300), 1, "make room")
    assert not (tmp_path / "out").exists()


def test_export_names_a_wrong_dtype(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    result = fedkseed("export", finished, tmp_path / "out", "--dtype", "int8")
    assert_one_line(result, 2, "--dtype is 'int8'", "bfloat16")
    assert not (tmp_path / "out").exists()


def test_export_of_no_run_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    assert_one_line(fedkseed("export", tmp_path / "none", tmp_path / "out"), 1, "cannot read the ledger")
    assert not (tmp_path / "out").exists()


def test_export_onto_another_model_is_refused(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", seed=3)
    tiny_records(tmp_path / "records.jsonl")
    result = fedkseed("export", finished, tmp_path / "out", "--model", other)
    assert_one_line(result, 1, "this model is not the ledger's base: lm_head.weight is the first of")
    assert not (tmp_path / "out").exists()


# --- Interrupted before there is anything to go on with ---


@OLD_TYPER
def test_an_interrupt_while_reading_data_exits_130_with_a_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fedkseed.runs.records
    from fedkseed.cli import main

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fedkseed.runs.records, "prepare", interrupt)
    monkeypatch.setattr(sys, "argv", ["fedkseed", "simulate", *flags(tiny_settings(tiny)), "--run", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fedkseed: interrupted\n"
