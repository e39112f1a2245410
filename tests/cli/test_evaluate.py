"""`fedkseed evaluate`: the run's own numbers, or a ledger's on any data; by category; as JSON; wrong calls are one line."""

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import CommandLine, Result, assert_one_line, flags
from tests.support.natural_instructions import task, write_folder
from tests.support.runs import held_out, read_metrics
from tests.support.tiny import tiny_settings, write_records

import fedkseed as fk
from fedkseed.data import EncodedExample, Example, encode, read_examples
from fedkseed.errors import ConfigError, DataError
from fedkseed.evaluation import evaluate_loss, rouge_l, rouge_l_published, score
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of records: one with a category that looks like markup, one with a record that is too long."""
    folder = tmp_path_factory.mktemp("data")
    odd = '{"instruction": "name the dog", "response": "red", "category": "[/b] [red]"}\n'
    (folder / "odd.jsonl").write_text(odd + (tiny / "records.jsonl").read_text())
    (folder / "long.jsonl").write_text(json.dumps({"instruction": "name " * 100, "response": "dog"}))
    return folder


@pytest.fixture(scope="module")
def run(fedkseed: CommandLine, tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done, its published ledger beside it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    settings = tiny_settings(tiny, eval_data=data / "odd.jsonl", eval_limit=20)
    assert fedkseed("simulate", *flags(settings), "--run", run).code == 0
    assert fedkseed("export", run, run.parent / "published.ledger", "--ledger-only").code == 0
    return run


def rows(result: Result) -> dict[str, list[str]]:
    """The table's rows: the last two numbers of each by what stands before them."""
    assert (result.code, result.stderr) == (0, "")
    words = [line.rsplit(maxsplit=2) for line in result.stdout.splitlines() if line]
    return {re.sub("^records of .*", "records", parts[0].strip()): parts[1:] for parts in words if len(parts) == 3}


