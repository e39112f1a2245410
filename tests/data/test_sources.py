"""One contract for every way in which records come: the same examples, named places, one line to each thing that is wrong."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkseed.data import Example, parse_columns, read_examples, read_records, resolve_source
from fedkseed.errors import ConfigError, DataError
from fedkseed.runs.settings import build

ROWS = [
    {"instruction": "Add, please.", "context": 'two "lines"\nof it', "response": "3", "category": "sums"},
    {"instruction": "Näme", "context": "", "response": "x", "category": "names"},
    {"instruction": "Once more.", "context": "", "response": "y", "category": "names"},
]
EXAMPLES = [Example(row["instruction"], row["context"], row["response"], row["category"]) for row in ROWS]
Rows = list[dict[str, Any]]


def csv_text(rows: Rows, delimiter: str = ",") -> str:
    def line(cells: Any) -> str:
        return delimiter.join('"' + str(cell).replace('"', '""') + '"' for cell in cells)

    return "\n".join([line(rows[0]), *(line(row.values()) for row in rows)]) + "\n"


def jsonl_text(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(name: str, text: Callable[[Rows], str]) -> Callable[[Path, Rows], Path]:
    def write(folder: Path, rows: Rows) -> Path:
        (folder / name).write_text(text(rows), encoding="utf-8")
        return folder / name

    return write


def compressed(name: str, text: Callable[[Rows], str], how: Callable[[bytes], bytes]) -> Callable[[Path, Rows], Path]:
    def write(folder: Path, rows: Rows) -> Path:
        (folder / name).write_bytes(how(text(rows).encode()))
        return folder / name

    return write


def zstd(content: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


def parquet(folder: Path, rows: Rows) -> Path:
    import pyarrow
    from pyarrow import parquet as files

    files.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    return folder / "d.parquet"


def arrow(folder: Path, rows: Rows, stream: bool = True) -> Path:
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    open_file = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with open_file(folder / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "d.arrow"


def saved(folder: Path, rows: Rows) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path, rows: Rows) -> Path:
    import datasets

    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(parts).save_to_disk(folder / "saved")
    return folder / "saved"


def shards(folder: Path, rows: Rows) -> Path:
    """A folder of files of several kinds; what is not of records is passed over."""
    shards = folder / "shards"
    shards.mkdir()
    (shards / "b.csv").write_text(csv_text(rows[1:2]), encoding="utf-8")
    (shards / "a.jsonl").write_text(jsonl_text(rows[:1]), encoding="utf-8")
    (shards / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows[2:]).encode()))
    for name in ("README.md", ".hidden.jsonl", "LICENSE.txt"):
        (shards / name).write_text("nothing")
    return shards


KINDS: dict[str, Callable[[Path, Rows], Path]] = {
    "jsonl": written("d.jsonl", jsonl_text),
    "no known name": written("d.data", jsonl_text),
    "array": written("d.json", json.dumps),
    "array over lines": written("d.json", lambda rows: json.dumps(rows, indent=1)),
    "array in data": written("d.json", lambda rows: json.dumps({"version": 1, "data": rows})),
    "csv": written("d.csv", csv_text),
    "tsv": written("d.tsv", lambda rows: csv_text(rows, "\t")),
    "jsonl.gz": compressed("d.jsonl.gz", jsonl_text, gzip.compress),
    "jsonl.bz2": compressed("d.jsonl.bz2", jsonl_text, bz2.compress),
    "jsonl.xz": compressed("d.jsonl.xz", jsonl_text, lzma.compress),
    "jsonl.zst": compressed("d.jsonl.zst", jsonl_text, zstd),
    "csv.gz": compressed("d.CSV.gz", csv_text, gzip.compress),
    "tsv.zst": compressed("d.tsv.zst", lambda rows: csv_text(rows, "\t"), zstd),
    "in two parts, each compressed": compressed(
        "d.jsonl.gz", jsonl_text, lambda text: gzip.compress(text[:50]) + gzip.compress(text[50:])
    ),
    "compressed, though its name does not say so": compressed("d.jsonl", jsonl_text, gzip.compress),
    "not compressed, though its name says so": written("d.jsonl.gz", jsonl_text),
    "parquet": parquet,
    "arrow stream": arrow,
    "arrow file": lambda folder, rows: arrow(folder, rows, stream=False),
    "saved by datasets": saved,
    "splits saved by datasets": saved_splits,
    "folder": shards,
    "glob": lambda folder, rows: shards(folder, rows) / "[abc].*",
    "glob over folders": lambda folder, rows: shards(folder, rows).parent / "*" / "?.*",
}
TEXTS_ONLY = {"csv", "tsv", "csv.gz", "tsv.zst", "folder", "glob", "glob over folders"}
EXTRA = {"arrow stream", "arrow file", "parquet", "saved by datasets", "splits saved by datasets"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_examples(tmp_path: Path, kind: str) -> None:
    source = KINDS[kind](tmp_path, ROWS)
    examples = read_examples(source)
    assert examples == EXAMPLES
    for example in examples:
        assert example.where.startswith(str(tmp_path))
    assert len({example.where for example in examples}) == len(examples)


@pytest.mark.parametrize("kind", KINDS)
def test_from_any_folder_and_with_named_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rows = [{{"response": " Answer, in full "}.get(key, key): value for key, value in row.items()} for row in ROWS]
    (tmp_path / "here").mkdir()
    source = KINDS[kind](tmp_path / "here", rows)
    monkeypatch.chdir(tmp_path / "here")
    relative = str(source.relative_to(tmp_path / "here"))
    absolute = build({"model": "m", "lr": 1, "data": relative}).data
    assert absolute is not None
    monkeypatch.chdir(tmp_path)
    assert read_examples(absolute, parse_columns('output="Answer, in full"')) == EXAMPLES
    with pytest.raises(DataError, match=r"no record has the column 'categry', .* so did you mean 'category'\?"):
        read_examples(absolute, parse_columns('output="Answer, in full",category=categry'))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TEXTS_ONLY])
def test_a_bad_value_is_named_with_its_place(tmp_path: Path, kind: str) -> None:
    rows = [{**row, "category": n + 0.5} for n, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=r"field 'category' is a number; expected a string") as caught:
        read_examples(KINDS[kind](tmp_path, rows))
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "." in kind])
def test_a_damaged_file_is_one_line(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}: cannot be decompressed (")
    assert str(caught.value).endswith("); the file is damaged, so fetch it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", sorted(EXTRA | {"jsonl.zst"}))
def test_without_the_extra_its_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = KINDS[kind](tmp_path, ROWS)
    for module in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        DataError, match=r"needs an extra; install it with: pip install -e '\.\[datasets\]' in fedkseed's clone$"
    ) as caught:
        read_examples(path)
    assert str(caught.value).startswith(str(path))


# --- Several ---


def test_several_with_commas_between_in_the_order_given(tmp_path: Path) -> None:
    one, two = (written(f"{name}.jsonl", jsonl_text)(tmp_path, rows) for name, rows in (("a", ROWS[:1]), ("b", ROWS[1:])))
    assert read_examples(f"{one},{two}") == EXAMPLES
    assert read_examples(f"{two}, {one}") == EXAMPLES[1:] + EXAMPLES[:1]
    assert read_examples(f"{tmp_path}/a.*,{tmp_path}/b.*") == EXAMPLES
    config = build({"model": "m", "lr": 1, "data": [str(one), two], "eval_data": [two]})
    assert (config.data, config.eval_data) == (f"{one},{two}", str(two))


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_a_compressed_file_of_several_streams_is_whole_or_an_error(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """As pbzip2 and `cat` write them; Python's own functions end without a word at a later one that is damaged."""
    lines = [f'{{"instruction": "a{i}", "response": "b"}}\n'.encode() for i in range(400)]
    first, second = compress(b"".join(lines[:200])), compress(b"".join(lines[200:]))
    path = tmp_path / "a.jsonl"
    path.write_bytes(first + second)
    assert len(read_examples(path)) == 400
    path.write_bytes(first + second + b"\0" * 4)  # as xz pads
    assert len(read_examples(path)) == 400
    middle = len(second) // 2
    for damaged in (second[:-9], second[:middle] + bytes([second[middle] ^ 1]) + second[middle + 1 :], b"more"):
        path.write_bytes(first + damaged)
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be decompressed \(.*\); the file is damaged, so fetch it again"):
            read_examples(path)


