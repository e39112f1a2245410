"""Natural Instructions against the published rules written down once more, and the one line to each broken folder."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.natural_instructions import Split, published_sizes, task, write_folder

from fedkseed.data import Example, is_natural_instructions, read_tasks
from fedkseed.errors import DataError

SPLITS: tuple[Split, ...] = ("train", "test")


def assert_by_the_rules(folder: Path, split: Split, max_chars: int, examples: Sequence[Example]) -> None:
    assert Counter(example.category for example in examples) == published_sizes(folder, split, max_chars)
    names = list(dict.fromkeys(example.category for example in examples))
    assert names == [name for name in (folder / f"splits/default/{split}_tasks.txt").read_text().split() if name in names]
    for name in names:
        content = json.loads((folder / f"tasks/{name}.json").read_text())
        allowed = Counter((i["input"], i["output"][0]) for i in content["Instances"] if len(i["input"]) < max_chars)
        taken = [example for example in examples if example.category == name]
        assert Counter((example.input, example.output) for example in taken) <= allowed  # each instance once at most
        assert {example.instruction for example in taken} == {content["Definition"][0]}
        assert {example.client for example in taken} == {name.split("_")[0]}


@pytest.fixture(scope="module")
def real(shared: Path) -> Path:
    folder = shared / "data" / "natural-instructions-2.8"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("max_chars", [1024, 120])
def test_the_real_folder_is_read_by_the_published_rules(real: Path, split: Split, max_chars: int) -> None:
    assert is_natural_instructions(real)
    assert_by_the_rules(real, split, max_chars, read_tasks(real, split, max_chars, 42))


def test_every_task_of_the_real_folder_is_a_client(real: Path) -> None:
    clients = {(example.category, example.client) for example in read_tasks(real, "train", 1024, 42)}
    assert len(clients) == len({client for _, client in clients}) > 100


@given(
    sizes=st.lists(st.integers(1, 130), min_size=1, max_size=3),
    max_chars=st.integers(4, 12),
    split=st.sampled_from(SPLITS),
    seed=st.integers(0, 99),
)
def test_any_folder_is_read_by_the_published_rules(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], max_chars: int, split: Split, seed: int
) -> None:
    tasks = {f"task{i:03}_x": task([3 + (7 * j) % 11 for j in range(n)], f"t{i}") for i, n in enumerate(sizes)}
    folder = write_folder(tmp_path_factory.mktemp("tasks"), **{"train": {}, "test": {}, split: tasks})
    if published_sizes(folder, split, max_chars):
        assert_by_the_rules(folder, split, max_chars, read_tasks(folder, split, max_chars, seed))
    else:
        with pytest.raises(DataError, match=rf"no {split} task has enough instances with inputs under {max_chars} characters"):
            read_tasks(folder, split, max_chars, seed)


@pytest.mark.parametrize(
    ("split", "count", "taken"),
    [
        *[("train", 19, 0), ("train", 20, 4), ("train", 24, 4), ("train", 25, 5), ("train", 250, 50)],
        *[("test", 1, 1), ("test", 19, 19), ("test", 20, 20), ("test", 999, 20), ("test", 1049, 20), ("test", 1050, 21)],
    ],
)
def test_sizes_at_the_edges_of_the_rules_are_taken_right(tmp_path: Path, split: Split, count: int, taken: int) -> None:
    tasks = {"task001_x": task([10] * count, "x"), "task002_y": task([10] * 100, "y")}
    folder = write_folder(tmp_path / "folder", **{"train": {}, "test": {}, split: tasks})
    assert sum(example.category == "task001_x" for example in read_tasks(folder, split, 1024, 0)) == taken


def test_an_input_of_max_chars_characters_is_too_long(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {}, {"task001_x": task([9, 10, 11], "x")})
    assert [len(example.input) for example in read_tasks(folder, "test", 10, 0)] == [9]


# --- The sample ---


def test_the_sample_of_a_task_depends_on_the_seed_and_on_no_other_task(tmp_path: Path) -> None:
    tasks = {f"task00{i}_{name}": task([10] * 100, name) for i, name in enumerate("abc")}
    whole = read_tasks(write_folder(tmp_path / "whole", tasks), "train", 1024, 5)
    assert read_tasks(tmp_path / "whole", "train", 1024, 5) == whole
    alone = read_tasks(write_folder(tmp_path / "alone", {"task001_b": tasks["task001_b"]}), "train", 1024, 5)
    turned = read_tasks(write_folder(tmp_path / "turned", dict(reversed(tasks.items()))), "train", 1024, 5)
    assert [e for e in whole if e.client == "task001"] == [e for e in turned if e.client == "task001"] == alone
    assert read_tasks(tmp_path / "alone", "train", 1024, 6) != alone


def test_tasks_of_equal_size_are_not_sampled_alike(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {f"task00{i}_x": task([10] * 100, "x") for i in range(2)})
    examples = read_tasks(folder, "train", 1024, 0)
    first, second = ([e.input for e in examples if e.client == client] for client in ("task000", "task001"))
    assert len(first) == len(second) == 20
    assert first != second
    assert first != sorted(task([10] * 100)["Instances"][i]["input"] for i in range(20))  # nor are they the first ones


def test_progress_is_told_task_by_task(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {f"task00{i}_x": task([10] * 20) for i in range(3)})
    heard: list[tuple[int, int]] = []
    read_tasks(folder, "train", 1024, 0, lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


# --- Broken folders ---


def test_another_folder_is_not_of_natural_instructions(tmp_path: Path) -> None:
    assert not is_natural_instructions(tmp_path)
    assert not is_natural_instructions(tmp_path / "nowhere")


def assert_names(folder: Path, file: str, message: str, split: Split = "train") -> None:
    with pytest.raises(DataError) as caught:
        read_tasks(folder, split, 1024, 0)
    assert str(caught.value).startswith(f"{folder / file}: {message}")
    assert "\n" not in str(caught.value)


def test_a_task_without_its_file_and_a_split_without_tasks(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"task001_x": task([10] * 20)}, {})
    list_of = folder / "splits/default/train_tasks.txt"
    list_of.write_text("task001_x\n\ntask002_y\n")
    assert_names(
        folder, "tasks/task002_y.json", f"no such file, though {list_of} names the task; restore it or take its line out"
    )
    list_of.write_text(" \n\n")
    assert_names(folder, "splits/default/train_tasks.txt", "no tasks; expected one name a line, such as task033_")
    assert_names(folder, "splits/default/test_tasks.txt", "no tasks; expected one name a line", "test")
    (folder / "splits/default/test_tasks.txt").unlink()
    assert_names(
        folder, "splits/default/test_tasks.txt", "cannot be read (No such file or directory); expected the list", "test"
    )
    list_of.write_bytes(b"task\xff\n")
    assert_names(folder, "splits/default/train_tasks.txt", "not UTF-8")


BAD_INSTANCES = [
    {"input": "x"},
    {"output": ["y"]},
    {"input": "x", "output": []},
    {"input": "x", "output": "y"},
    {"input": "x", "output": [None]},
    {"input": None, "output": ["y"]},
    {"input": "\ud800", "output": ["y"]},
    {"input": "x", "output": ["\ud800"]},
    "x",
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"Definition": ["Do."]}, "no instances; expected a list of at least one under 'Instances'"),
        ({"Definition": ["Do."], "Instances": []}, "no instances"),
        ({"Definition": ["Do."], "Instances": {"input": "x"}}, "no instances"),
        (
            {"Instances": [{"input": "x", "output": ["y"]}]},
            "field 'Definition' is no list of texts; expected the task's instruction",
        ),
        ({"Definition": [], "Instances": []}, "field 'Definition' is no list of texts"),
        (
            {"Definition": [None], "Instances": [{"input": "x", "output": ["y"]}]},
            "field 'Definition' is null; expected a string",
        ),
        ({"Definition": ["\ud800"], "Instances": [{"input": "x", "output": ["y"]}]}, "field 'Definition' has half a surrogate"),
        ([], "an array; expected an object with 'Definition' and 'Instances'"),
        *[
            ({"Definition": ["Do."], "Instances": [{"input": "x", "output": ["y"]}, bad]}, "instance 2")
            for bad in BAD_INSTANCES
        ],
    ],
)
def test_a_broken_task_is_named(tmp_path: Path, content: Any, message: str) -> None:
    assert_names(write_folder(tmp_path / "folder", {"task001_x": content}), "tasks/task001_x.json", message)


@pytest.mark.parametrize("content", [b"", b'{"Definition": [', b"\xff", b"[" * 100_000])
def test_a_task_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    folder = write_folder(tmp_path / "folder", {"task001_x": {}})
    (folder / "tasks/task001_x.json").write_bytes(content)
    assert_names(folder, "tasks/task001_x.json", "not JSON (")


def test_a_list_of_tasks_names_each_once_and_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train={"task001_a": task([3] * 30, "a")}, test={})
    once = read_tasks(folder, "train", 100, 0)
    (folder / "splits/default/train_tasks.txt").write_text("\ufefftask001_a\ntask001_a\n", encoding="utf-8")
    assert read_tasks(folder, "train", 100, 0) == once
