"""SeedPool: golden values, what a seed means by docs/noise.md, the laws of z, and what is refused."""

import contextlib
import dataclasses
import math
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import laws
from tests.support.generators import global_states, seed_globally
from tests.support.rows import backends, families, quick_backends

import fedkseed as fk
from fedkseed.errors import InvalidValueError

KEY = 0x0123456789ABCDEF
BLOCKS = (1, 2, 3, 5, 127, 128, 129, 1000, 1024, 4096, 65535, 65536)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
keys = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])


def sizes_around_blocks(size: int) -> st.SearchStrategy[int]:
    block = laws.block_size(size)
    return st.sampled_from([1, 2, block - 1, block, block + 1, 3 * block + 7, 65537, 3 * 65536 + 5])


# --- golden vectors ---


@backends
@pytest.mark.parametrize("vector", laws.VECTORS["hadamard"], ids=lambda v: f"K={v['K']}")
def test_hadamard_gives_the_golden_signs_and_combinations(backend, vector):
    name, n, size = vector["name"], vector["n"], vector["K"]
    pool = fk.SeedPool(int(vector["key"]), size, "hadamard")
    for golden in vector["z"]:
        z = pool.perturbation(name, n, golden["k"], backend)
        assert z.dtype == np.float32
        assert z.shape == (n,)
        assert z[:16].tolist() == golden["first16"]
        assert laws.sha256(z) == golden["sha256_float32_le"]
    coefficients = (np.arange(size) % 17 - 8).astype(np.float32) * np.float32(0.001)
    s = pool.combine(name, n, coefficients, backend)
    assert s[:4].tolist() == vector["combine_first4"]
    assert laws.sha256(s) == vector["combine_sha256_float32_le"]


# --- what a seed means: the transcription of docs/noise.md, backend by backend ---


