"""What would be released: files and size of wheel and sdist, what the package says of itself, how documents install it."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

from tests.support.documents import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LARGEST = 3_000_000
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("src/**/*.py")])
BY_NAME = re.compile(r"pip install (?:-\S+ )*['\"]?fedkseed\b")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def sources() -> set[str]:
    """The package's files, by their paths below src/."""
    below = ROOT / "src"
    return {
        path.relative_to(below).as_posix() for path in below.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < LARGEST
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = HeaderParser().parsestr(next(archive.read(name).decode() for name in names if name.endswith("/METADATA")))
    about = f"fedkseed-{PROJECT['version']}.dist-info/"
    beside = {name for name in names if name.startswith(about)}
    assert names - beside == sources()
    assert {name.removeprefix(about) for name in beside} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"
    }  # fmt: skip
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert urls.keys() == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/fedkseed/fedkseed") for url in urls.values())


def test_the_sdist_is_what_a_wheel_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    assert sdist.stat().st_size < LARGEST
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    beside = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    assert names == {f"src/{name}" for name in sources()} | beside


def test_what_names_the_project_agrees() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8") or ".dev" in PROJECT["version"]


def test_pythons_are_claimed_that_ci_tries_and_the_oldest_is_what_is_required() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    tried = workflow["jobs"]["linux"]["strategy"]["matrix"]["python"]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert claimed
    assert set(claimed) <= set(tried)
    assert PROJECT["requires-python"] == f">={tried[0]}"


def test_ruff_is_the_same_before_a_commit() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    ruff = next(repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"])
    assert f"\nruff=={ruff.removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_actions_are_pinned_and_only_one_job_may_do_more_than_read() -> None:
    workflows = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob(".github/workflows/*.yml")}
    assert len(workflows) == 2
    jobs = [job for workflow in workflows.values() for job in workflow["jobs"].values()]
    used = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert [action for action in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)] == []
    assert all(workflow["permissions"] == {} for workflow in workflows.values())
    assert [job["permissions"] for job in jobs if job["permissions"] != {"contents": "read"}] == [{"id-token": "write"}]


def test_nothing_is_installed_by_a_name_that_no_index_has() -> None:
    """Somebody else could take the name; until a release, what is installed is a clone."""
    assert len(TEXTS) > 150
    said = {path: BY_NAME.findall(path.read_text(encoding="utf-8")) for path in TEXTS if path.name != "RELEASING.md"}
    assert {path: found for path, found in said.items() if found} == {}


def test_such_a_line_would_be_noticed() -> None:
    for line in ("pip install fedkseed", "pip install 'fedkseed[flower]'", 'pip install -U "fedkseed[gpu]"'):
        assert BY_NAME.search(line)
    for line in ("pip install '.[flower]'", "pip install CLONE", "pip install -c constraints.txt '.[flower]'"):
        assert not BY_NAME.search(line)
