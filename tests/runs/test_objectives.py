"""Runs that are tuned on scores or on preferences: they learn, what is bad is dropped or one line, and guard rails hold."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.runs import Watcher, read_metrics, simulation, trained
from tests.support.tiny import tiny_settings

import fedkseed as fk
from fedkseed.data import Example
from fedkseed.demo import clients, held_out, model_folder
from fedkseed.errors import ConfigError, DataError
from fedkseed.evaluation import Decoder, EvalLoss
from fedkseed.runs.driver import Driver
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.provenance import records_digest
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build
from fedkseed.runs.tuning import tune

SCORED = {"objective": "exact-match", "max_new_tokens": 3, "directions": 2, "local_steps": 2, "eval_every": 3, "eval_limit": 4}


def demo(**changes: Any) -> dict[str, Any]:
    """The demo's model and two of its clients."""
    own = [{**asdict(e), "client": name} for name, records in list(clients(1).items())[:2] for e in records]
    settings = {
        "model": str(model_folder()), "data": own, "eval_data": [asdict(e) for e in held_out(1)[::8]], "partition": "client",
        "num_clients": 2, "fraction_train": 1.0, "num_rounds": 1, "local_steps": 3, "batch_size": 6, "directions": 4,
        "eps": 3e-2, "lr": 1e-2, "max_length": 96, "max_new_tokens": 2, "eval_every": 1, "eval_limit": "all", "seed": 1,
    }  # fmt: skip
    return settings | changes


# --- A user's own function ---


def test_a_function_of_three_lines_tunes_the_demos_model_by_federation(tmp_path: Path) -> None:
    """It asks for the letter e. With its sign turned the same run goes the other way: the control that must fail."""

    def score(record: Example, answer: str) -> float:
        letters = answer.replace(" ", "")
        return letters.count("e") / max(len(letters), 1)

    up = fk.simulate(demo(objective=score), tmp_path / "up")
    down = fk.simulate(demo(objective=lambda record, answer: -score(record, answer)), tmp_path / "down")
    assert up.rewards[1] > up.rewards[0] + 0.03
    assert down.rewards[0] == -up.rewards[0]
    assert -down.rewards[1] < up.rewards[0] - 0.01
    before, first, *_ = read_metrics(tmp_path / "up")
    assert before["eval_reward"] == up.rewards[0]
    assert first["train_loss"] is None
    assert 0 < first["train_reward"] < 1
    assert sum(one["weight"] * one["reward"] for one in first["clients"].values()) == pytest.approx(first["train_reward"])
    assert first["bytes_up"] < 2 * 3 * 4 + 150  # one scalar a direction, as ever
    assert "score" in (tmp_path / "up" / "config.toml").read_text()


def test_the_same_run_again_is_the_same_and_goes_on_where_it_was(tiny: Path, tmp_path: Path) -> None:
    """Draws of answers too are a function of the run's seed and of where they are made."""
    settings = tiny_settings(tiny, **SCORED, num_rounds=2, temperature=1.0) | {"objective": "tests.support.rewards:shortness"}
    whole, _ = trained(tmp_path / "whole", settings)
    assert whole.coefficients.any()
    simulation(tmp_path / "cut", settings | {"num_rounds": 1})[0].train()
    run = RunFolder.open(tmp_path / "cut")
    run.write_config(build(settings))
    assert fk.simulate(settings, tmp_path / "cut").ledger.digest() == whole.digest()
    greedy = simulation(tmp_path / "greedy", settings | {"temperature": 0.0})[0].train()
    assert greedy.digest() != whole.digest()


