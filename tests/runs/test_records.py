"""From settings to records: what is held out, who holds what, and which of it is drawn; see also test_simulation.py."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.support.baselines import row_settings
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.natural_instructions import in_words, published_sizes, task, write_folder
from tests.support.runs import Watcher, read_metrics, simulation
from tests.support.tiny import tiny_settings, write_records

from fedkseed.data import Example, encode, read_examples
from fedkseed.errors import ConfigError, DataError
from fedkseed.models.loading import load_tokenizer
from fedkseed.runs.records import Records, deal, describe, load_examples, prepare, sample
from fedkseed.runs.settings import build


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Natural Instructions with words that the tiny model has."""
    train = {
        f"task00{i}_{name}": in_words(task([30] * n, name)) for i, (name, n) in enumerate([("a", 19), ("b", 20), ("c", 60)])
    }
    return write_folder(tmp_path_factory.mktemp("tasks"), train, {"task009_t": in_words(task([30] * 25, "t"))})


def prepared(tiny: Path, **changes: Any) -> Records:
    return prepare(build(tiny_settings(tiny, **changes)), Watcher())


def held(records: Records) -> Counter[str]:
    return Counter(record.category for record in records.references)


# --- What is held out ---


@pytest.mark.parametrize("category", ["animal", "colour", "fruit"])
def test_any_category_can_be_held_out_and_no_client_gets_it(tiny: Path, category: str) -> None:
    train, held_out = load_examples(build(tiny_settings(tiny, held_out_category=category)))
    assert {example.category for example in held_out} == {category}
    assert {example.category for example in train} == {"animal", "colour", "fruit"} - {category}
    assert (len(train), len(held_out)) == (40, 20)
    records = prepared(tiny, held_out_category=category)
    assert held(records) == {category: 20}
    assert sum(len(examples) for examples in records.clients.values()) == 40


def test_an_unknown_category_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny, held_out_category="trees")), "--run", tmp_path / "run")
    wanted = ["--held-out-category is 'trees'; expected one of several categories of", "which has: animal, colour, fruit"]
    assert_one_line(result, 2, *wanted)
    assert not (tmp_path / "run").exists()


def test_the_only_category_cannot_be_held_out(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "response": "b", "category": "c"}\n' * 3)
    with pytest.raises(DataError, match=r"--held-out-category is 'c'; expected one of several categories of .*: c$"):
        load_examples(build(tiny_settings(tiny, data=str(tmp_path / "one.jsonl"), held_out_category="c")))


def test_two_held_out_sets_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"--held-out-category and --eval-data both say what is held out; give one of them"):
        build(tiny_settings(tiny, held_out_category="animal", eval_data=str(tiny / "records.jsonl")))