@quick_backends
@pytest.mark.parametrize("size", BLOCKS)
def test_hadamard_seeds_are_what_the_popcount_formula_says(backend, size):
    pool = fk.SeedPool(KEY, size)
    n = min(3 * pool.block, 70_000) + 5
    for k in sorted({0, 1 % size, size // 2, size - 1}):
        np.testing.assert_array_equal(
            pool.perturbation("a.weight", n, k, backend), laws.hadamard_z(KEY, size, "a.weight", n, k)
        )


@pytest.mark.parametrize("size", BLOCKS)
def test_the_block_is_the_smallest_power_of_two_from_128_that_holds_all_seeds(size):
    assert fk.SeedPool(0, size).block == laws.block_size(size)


@quick_backends
@given(st.data())
def test_hadamard_equals_its_transcription_bit_for_bit(backend, data):
    size = data.draw(st.sampled_from(BLOCKS) | st.integers(1, 65536), label="K")
    n = data.draw(sizes_around_blocks(size), label="n")
    key, name = data.draw(keys, label="key"), data.draw(names, label="name")
    coefficients = laws.some_coefficients(size, data.draw(st.integers(0, 2**32)), largest=3e38)
    result = fk.SeedPool(key, size).combine(name, n, coefficients, backend)
    np.testing.assert_array_equal(laws.bits(result), laws.bits(laws.hadamard_sum(key, size, name, n, coefficients)))


@quick_backends
@pytest.mark.parametrize("size", [128, 1000, 4096])
@pytest.mark.parametrize("stride", [1, 2, 64])
def test_the_table_is_made_on_ascending_strides(backend, size, stride):
    """Pairs of large coefficients that cancel, beside small ones: float64 sums in another order lose the small ones."""
    coefficients = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    coefficients[[5, 5 ^ stride]] = 2.0**60
    result = fk.SeedPool(KEY, size).combine("w", 4096, coefficients, backend)
    np.testing.assert_array_equal(laws.bits(result), laws.bits(laws.hadamard_sum(KEY, size, "w", 4096, coefficients)))

    # negative control: the same table on descending strides is another one
    x = np.zeros(laws.block_size(size), np.float64)
    x[:size] = coefficients
    for h in reversed([1 << bit for bit in range(len(x).bit_length() - 1)]):
        j = np.flatnonzero(np.arange(len(x)) & h == 0)
        x[j], x[j + h] = x[j] + x[j + h], x[j] - x[j + h]
    assert (x.astype(np.float32) != laws.hadamard_table(coefficients, size)).any()


@quick_backends
@given(st.data())
def test_gaussian_equals_its_transcription_bit_for_bit(backend, data):
    size = data.draw(st.integers(1, 12), label="K")
    n = data.draw(st.sampled_from([1, 2, 3, 4, 5, 127, 511, 512, 513, 2049, 65541]), label="n")
    key, name = data.draw(keys, label="key"), data.draw(names, label="name")
    coefficients = laws.some_coefficients(size, data.draw(st.integers(0, 2**32)))
    result = fk.SeedPool(key, size, "gaussian").combine(name, n, coefficients, backend)
    np.testing.assert_array_equal(laws.bits(result), laws.bits(laws.gaussian_sum(key, name, n, coefficients)))


@settings(max_examples=60)
@given(st.data())
def test_all_backends_give_the_bits_of_the_reference(data):
    check_reference(data, laws.QUICK_BACKENDS)


@settings(max_examples=8)
@given(st.data())
def test_all_backends_interpreted_ones_too_give_the_bits_of_the_reference(data):
    check_reference(data, laws.BACKENDS)


def check_reference(data, backends) -> None:
    family = data.draw(st.sampled_from(laws.FAMILIES), label="family")
    size = data.draw(st.sampled_from(BLOCKS) | st.integers(1, 65536), label="K")
    n = data.draw(sizes_around_blocks(size), label="n")
    pool = fk.SeedPool(data.draw(keys, label="key"), size, family)
    name, k = data.draw(names, label="name"), data.draw(st.integers(0, size - 1), label="k")
    few = 5 if family == "gaussian" else None
    coefficients = laws.some_coefficients(size, data.draw(st.integers(0, 2**32)), nonzero=few)
    z, s = pool.perturbation(name, n, k, "reference"), pool.combine(name, n, coefficients, "reference")
    for backend in backends:
        np.testing.assert_array_equal(laws.bits(pool.perturbation(name, n, k, backend)), laws.bits(z))
        np.testing.assert_array_equal(laws.bits(pool.combine(name, n, coefficients, backend)), laws.bits(s))


@quick_backends
def test_gaussian_coefficients_that_are_zero_may_be_skipped_but_change_no_bit(backend):
    """The transcription adds all K products, +0 and -0 among them."""
    coefficients = laws.some_coefficients(300, 1, nonzero=40)
    coefficients[:20] = -0.0
    s = fk.SeedPool(KEY, 300, "gaussian").combine("norm.weight", 61, coefficients, backend)
    np.testing.assert_array_equal(laws.bits(s), laws.bits(laws.gaussian_sum(KEY, "norm.weight", 61, coefficients)))


@backends
@families
def test_the_last_seed_of_the_largest_pool_has_its_own_perturbation(backend, family):
    pool = fk.SeedPool(2**64 - 1, 65536, family)
    only = np.zeros(65536, np.float32)
    only[65535] = 1
    z = pool.perturbation("lm_head.weight", 3 * 65536 + 5, 65535, backend)
    np.testing.assert_array_equal(z, pool.combine("lm_head.weight", 3 * 65536 + 5, only, backend))
    assert 0.99 < np.mean(z.astype(np.float64) ** 2) < 1.01


@backends
@families
def test_a_coefficient_that_overflows_the_sum_gives_infinity(backend, family):
    coefficients = np.array([3e38, 3e38, 0], np.float32)
    s = fk.SeedPool(KEY, 3, family).combine("w", 1000, coefficients, backend)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = laws.noise_sum(family, KEY, "w", 1000, coefficients)
    assert np.isinf(expected).any()
    np.testing.assert_array_equal(s, expected)


@backends
@families
def test_a_tensor_without_elements_has_an_empty_perturbation(backend, family):
    assert fk.SeedPool(KEY, 4, family).perturbation("empty", 0, 1, backend).shape == (0,)


# --- what z depends on, and what not ---


@families
@given(n=st.integers(1, 70_000), m=st.integers(1, 70_000), k=st.integers(0, 199))
def test_an_element_does_not_depend_on_the_length_of_its_tensor(family, n, m, k):
    pool = fk.SeedPool(KEY, 200, family)
    short, long = sorted((n, m))
    np.testing.assert_array_equal(pool.perturbation("w", long, k)[:short], pool.perturbation("w", short, k))


def test_a_gaussian_seed_is_the_same_in_a_pool_of_any_size():
    small, large = (fk.SeedPool(KEY, size, "gaussian").perturbation("w", 100, 9) for size in (10, 65536))
    np.testing.assert_array_equal(small, large)


def test_a_hadamard_seed_is_the_same_in_all_pools_of_one_block_size():
    z = [fk.SeedPool(KEY, size).perturbation("w", 3000, 512) for size in (513, 1000, 1024)]
    np.testing.assert_array_equal(z[0], z[1])
    np.testing.assert_array_equal(z[0], z[2])
    assert (z[0] != fk.SeedPool(KEY, 1025).perturbation("w", 3000, 512)).any()


@quick_backends
@families
def test_key_name_and_index_each_change_the_perturbation(backend, family):
    variants = [
        (KEY, "w", 1),
        (KEY ^ 1, "w", 1),
        (KEY ^ 1 << 32, "w", 1),
        (KEY ^ 1 << 63, "w", 1),
        (KEY, "v", 1),
        (KEY, "w", 2),
    ]
    drawn = {fk.SeedPool(key, 8, family).perturbation(name, 256, k, backend).tobytes() for key, name, k in variants}
    assert len(drawn) == len(variants)


# --- laws of z ---


@quick_backends
@pytest.mark.parametrize(("size", "blocks"), [(1, 3), (100, 5), (128, 4), (129, 3), (600, 2)])
def test_different_seeds_are_exactly_orthogonal_in_full_blocks(backend, size, blocks):
    pool = fk.SeedPool(KEY, size)
    n = blocks * pool.block
    z = np.stack([pool.perturbation("w", n, k, backend) for k in range(size)]).astype(np.float64)
    np.testing.assert_array_equal(z @ z.T, n * np.eye(size))  # integers below 2^53: exact in float64


@pytest.mark.parametrize("size", [4096, 65536])
def test_some_seeds_of_large_pools_are_exactly_orthogonal_in_full_blocks(size):
    pool = fk.SeedPool(KEY, size)
    n, step = 2 * size, size // 16
    chosen = sorted({*range(8), *range(0, size, step), *range(size - 8, size)})
    z = np.stack([pool.perturbation("w", n, k) for k in chosen]).astype(np.float64)
    np.testing.assert_array_equal(z @ z.T, n * np.eye(len(chosen)))


def test_neither_partial_blocks_nor_gaussian_seeds_are_exactly_orthogonal():
    """The negative control of the two tests above: they must be able to fail."""
    for family, n in (("hadamard", 3 * 128 + 50), ("gaussian", 3 * 128)):
        pool = fk.SeedPool(KEY, 128, family)
        z = np.stack([pool.perturbation("w", n, k) for k in range(128)]).astype(np.float64)
        assert not np.array_equal(z @ z.T, n * np.eye(128))


def test_all_seeds_of_a_pool_give_an_exact_identity_within_a_block():
    """sum_k z_k z_k' = B I on a block when K = B: then the rows are orthogonal as the columns are."""
    pool = fk.SeedPool(KEY, 128)
    z = np.stack([pool.perturbation("w", 256, k) for k in range(128)]).astype(np.int64)
    for block in (z[:, :128], z[:, 128:]):
        np.testing.assert_array_equal(block.T @ block, 128 * np.eye(128, dtype=np.int64))


@families
def test_a_perturbation_is_isotropic_over_keys(family):
    """E z z' = I, in three blocks and a bit."""
    z = np.stack([fk.SeedPool(key, 128, family).perturbation("w", 400, 77) for key in range(3000)]).astype(np.float64)
    assert laws.is_isotropic(z)
    # the negative controls: z repeated in each block, one element copied to its neighbour, a variance of 1.2
    assert not laws.is_isotropic(np.concatenate([z[:, :128], z[:, :128]], axis=1))
    assert not laws.is_isotropic(np.concatenate([z[:, :1], z[:, :1], z[:, 2:]], axis=1))
    assert not laws.is_isotropic(z * math.sqrt(1.2))


def test_signs_that_repeat_in_each_block_are_not_isotropic():
    """Negative control: the transcription with one sign vector for all blocks fails the check that the pool passes."""
    wrong, right = (
        np.stack([laws.hadamard_z(key, 128, "w", 300, 0, per_block=p) for key in range(1000)]).astype(np.float64)
        for p in (False, True)
    )
    assert laws.is_isotropic(right)
    assert not laws.is_isotropic(wrong)


def test_blocks_are_shifted_so_that_two_seeds_agree_independently_in_them():
    """E y y' = 0 between blocks for y = z_k z_l: without the shift y would be the same vector in every block."""

    def agreement_between_blocks(perturbation):
        z = [np.stack([perturbation(key, k) for key in range(800)]).astype(np.float64) for k in (3, 100)]
        y = z[0] * z[1]
        return np.abs(y[:, :128].T @ y[:, 128:] / len(y)).max()

    # the mean of 800 fair signs, 128^2 pairs of elements: 6 standard deviations
    assert agreement_between_blocks(lambda key, k: fk.SeedPool(key, 128).perturbation("w", 256, k)) < 6 / math.sqrt(800)
    wrong = agreement_between_blocks(lambda key, k: laws.hadamard_z(key, 128, "w", 256, k, shifted=False))
    assert wrong == 1


# --- a combination is the sum of its perturbations ---


@quick_backends
@pytest.mark.parametrize("size", [1, 5, 128, 300])
def test_a_hadamard_combination_is_the_sum_of_its_perturbations(backend, size):
    """Bound: log2 B float64 additions in a row, each off by 2^-53 of a partial sum no larger than sum |a|, then one
    rounding to binary32, off by 2^-24 of the sum: |error| <= 2^-24 |exact| + 1.01 log2(B) 2^-53 sum |a|."""
    pool, n = fk.SeedPool(KEY, size), 260
    coefficients = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    z = np.stack([pool.perturbation("w", n, k, backend) for k in range(size)]).astype(np.float64)
    exact = np.array([math.fsum(column) for column in (z * coefficients[:, None].astype(np.float64)).T])

    def within_bound(s):
        slack = 1.01 * math.log2(pool.block) * 2.0**-53 * math.fsum(np.abs(coefficients))
        return bool((np.abs(s - exact) <= 2.0**-24 * np.abs(exact) + slack).all())

    s = pool.combine("w", n, coefficients, backend)
    assert within_bound(s)
    # negative controls: one coefficient off by one part in a million; a sum in binary32 throughout
    wrong = coefficients.copy()
    wrong[size // 2] *= np.float32(1 + 1e-6)
    assert not within_bound(pool.combine("w", n, wrong, backend))
    if size >= 5:
        assert not within_bound(np.add.accumulate(z.astype(np.float32) * coefficients[:, None])[-1])


@quick_backends
@pytest.mark.parametrize("size", [1, 5, 200])
def test_a_gaussian_combination_is_the_sum_of_its_perturbations(backend, size):
    """Bound: a product rounds once, and a term passes at most K additions: |error| <= ((1+u)^(K+1) - 1) sum |a_k z_k|
    with u = 2^-24. The products are exact in float64 (48 bits)."""
    pool, n = fk.SeedPool(KEY, size, "gaussian"), 260
    coefficients = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    z = np.stack([pool.perturbation("w", n, k, backend) for k in range(size)])
    terms = z.astype(np.float64) * coefficients[:, None].astype(np.float64)
    exact = np.array([math.fsum(column) for column in terms.T])
    bound = ((1 + 2.0**-24) ** (size + 1) - 1) * np.abs(terms).sum(axis=0)
    s = pool.combine("w", n, coefficients, backend)
    assert (np.abs(s - exact) <= bound).all()
    # negative controls: one coefficient off by one part in a thousand; half a binary16's precision
    wrong = coefficients.copy()
    wrong[size // 2] *= np.float32(1.001)
    assert not (np.abs(pool.combine("w", n, wrong, backend) - exact) <= bound).all()
    assert not (np.abs(s.astype(np.float16) - exact) <= bound).all()

    # the order is part of the definition: ascending k to the bit, and another order is noticed
    products = z * coefficients[:, None]
    np.testing.assert_array_equal(s, np.add.accumulate(np.concatenate([np.zeros((1, n), np.float32), products]))[-1])
    if size > 2:
        assert (s != np.add.accumulate(products[::-1])[-1]).any()


@given(st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=200))
def test_integer_coefficients_combine_exactly(integers):
    """Sums below 2^53 are exact in float64 and here rounded once: the table is H a, entry by entry."""
    size = len(integers)
    s = fk.SeedPool(KEY, size).combine("w", 130, np.array(integers, np.float32))
    z = [laws.hadamard_z(KEY, size, "w", 130, k) for k in range(size)]
    exact = sum(a * column for a, column in zip(integers, z, strict=True))
    np.testing.assert_array_equal(s, exact.astype(np.float32))


def test_a_combination_is_rounded_once():
    """1 + 2^-24 + 2^-50 lies above the middle of two binary32 numbers; rounding in two steps would lose the last term."""
    terms = [1.0, 2.0**-24, 2.0**-50]
    coefficients = np.array(terms, np.float32)
    s = fk.SeedPool(KEY, 3).combine("w", 128, coefficients)
    z = [laws.hadamard_z(KEY, 3, "w", 128, k) for k in range(3)]
    exact = [sum(Fraction(t) * int(column[i]) for t, column in zip(terms, z, strict=True)) for i in range(128)]
    nearest = [np.float32(np.float64(e.numerator / e.denominator)) for e in exact]  # exact in float64: 51 bits
    np.testing.assert_array_equal(s, nearest)
    assert 1 + 2.0**-23 in np.abs(s)


# --- no global state ---


@quick_backends
@families
def test_the_global_generators_are_neither_read_nor_moved(backend, family):
    pool = fk.SeedPool(KEY, 64, family)
    coefficients = laws.some_coefficients(64, 3)

    def everything():
        return pool.perturbation("w", 3000, 5, backend).tobytes() + pool.combine("w", 3000, coefficients, backend).tobytes()

    before = global_states()
    first = everything()
    assert global_states() == before
    seed_globally(1)
    assert everything() == first
    for draw in (torch.rand, np.random.rand, lambda _: random.random()):  # the negative control: one draw is noticed
        before = global_states()
        draw(1)
        assert global_states() != before
    assert everything() == first


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@quick_backends
@families
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_torchs_defaults_do_not_matter(backend, family, surroundings):
    """Models are built and loaded under such defaults; the result is float32 in memory all the same."""
    pool = fk.SeedPool(KEY, 8, family)
    z = pool.perturbation("w", 300, 3, backend)
    with SURROUNDINGS[surroundings]():
        result = pool.perturbation("w", 300, 3, backend)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, z)


def test_torchs_default_device_does_not_matter():
    """In a process of its own: a kernel that writes to a tensor without memory would take this one along."""
    script = """
import numpy as np, torch, fedkseed as fk
for backend in ("reference", "cpu"):
    for family in ("hadamard", "gaussian"):
        pool = fk.SeedPool(1, 8, family)
        z = pool.perturbation("w", 300, 3, backend)
        with torch.device("meta"):
            np.testing.assert_array_equal(pool.perturbation("w", 300, 3, backend), z)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"


# --- the pool as a value ---


def test_a_pool_is_a_frozen_value():
    pool = fk.SeedPool(key=np.uint64(KEY), size=np.int32(8))
    assert pool == fk.SeedPool(KEY, 8, "hadamard")
    assert hash(pool) == hash(fk.SeedPool(KEY, 8))
    assert (type(pool.key), type(pool.size)) == (int, int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pool.key = 3


@quick_backends
@families
def test_coefficients_are_read_through_any_strides_and_left_as_they_are(backend, family):
    pool = fk.SeedPool(KEY, 6, family)
    wide = np.arange(18, dtype=np.float32).reshape(6, 3)
    wide.flags.writeable = False
    s = pool.combine("w", 200, wide[:, 1], backend)
    np.testing.assert_array_equal(s, pool.combine("w", 200, wide[:, 1].copy(), backend))
    assert s.flags.writeable


# --- bad input ---


@pytest.mark.parametrize("key", [-1, 2**64, 1.0, "1", None, True, np.float64(3), np.array([1, 2])], ids=repr)
def test_a_key_outside_64_bits_is_refused(key):
    with pytest.raises(InvalidValueError, match=r"key is .*; expected an integer") as error:
        fk.SeedPool(key, 4)
    assert repr(key) in str(error.value)


@pytest.mark.parametrize("size", [0, -1, 65537, 2**40, 4.0, "4", None, True], ids=repr)
def test_fewer_than_1_or_more_than_65536_seeds_are_refused(size):
    with pytest.raises(InvalidValueError, match=r"size .*; expected an integer") as error:
        fk.SeedPool(1, size)
    assert repr(size) in str(error.value)


@pytest.mark.parametrize("family", ["Hadamard", "normal", "", None, 1, ["hadamard"]], ids=repr)
def test_an_unknown_family_is_refused(family):
    with pytest.raises(InvalidValueError, match=r"family is .*expected one of 'hadamard', 'gaussian'") as error:
        fk.SeedPool(1, 4, family)
    assert repr(family) in str(error.value)


def test_the_refusal_of_a_key_names_the_range_and_the_range_is_admitted():
    with pytest.raises(InvalidValueError, match=rf"key is {2**64}; expected an integer from 0 to {2**64 - 1}$"):
        fk.SeedPool(2**64, 4)
    assert fk.SeedPool(2**64 - 1, 4).key == 2**64 - 1


@families
@pytest.mark.parametrize("index", [-1, 7, 2**70, 1.0, "0", None, True], ids=repr)
def test_an_index_outside_the_pool_is_refused(family, index):
    with pytest.raises(InvalidValueError, match=r"index is .*; expected an integer") as error:
        fk.SeedPool(1, 7, family).perturbation("w", 10, index)
    assert repr(index) in str(error.value)


@pytest.mark.parametrize("n", [-1, 2**34 + 1, 3.0, None, True], ids=repr)
def test_an_impossible_number_of_elements_is_refused(n):
    pool = fk.SeedPool(1, 7)
    with pytest.raises(InvalidValueError, match=r"n is .*; expected an integer") as error:
        pool.perturbation("w", n, 0)
    assert repr(n) in str(error.value)
    with pytest.raises(InvalidValueError, match=r"n is .*; expected an integer"):
        pool.combine("w", n, np.zeros(7, np.float32))


VALUES = [0.5, 0.0, -3.0, 2.0, -0.25]
GOOD_COEFFICIENTS = {
    "list": VALUES,
    "tuple of NumPy's numbers": tuple(np.array(VALUES)),
    "float64": np.array(VALUES),
    "float16": np.array(VALUES, np.float16),
    "big-endian": np.array(VALUES, ">f4"),
    "every other": np.repeat(np.array(VALUES, np.float32), 2)[::2],
    "tensor": torch.tensor(VALUES),
    "tensor of float64": torch.tensor(VALUES, dtype=torch.float64),
    "tensor of bfloat16": torch.tensor(VALUES, dtype=torch.bfloat16),
    "parameter": torch.nn.Parameter(torch.tensor(VALUES)),
}


@families
@pytest.mark.parametrize("case", GOOD_COEFFICIENTS)
def test_coefficients_may_be_any_numbers_that_float32_holds(family, case):
    pool = fk.SeedPool(1, 5, family)
    expected = pool.combine("w", 300, np.array(VALUES, np.float32))
    assert expected.any()
    assert pool.combine("w", 300, GOOD_COEFFICIENTS[case]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("whole", [[1, 0, -3, 2**24, 7], np.array([1, 0, -3, 2**24, 7]), torch.tensor([1, 0, -3, 2**24, 7])])
def test_coefficients_may_be_integers_that_float32_holds(whole):
    found = fk.SeedPool(1, 5).check_coefficients(whole)
    assert (found.dtype, found.tolist()) == (np.float32, [1, 0, -3, 2**24, 7])


def one(number, dtype=np.float64):
    return np.array([0, 0, number, 0, 0], dtype)


ROUND_IT = r"; float32 cannot hold it: round it first, such as with \.astype\(np\.float32\)$"
BEYOND = "; it must be finite in float32$"
BAD_COEFFICIENTS = {
    "None": (None, "coefficients are NoneType; expected an array, a list or a tensor of numbers"),
    "wide": (
        [2**70] * 5,
        "coefficients are list with 1180591620717411303424; expected .* of numbers, integers of 64 bits",
    ),
    "text": ("abcde", "coefficients are str; expected an array"),
    "texts": (list("abcde"), "coefficients are list; expected an array"),
    "truth values": (np.ones(5, bool), "coefficients are bool; expected an array"),
    "tensor of truth values": (torch.ones(5, dtype=torch.bool), r"coefficients are torch\.bool; expected an array"),
    "complex": (np.ones(5, complex), "coefficients are complex128; expected an array"),
    "objects": ([0.0, None, 0.0, 0.0, 0.0], "coefficients are list; expected an array"),
    "ragged": ([0.0, [1.0], 0.0, 0.0, 0.0], "coefficients are list; expected an array"),
    "dict": ({0: 1.0}, "coefficients are dict; expected an array"),
    "a third": (one(1 / 3), rf"coefficient 2 is 0\.3333333333333333{ROUND_IT}"),
    "a third in a list": ([0, 0, 1 / 3, 0, 0], rf"coefficient 2 is 0\.3333333333333333{ROUND_IT}"),
    "a third in a tensor": (torch.tensor(one(1 / 3)), rf"coefficient 2 is 0\.3333333333333333{ROUND_IT}"),
    "too small": (one(1e-60), rf"coefficient 2 is 1e-60{ROUND_IT}"),
    "too large": (one(1e39), rf"coefficient 2 is 1e\+39{BEYOND}"),
    "odd integer": (one(2**24 + 1, np.int64), rf"coefficient 2 is 16777217{ROUND_IT}"),
    "largest int64": (one(2**63 - 1, np.int64), rf"coefficient 2 is {2**63 - 1}{ROUND_IT}"),
    "largest uint64": (one(2**64 - 1, np.uint64), rf"coefficient 2 is {2**64 - 1}{ROUND_IT}"),
    "short": (np.zeros(4, np.float32), r"shape \(4,\); the pool has K = 5"),
    "long": (np.zeros(6, np.float32), r"shape \(6,\); the pool has K = 5"),
    "empty": (np.zeros(0, np.float32), r"shape \(0,\); the pool has K = 5"),
    "column": (np.zeros((5, 1), np.float32), r"shape \(5, 1\); the pool has K = 5"),
    "scalar": (np.zeros((), np.float32), r"shape \(\); the pool has K = 5"),
    "nan": (np.array([0, 0, np.nan, 0, 0], np.float32), "coefficient 2 is nan; all must be finite"),
    "inf": (np.array([0, 0, 0, 0, np.inf], np.float32), "coefficient 4 is inf; all must be finite"),
    "-inf": (np.array([-np.inf, 0, 0, 0, np.nan], np.float32), "coefficient 0 is -inf; all must be finite"),
}


@families
@pytest.mark.parametrize("case", BAD_COEFFICIENTS)
def test_coefficients_that_are_no_numbers_or_another_length_or_beyond_float32_are_refused(family, case):
    coefficients, message = BAD_COEFFICIENTS[case]
    with pytest.raises(InvalidValueError, match=message):
        fk.SeedPool(1, 5, family).combine("w", 10, coefficients)


def test_numbers_that_float32_holds_only_when_rounded_are_taken_after_that():
    """What the message says helps."""
    pool = fk.SeedPool(1, 5)
    for number in (1 / 3, 1e-60, 2**24 + 1):
        assert pool.check_coefficients(one(number).astype(np.float32))[2] == np.float32(number)
