"""Settings: flag > file > default, and what is no setting is an error of one line."""

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.tiny import tiny_settings

from fedkseed.errors import ConfigError
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.settings import SimulationConfig, build, flag
from fedkseed.runs.settings import flags as words_of


@pytest.fixture
def needed(tmp_path: Path) -> dict[str, Any]:
    """What has no default."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    return {"model": "a/b", "data": str(tmp_path / "data.jsonl"), "lr": 1e-4}


# --- Precedence, through the command line ---


def resolved(run: Path) -> dict[str, Any]:
    return tomllib.loads((run / "config.toml").read_text())


def test_a_flag_beats_the_file_and_the_file_beats_the_default(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    in_file = tiny_settings(tiny, num_rounds=1, local_steps=2, batch_size=3, schedule="linear", loss_clip=2.5)
    file.write_text(tomli_w.dumps(in_file))
    given = {"batch_size": 4, "noise": "gaussian", "lr": 0.002}
    result = fedkseed("simulate", "--config", file, *flags(given), "--run", tmp_path / "run")
    assert (result.code, result.stderr) == (0, "")
    found = resolved(tmp_path / "run")
    assert {name: found[name] for name in given} == given  # flag > file, flag > default
    left = {name: value for name, value in in_file.items() if name not in given}
    assert {name: found[name] for name in left} == left  # file > default
    fields = SimulationConfig.model_fields
    for name in set(fields) - set(given) - set(in_file) - {"eval_limit"}:  # which is found out
        assert found.get(name) == (fields[name].default if ALGORITHMS["fedkseed"].takes(name) else None)
    steps = [line for line in result.stdout.splitlines() if "clients" in line]
    assert steps  # and it ran


def test_a_whole_run_can_come_from_a_file(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(tomli_w.dumps(tiny_settings(tiny, num_rounds=1)))
    assert fedkseed("simulate", "--config", tmp_path / "settings.toml", "--run", tmp_path / "a").code == 0
    assert fedkseed("simulate", *flags(tiny_settings(tiny, num_rounds=1)), "--run", tmp_path / "b").code == 0
    for name in ("config.toml", "ledger.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_settings_that_were_written_start_the_same_run(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, num_rounds=1, loss_clip=3.3, alpha=0.7, lr=0.1 + 0.2, seed=2**63 - 1)
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "a").code == 0
    assert fedkseed("simulate", "--config", tmp_path / "a" / "config.toml", "--run", tmp_path / "b").code == 0
    for name in ("config.toml", "ledger.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("num_round = 3\n", ["'num_round' is unknown", "num_rounds"]),
        ("[server]\nlr = 3\n", ["'server' is unknown"]),
        ("run = 'x'\n", ["'run' is unknown"]),
        ("num-rounds = 3\n", ["'num-rounds' is unknown"]),
        ("num_rounds = 'many'\n", ["--num-rounds is 'many'"]),
        ("num_rounds = 2.5\n", ["--num-rounds is '2.5'"]),
        ("num_rounds = [3]\n", ["--num-rounds is '[3]'"]),
        ("num_rounds = true\n", ["--num-rounds is 'True'"]),
        ("loss_clip = true\n", ["--loss-clip is 'True'"]),
        ("model = 3\n", ["--model is '3'"]),
        ("data = 3\n", ["--data is '3'"]),
        ("noise = 3\n", ["--noise is '3'"]),
        ("lr = nan\n", ["--lr is 'nan'"]),
        ("fraction_train = 0\n", ["--fraction-train is '0'"]),
        ("eps = -1.0\n", ["--eps is '-1.0'"]),
        ("num_seeds = 100000\n", ["--num-seeds is '100000'"]),
        ("lr = = 3\n", ["not TOML", "num_rounds = 40"]),
        ("lr = '\xff'\n", ["not TOML"]),
    ],
)
def test_a_bad_file_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path, content: str, wanted: list[str]) -> None:
    (tmp_path / "settings.toml").write_bytes(content.encode("latin-1"))
    name = content.split(" =")[0]
    rest = {n: v for n, v in tiny_settings(tiny).items() if n != name}
    result = fedkseed("simulate", "--config", tmp_path / "settings.toml", *flags(rest), "--run", tmp_path / "run")
    assert_one_line(result, 2, *wanted)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_one_line(fedkseed: CommandLine, tmp_path: Path) -> None:
    assert_one_line(fedkseed("simulate", "--config", tmp_path / "none.toml"), 2, "none.toml: cannot read", "TOML file")
    assert_one_line(fedkseed("simulate", "--config", tmp_path), 2, "cannot read")


# --- The model of the settings itself ---


def test_there_is_no_default_learning_rate(needed: dict[str, Any]) -> None:
    for name in ("model", "lr"):
        with pytest.raises(
            ConfigError, match=rf"^--{name} is missing; give it on the command line or as {name} in the --config"
        ):
            build({key: value for key, value in needed.items() if key != name})


def test_a_choice_that_is_nearly_one_leads_to_it(needed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^--algorithm is 'fedkseed-gard': .*; did you mean 'fedkseed-grad'\?$"):
        build({**needed, "algorithm": "fedkseed-gard"})
    with pytest.raises(ConfigError, match=r"^--template is 'chatt': unknown; .*; did you mean 'chat'\?$") as caught:
        build({**needed, "template": "chatt"})
    assert str(caught.value).count("chatt") == 1
    with pytest.raises(ConfigError, match=r"^--lr is '-1': input should be greater than or equal to 1e-37; give a number"):
        build({**needed, "lr": "-1"})


ODD = os.fsdecode(b"d\xff")
"""A name that is not UTF-8."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", "data.jsonl"),
        ("eval_data", f"../{ODD}/data.jsonl"),
        ("template", "template.toml"),
        ("model", "."),
        ("held_out_category", ODD),
        ("train", ODD),
    ],
)
def test_what_is_not_utf_8_is_refused_before_a_run(
    needed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """`config.toml` could not hold it: of any setting, and of a path that is made absolute."""
    (tmp_path / ODD).mkdir()
    (tmp_path / ODD / "data.jsonl").write_text("{}\n")
    (tmp_path / ODD / "template.toml").write_text("prompt_input = '{instruction}{input}'\nprompt_no_input = '{instruction}'\n")
    monkeypatch.chdir(tmp_path / ODD)
    with pytest.raises(ConfigError, match=rf"^{flag(name)} is '[^']*d\\udcff[^']*', which is not UTF-8, .* another name$"):
        build(needed | {name: value})


def test_a_source_that_is_not_there_is_named_whatever_its_name(needed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^--data is '.*': d\\udcff: no such file"):
        build(needed | {"data": f"{needed['data']},{ODD}"})


def test_the_defaults_are_the_papers(needed: dict[str, Any]) -> None:
    config = build(needed)
    expected = {
        "algorithm": "fedkseed",
        "num_rounds": 40,
        "fraction_train": 0.05,
        "local_steps": 200,
        "batch_size": 1,
        "schedule": "constant",
        "eps": 5e-4,
        "num_seeds": 4096,
        "noise": "hadamard",
        "weighting": "examples",
        "loss_clip": None,
        "num_clients": 200,
        "max_length": None,
        "partition": "dirichlet",
        "eval_data": None,
        "eval_limit": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_text_is_read_as_the_type_of_the_setting(needed: dict[str, Any]) -> None:
    config = build(needed | {"lr": "3e-7", "num_rounds": "7", "loss_clip": "0.5"})
    assert (config.lr, config.num_rounds, config.loss_clip) == (3e-7, 7, 0.5)
    assert isinstance(config.num_rounds, int)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("fraction_train", [1e-9, 1], [0, -1, 1.0000001, "nan"]),
        ("lr", [1e-30, 1], [0, -1, "inf", "nan", ""]),
        ("eps", [1e-30, 1], [0, -1, "inf", "nan"]),
        ("num_seeds", [1, 65536], [0, 65537, 1.5]),
        ("num_rounds", [1], [0, -1, 1.5]),
        ("local_steps", [1, 65535], [0, 65536]),
        ("batch_size", [1, 65535], [0, 65536]),
        ("max_length", [2], [1]),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("alpha", [1e-3, 1e3], [0, "inf"]),
        ("loss_clip", [1e-3], [0, -1, "inf"]),
        ("min_replies", [1], [0]),
        ("num_clients", [1], [0]),
        ("eval_every", [1], [0]),
        ("eval_limit", [1], [0]),
    ],
)
def test_values_in_range_are_taken_and_others_are_one_line(
    needed: dict[str, Any], name: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert getattr(build(needed | {name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^{flag(name)} is '{value}': ") as caught:
            build(needed | {name: value})
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("algorithm", ["fedkseed", "fedkseed-grad", "fedavg"])
def test_a_run_from_before_there_were_rules_goes_on_as_a_mean(needed: dict[str, Any], tmp_path: Path, algorithm: str) -> None:
    """New ones are clipped; what the folder does not say is as it was then."""
    run = RunFolder.create(tmp_path / "run", build(needed | {"algorithm": algorithm}))
    assert run.config.rule.name == RunFolder.open(run.path).config.rule.name == ("mean" if algorithm == "fedavg" else "clipped")
    file = run.path / "config.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("aggregator", "shared_seeds"))]
    file.write_text("\n".join(lines) + "\n")
    assert RunFolder.open(run.path).config.rule.name == "mean"


def test_a_flag_is_the_settings_name_in_kebab_case() -> None:
    assert flag("num_rounds") == "--num-rounds"
    assert flag("lr") == "--lr"


def test_what_was_given_is_among_a_command_lines_words_at_its_default_too(needed: dict[str, Any]) -> None:
    """`--server-optimizer adam` wants to be given a `--server-lr`, be it 1; what nobody gave is left out."""
    given = needed | {"algorithm": "fedkseed-grad", "server_optimizer": "adam", "server_lr": 1.0}
    words = words_of(build(given))
    assert words[words.index("--server-lr") + 1] == "1.0"
    again = dict(zip(words[::2], words[1::2], strict=True))
    assert build({name[2:].replace("-", "_"): value for name, value in again.items()}) == build(given)
    assert "--eps" not in words


def test_settings_round_trip_through_the_run_folder(needed: dict[str, Any], tmp_path: Path) -> None:
    config = build(needed | {"lr": 0.1 + 0.2, "loss_clip": 1e-300, "seed": 2**63 - 1, "model": 'a "quoted" \\ name/ü'})
    RunFolder.create(tmp_path / "run", config)
    assert RunFolder.open(tmp_path / "run").config == config
