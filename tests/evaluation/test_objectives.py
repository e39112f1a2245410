"""Scores of answers: those with a name, a user's own, and what is no number."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkseed.data import Example
from fedkseed.errors import ConfigError, DataError
from fedkseed.evaluation import check_score, find_score, scored

RECORD = Example("Say it", "", "the cat sat", "")


def test_the_named_scores() -> None:
    match, rouge = find_score("exact-match"), find_score("rouge-l")
    assert (match(RECORD, " the cat sat\n"), match(RECORD, "the cat")) == (1.0, 0.0)
    assert rouge(RECORD, "the cat") == pytest.approx(0.8)


def test_a_function_of_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class By:\n    @staticmethod\n    def length(record, answer):\n        return -len(answer)\n"
    (tmp_path / "own_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert find_score("own_rewards:By.length")(RECORD, "four") == -4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("math:no_such", "no attribute 'no_such'"),
        ("math:pi", "of type float; expected a function"),
        ("nonsense", "or a function as PACKAGE:FUNCTION"),
    ],
)
def test_what_is_not_there_is_one_line(name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_score(name)
    assert str(caught.value).startswith(f"--objective is '{name}'")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def raising(record: Example, answer: str) -> float:
    raise ValueError("column\n gone")


@pytest.mark.parametrize("value", [True, 1, 0.5, np.float32(2), np.int64(3), np.bool_(False)], ids=repr)
def test_numbers_of_any_kind_are_numbers(value: Any) -> None:
    assert scored(lambda record, answer: value, RECORD, "x") == (float(value), "")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raising, "raised ValueError: column gone"),
        (lambda record, answer: math.nan, "gave nan"),
        (lambda record, answer: -math.inf, "gave -inf"),
        (lambda record, answer: "0.5", "gave something of type str"),
        (lambda record, answer: None, "gave something of type NoneType"),
        (lambda record, answer: [1.0], "gave something of type list"),
        (lambda record: 1.0, "raised TypeError"),
    ],
)
def test_what_is_no_number_is_nan_with_its_reason_and_an_error_before_a_run(function: Any, reason: str) -> None:
    value, told = scored(function, RECORD, "x")
    assert math.isnan(value)
    assert told.startswith(reason)
    with pytest.raises(DataError, match="of a record and its own response the function") as caught:
        check_score(function, RECORD, "module:function")
    assert told in str(caught.value)