def scores(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_run_has_the_loss_of_its_metrics(fedkseed: CommandLine, run: Path, tmp_path: Path) -> None:
    shown = rows(fedkseed("evaluate", run, "--output", tmp_path / "scores.json"))
    losses = held_out(read_metrics(run))
    content = scores(tmp_path / "scores.json")
    found = [content[which]["overall"]["loss"] for which in ("base", "tuned")]
    assert found == pytest.approx([losses[0], losses[-1]], rel=1e-5)
    assert shown["held-out loss"] == [f"{loss:.4f}" for loss in found]
    assert shown["records"] == ["20", "20"]
    assert content["rounds"] == 3
    assert losses[0] != losses[-1]


def test_the_whole_is_the_token_weighted_mean_of_the_categories(
    fedkseed: CommandLine, run: Path, tiny: Path, tmp_path: Path
) -> None:
    result = fedkseed("evaluate", run, "--limit", 61, "--answers", 30, "--by-category", "--output", tmp_path / "scores.json")
    shown = rows(result)
    for which in ("base", "tuned"):
        content = scores(tmp_path / "scores.json")[which]
        parts, whole = content["categories"], content["overall"]
        assert sorted(parts) == ["[/b] [red]", "animal", "colour", "fruit"]
        for count in ("num_examples", "num_tokens", "num_answers"):
            assert sum(part[count] for part in parts.values()) == whole[count]
        assert (whole["num_examples"], whole["num_answers"]) == (61, 30)
        assert whole["loss"] == pytest.approx(
            math.fsum(part["loss"] * part["num_tokens"] for part in parts.values()) / whole["num_tokens"], rel=1e-12
        )
        assert whole["perplexity"] == pytest.approx(math.exp(whole["loss"]))
        for name in ("rouge_l", "rouge_l_published", "exact_match"):
            answered = [part for part in parts.values() if part["num_answers"]]
            assert whole[name] == pytest.approx(sum(part[name] * part["num_answers"] for part in answered) / 30)
    kept = json.loads((run / "answers.json").read_text())
    assert kept["of"] == Ledger.load(run / "ledger.safetensors").digest()
    assert len(kept["answers"]) == 20  # of the 30
    assert set(kept["answers"][0]) == {"asked", "wanted", "before", "after"}
    assert all(answer["asked"].startswith("name the ") and answer["wanted"] for answer in kept["answers"])
    assert "exact match of 30" in result.stdout
    assert "[/b] [red]" in result.stdout
    assert any(line.startswith("animal") for line in result.stdout.splitlines())
    assert "Rouge-L (as published)" in result.stdout
    assert shown["records"] == ["61", "61"]
    assert "records of 61 " in result.stdout


def test_one_category_is_a_line_in_place_of_an_empty_table(fedkseed: CommandLine, finished: Path) -> None:
    result = fedkseed("evaluate", finished, "--limit", 1, "--by-category")
    assert result.code == 0
    assert result.stdout.endswith("\nby category: nothing to tell apart; these records are all of one category, or have none\n")


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(fedkseed: CommandLine, copied: Path) -> None:
    (copied / "answers.json").mkdir()
    result = fedkseed("evaluate", copied, "--answers", 1)
    assert result.code == 0, result.stderr
    assert "answers.json: cannot keep the answers for the report" in result.stdout
    assert "exact match of 1" in result.stdout


def test_a_published_ledger_needs_a_model_and_data_and_no_run(
    fedkseed: CommandLine, run: Path, tiny: Path, tmp_path: Path
) -> None:
    published, output = run.parent / "published.ledger", tmp_path / "scores.json"
    call = ("evaluate", "--ledger", published, "--model", tiny / "model", "--data", tiny / "records.jsonl")
    assert rows(fedkseed(*call, "--max-length", 48, "--output", output))["records"] == ["60", "60"]
    tokenizer = load_tokenizer(tiny / "model")
    data = encode(read_examples(tiny / "records.jsonl"), tokenizer, 48)
    expected = evaluate_loss(load_model(tiny / "model", "float32"), data.examples, 8, 0)
    found = scores(output)
    assert found["base"]["overall"]["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found["tuned"]["overall"]["loss"] < found["base"]["overall"]["loss"]
    assert found["base"]["overall"]["num_tokens"] == expected.num_tokens
    assert "rouge_l" not in found["base"]["overall"]  # JSON has no NaN
    again = fedkseed(*call, "--max-length", 48, "--limit", 10)
    assert rows(again)["records"] == ["10", "10"]
    assert rows(again) == rows(fedkseed(*call, "--max-length", 48, "--limit", 10))


def test_a_prompt_that_fills_the_length_is_cut_or_dropped_as_the_run_or_the_caller_says(
    fedkseed: CommandLine, run: Path, copied: Path, tiny: Path, tmp_path: Path
) -> None:
    data = write_records(
        tmp_path / "d.jsonl",
        [Example("name the animal", text, "dog", "animal") for text in ("a big dog and " * 20, *[""] * 20)],
    )
    bare = ("evaluate", "--ledger", run.parent / "published.ledger", "--model", tiny / "model", "--data", data)
    call = (*bare, "--max-length", 48)
    for words, number in (((), "21"), (("--long-prompts", "cut"), "21"), (("--long-prompts", "drop"), "20")):
        assert rows(fedkseed(*call, *words))["records"] == [number, number]
    wrong = fedkseed(*call, "--long-prompts", "fold")
    assert wrong.code == 2
    assert "'fold' is not one of 'cut', 'drop'" in wrong.stderr
    config = copied / "config.toml"
    config.write_text(config.read_text().replace('long_prompts = "cut"\n', ""))
    assert rows(fedkseed("evaluate", copied, "--data", data, "--max-length", 48, "--limit", 99))["records"] == ["20", "20"]
    with pytest.raises(ConfigError, match=r"^--long-prompts is 'fold'; expected cut or drop$"):
        fk.evaluate(copied, data=str(data), long_prompts="fold")


def test_another_template_is_another_loss(fedkseed: CommandLine, run: Path) -> None:
    assert (
        rows(fedkseed("evaluate", run))["held-out loss"]
        != rows(fedkseed("evaluate", run, "--template", "bare"))["held-out loss"]
    )


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["--data", "odd.jsonl", "--columns", "output=reply"], ["odd.jsonl:1: no field 'reply'", "--columns"]),
        (["--data", "odd.jsonl", "--columns", "x"], ["columns has 'x'; expected field=column"]),
        (["--columns", "output=reply"], ["--columns is of --data, which is missing; give --data"]),
        (["--template", "alpaka"], ["template 'alpaka' is unknown"]),
        (["--model", "/no/model"], ["/no/model: no such model folder"]),
        (["--model", ""], ["the model's name is empty"]),
        (["--model", "~nobody-of-that-name/model"], ["nobody-of-that-name"]),
        (["--ledger", "nowhere.ledger"], ["nowhere.ledger"]),
        (["--data", "long.jsonl", "--max-length", "1000"], ["--max-length is 1000;", "takes 64 tokens, so give 64 or less"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_a_wrong_call_is_one_line(
    fedkseed: CommandLine, run: Path, data: Path, extra: Sequence[str], wanted: Sequence[str]
) -> None:
    result = fedkseed("evaluate", run, *extra, cwd=data)
    assert_one_line(result, 2, *wanted)


def test_scores_that_cannot_be_written_are_refused_before_they_are_measured(
    fedkseed: CommandLine, run: Path, data: Path
) -> None:
    result = fedkseed("evaluate", run, "--output", "odd.jsonl/scores.json", cwd=data)
    assert_one_line(result, 1, "odd.jsonl: cannot be made or written into (Not a directory); give an output in another folder")
    assert "base" not in result.stdout  # nothing was measured
    result = fedkseed("evaluate", "run", "--output", "/no/such/scores.json", cwd=Path("/"), nobody=True)
    assert_one_line(result, 1, "/no/such: cannot be made or written into (Permission denied); give an output in another")


def test_a_command_that_refuses_leaves_no_folder(fedkseed: CommandLine, run: Path, tmp_path: Path) -> None:
    for words in (("nosuch",), (run, "--limit", "1", "--round", "9")):
        assert_one_line(fedkseed("evaluate", *words, "--output", "made/for/nothing.json", cwd=tmp_path), 2)
    assert list(tmp_path.iterdir()) == []
    assert fedkseed("evaluate", run, "--limit", "1", "--output", "made/for/this.json", cwd=tmp_path).code == 0
    assert (tmp_path / "made" / "for" / "this.json").is_file()


def test_without_a_run_what_is_missing_is_named(fedkseed: CommandLine, run: Path, tiny: Path) -> None:
    published = run.parent / "published.ledger"
    assert_one_line(
        fedkseed("evaluate"), 2, "no run and no --ledger; give a run folder, or --ledger FILE with --model and --data"
    )
    result = fedkseed("evaluate", "--ledger", published, "--data", tiny / "records.jsonl")
    assert_one_line(result, 2, "--model is missing and", "give --model")
    result = fedkseed("evaluate", "--ledger", published, "--model", tiny / "model")
    assert_one_line(result, 2, "--data is missing and", "give --data")


def test_another_base_is_refused(fedkseed: CommandLine, run: Path, other_model: Path) -> None:
    result = fedkseed("evaluate", run, "--model", other_model)
    assert_one_line(result, 1, "base")


# --- Scores of answers written by hand ---


def test_scores_of_answers_by_hand(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four records, two categories; three are answered, one of them not at all, one exactly."""
    tokenizer, model = load_tokenizer(tiny / "model"), load_model(tiny / "model", "float32")
    records = [
        Example("name the dog", "", "red blue dog cat", "b"),
        Example("name the cat", "", "apple", "a"),
        Example("name the pear", "", "big small pear", "b"),
        Example("name the apple", "", "blue", "b"),
    ]
    examples = encode(records, tokenizer, 48).examples
    answers = {"name the dog": "Red dog.", "name the cat": " apple\n", "name the pear": ""}

    def answer(model: Any, tokenizer: Any, chosen: Sequence[EncodedExample], **_: Any) -> list[str]:
        texts = [tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in chosen]
        return [next(text for prompt, text in answers.items() if prompt in found) for found in texts]

    monkeypatch.setattr("fedkseed.evaluation.scores.generate", answer)
    result = score(model, tokenizer, examples, records, 0, answered=[0, 1, 2])
    assert rouge_l("Red dog.", "red blue dog cat") == pytest.approx(2 * 1 * 0.5 / 1.5)
    a, b = result.categories["a"], result.categories["b"]
    assert (a.num_examples, a.num_answers, b.num_examples, b.num_answers) == (1, 1, 3, 2)
    assert (a.exact_match, a.rouge_l) == (1, 1)
    assert (b.exact_match, b.rouge_l) == (0, pytest.approx((2 / 3 + 0) / 2))
    assert result.overall.exact_match == pytest.approx(1 / 3)
    assert result.overall.rouge_l == pytest.approx((2 / 3 + 1) / 3)
    published = [rouge_l_published("Red dog.", "red blue dog cat"), rouge_l_published("apple", "apple"), 0]
    assert published[0] < 2 / 3  # case counts there
    assert result.overall.rouge_l_published == pytest.approx(sum(published) / 3)
    unanswered = score(model, tokenizer, examples, records, 0)
    assert math.isnan(unanswered.overall.rouge_l)
    assert unanswered.overall.loss == result.overall.loss
    assert score(model, tokenizer, examples[1:2], records[1:2], 0).categories == {}


def test_answers_end_where_the_run_taught_them_to_and_where_the_context_does(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def answer(model: Any, tokenizer: Any, chosen: Sequence[EncodedExample], **how: Any) -> list[str]:
        told.append(how)
        return [""] * len(chosen)

    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["and"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} and {% endfor %}"
    tokenizer.save_pretrained(model)
    result = fk.simulate(tiny_settings(tiny, model=str(model), template="chat", num_rounds=1), tmp_path / "run")
    monkeypatch.setattr("fedkseed.evaluation.scores.generate", answer)
    fk.evaluate(result.folder, answers=2)
    stops = tokenizer.convert_tokens_to_ids(["</s>", "and"])
    assert [(list(how["stop_ids"]), how["context"]) for how in told] == [(stops, 64)] * 2


def test_records_that_have_changed_since_are_said(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    """One record more draws the held-out ones anew, so that those that were trained on are among them."""
    data = tmp_path / "records.jsonl"
    shutil.copy(tiny / "records.jsonl", data)
    settings = tiny_settings(tiny, data=data, num_rounds=1)
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run").code == 0
    quiet = fedkseed("evaluate", tmp_path / "run")
    assert (quiet.code, "records, template or model have changed" in quiet.stdout + quiet.stderr) == (0, False)
    with data.open("a") as file:
        file.write('{"instruction": "name the dog", "response": "red blue", "category": "new"}\n' * 30)
    said = fedkseed("evaluate", tmp_path / "run")
    assert (said.code, "records, template or model have changed" in said.stdout + said.stderr) == (0, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "fedprompt", "num_virtual_tokens": 12},
        {"algorithm": "fedptuning", "num_virtual_tokens": 12},
        {"eval_limit": 2},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_run_that_is_evaluated_as_it_was_is_not_warned_of(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """A soft prompt is in a run's first loss and in no base model's; and a run may go on with other records to evaluate on."""
    settings = tiny_settings(tiny, num_rounds=1, local_steps=1, **changes)
    if "algorithm" in changes:
        settings = {name: value for name, value in settings.items() if name not in ("num_seeds", "noise", "eps")}
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run").code == 0
    if "eval_limit" in changes:
        assert fedkseed("simulate", "--resume", tmp_path / "run", "--num-rounds", 2, "--eval-limit", "all").code == 0
    said = fedkseed("evaluate", tmp_path / "run")
    assert (said.code, said.stderr, "have changed" in said.stdout) == (0, "", False)


def test_a_runs_own_file_is_of_the_run_whatever_is_said_beside_it(fedkseed: CommandLine, run: Path, tiny: Path) -> None:
    ledger, data = run / "ledger.safetensors", ("--data", tiny / "records.jsonl")
    assert rows(fedkseed("evaluate", ledger, *data, "--model", tiny / "model")) == rows(fedkseed("evaluate", ledger, *data))


def test_columns_of_natural_instructions_are_refused(fedkseed: CommandLine, run: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tasks", train={}, test={"task001_a": task([3] * 30, "a")})
    result = fedkseed("evaluate", run, "--data", folder, "--columns", "output=zz")
    assert_one_line(result, 2, "--columns is 'output=zz' and tasks of Natural Instructions have no columns; leave it out")


def test_answers_to_private_records_stay_out_of_a_published_folder(
    fedkseed: CommandLine, copied: Path, tiny: Path, tmp_path: Path
) -> None:
    assert fedkseed("export", copied, tmp_path / "published", "--ledger-only").code == 0
    held = ("--model", tiny / "model", "--data", tiny / "records.jsonl", "--answers", 1)
    assert fedkseed("evaluate", tmp_path / "published", *held).code == 0
    assert fedkseed("evaluate", copied, "--ledger", tmp_path / "published", "--answers", 1).code == 0
    assert not list(tmp_path.rglob("answers.json"))
    assert fedkseed("evaluate", copied, "--data", tiny / "records.jsonl", "--answers", 1).code == 0
    assert not list(copied.rglob("answers.json"))  # the report calls those held out that are kept
    assert fedkseed("evaluate", copied, "--answers", 1).code == 0
    assert (copied / "answers.json").is_file()


def test_beside_a_ledger_a_run_must_be_one(fedkseed: CommandLine, run: Path, tiny: Path) -> None:
    call = ("--ledger", run.parent / "published.ledger", "--model", tiny / "model", "--data", tiny / "records.jsonl")
    for path in ("/nonexistent-run", run / "metrics.jsonl"):
        assert_one_line(fedkseed("evaluate", path, *call), 2, f"{path} holds no run (no config.toml)")


def test_somebodys_settings_beside_a_ledger_are_not_the_runs(
    fedkseed: CommandLine, run: Path, tiny: Path, tmp_path: Path
) -> None:
    shutil.copy(run.parent / "published.ledger", tmp_path / "ledger.safetensors")
    (tmp_path / "config.toml").write_text('title = "My blog"\n')
    call = ("evaluate", tmp_path / "ledger.safetensors", "--model", tiny / "model")
    assert rows(fedkseed(*call, "--data", tiny / "records.jsonl", "--max-length", 48))["records"] == ["60", "60"]


def test_a_text_that_is_learnt_whole_has_nothing_to_answer(tiny: Path) -> None:
    """With a tokenizer that begins no text with a token of its own."""
    model, tokenizer = load_model(tiny / "model", "float32"), load_tokenizer(tiny / "model")
    examples = encode([Example("", "", "dog", "")], tokenizer, 48).examples
    bare = [EncodedExample(one.input_ids[one.prompt_length :], 0) for one in examples]
    with pytest.raises(DataError, match=r"^a record has no prompt, not even a token .* nothing to answer; give records"):
        score(model, tokenizer, bare, [Example("", "", "dog", "")], 0, [0])


def test_scores_replace_scores_and_nothing_else(fedkseed: CommandLine, copied: Path, tmp_path: Path) -> None:
    for path in (copied / "ledger.safetensors", copied, copied / "config.toml"):
        before = path.read_bytes() if path.is_file() else b""
        assert_one_line(fedkseed("evaluate", copied, "--output", path), 2, f"--output {path} exists and is no file of scores")
        assert not before or path.read_bytes() == before
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to: not waited for
    for path in (tmp_path / "pipe", Path("/dev/null")):
        assert_one_line(fedkseed("evaluate", copied, "--output", path), 2, f"--output {path} exists and is no file of scores")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "scores.json").touch()  # as mktemp makes it
    for _ in range(2):
        assert fedkseed("evaluate", copied, "--output", tmp_path / "scores.json").code == 0
