"""Rouge-L against the two packages that it follows, on generated and on real texts."""

import itertools
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

from fedkseed.evaluation import rouge_l, rouge_l_published

logging.getLogger("absl").setLevel(logging.WARNING)
SCORER = RougeScorer(["rougeL"])
PACKAGE = Rouge(metrics=["rouge-l"], stats=["f"])

# few words and many separators, so that common subsequences, ties and repeated words occur
pieces = st.sampled_from(["a", "b", "cat", "Cat", "dog", "7", " ", "  ", ".", ". ", "\n", ",", "é", "_", "-"])
texts = st.lists(pieces, max_size=24).map(" ".join) | st.text(max_size=40)


def published(answer: str, reference: str) -> float:
    """What the published code does around the package."""
    if not answer:
        return 0.0
    try:
        return float(PACKAGE.get_scores([answer], [reference])[0]["rouge-l"]["f"])
    except ValueError:
        return 0.0


@given(answer=texts, reference=texts)
def test_the_standard_score_is_that_of_rouge_score(answer: str, reference: str) -> None:
    assert rouge_l(answer, reference) == pytest.approx(SCORER.score(reference, answer)["rougeL"].fmeasure, abs=1e-12)


@given(answer=texts, reference=texts)
def test_the_published_score_is_that_of_rouge(answer: str, reference: str) -> None:
    assert rouge_l_published(answer, reference) == pytest.approx(published(answer, reference), abs=1e-12)


def test_both_scores_on_real_texts_are_those_of_their_packages(shared: Path) -> None:
    lines = (shared / "data/databricks-dolly-15k.jsonl").read_text(encoding="utf-8").split("\n")[:80]
    responses = [json.loads(line)["response"][:600] for line in lines]
    for answer, reference in itertools.pairwise(responses):
        assert rouge_l(answer, reference) == pytest.approx(SCORER.score(reference, answer)["rougeL"].fmeasure, abs=1e-12)
        assert rouge_l_published(answer, reference) == pytest.approx(published(answer, reference), abs=1e-12)


def test_the_two_are_not_the_same() -> None:
    """Case, punctuation and repeated words: what a table must say beside its numbers."""
    assert rouge_l("the Cat, the dog", "the cat the dog") == 1.0
    assert rouge_l_published("the Cat, the dog", "the cat the dog") < 0.8
    assert rouge_l_published("go go go", "go") == pytest.approx(1.0)
    assert rouge_l("go go go", "go") == pytest.approx(0.5)


def test_the_order_of_words_counts() -> None:
    assert rouge_l("a b c d", "d c b a") < rouge_l("a b c d", "a b c d") == 1.0


def test_long_texts_do_not_exhaust_the_stack() -> None:
    """The package recurses over the words and fails here; a long reference is a fact of Dolly."""
    text = " ".join(f"w{i}" for i in range(700))
    assert rouge_l_published(text, text) == pytest.approx(1.0)


@pytest.mark.parametrize(("answer", "reference"), [("", "a"), ("a", ""), ("", ""), (".", "a"), ("a", "...")])
def test_nothing_scores_nothing(answer: str, reference: str) -> None:
    assert rouge_l(answer, reference) == rouge_l_published(answer, reference) == 0.0
