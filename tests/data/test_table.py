"""Records in tables: CSV, TSV, parquet and datasets of the hub give what jsonl gives, and say in one line what is wrong."""

import csv
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fedkseed.data import Example, is_hub_id, parse_columns, read_examples
from fedkseed.errors import DataError
from fedkseed.runs.settings import build

ROWS = [
    {"instruction": "Add, please.", "context": 'two "lines"\nof it', "response": "3", "category": "sums"},
    {"instruction": "Näme", "context": "", "response": "x", "category": "names"},
]
EXAMPLES = [Example("Add, please.", 'two "lines"\nof it', "3", "sums"), Example("Näme", "", "x", "names")]
HEADER = "instruction,context,response,category\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# --- CSV and TSV ---


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_gives_its_rows(tmp_path: Path, start: str, end: str) -> None:
    lines = [HEADER.strip(), '"Add, please.","two ""lines""\nof it",3,sums', "Näme,,x,names", ""]
    path = write(tmp_path / "a.csv", start + end.join(lines))
    assert read_examples(path) == EXAMPLES


def test_a_tsv_gives_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.TSV", "instruction\tresponse\nAdd, please.\t3, or so\n")
    assert read_examples(path) == [Example("Add, please.", "", "3, or so", "")]


def test_blank_lines_of_a_csv_are_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\n\ninstruction,response\n\nadd,3\n\n")
    assert read_examples(path) == [Example("add", "", "3", "")]
    with pytest.raises(DataError, match=r"a\.csv:3: two columns are called 'a'"):
        read_examples(write(tmp_path / "a.csv", "\n\na,a\n1,2\n"))
    with pytest.raises(DataError, match=r"a\.csv:4: the row has other columns"):
        read_examples(write(tmp_path / "a.csv", "\ninstruction,response\n\nadd,3,4\n"))


def test_a_csv_without_names_of_columns_is_told_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "Why?,So.\nWhen?,Now.\n")
    with pytest.raises(
        DataError, match=r"found \['So\.', 'Why\?'\].* such as instruction=NAME; the first line of such a file nam"
    ):
        read_examples(path)


def test_columns_of_a_csv_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "q,a,site\nWhy?,So.,4\n")
    assert read_examples(path, parse_columns("instruction=q,output=a,client=site")) == [Example("Why?", "", "So.", "", "4")]


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        ("", "", "no records; expected some with an instruction and a response"),
        (HEADER, "", "no records"),
        ("instruction, output ,output\na,b,c\n", ":1", "two columns are called 'output'; give each its own name"),
        (HEADER + "a,b,c,d\na,b,c\n", ":3", "the row has other columns than the first row names; mend its commas and quotes"),
        (HEADER + "a,b,c,d,e\n", ":2", "the row has other columns than the first row names"),
        (HEADER + 'a,"b"x,c,d\n', ":2", "not CSV (',' expected after '\"'); mend the row's quotes"),
        (HEADER + 'a,"b,c,d\n', ":2", "not CSV (unexpected end of data)"),
        (
            "question,response\na,b\n",
            ":2",
            "no field 'instruction' or 'prompt'; found ['question', 'response'], so add it, or say with --col",
        ),
        (
            "instruction,answer\na,b\n",
            ":2",
            "no field 'output' or 'response' or 'completion' or 'chosen'; found ['answer', 'instruction']",
        ),
        (
            HEADER.encode() + b"a,b,c,d\n" * 20_000 + b"a,\xff,c,d\n",
            ":20002",
            "not UTF-8 (invalid start byte); save the file as",
        ),
    ],
)
def test_a_bad_csv_is_named_with_its_line(tmp_path: Path, content: str | bytes, where: str, message: str) -> None:
    path = write(tmp_path / "bad.csv", content)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}{where}: {message}")
    assert "\n" not in str(caught.value)


def test_a_csv_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file; check the path of the data"):
        read_examples(tmp_path / "nowhere.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv: a folder without files of records \(\.csv, .*\), and not of Natural"):
        read_examples(tmp_path / "folder.csv")


def test_blanks_around_column_names_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ' Question ," The answer, in short"\nWhy?, So.\n')
    assert read_examples(path, parse_columns('instruction=Question,output="The answer, in short"')) == [
        Example("Why?", "", " So.", "")
    ]
    assert read_examples(write(tmp_path / "b.csv", " Instruction,Response \na,b\n")) == [Example("a", "", "b", "")]


def test_a_field_of_any_length(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f"instruction,response\n{'x' * 200_000},y\n")
    assert len(read_examples(path)[0].instruction) == 200_000
    assert csv.field_size_limit() == before  # the csv module's own limit is everybody's


def test_a_conversation_in_a_csv_is_json(tmp_path: Path) -> None:
    talk = '[{""role"": ""user"", ""content"": ""Why?""}, {""role"": ""assistant"", ""content"": ""So.""}]'
    (example,) = read_examples(write(tmp_path / "a.csv", f'messages,category\n"{talk}",x\n'))
    assert (example.instruction, example.output, example.category) == ("Why?", "So.", "x")