def test_eval_data_is_held_out_whole_and_read_with_the_same_columns(tiny: Path, tmp_path: Path) -> None:
    lines = [
        {"instruction": "name the dog", "answer": "red", "category": "x"},
        {"instruction": "name", "answer": "", "category": "y"},
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"eval\.jsonl:1: no field 'output' or 'response'"):
        prepared(tiny, eval_data=tmp_path / "eval.jsonl")
    (tmp_path / "train.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[0]))
    paths = {"data": tmp_path / "train.jsonl", "eval_data": tmp_path / "eval.jsonl"}
    records = prepared(tiny, **paths, columns="output=answer", num_clients=2, partition="iid")
    assert [record.output for record in records.references] == ["red"]  # the empty response is dropped, and its record too


def test_one_record_is_too_few_to_hold_some_out(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    with pytest.raises(DataError, match=r"one\.jsonl has 1 record; expected enough to hold some out, or give --eval-data"):
        load_examples(build(tiny_settings(tiny, data=str(tmp_path / "one.jsonl"))))


# --- Draws ---


def test_a_subsample_is_a_seeded_share_in_the_files_order(tiny: Path) -> None:
    def drawn(**changes: Any) -> list[Example]:
        return load_examples(build(tiny_settings(tiny, eval_data=str(tiny / "records.jsonl"), **changes)))[0]

    whole, half = drawn(), drawn(subsample=0.5)
    assert (len(whole), len(half)) == (60, 30)
    rest = iter(whole)
    assert all(example in rest for example in half)  # a subsequence
    assert half == drawn(subsample=0.5)
    assert half != drawn(subsample=0.5, seed=8)
    assert half != whole[:30]
    assert not Counter(half) - Counter(whole)
    assert len(drawn(subsample=0.001)) == 1


@pytest.mark.parametrize("subsample", [0, -0.5, 1.5])
def test_a_subsample_out_of_range(tiny: Path, subsample: float) -> None:
    with pytest.raises(ConfigError, match=rf"--subsample is '{subsample}'"):
        build(tiny_settings(tiny, subsample=subsample))


def test_a_sample_is_seeded_sorted_and_not_the_first_ones() -> None:
    draws = {(seed, purpose): tuple(sample(1000, 10, seed, purpose)) for seed in (1, 2) for purpose in ("a", "b")}
    assert len(set(draws.values())) == 4
    for draw in draws.values():
        assert len(set(draw)) == 10
        assert draw == tuple(sorted(draw))
        assert 0 <= draw[0] <= draw[-1] < 1000
        assert draw != tuple(range(10))
        assert draw[-1] > 100  # by chance once in ten thousand million
    assert sample(1000, 10, 1, "a") == list(draws[1, "a"])
    for limit in (None, 5, 6):
        assert sample(5, limit, 1) == [0, 1, 2, 3, 4]


def test_eval_limit_draws_with_the_runs_seed(tiny: Path) -> None:
    def drawn(**changes: Any) -> list[Example]:
        return prepared(tiny, held_out_category="fruit", **changes).references

    whole, some = drawn(), drawn(eval_limit=8)
    assert len(some) == 8
    assert some == drawn(eval_limit=8)
    assert some != whole[:8]
    assert some != drawn(eval_limit=8, seed=8)
    assert not Counter(some) - Counter(whole)
    assert drawn(eval_limit=1000) == whole


def test_references_are_what_was_encoded(tiny: Path) -> None:
    records = prepared(tiny, held_out_category="fruit", eval_limit=5)
    assert len(records.references) == len(records.held_out) == 5
    tokenizer_ids = {"apple": 13, "pear": 14}
    answers = [record.output for record in records.references]
    ids = [example.input_ids[example.prompt_length] for example in records.held_out]
    assert len(set(answers)) == 2
    assert {answer: {i for a, i in zip(answers, ids, strict=True) if a == answer} for answer in answers} == {
        answer: {tokenizer_ids[answer]} for answer in answers
    }


# --- Partitions ---


def test_every_client_has_the_least_number(tiny: Path) -> None:
    def sizes(**changes: Any) -> list[int]:
        return [
            len(of_client) for of_client in prepared(tiny, alpha=0.3, held_out_category="fruit", **changes).clients.values()
        ]

    assert min(sizes(min_partition_size=6)) >= 6
    assert min(sizes()) < 6  # the control: the setting matters
    assert sum(sizes(min_partition_size=6)) == sum(sizes()) == 40


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"alpha": 0}, ["--alpha is '0'", "greater than 0"]),
        ({"alpha": -1}, ["--alpha is '-1'", "greater than 0"]),
        ({"min_partition_size": 0}, ["--min-partition-size is '0'"]),
        (
            {"min_partition_size": 15},
            ["57 examples are too few for 4 clients with at least 15 each; lower --num-clients"],
        ),
        (
            {"alpha": 0.001, "min_partition_size": 14},
            ["in 1000 draws with alpha 0.001, 4 clients never all got 14", "raise --alpha"],
        ),
        (
            {"partition": "iid", "alpha": 100},
            ["--alpha is 100 and --partition iid, which has no use for it", "take --partition dirichlet"],
        ),
        ({"partition": "client", "min_partition_size": 3}, ["--min-partition-size is 3 and --partition client"]),
        ({"partition": "client"}, ["a record has no field 'client'", "so say with --columns client=COLUMN"]),
        ({"columns": "category"}, ["--columns is 'category': columns has 'category'; expected field=column"]),
        ({"columns": "output=reply"}, ["records.jsonl:1: no field 'reply'", "or say with --columns"]),
        (
            {"local_unit": "epochs", "local_steps": 60_000},
            ["60000 epochs of client", "lower --local-steps or raise --batch-size"],
        ),
    ],
    ids=str,
)
def test_what_cannot_be_dealt_out_is_one_line(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, changes: dict[str, Any], wanted: list[str]
) -> None:
    result = fedkseed("simulate", *flags(tiny_settings(tiny, **changes)), "--run", tmp_path / "run")
    assert_one_line(result, 1 if "local_unit" in changes else 2, *wanted)