def test_the_batch_of_a_probe_is_answered_at_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass costs a GPU as much for few records as for many."""
    batches: list[tuple[int, int]] = []
    answers = Decoder.answers

    def counted(self: Decoder, prompts: Any, batch_size: int, *others: Any) -> list[str]:
        batches.append((len(prompts), batch_size))
        return answers(self, prompts, batch_size, *others)

    monkeypatch.setattr(Decoder, "answers", counted)
    fk.simulate(demo(objective="exact-match", batch_size=20, local_steps=1, directions=1), tmp_path / "run")
    assert batches.count((20, 20)) == 2 * 2  # of two clients, a pair of probes each
    assert {batch_size for _, batch_size in batches} == {20}  # of an evaluation too


# --- What is bad ---


def falters(when: Callable[[int], bool], bad: Any) -> Callable[[Example, str], Any]:
    calls = 0

    def score(record: Example, answer: str) -> Any:
        nonlocal calls
        calls += 1
        if not when(calls):
            return float(len(answer))
        if isinstance(bad, Exception):
            raise bad
        return bad

    return score


@pytest.mark.parametrize("bad", [RuntimeError("the service is gone"), math.nan, "1.0"], ids=repr)
def test_a_score_that_is_none_drops_its_step_which_is_counted(
    tiny: Path, tmp_path: Path, bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls: one before the run, 4 at the base's evaluation, then 8 a step; the second step of the first client is bad."""
    score = falters(lambda call: call == 1 + 4 + 8 + 1, bad)
    settings = tiny_settings(tiny, **SCORED, num_rounds=1) | {"objective": score}
    fk.simulate(settings, tmp_path / "run")
    (event,) = (event for event in read_metrics(tmp_path / "run") if event["event"] == "round")
    assert event["dropped_steps"] == 1
    assert event["num_replies"] == 2
    (line,) = (record.getMessage() for record in caplog.records if "in training the step is dropped" in record.getMessage())
    assert line.startswith("tests.")


