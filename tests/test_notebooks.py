"""The notebooks of examples/notebooks/ run as a reader runs them, and say what they said when they were committed."""

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def printed(notebook: Any) -> str:
    """What its cells print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def rounded(text: str) -> list[str]:
    """Words, with losses to their first digit: the last ones are the machine's."""
    return re.sub(r"(\d+\.\d)\d", r"\1", text).split()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_tidy(path: Path) -> None:
    """Small, run from top to bottom, and what it printed is text; nothing of a machine is in it."""
    notebook = read(path)
    assert path.stat().st_size < 20_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.get("name") for cell in code for output in cell.outputs} == {"stdout"}
    text = path.read_text(encoding="utf-8")
    assert [word for word in ("/home", "/root", "/work", "/tmp", "Traceback") if word in text] == []
    for cell in notebook.cells:
        for link in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            assert (path.parent / link.partition("#")[0]).exists(), link


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """In a kernel of its own and an empty folder; counts of bytes and answers are the same, losses nearly."""
    pytest.importorskip("ipykernel")
    from nbclient import NotebookClient

    notebook, before = read(path), printed(read(path))
    assert before
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    now = printed(notebook)
    same = [one == other for one, other in zip(rounded(before), rounded(now), strict=True)]
    assert sum(same) >= 0.9 * len(same), now
