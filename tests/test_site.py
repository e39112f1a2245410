"""The site of docs/: it builds without a warning, has every public name, asks no other host, and its search works offline."""

import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import fedkseed as fk
from tests.support.browser import page_after_scripts
from tests.support.documents import ROOT

DOCS = ROOT / "docs"


def test_every_page_is_in_a_list_of_the_index() -> None:
    listed = re.findall(r"^([\w/-]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")} - {"index"}
    assert pages
    assert {page for page in pages if not page.startswith("_")} == set(listed)


def test_the_cast_is_small_and_stands_alone() -> None:
    cast = (DOCS / "images" / "demo.svg").read_text(encoding="utf-8")
    assert len(cast) < 20_000
    assert not re.search(r"<script|href|url\(|@import|/home|/tmp|/work|/root", cast)
    assert "held-out loss" in cast


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", str(DOCS), str(folder / "html")]
    done = subprocess.run([*command, "-d", str(folder / "doctrees")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.mark.slow
def test_every_public_name_has_its_place(site: Path) -> None:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    named = set(re.findall(r"^fedkseed\.(\w+) py:", inventory, re.MULTILINE))
    assert {name for name in fk.__all__ if not name.startswith("__")} <= named


@pytest.mark.slow
def test_no_page_asks_another_host_for_what_it_shows(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert (
            re.findall(
                r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page.read_text(encoding="utf-8")
            )
            == []
        )


@pytest.mark.slow
def test_the_search_works_from_the_disk(site: Path, tmp_path: Path) -> None:
    shown = page_after_scripts(f"file://{site}/search.html?q=perturbation", tmp_path / "profile", 5000)
    found = re.search(r"found (\d+) pages", shown)
    assert found is not None
    assert int(found[1]) > 3
    assert "api.html#fedkseed.SeedPool.perturbation" in shown


@pytest.mark.slow
def test_a_dead_link_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text(
        (DOCS / "conf.py").read_text(encoding="utf-8").replace('html_static_path = ["_static"]', "")
    )
    (tmp_path / "_extensions").symlink_to(DOCS / "_extensions")
    (tmp_path / "index.md").write_text("# A page\n\n[nowhere](nowhere.md)\n")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", str(tmp_path), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
