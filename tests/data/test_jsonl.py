"""The readers of JSON: what they take, and the one line that they say to each thing they do not."""

import json
from pathlib import Path

import pytest

from fedkseed.data import Example, parse_columns, read_examples
from fedkseed.errors import DataError

GOOD = b'{"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"}'


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_reads_both_spellings_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, b"", b'{"instruction": "Hi", "input": "x", "output": ""}\r', b"  ", b"")
    assert read_examples(path) == [Example("Add.", "1 2", "3", "sums"), Example("Hi", "x", "", "")]


def test_a_record_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    line = json.dumps({"instruction": text, "output": text}, ensure_ascii=False).encode()
    assert read_examples(write(tmp_path, line, line)) == [Example(text, "", text, "")] * 2


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path, b"\xef\xbb\xbf" + GOOD))) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"instruction": "x", ', r"not JSON \(.*\); expected one object a line, so mend or delete the line"),
        (b"[" * 100_000, r"not JSON"),
        (b"[1]", r"an array; expected an object with 'instruction' and 'response'"),
        (b"null", r"null; expected an object"),
        (b'"text"', r"a string; expected an object"),
        (b'{"response": "y"}', r"no field 'instruction' or 'prompt'; found \['response'\], so add it"),
        (
            b'{"instruction": "x"}',
            r"no field 'output' or 'response' or 'completion' or 'chosen'; found \['instruction'\], so add it, or say",
        ),
        (b'{"instruction": 3, "response": "y"}', r"field 'instruction' is a number; expected a string"),
        (b'{"instruction": "x", "response": ["y"]}', r"field 'response' is an array; expected a string"),
        (b'{"instruction": "x", "context": ["a"], "response": "y"}', r"field 'context' is an array"),
        (b'{"instruction": "x", "response": "y", "category": true}', r"field 'category' is a boolean"),
        (b'{"instruction": "\xff", "response": "y"}', r"byte 18 of the line is not UTF-8; save the file as UTF-8"),
        (b'{"instruction": "\\ud800", "response": "y"}', r"field 'instruction' has half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, GOOD, b"", line, GOOD)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file; check the path"):
        read_examples(tmp_path / "nowhere.jsonl")
    for content in (b"", b" \n\n", b"[]", b"\xef\xbb\xbf"):
        with pytest.raises(DataError, match=r"data\.jsonl: no records; expected some with an instruction and a response"):
            read_examples(write(tmp_path, content))


# --- Arrays ---


@pytest.mark.parametrize(
    "content",
    [
        b"[" + GOOD + b"," + GOOD + b"]",
        b"\xef\xbb\xbf \n[\n" + GOOD + b",\n" + GOOD + b"\n]\n",
        b'{"version": 1, "data": [' + GOOD + b"," + GOOD + b"]}",
        b'{\n "rows": [\n' + GOOD + b",\n" + GOOD + b"\n]\n}",
        b'{"data": [' + GOOD + b"," + GOOD + b'], "authors": [{"name": "x"}]}',
    ],
    ids=["a line", "lines", "in data", "in another key", "data first"],
)
def test_an_array_is_its_records(tmp_path: Path, content: bytes) -> None:
    examples = read_examples(write(tmp_path, content))
    assert examples == [Example("Add.", "1 2", "3", "sums")] * 2
    assert examples[1].where.endswith("record 2")


def test_one_record_in_a_file_of_one_object_is_a_record(tmp_path: Path) -> None:
    talk = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'
    for content in (talk, json.dumps(json.loads(talk), indent=1).encode()):
        (example,) = read_examples(write(tmp_path, content))
        assert (example.instruction, example.output) == ("Hi", "Yo")
    turns = talk.replace(b"messages", b"turns")
    (example,) = read_examples(write(tmp_path, turns), parse_columns("messages=turns"))
    assert (example.instruction, example.output) == ("Hi", "Yo")


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"[" + GOOD + b",\n{]", ":2", "not JSON (Expecting property name enclosed in double quotes); expected an array of"),
        (b"[" + GOOD + b"\n\xff]", ":2", "not UTF-8 (invalid start byte); save the file as UTF-8"),
        (b"[" * 100_000, "", "not JSON (maximum recursion depth exceeded"),
        (b"[" + GOOD + b", 3]", ", record 2", "a number; expected an object with 'instruction' and 'response'"),
        (b'{"data": [{"a": 1}]}', ", data, record 1", "no field 'instruction' or 'prompt'; found ['a'], so add it"),
        (b'{"a": [{}], "b": [{}]}', "", "has several lists of objects, ['a', 'b']; keep one, or call it 'data'"),
        (b'{\n "a": 1\n', ":1", "not JSON (Expecting property name enclosed in double quotes: line 2 column 1"),
    ],
)
def test_a_bad_array_is_named(tmp_path: Path, content: bytes, where: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}{where}: {message}")
    assert "\n" not in str(caught.value)


def test_dolly_has_its_records_and_categories(shared: Path) -> None:
    examples = read_examples(shared / "data" / "databricks-dolly-15k.jsonl")
    assert len(examples) == 15_011
    assert len({example.category for example in examples}) == 8
    assert all(example.instruction and example.output for example in examples)


@pytest.mark.parametrize("content", [b'{"response": "a", "instruction": "b", "response": ""}\n', b'[{"a": {"b": 1, "b": 2}}]'])
def test_a_field_that_stands_twice_is_no_record(tmp_path: Path, content: bytes) -> None:
    """As with a column of a table: nobody knows which of the two is meant."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json.*: not JSON \(field '(response|b)' stands twice in an object\)"):
        read_examples(path)