def test_a_function_that_never_works_is_one_line_before_the_run(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, **SCORED) | {"objective": lambda record: 1.0}
    with pytest.raises(DataError, match=r"the function raised TypeError: .*expected score\(record, answer\)"):
        fk.simulate(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "no_such_module:score"}, "--objective is 'no_such_module:score': No module named"),
        ({"objective": "own"}, "--objective own is of runs on Flower"),
        ({"objective": "exact-match", "max_new_tokens": 4000}, "--max-new-tokens is 4000 and the longest prompt has"),
        ({"objective": "dpo"}, "no worse response, which --objective dpo compares with; give each record a field 'rejected'"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_one_line_before_the_run(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        simulation(tmp_path / "run", tiny_settings(tiny, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_that_are_learnt_whole_have_nothing_to_answer(tiny: Path, tmp_path: Path) -> None:
    """The tiny tokenizer begins no text with a token of its own."""
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "name the dog"}\n' * 40)
    with pytest.raises(DataError, match=r"a record has no prompt, .* nothing to answer"):
        simulation(tmp_path / "run", tiny_settings(tiny, **SCORED, data=str(data), columns="output=text", partition="iid"))
    assert not (tmp_path / "run" / "ledger.safetensors").exists()


def test_records_without_a_reference_are_left_out_and_counted(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, **SCORED)
    lines = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    lines[5]["response"] = ""
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    watcher = simulation(tmp_path / "run", settings | {"data": str(data)})[1]
    assert any("1 no response" in note for note in watcher.notes)


def test_no_rate_is_looked_for_by_the_loss(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="measure the loss, and --objective is exact-match; give --lr"):
        tune(tiny_settings(tiny, **SCORED))


# --- Guard rails ---


def test_the_model_stays_as_near_to_its_base_as_is_asked(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, **SCORED) | {"objective": "dpo-sign"}  # whose score moves with any weight
    del settings["max_new_tokens"]
    data = tmp_path / "pairs.jsonl"
    pairs(Path(settings["data"]), data)
    settings |= {"data": str(data)}
    simulation(tmp_path / "free", settings)[0].train()
    free = [event["moved_rms"] for event in read_metrics(tmp_path / "free") if event["event"] == "round"]
    run, watcher = simulation(tmp_path / "bound", settings | {"max_moved": free[0] / 2})
    run.train()
    held = [event["moved_rms"] for event in read_metrics(tmp_path / "bound") if event["event"] == "round"]
    assert max(held) <= free[0] / 2 * (1 + 1e-3)
    (note,) = (note for note in watcher.notes if "--max-moved" in note)
    assert note == f"round 1: the model is as far from its base as --max-moved {free[0] / 2:g} lets it; it is pulled back"


def test_a_reward_that_rises_while_the_loss_does_is_told_and_not_called_divergence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, watcher = simulation(tmp_path / "run", tiny_settings(tiny, **SCORED))
    driver, done = Driver(run.run, run.server, watcher), [-1]
    monkeypatch.setattr(Driver, "round", property(lambda _: done[0]))

    def warned(loss: float, reward: float) -> list[str]:
        watcher.notes.clear()
        done[0] += 1
        driver.evaluated(EvalLoss(loss, math.exp(loss), 4, 8, reward), 0, 0.0)
        return watcher.notes

    assert warned(2.0, 0.25) == []
    assert warned(2.1, 0.5) == []  # within a tenth
    (note,) = warned(2.3, 0.5)
    assert note.startswith(
        "warning: round 2: the held-out reward has risen from 0.2500 to 0.5000 and the held-out loss from 2.0000 to 2.3000: "
        "the model forgets, or scores without answering"
    )
    (note,) = warned(2.3, 0.2)  # both the wrong way: no reward is hacked
    assert "the run diverges" in note


# --- Preferences ---


def pairs(source: Path, target: Path) -> Path:
    """Records with two responses each, of which all clients prefer the same one."""
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    worse = {"dog": "cat", "cat": "dog", "red": "blue", "blue": "red", "apple": "pear", "pear": "apple"}
    made = []
    for line in lines:
        given = line.pop("response")
        liked = min(given, worse[given])  # everybody prefers the same one
        made.append({**line, "chosen": liked, "rejected": worse[liked]})
    target.write_text("".join(json.dumps(line) + "\n" for line in made))
    return target


GRADIENT = {"objective": "dpo", "algorithm": "fedkseed-grad", "num_seeds": 128, "lr": 0.1, "dpo_beta": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "dpo", "lr": 0.01, "dpo_beta": 1.0, "local_steps": 12},
        {"objective": "dpo-sign", "directions": 4, "lr": 0.01},
        GRADIENT,
        {**GRADIENT, "two_point_clients": 0.5},
    ],
    ids=str,
)
def test_clients_preferences_are_learnt(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """At the base no pair is preferred; afterwards most held-out pairs are. Nothing else than scalars or changes travels."""
    settings = tiny_settings(tiny, num_rounds=5, eval_every=5, batch_size=6, fraction_train=1.0)
    settings["data"] = str(pairs(Path(settings["data"]), tmp_path / "pairs.jsonl"))
    settings |= {"eval_data": settings["data"], **changes}
    run, _ = simulation(tmp_path / "run", settings)
    run.train()
    metrics = read_metrics(tmp_path / "run")
    before, after = [event["eval_reward"] for event in metrics if event["event"] == "evaluation"]
    assert before == 0.5
    assert after > 0.75
    if changes["objective"] == "dpo":
        first = next(event for event in metrics if event["event"] == "round")
        assert first["train_loss"] < math.log(2) + 0.01


def test_other_worse_responses_are_other_records(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny, objective="dpo")
    data = pairs(Path(settings["data"]), tmp_path / "pairs.jsonl")
    digests = []
    for text in (data.read_text(), data.read_text().replace('"rejected": "dog"', '"rejected": "a dog"')):
        data.write_text(text)
        digests.append(records_digest(prepare(build(settings | {"data": str(data)}), Watcher())))
    assert digests[0] != digests[1]


def test_a_margin_is_by_how_much_more_than_the_base_the_model_prefers_the_better_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand from log-softmax; what the base thinks is computed once and then read, also by another process's task."""
    settings = tiny_settings(tiny, objective="dpo")
    settings["data"] = str(pairs(Path(settings["data"]), tmp_path / "pairs.jsonl"))
    run, _ = simulation(tmp_path / "run", settings)
    task: Any = next(iter(run.clients.values())).task
    assert np.abs(task.all_margins()).max() < 1e-4

    def log_prob(example: Any) -> float:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        with torch.inference_mode():
            logs = run.model(input_ids=ids).logits[0].double().log_softmax(-1)
        return sum(float(logs[t - 1, ids[0, t]]) for t in range(example.prompt_length, ids.shape[1]))

    def gap(i: int) -> float:
        return log_prob(task._examples[i]) - log_prob(task._worse[i])

    before = [gap(i) for i in range(3)]
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    wanted = [gap(i) - before[i] for i in range(3)]
    assert max(map(abs, wanted)) > 0.01
    np.testing.assert_allclose(task.all_margins()[:3], wanted, atol=1e-4)
    beta = run.config.dpo_beta
    assert task.loss(np.arange(3)) == pytest.approx(np.mean([math.log1p(math.exp(-beta * w)) for w in wanted]), abs=1e-5)

    def forbidden(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("fedkseed.runs.preferences.PairTask.all_margins", forbidden)
    simulation(tmp_path / "again", settings)
