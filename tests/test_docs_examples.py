"""What docs/ says of the code: the Python of python.md runs, names and files exist, links and digests are right.

The examples go on from one another, so they run as a reader of a notebook would run them: one program, in a folder with a
model called MODEL and records; the last one, which stands by itself, is another.
"""

import hashlib
import re
import subprocess
import sys
import textwrap
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fedkseed.demo import clients, model_folder
from tests.support.documents import links, unknown
from tests.support.tiny import write_records

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "results" / "README.md", *ROOT.glob("examples/*/README.md")])


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


BLOCKS = blocks("python.md")


def run(program: str, folder: Path) -> str:
    """What a program prints that runs as a process of its own in a folder."""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_examples_run_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "MODEL").symlink_to(model_folder())
    write_records(tmp_path / "records.jsonl", [example for own in clients(seed=1).values() for example in own[:15]])
    assert len(BLOCKS) > 5
    printed = run("\n".join(BLOCKS[:-1]), tmp_path)
    assert "{0: " in printed
    assert "<Ledger, checkpoint: 3 rounds" in printed
    assert "<Binding of Linear: 36 tunable parameters, K = 4,096 hadamard seeds>" in printed
    assert (tmp_path / "runs" / "watched" / "ledger.safetensors").exists()


def test_a_federation_over_a_model_of_ones_own_learns_without_a_gradient(tmp_path: Path) -> None:
    printed = run(BLOCKS[-1], tmp_path)
    before, after = (float(value) for value in re.fullmatch(r"before: (\S+)\nafter: (\S+)\n", printed).groups())
    assert before > 0.5
    assert after < 0.05
    assert (tmp_path / "tuned.safetensors").stat().st_size < 2000


def test_the_function_of_the_page_on_rewards_tunes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "rewards.md").read_text(encoding="utf-8")
    (function,) = re.findall(r"^ {4}def score.*\n(?:^ {8}.*\n)+", page, re.MULTILINE)
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(function))
    assert len(function.splitlines()) == 3
    (tmp_path / "MODEL").symlink_to(model_folder())
    write_records(tmp_path / "records.jsonl", [example for own in clients(seed=1).values() for example in own[:4]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {}
    exec("\n".join(blocks("rewards.md")), names)
    assert sorted(names["result"].rewards) == [0, 1, 2]
    assert names["result"].ledger.coefficients.any()


@pytest.mark.filterwarnings("ignore")
def test_the_adapters_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported what takes seconds."""
    (tmp_path / "MODEL").symlink_to(model_folder())
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks("adapter.md")), {})
    assert "<Ledger, published: 4 rounds, 4,096 of K = 4,096 hadamard seeds in use" in capfd.readouterr().out


def test_every_public_name_is_documented() -> None:
    import fedkseed as fk

    page = (DOCS / "python.md").read_text(encoding="utf-8")
    assert [name for name in dir(fk) if f"fk.{name}" not in page and not name.startswith("__")] == []


def test_every_public_name_is_in_the_api_and_comes_lazily() -> None:
    import fedkseed as fk

    named = re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == [name for name in dir(fk) if not name.startswith("__")]
    assert all(getattr(fk, name).__doc__ for name in named)


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("tutorials/*.md")), DOCS / "quickstart.md"], ids=lambda page: page.stem)
def test_every_command_that_a_page_for_beginners_names_exists(page: Path) -> None:
    assert unknown(page.read_text(encoding="utf-8")) == []


# --- what is named exists ---


def exists(file: str, name: str) -> bool:
    """Whether a module below src/fedkseed/ has a name, which may have a dot."""
    module = import_module("fedkseed." + file.removesuffix(".py").replace("/", "."))
    try:
        reduce(getattr, name.split("."), module)
    except AttributeError:
        return False
    return True


def test_every_function_of_a_round_is_where_the_page_says() -> None:
    page = (DOCS / "round.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|\n]*\| `(\w+/\w+\.py)` \| ([^|\n]*) \|", page, re.MULTILINE)
    named = [(file, name) for file, cell in rows for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(named) > 8
    assert [(file, name) for file, name in named if not exists(file, name)] == []
    assert len({file for file, _ in named}) == 6


def test_a_function_that_is_gone_would_be_noticed() -> None:
    assert not exists("kseed/server.py", "Server.nonsense")


@pytest.mark.parametrize("page", ["round.md", "extending.md", "glossary.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"`([\w.-]+/[\w/.-]+\.\w+|[\w.-]+\.py)`", (DOCS / page).read_text(encoding="utf-8")))
    assert named
    assert [name for name in named if not (ROOT / name).exists() and not (ROOT / "src" / "fedkseed" / name).exists()] == []


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    wrong = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_every_archive_of_raw_results_has_the_digest_that_is_said() -> None:
    archives = sorted((ROOT / "results" / "runs").glob("*/raw.tar.xz"))
    assert archives
    readme = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    for archive in archives:
        table = archive.with_name("table.md")
        said = table.read_text(encoding="utf-8") if table.exists() else readme
        assert hashlib.sha256(archive.read_bytes()).hexdigest() in said, archive
