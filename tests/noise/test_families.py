"""The families of noise: their codes stand in messages and never change."""

import numpy as np
import pytest

from fedkseed.noise import families
from fedkseed.noise.families import BY_CODE, FAMILIES, Family

every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
FROZEN = {"hadamard": 0, "gaussian": 1}
"""As in docs/noise.md and in every message that was ever sent; only added to."""


def test_codes_are_distinct_and_frozen() -> None:
    codes = {family.name: family.code for family in FAMILIES.values()}
    assert codes.items() >= FROZEN.items()
    assert len(set(codes.values())) == len(codes)
    assert all(0 <= code < 256 for code in codes.values())
    assert {code: family.name for code, family in BY_CODE.items()} == {code: name for name, code in codes.items()}


@every
def test_a_family_stands_under_its_own_name(family: Family) -> None:
    assert FAMILIES[family.name] is family is BY_CODE[family.code]
    assert family.about


@every
def test_a_mixture_is_a_function_of_what_it_is_given(family: Family) -> None:
    indices, amounts = np.array([0, 3, 7]), np.array([1.0, -2.0, 0.5], np.float32)
    before = indices.copy(), amounts.copy()
    one, same, other = (family.mix(key, 8, indices, amounts) for key in (5, 5, 6))

    def content(mixture: object) -> list[bytes]:
        return [np.asarray(value).tobytes() for value in vars(mixture).values()]

    assert type(one) is type(same)
    assert content(one) == content(same) != content(other)
    assert (indices.tolist(), amounts.tolist()) == (before[0].tolist(), before[1].tolist())


def test_no_two_families_have_one_kind_of_mixture() -> None:
    """Backends tell families apart by it."""
    kinds = [type(family.mix(1, 4, np.array([1]), np.ones(1, np.float32))) for family in FAMILIES.values()]
    assert len(set(kinds)) == len(kinds)
    assert families.MIN_BLOCK == 128
