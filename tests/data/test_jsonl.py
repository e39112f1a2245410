"""The jsonl reader: what it takes, and the one line that it says to each thing it does not."""

import json
import re
from pathlib import Path

import pytest

from fedkseed.data import Example, read_jsonl
from fedkseed.errors import DataError

GOOD = b'{"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"}'


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_reads_both_spellings_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, b"", b'{"instruction": "Hi", "input": "x", "output": ""}\r', b"  ", b"")
    assert read_jsonl(path) == [Example("Add.", "1 2", "3", "sums"), Example("Hi", "x", "", "")]


def test_a_record_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    line = json.dumps({"instruction": text, "output": text}, ensure_ascii=False).encode()
    assert read_jsonl(write(tmp_path, line, line)) == [Example(text, "", text, "")] * 2


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert len(read_jsonl(write(tmp_path, b"\xef\xbb\xbf" + GOOD))) == 1


def test_of_two_names_for_one_field_the_first_counts(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"instruction": "i", "response": "second", "output": "first"}')
    assert read_jsonl(path)[0].output == "first"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"instruction": "x", ', r"not JSON \(.*\); expected one object a line, so mend or delete the line"),
        (b"[" * 100_000, r"not JSON"),
        (b"[1]", r"a JSON array; expected an object with 'instruction' and 'response'"),
        (b"null", r"a JSON null; expected an object"),
        (b'"text"', r"a JSON string; expected an object"),
        (b'{"response": "y"}', r"no field 'instruction'; found \['response'\], so add it"),
        (
            b'{"instruction": "x"}',
            r"no field 'output' or 'response'; found \['instruction'\], so add it, or say with --columns",
        ),
        (b'{"instruction": 3, "response": "y"}', r"field 'instruction' is a number; expected a string"),
        (b'{"instruction": "x", "response": null}', r"field 'response' is a null; expected a string"),
        (b'{"instruction": "x", "context": ["a"], "response": "y"}', r"field 'context' is a array"),
        (b'{"instruction": "x", "response": "y", "category": true}', r"field 'category' is a boolean"),
        (b'{"instruction": "\xff", "response": "y"}', r"byte 18 of the line is not UTF-8; save the file as UTF-8"),
        (b'{"instruction": "\\ud800", "response": "y"}', r"field 'instruction' has half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, GOOD, b"", line, GOOD)
    with pytest.raises(DataError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file; check the path"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: cannot be read")):
        read_jsonl(tmp_path)
    for content in (b"", b" \n\n"):
        with pytest.raises(DataError, match=r"data\.jsonl: no records; expected one JSON object a line"):
            read_jsonl(write(tmp_path, content))


def test_dolly(shared: Path) -> None:
    examples = read_jsonl(shared / "data" / "databricks-dolly-15k.jsonl")
    assert len(examples) == 15_011
    assert len({example.category for example in examples}) == 8
    assert all(example.instruction and example.output for example in examples)