def test_a_column_tells_who_holds_a_record(tiny: Path) -> None:
    records = prepared(tiny, partition="client", columns="client=category", num_clients=7)
    assert sorted(records.clients) == ["animal", "colour", "fruit"]
    assert sum(len(examples) for examples in records.clients.values()) == 57


def test_names_that_differ_in_capitals_only_are_told(tiny: Path, tmp_path: Path) -> None:
    names = ("North", "north", "South")
    rows = [{"instruction": "name", "response": "dog", "client": name} for name in names]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    watcher = Watcher()
    prepare(
        build(tiny_settings(tiny, partition="client", data=tmp_path / "data.jsonl", eval_data=tiny / "records.jsonl")), watcher
    )
    told = [note for note in watcher.notes if "capitals" in note]
    assert told == ["warning: clients 'North' and 'north' differ in capitals only; are they one?"]


def test_a_record_without_a_client_is_refused(tiny: Path) -> None:
    config = build(tiny_settings(tiny, partition="client"))
    with pytest.raises(DataError, match=r"a record has no field 'client'; --partition client needs it in every record"):
        deal([Example("i", "", "o", "", "someone"), Example("i", "", "o", "")], config)


def test_a_name_that_is_no_clients_name_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, partition="client", columns="client=context", min_replies=1)
    (tmp_path / "bad.jsonl").write_text(
        "".join(json.dumps({"instruction": "name", "response": "dog", "context": name}) + "\n" for name in ("a\x07b", "c", "d"))
    )
    result = fedkseed("simulate", *flags(settings | {"data": tmp_path / "bad.jsonl", "eval_data": tiny / "records.jsonl"}))
    assert_one_line(result, 2, "bad.jsonl", "client", "1 to 64 bytes of printable text", "a\\x07b")


# --- Natural Instructions ---


def test_a_folder_of_natural_instructions_gives_a_client_a_task_and_holds_the_test_tasks_out(tiny: Path, tasks: Path) -> None:
    records = prepared(tiny, data=tasks, partition="client")
    sizes = published_sizes(tasks, "train", 48)
    assert {name: len(examples) for name, examples in records.clients.items()} == {k.split("_")[0]: n for k, n in sizes.items()}
    assert sizes == {"task001_b": 4, "task002_c": 12}
    assert held(records) == {"task009_t": 20}


def test_its_tasks_are_categories_too(tiny: Path, tasks: Path) -> None:
    records = prepared(tiny, data=tasks, held_out_category="task001_b", partition="iid", num_clients=3)
    assert held(records) == {"task001_b": 4}
    assert [len(examples) for examples in records.clients.values()] == [4, 4, 4]


def test_another_folder_is_refused_and_a_broken_task_named(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, partition="client")
    result = fedkseed("simulate", *flags(settings | {"data": tmp_path}))
    assert_one_line(result, 2, f"--data is '{tmp_path}': a folder without files of records (.csv,")
    folder = write_folder(tmp_path / "broken", {"task001_x": {"Definition": ["Do."], "Instances": []}})
    result = fedkseed("simulate", *flags(settings | {"data": folder}))
    assert_one_line(result, 2, "tasks/task001_x.json: no instances")
    for split in ("train", "test"):
        (folder / f"splits/default/{split}_tasks.txt").write_text("task077_gone\n")
    result = fedkseed("simulate", *flags(settings | {"data": folder}))
    assert_one_line(result, 2, "task077_gone.json: no such file, though", "train_tasks.txt names the task")


