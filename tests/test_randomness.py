"""Keys and generators as functions of where they are used: frozen values, no collisions, no global state."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkseed.randomness import derive, generator
from tests.support.generators import global_states, seed_globally

PATHS = st.lists(st.one_of(st.integers(-(2**64), 2**64), st.text(max_size=8)), max_size=4)

# Frozen: a run that is resumed with a later version must draw what the earlier one drew.
GOLDEN = [
    ((0,), 11243728523470438572),
    ((42, "pool"), 16767694595064830179),
    ((42, 1, 0, "cohort"), 16702257163862454245),
    ((42, 1, 0, "client-3", "seeds"), 16172839434760029518),
    ((2**63 - 1, 40, 2, "Zürich-北京", "batches"), 12089080370092395111),
]


@pytest.mark.parametrize(("path", "key"), GOLDEN)
def test_derive_is_frozen(path: tuple[int | str, ...], key: int) -> None:
    assert derive(*path) == key


def test_generator_is_frozen() -> None:
    draw = generator(42, 1, 0, "cohort")
    assert draw.integers(0, 2**32, 4).tolist() == [3823505516, 378025278, 555015262, 851097771]
    assert draw.choice(10, 4, replace=False).tolist() == [6, 5, 2, 7]


@given(PATHS, PATHS)
def test_different_paths_have_different_keys(one: list[int | str], other: list[int | str]) -> None:
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (derive(7, *one) == derive(7, *other)) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab",)),
        (("a", "b"), ("a,b",)),
        (("a", "b"), ('a", "b',)),
        (("a", "b"), ("b", "a")),
        ((1, "a"), ("1", "a")),
        ((1, 23), (12, 3)),
        (("a",), ("a", "")),
        (("é",), ("e\u0301",)),
    ],
)
def test_parts_of_a_path_do_not_run_together(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert derive(1, *one) != derive(1, *other)


def test_keys_fill_64_bits() -> None:
    keys = np.array([derive(0, k) for k in range(2000)], np.uint64)
    ones = np.array([int((keys >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(64)])
    assert np.all(np.abs(ones - 1000) < 6 * np.sqrt(500))  # six standard deviations of 2000 fair coins
    assert len(set(keys.tolist())) == 2000


def test_streams_of_neighbours_are_uncorrelated() -> None:
    samples = np.stack([generator(5, server_round, "x").standard_normal(4000) for server_round in range(12)])
    correlation = np.corrcoef(samples)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 6 / np.sqrt(4000)


def test_global_generators_are_neither_read_nor_changed() -> None:
    seed_globally(1)
    before = global_states()
    first = derive(3, "a"), generator(3, "a").random(5).tolist()
    assert global_states() == before
    seed_globally(2)
    assert (derive(3, "a"), generator(3, "a").random(5).tolist()) == first