# --- Parquet ---


def test_a_parquet_file_gives_its_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    assert read_examples(path) == EXAMPLES


def test_parquet_with_numbered_categories_and_conversations(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path = write_parquet(tmp_path / "a.parquet", [{"messages": talk, "category": 3}])
    assert read_examples(path) == [Example("Why?", "", "So.", "3", history=({"role": "user", "content": "Why?"},))]


def test_a_bad_parquet_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"bad\.parquet: cannot be read \(.*\); expected a parquet file, so check the name or give"
    ):
        read_examples(write(tmp_path / "bad.parquet", "junk"))
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        read_examples(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, record 2: field 'response' is an array; expected a string"):
        read_examples(write_parquet(tmp_path / "a.parquet", [{"instruction": "i", "response": r} for r in (None, ["a"])]))
    with pytest.raises(DataError, match=r"a\.parquet, record 1: no field 'instruction' or 'prompt'; found \['a'\]"):
        read_examples(write_parquet(tmp_path / "a.parquet", [{"a": "b"}]))


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "a.parquet"), ("datasets", "owner/name")])
def test_without_the_extra_the_fix_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", "")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{source} needs an extra; install it with: pip install -e '\.\[datasets\]' in fed"):
        read_examples(source)


# --- The hub ---


class Hub:
    """In place of the hub and of `datasets.load_dataset`; remembers what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: Any = (), reachable: bool = True, cached: bool = True) -> None:
        import datasets

        self.asked: list[tuple[str, str, bool]] = []

        def dataset_info(name: str, timeout: float) -> None:
            if not reachable:
                raise OSError("no route\nto the hub")

        def load_dataset(name: str, split: str) -> Any:
            self.asked.append((name, split, datasets.config.HF_HUB_OFFLINE))
            if not cached:
                raise ConnectionError("Couldn't reach it")
            if isinstance(rows, Exception):
                raise rows
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr("huggingface_hub.dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(("source", "split"), [("owner/my-data_2.5", "train"), ("owner/name:validation", "validation")])
def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch, source: str, split: str) -> None:
    hub = Hub(monkeypatch, ROWS)
    assert read_examples(source) == EXAMPLES
    assert hub.asked == [(source.partition(":")[0], split, False)]


def test_a_dataset_of_the_hub_with_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, [{"q": "Why?", "a": "So.", "label": 2}])
    assert read_examples("o/n", parse_columns("instruction=q,output=a,category=label")) == [Example("Why?", "", "So.", "2")]
    with pytest.raises(DataError, match=r"o/n, record 1: no field 'instruction' or 'prompt'; found \['a', 'label', 'q'\]"):
        read_examples("o/n")


def test_where_the_hub_is_out_of_reach_the_cache_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = Hub(monkeypatch, ROWS, reachable=False)
    assert read_examples("o/n") == EXAMPLES
    assert hub.asked == [("o/n", "train", True)]
    assert datasets.config.HF_HUB_OFFLINE is False  # put back


def test_neither_hub_nor_cache_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, reachable=False, cached=False)
    with pytest.raises(DataError) as caught:
        read_examples("o/n")
    assert str(caught.value) == (
        "o/n: cannot be read (no route to the hub); expected a dataset's hub id, and the network, "
        "so check the name or give a jsonl file"
    )


def test_whatever_datasets_raises_is_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, ValueError("Unknown split.\n" * 100))
    with pytest.raises(DataError, match=r"^o/n:valid: cannot be read \(Unknown split\. .*\.\.\.\); expected") as caught:
        read_examples("o/n:valid")
    assert len(str(caught.value)) < 300
    Hub(monkeypatch, [])
    with pytest.raises(DataError, match=r"^o/n: no records; expected some"):
        read_examples("o/n")


def test_the_real_library_without_a_network_asks_once_and_gives_up(tmp_path: Path) -> None:
    """By itself it would retry five times, and take half a minute."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                asked.append(caller.recv(1000).split(b" ")[1].decode())
                caller.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import fedkseed.data as d\ntry: d.read_examples('o/n')\nexcept d.table.DataError as e: print(e)",
            ],
            env={**environment, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "no_proxy": "*"},
            capture_output=True,
            text=True,
            check=True,
        )
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert done.stdout.startswith("o/n: cannot be read (")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert [path for path in asked if "o/n" in path] == ["/api/datasets/o/n"]


# --- Which is which ---


@pytest.mark.parametrize("name", ["o/n", "o/n:test", "teknium/OpenHermes-2.5", "a.b/c_d-e"])
def test_what_can_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name)
    assert build({"model": "m", "lr": 1, "data": name}).data == name


@pytest.mark.parametrize("name", ["n", "/o/n", "o/n/m", "data/a.jsonl", "data/a.CSV", "data/a.parquet", "o/n:", "o n/m"])
def test_what_cannot_be_a_hub_id(name: str) -> None:
    assert not is_hub_id(name)


def test_a_file_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    write(tmp_path / "o" / "n", '{"instruction": "i", "output": "o"}')
    assert read_examples("o/n") == [Example("i", "", "o", "")]