def test_epochs_through_a_simulation(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny, data=tasks, partition="client", local_unit="epochs", local_steps=2, batch_size=5, fraction_train=1.0
    )
    run, watcher = simulation(tmp_path / "run", settings | {"num_rounds": 1})
    run.train()
    assert {probe.client: probe.steps for probe in watcher.probes} == {"task001": 2 * 1, "task002": 2 * 3}
    assert len(read_metrics(tmp_path / "run")[1]["clients"]) == 2


# --- What is dropped ---


@pytest.mark.parametrize("long_prompts", ["cut", "drop"])
@pytest.mark.parametrize(("long", "empty", "warns"), [(0, 0, False), (1, 0, False), (4, 0, True), (0, 4, True), (4, 4, True)])
def test_more_than_a_twentieth_dropped_or_cut_is_a_warning_with_the_length_that_keeps_the_rest(
    tiny: Path, tmp_path: Path, long: int, empty: int, warns: bool, long_prompts: str
) -> None:
    words = ["a", "big", "small", "and"]
    kept = [Example("name the animal", " ".join(words), "dog", "animal")] * (40 - long - empty)
    lengthy = [Example("name the animal", " ".join(words * 3), "dog", "animal")] * long
    data = write_records(tmp_path / "d.jsonl", [*kept, *lengthy, *[Example("name", "a", " ", "animal")] * empty])
    tokenizer = load_tokenizer(tiny / "model")
    whole = encode(read_examples(data), tokenizer, 64)
    prompts = sorted({example.prompt_length for example in whole.examples})
    watcher = Watcher()
    changes = {"data": data, "eval_data": tiny / "records.jsonl", "max_length": prompts[0] + 3}
    prepare(build(tiny_settings(tiny, **changes, long_prompts=long_prompts)), watcher)
    (note,) = [note for note in watcher.notes if "training records: " in note]
    assert note.startswith("warning: ") == warns
    rescued = long if long_prompts == "cut" else 0
    assert f"{40 - long - empty + rescued} used, {long + empty - rescued} dropped" in note
    assert (f"tokens), {long} prompts cut" in note) == (rescued > 0)
    if warns:
        harm = "dropped or lose part of their prompt" if rescued else "dropped"
        assert f"; {100 * (long + empty) / 40:.0f} % are {harm}" in note
    if long > 2:
        assert f"--max-length {prompts[-1] + 1} would keep 95 %{' whole' if rescued else ''}" in note
        assert len(encode(read_examples(data), tokenizer, prompts[-1] + 1).examples) >= 0.95 * (40 - empty)
    else:
        assert "would keep" not in note


def test_a_length_that_the_model_does_not_take_is_not_advised(tiny: Path) -> None:
    fits = Example("name the animal", "a big", "dog", "animal")
    longer = Example("name the animal", "a big small and or " * 10, "dog", "animal")
    encoded = encode([fits] * 5 + [longer] * 5, load_tokenizer(tiny / "model"), 20)
    assert "would keep 95 %" in describe("training", encoded)
    assert "would keep 95 %" in describe("training", encoded, 512)
    assert describe("training", encoded, 40).endswith("50 % are dropped")  # and no fewer at 40
    between = Example("name the animal", "a big small and or " * 4, "dog", "animal")
    encoded = encode([fits] * 5 + [between] * 2 + [longer] * 3, load_tokenizer(tiny / "model"), 20)
    assert describe("training", encoded, 40).endswith("--max-length 40, the most that the model takes, would keep 70 %")


def test_a_soft_prompt_is_no_room_for_a_record(tiny: Path, tmp_path: Path) -> None:
    """The model takes 64 tokens, and the soft prompt has 44 of them: more than 20 cannot be advised."""
    examples = [Example("name the animal", "a big small and or " * 2, "dog", "animal")] * 9
    examples += [Example("name the animal", "a big small and or " * 5, "dog", "animal")]
    data = write_records(tmp_path / "d.jsonl", examples)
    settings = row_settings(
        tiny, "fedprompt", num_virtual_tokens=44, data=data, eval_data=tiny / "records.jsonl", max_length=12
    )
    watcher = Watcher()
    prepare(build(settings), watcher)
    (note,) = [note for note in watcher.notes if "training records: " in note]
    assert note.startswith("warning: ")
    assert "--max-length 20, the most that the model takes, would keep 90 %" in note