def test_two_columns_of_one_name_are_refused_of_arrow_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["instruction", "response", "response"])
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(DataError, match=r"a\.arrow: two columns are called 'response'; give each its own name"):
        read_examples(tmp_path / "a.arrow")


def test_of_several_none_has_a_comma_in_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their absolute paths are kept with commas between."""
    folder = tmp_path / "a,b"
    folder.mkdir()
    for name in ("one.jsonl", "two.jsonl"):
        (folder / name).write_text('{"instruction": "a", "response": "b"}\n')
    monkeypatch.chdir(folder)
    assert read_examples(resolve_source("one.jsonl")) == [Example("a", "", "b", "")]
    with pytest.raises(DataError, match=r"a,b/one\.jsonl: of several sources none may have a comma in its path"):
        resolve_source("one.jsonl,two.jsonl")


def test_the_folder_that_a_pattern_is_meant_from_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x[1]"
    folder.mkdir()
    (folder / "one.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    monkeypatch.chdir(folder)
    source = resolve_source("*.jsonl")
    monkeypatch.chdir(tmp_path)
    assert read_examples(source) == [Example("a", "", "b", "")]


def test_a_name_with_a_comma_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    path = written("c,d.jsonl", jsonl_text)(tmp_path / "a,b", ROWS)
    for source in (path, path.parent / "*.jsonl", path.parent):
        assert read_examples(source) == read_examples(resolve_source(str(source))) == EXAMPLES


def test_two_data_sets_in_several_files_have_their_own_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "i", "input": "x", "output": "o"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "i", "completion": "o"}\n')
    (tmp_path / "c.csv").write_text("instruction,context,response\ni,x,o\n")
    whole, bare = Example("i", "x", "o", ""), Example("i", "", "o", "")
    assert read_examples(tmp_path) == [whole, bare, whole]
    assert read_examples(tmp_path, parse_columns("input=context")) == [bare, bare, whole]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no such file; check the path of the data"),
        ("*.jsonl", "no file has such a name; check the pattern of the data"),
        (
            "empty",
            "a folder without files of records (.csv, .tsv, .parquet, .arrow, .feather, .jsonl, .ndjson, .json), and not",
        ),
        ("good.jsonl,nowhere.jsonl", "nowhere.jsonl: no such file; check the path of the data"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    if source.startswith("good"):
        written("good.jsonl", jsonl_text)(tmp_path, ROWS)
    with pytest.raises(DataError) as caught:
        read_examples(source)
    assert str(caught.value).startswith(message if "," in source else f"{source}: {message}")
    with pytest.raises(ConfigError) as refused:
        build({"model": "m", "lr": 1, "data": source})
    assert str(refused.value).startswith(f"--data is {source!r}: {message}")


def test_saved_splits_without_train_are_named(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list(ROWS) for name in ("a", "b")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError, match=r"has the splits \['a', 'b'\] and no 'train'; give the folder of one, such as .*/saved/a$"
    ):
        read_examples(tmp_path / "saved")
    assert read_examples(tmp_path / "saved" / "b") == EXAMPLES


# --- Objects ---


def frame(rows: Rows) -> Any:
    import pandas

    return pandas.DataFrame(rows)


def dataset(rows: Rows) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def table(rows: Rows) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


OBJECTS: dict[str, Callable[[Rows], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "DataFrame": frame,
    "Dataset": dataset,
    "pyarrow": table,
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_give_the_same_examples(kind: str) -> None:
    assert read_records(OBJECTS[kind](ROWS)) == EXAMPLES
    assert [example.where for example in read_records(OBJECTS[kind](ROWS))] == [f"data, record {n}" for n in (1, 2, 3)]
    with pytest.raises(DataError, match=r"^eval_data: no record has the column 'x'"):
        read_records(OBJECTS[kind](ROWS), parse_columns("input=x"), "eval_data")


@pytest.mark.parametrize("kind", OBJECTS)
def test_gaps_of_objects_are_absent_and_their_numbers_whole(kind: str) -> None:
    rows = [
        {"instruction": "i", "output": "o", "category": 1, "client": 7},
        {"prompt": "i", "completion": "o", "category": None},
    ]
    if kind in ("Dataset", "pyarrow"):
        rows = [{key: row.get(key) for key in {**rows[0], **rows[1]}} for row in rows]
    assert read_records(OBJECTS[kind](rows)) == [Example("i", "", "o", "1", "7"), Example("i", "", "o", "")]


def test_conversations_in_a_data_frame_from_parquet(tmp_path: Path) -> None:
    import pandas

    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    parquet(tmp_path, [{"messages": talk}])
    rows = pandas.read_parquet(tmp_path / "d.parquet")
    assert not isinstance(rows["messages"][0], list)  # an array of NumPy's
    assert read_records(rows) == read_records([{"messages": talk}])


def test_examples_stay_as_they_are() -> None:
    assert read_records(EXAMPLES) == EXAMPLES


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "data: no records; expected some with an instruction and a response"),
        ([ROWS[0], "text"], "data, record 2 is of type str; expected a dict"),
        (3, "data is of type int; expected a list of dicts, a DataFrame or a dataset"),
        ("d.jsonl", "data is of type str; expected a list of dicts"),
        (
            {"train": ROWS},
            "data is of type dict; expected a list of dicts, a DataFrame or a dataset; choose one of its parts, such as 'tr",
        ),
        (
            [{"instruction": "i"}],
            "data, record 1: no field 'output' or 'response' or 'completion' or 'chosen'; found ['instruction'], so add",
        ),
    ],
)
def test_other_objects_are_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_records(source)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("source", "message"), [("", "is empty"), ("  ", "is empty"), ("a.jsonl,", "a comma without a name")])
def test_a_name_that_is_empty_is_not_this_folder(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a shell's variable that is not set: the folder's training records became the held-out ones."""
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        resolve_source(source)
