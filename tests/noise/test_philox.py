"""The integers under all noise: Philox4x32-10 and tensor ids."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from tests.support import laws

from fedkseed.noise import cpu, halves, philox, tensor_id

words = st.integers(0, 2**32 - 1)

# the kernel's own function, called as a kernel calls it
_cpu_philox = cpu._philox


@njit
def _call_cpu_philox(w):
    return _cpu_philox(w[0], w[1], w[2], w[3], w[4], w[5])


def of_reference(counter, key):
    return tuple(int(r) for r in philox(tuple(counter), tuple(key)))


def of_cpu(counter, key):
    return tuple(int(r) for r in _call_cpu_philox(np.array([*counter, *key], np.uint64)))


PHILOX = {"reference": of_reference, "cpu": of_cpu, "oracle": lambda c, k: laws.philox(tuple(c), tuple(k))}


def test_the_vectors_are_the_shared_ones(shared: Path):
    ours = Path(__file__).parents[1] / "vectors" / "noise_vectors.json"
    assert json.loads(ours.read_text()) == json.loads((shared / "noise_vectors.json").read_text())


@pytest.mark.parametrize("implementation", PHILOX)
@pytest.mark.parametrize("vector", laws.VECTORS["philox4x32_10"], ids=lambda v: f"{v['counter'][0]:08x}")
def test_philox_gives_random123s_known_answers(implementation, vector):
    assert PHILOX[implementation](vector["counter"], vector["key"]) == tuple(vector["out"])


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_philox_equals_its_definition_in_pythons_integers(implementation, counter, key):
    assert PHILOX[implementation](counter, key) == laws.philox(counter, key)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=20), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_arrays_of_counters_and_keys_go_element_by_element(counters, tensor, key):
    c0, c1 = np.array(counters, np.int64).T
    expected = [laws.philox((a, b, *halves(tensor)), halves(key)) for a, b in counters]
    result = philox((c0, c1, *halves(tensor)), halves(key))
    assert result.dtype == np.uint32
    np.testing.assert_array_equal(result.T, expected)
    np.testing.assert_array_equal(laws.philox_rows(c0, c1, tensor, key), expected)
    keys = philox((1, 2, 3, 4), (c0, c1))
    np.testing.assert_array_equal(keys.T, [laws.philox((1, 2, 3, 4), pair) for pair in counters])


@pytest.mark.parametrize("vector", laws.VECTORS["tensor_id"], ids=lambda v: v["name"])
def test_tensor_ids_are_the_golden_ones(vector):
    assert tensor_id(vector["name"]) == int(vector["id"], 16)
    assert laws.tensor_id(vector["name"]) == int(vector["id"], 16)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_tensor_id_is_the_little_endian_blake2b_of_the_utf8_name(name):
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    assert tensor_id(name) == sum(byte << 8 * i for i, byte in enumerate(digest))


@given(st.integers(0, 2**64 - 1))
def test_halves_are_low_then_high(x):
    low, high = halves(x)
    assert 0 <= low < 2**32
    assert 0 <= high < 2**32
    assert low + 2**32 * high == x
