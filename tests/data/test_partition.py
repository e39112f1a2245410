"""Partitions: disjoint covers, repeatable, big enough; and the shuffled control."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.generators import global_states, seed_globally

from fedkseed.data import Example, dirichlet, iid, read_examples, shuffle_responses, split_off
from fedkseed.errors import DataError, InvalidValueError

SEEDS = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_disjoint_cover(parts: list[np.ndarray], num_examples: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))
    assert all(np.all(np.diff(part) > 0) for part in parts)  # sorted
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}


def skew(parts: list[np.ndarray], categories: list[str]) -> float:
    """The mean share of a client's commonest category."""
    labels = np.array(categories)
    return float(np.mean([max(Counter(labels[part].tolist()).values()) / len(part) for part in parts if len(part)]))


@given(st.integers(1, 200), st.integers(1, 30), SEEDS)
def test_iid_parts_cover_all_records_and_differ_by_one_at_most(num_examples: int, num_clients: int, seed: int) -> None:
    num_clients = min(num_clients, num_examples)
    parts = iid(num_examples, num_clients, rng(seed))
    assert_disjoint_cover(parts, num_examples)
    assert len(parts) == num_clients
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(map(np.array_equal, parts, iid(num_examples, num_clients, rng(seed))))


@given(
    st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=20, max_size=80),
    st.integers(1, 4),
    st.floats(0.5, 1e6),
    st.integers(0, 2),
    SEEDS,
)
def test_dirichlet_parts_cover_all_records_and_hold_the_least_number(
    categories: list[str], num_clients: int, alpha: float, least: int, seed: int
) -> None:
    parts = dirichlet(categories, num_clients, alpha, rng(seed), least)
    assert_disjoint_cover(parts, len(categories))
    assert len(parts) == num_clients
    assert min(map(len, parts)) >= least
    assert all(map(np.array_equal, parts, dirichlet(categories, num_clients, alpha, rng(seed), least)))


def test_another_seed_gives_another_partition() -> None:
    categories = ["a", "b"] * 50
    assert not all(map(np.array_equal, iid(100, 4, rng(0)), iid(100, 4, rng(1))))
    sizes = [[len(part) for part in dirichlet(categories, 4, 0.5, rng(seed))] for seed in (0, 1)]
    assert sizes[0] != sizes[1]


def test_alpha_sets_the_skew() -> None:
    categories = ["a", "b", "c", "d"] * 100
    skews = [skew(dirichlet(categories, 10, alpha, rng()), categories) for alpha in (0.1, 1.0, 1000.0)]
    assert skews[0] > 0.6 > skews[1] > 0.35 > skews[2]
    assert skew(iid(400, 10, rng()), categories) < 0.45  # the control: no skew without Dirichlet


def test_shares_of_a_category_are_dirichlets() -> None:
    """Mean 1/n and variance (1/n)(1 - 1/n)/(n alpha + 1) of a client's share, over many draws."""
    n, alpha, size, draws = 4, 0.7, 1000, 4000
    generator = rng(5)
    shares = np.array([[len(p) for p in dirichlet([""] * size, n, alpha, generator, 0)] for _ in range(draws)]) / size
    variance = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    # 5 standard errors of the mean; 10 % for the variance
    np.testing.assert_allclose(shares.mean(0), 1 / n, atol=5 * np.sqrt(variance / draws))
    np.testing.assert_allclose(shares.var(0), variance, rtol=0.1)


def test_dolly_can_be_dealt_out_as_published(shared: Path) -> None:
    categories = [example.category for example in read_examples(shared / "data" / "databricks-dolly-15k.jsonl")]
    parts = dirichlet(categories, 200, 0.5, rng(42))
    assert_disjoint_cover(parts, 15_011)
    assert min(map(len, parts)) >= 1


@given(st.integers(2, 500), st.floats(1e-6, 1, exclude_max=True), SEEDS)
def test_what_is_split_off_is_the_fraction_and_the_rest_remains(num_examples: int, fraction: float, seed: int) -> None:
    train, held_out = split_off(num_examples, fraction, rng(seed))
    assert_disjoint_cover([train, held_out], num_examples)
    assert len(held_out) == min(max(round(fraction * num_examples), 1), num_examples - 1)
    assert np.array_equal(held_out, split_off(num_examples, fraction, rng(seed))[1])


def test_what_cannot_be_dealt_out() -> None:
    with pytest.raises(DataError, match=r"3 examples are too few for 4 clients with at least 1 each; lower --num-clients"):
        iid(3, 4, rng())
    with pytest.raises(DataError, match=r"10 examples are too few for 4 clients with at least 3 each"):
        dirichlet(["a"] * 10, 4, 1.0, rng(), min_partition_size=3)
    with pytest.raises(DataError, match=r"0 examples are too few"):
        dirichlet([], 1, 1.0, rng(), min_partition_size=0)
    with pytest.raises(
        DataError, match=r"in 1000 draws with alpha 0\.001, 8 clients never all got 2 of the 40 .* raise --alpha"
    ):
        dirichlet(["a", "b"] * 20, 8, 0.001, rng(), min_partition_size=2)
    with pytest.raises(DataError, match=r"1 examples cannot be split in two"):
        split_off(1, 0.5, rng())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(InvalidValueError, match=r"alpha is .*; expected a number"):
        dirichlet(["a"] * 10, 2, alpha, rng())


def test_other_arguments_out_of_range() -> None:
    with pytest.raises(InvalidValueError, match=r"num_clients is 0; expected at least 1"):
        iid(10, 0, rng())
    with pytest.raises(InvalidValueError, match=r"min_partition_size is -1; expected at least 0"):
        dirichlet(["a"] * 10, 2, 1.0, rng(), min_partition_size=-1)
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InvalidValueError, match=r"the held-out fraction is .*; expected a number between 0 and 1"):
            split_off(10, fraction, rng())


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=30), SEEDS)
def test_the_control_deals_every_response_to_another_prompt(texts: list[tuple[str, str]], seed: int) -> None:
    examples = [Example(a, b, f"response {i}", b) for i, (a, b) in enumerate(texts)]
    shuffled = shuffle_responses(examples, rng(seed))
    assert Counter(example.output for example in shuffled) == Counter(example.output for example in examples)
    for before, after in zip(examples, shuffled, strict=True):
        assert (before.instruction, before.input, before.category) == (after.instruction, after.input, after.category)
        assert before.output != after.output or len(examples) == 1
    assert shuffled == shuffle_responses(examples, rng(seed))


def test_global_generators_are_left_alone() -> None:
    seed_globally(3)
    before = global_states()
    iid(10, 2, rng())
    dirichlet(["a"] * 10, 2, 1.0, rng())
    split_off(10, 0.5, rng())
    shuffle_responses([Example("a", "b", "c", "d")] * 5, rng())
    assert global_states() == before
