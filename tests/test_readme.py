"""What README.md tells a reader to type: commands run, Python runs, and what is named exists.

Commands run one after the other in one folder, as a reader would, on a tiny model and records in place of the reader's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model
from tests.support.command_line import CommandLine
from tests.support.documents import ROOT, blocks, commands, links, spans, unknown
from tests.support.tiny import tiny_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
STANDS_FOR = {"MODEL": "model", "databricks-dolly-15k.jsonl": "records.jsonl"}
QUICK = {"simulate": ["--num-rounds", "2", "--local-steps", "2", "--max-length", "64"]}
"""Given after README's own flags, and the last one counts."""
IN_SENTENCES = {
    "--resume runs/first": "simulate --resume runs/first",
    "fedkseed evaluate": "evaluate runs/first",
    "report": "report runs/first",
    "inspect": "inspect runs/first",
    "status": "status runs/first",
    "export": "export runs/first tuned",
    "fedkseed doctor": "doctor",
    "fedkseed simulate --help": "simulate --help",
}
"""The commands that README's sentences name, and what a reader makes of them after the commands of its blocks."""


def test_every_program_command_flag_and_target_exists() -> None:
    assert unknown(README) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("    make demo test\n", []),
        ("    .venv/bin/fedkseed simulate --lr 1 \\\n        --run x\n", []),
        ("```sh\nfedkseed --version  # which one\nfedkseed evaluate runs/first --answers=3\n```\n", []),
        ("`fedkseed simulate --help` lists them, `--eps` and `--answers 3` too; `make` and `lr` is what it is\n", []),
        ("    what it printed: --nonsense\n", []),
        ("    make nonsense\n", ["nonsense"]),
        ("    fedkseed nonsense --lr 1\n", ["nonsense"]),
        ("    fedkseed --nonsense\n", ["--nonsense"]),
        ("    fedkseed simulate --lr 1 \\\n        --nonsense x\n", ["--nonsense"]),
        ("```sh\nnonsense --lr 1\nfedkseed inspect --lr 1\n```\n", ["nonsense", "--lr"]),
        ("use `--nonsense`, `fedkseed nonsense`, `fedkseed report --lr 1` or `make nonsense`\n",
         ["--nonsense", "nonsense", "--lr", "nonsense"]),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found(text: str, wrong: list[str]) -> None:
    assert unknown(text) == wrong


def test_every_link_to_a_file_leads_to_one() -> None:
    files = [link.partition("#")[0] for link in links(README)]
    assert len(files) > 5
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_a_link_to_the_repository_is_followed_to_its_file() -> None:
    assert links("[a](docs/a.md#b), [c](https://github.com/fedkseed/fedkseed/blob/main/c.md), [d](https://example.org/d)") == [
        "docs/a.md#b", f"{ROOT}/c.md"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "target", sorted({target for program, *args in commands(README) if program == "make" for target in args})
)
def test_make_would_call_what_exists(target: str) -> None:
    """A dry run: the demo and the tests are tests of their own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    program, *args = done.stdout.splitlines()[-1].split()
    assert (Path(sys.executable).parent / Path(program).name).is_file()
    if target == "demo":
        assert (Path(program).name, args) == ("fedkseed", ["demo"])


@pytest.fixture(scope="module")
def reader(fedkseed: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has typed the commands of the blocks."""
    folder = tmp_path_factory.mktemp("reader")
    tiny_settings(folder)
    typed = [args for program, *args in commands(README) if program == "fedkseed" and args[0] != "demo"]
    assert typed
    for args in typed:
        result = fedkseed(*(STANDS_FOR.get(arg, arg) for arg in args), *QUICK.get(args[0], []), cwd=folder)
        assert (result.code, result.stderr) == (0, ""), args
    return folder


def test_the_commands_of_the_blocks_leave_a_run(reader: Path) -> None:
    assert Ledger.load(reader / "runs" / "first" / "ledger.safetensors").round == 2


@pytest.mark.parametrize("span", [span for span in IN_SENTENCES if span in spans(README)])
def test_a_command_that_a_sentence_names_runs(reader: Path, fedkseed: CommandLine, span: str) -> None:
    result = fedkseed(*IN_SENTENCES[span].split(), cwd=reader)
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout


def test_the_python_runs(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader)
    programs = [content for language, content in blocks(README) if language == "python"]
    assert programs
    for program in programs:
        model = load_model("./model", "float32")
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        ids = torch.arange(3, 9)[None]
        exec(
            program, {"model": model, "base": load_model("./model", "float32"), "batches": [{"input_ids": ids, "labels": ids}]}
        )
        assert any(not base[name].equal(p) for name, p in model.named_parameters())
        assert Ledger.load(reader / "adapter" / "ledger.safetensors").round == 1
