"""The gaussian family's values: near the float64 ones, the same bits on every backend, and normally distributed."""

import itertools
import math

import numpy as np
import pytest
import torch
from numba import njit
from scipy import stats
from tests.support import laws
from tests.support.rows import backends

import fedkseed as fk
from fedkseed.noise import cpu, reference

BOUND = 1.2e-6  # docs/noise.md: the largest distance from the float64 value
KEY = 0x0123456789ABCDEF
LARGEST, SMALLEST = 0, 2**32 - 1  # the words r of the largest radius, 5.77, and of the smallest, 3.5e-4

_cpu_box_muller = cpu._box_muller


@njit
def _fill(r, r2, z, z2):
    for i in range(r.size):
        z[i], z2[i] = _cpu_box_muller(r[i], r2[i])


def of_cpu(r, r2):
    """The kernel's own function, called as a kernel calls it."""
    z, z2 = np.empty(r.size, np.float32), np.empty(r.size, np.float32)
    _fill(r, r2, z, z2)
    return z, z2


if "gpu" in laws.BACKENDS:
    import triton
    import triton.language as tl

    from fedkseed.noise.gpu_kernels import OPTIONS
    from fedkseed.noise.gpu_kernels import _box_muller as _gpu_box_muller

    @triton.jit
    def _fill_on_gpu(r, r2, z, z2, n, TILE: tl.constexpr):
        at = tl.program_id(0) * TILE + tl.arange(0, TILE)
        words, words2 = tl.load(r + at, mask=at < n, other=0), tl.load(r2 + at, mask=at < n, other=0)
        first, second = _gpu_box_muller(words.to(tl.uint32, bitcast=True), words2.to(tl.uint32, bitcast=True))
        tl.store(z + at, first, mask=at < n)
        tl.store(z2 + at, second, mask=at < n)


def of_gpu(r, r2):
    """The kernels' own function, called as a kernel calls it."""
    tile = 2**18 if laws.INTERPRETED else 1024
    words = [torch.from_numpy(x.view(np.int32)).to(laws.device_of("gpu")) for x in (r, r2)]
    values = [torch.empty_like(words[0], dtype=torch.float32) for _ in range(2)]
    _fill_on_gpu[(-(-r.size // tile),)](*words, *values, r.size, TILE=tile, **OPTIONS)
    z, z2 = (x.cpu().numpy() for x in values)
    return z, z2


# one row per backend of the contract table
BOX_MULLER = {"reference": reference.box_muller, "cpu": of_cpu, **({"gpu": of_gpu} if "gpu" in laws.BACKENDS else {})}


def words(values) -> np.ndarray:
    return (np.asarray(values, np.int64) % 2**32).astype(np.uint32)


def largest_error(values, r, r2) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(values, laws.box_muller64(r, r2), strict=True))


def all_radii():
    """All 2^23 radii, in chunks; the low nine bits, which count for nothing, are noise."""
    for first in range(0, 2**23, 2**18):  # chunks that stay in the cache
        j = np.arange(first, first + 2**18)
        yield words((j << 9) + j * 2654435761 % 512)


def some_radii(n: int) -> np.ndarray:
    """n words that run through large, small and middling radii."""
    edges = words([LARGEST, SMALLEST, 1 << 9, SMALLEST - (1 << 9), 1 << 31, (1 << 31) - 1])
    return np.where(np.arange(n) % 3 == 0, np.resize(edges, n), words(np.arange(n) * 2654435761 + 12345))


def angles_around_eighths() -> np.ndarray:
    """Every multiple of an eighth turn, 5000 steps to both sides; a quarter's edges are where the polynomials change."""
    return words((np.arange(8)[:, None] * 2**29 + np.arange(-5000, 5001)).reshape(-1))


def all_over_the_turn(n: int) -> np.ndarray:
    return words(np.arange(n) * (2**32 // n) + np.arange(n) * 40503 % (2**32 // n))


# --- golden values ---


@backends
@pytest.mark.parametrize("vector", laws.VECTORS["gaussian"], ids=lambda v: v["name"])
def test_gaussian_gives_the_golden_values(backend, vector):
    key, k = int(vector["key"]), vector["k"]
    golden = np.array(vector["float64"])
    pool = fk.SeedPool(key, 1024, "gaussian")
    z = pool.perturbation(vector["name"], len(golden), k, backend)
    assert z.dtype == np.float32
    assert np.abs(z - golden).max() <= BOUND
    assert pool.mixture([k], [1.0]).seeds.tolist() == [int(vector["seed"])]
    assert laws.seed_key(key, k) == int(vector["seed"])
    np.testing.assert_allclose(laws.gaussian_z64(key, vector["name"], len(golden), k), golden, rtol=0, atol=1e-14)


FROZEN = {
    ("model.norm.weight", 1, 0): "2ac05a8b07b16a685ab844b45a98eab463e2bcc64bf3ef53eb72938dcd9b8582",
    (
        "model.layers.0.mlp.up_proj.weight",
        0x0123456789ABCDEF,
        1023,
    ): "e56e79eb5f62f484fd3131332f14b9afcb39be710ccd17b0d3c065551e2b4ab8",
    ("lm_head.weight", 2**64 - 1, 65535): "493f1b87ed207c2d636293fdb0270d6649b84eb16d7c20f63bcf35e5dc221f24",
}


@backends
@pytest.mark.parametrize("name_key_k", FROZEN, ids=lambda x: x[0])
def test_the_bits_of_gaussian_noise_are_frozen(backend, name_key_k):
    """Pinned when the polynomials were chosen: another bit here breaks every model published with gaussian noise."""
    name, key, k = name_key_k
    z = fk.SeedPool(key, 65536, "gaussian").perturbation(name, 10_001, k, backend)
    assert laws.sha256(z) == FROZEN[name_key_k]


def test_the_bits_of_docs_noise_md():
    """The examples of docs/noise.md: pairs of words and their two values, and a perturbation's beginning."""
    rows = """
        00000000 00000000 40B89456 00000000
        FFFFFFFF FFFFFFFF 39B504F3 AB0E2C19
        80000000 20000000 3F55224C 3F55224B
        12345678 9ABCDEF0 BFE92F36 BFB39380
        6A09E667 40000000 80000000 3FA9F194
        DEADBEEF CAFEBABE 3E102B5C BF024D52
        B504F200 1FFFFFFF 3F16B55F 3F16B560"""
    r, r2, first, second = np.array([[int(x, 16) for x in row.split()] for row in rows.split("\n")[1:]], np.uint32).T
    for function in (*BOX_MULLER.values(), laws.box_muller):
        z, z2 = function(r.copy(), r2.copy())
        np.testing.assert_array_equal(laws.bits(z), first)
        np.testing.assert_array_equal(laws.bits(z2), second)
    beginning = "BEA6556E BF25E16F BF12278B 3F711DC9 3EEA25E0 BE5DF9A5 3F44A5EC BF09EBDB"
    for backend in laws.BACKENDS:
        z = fk.SeedPool(1, 1, "gaussian").perturbation("model.norm.weight", 8, 0, backend)
        assert " ".join(f"{word:08X}" for word in laws.bits(z)) == beginning


# --- accuracy, and the same bits ---


def check_all_backends(r, r2, backends=laws.BACKENDS) -> None:
    """Every backend's values are near the float64 ones and have the bits of the transcription, hence of each other."""
    exact, expected = laws.box_muller64(r, r2), laws.box_muller(r, r2)
    for backend in backends:
        for value, right, near in zip(BOX_MULLER[backend](r, r2), expected, exact, strict=True):
            np.testing.assert_array_equal(laws.bits(value), laws.bits(right), err_msg=backend)
            assert np.abs(value - near).max() <= BOUND, backend


def test_all_radii_at_angle_0_are_near_float64_and_the_same_bits_on_all_backends():
    """Exhaustively: at angle 0 the value is the radius itself."""
    for r in all_radii():
        check_all_backends(r, np.zeros_like(r), laws.QUICK_BACKENDS)


def test_all_radii_at_changing_angles_are_near_float64_and_the_same_bits_on_all_backends():
    for r in all_radii():
        check_all_backends(r, words(r.astype(np.int64) * 2654435761 + 99))


def test_all_angles_around_the_eighths_of_a_turn_are_near_float64_and_the_same_bits_on_all_backends():
    angles = angles_around_eighths()
    for r in (np.full_like(angles, LARGEST), np.full_like(angles, SMALLEST), some_radii(len(angles))):
        check_all_backends(r, angles)


def test_a_large_sample_of_angles_is_near_float64_and_the_same_bits_on_all_backends():
    """At the largest radius, where an error of the sine or the cosine counts most."""
    for part in np.array_split(all_over_the_turn(2**21), 2):
        check_all_backends(np.full_like(part, LARGEST), part)
    check_all_backends(some_radii(2**19), all_over_the_turn(2**19))


def test_the_accuracy_check_notices_a_lost_coefficient(monkeypatch):
    """Negative control: each polynomial without its last coefficient misses the bound on the samples used above."""
    zero = np.float32(0)
    r = np.concatenate(list(itertools.islice(all_radii(), 4)))
    angles = all_over_the_turn(2**20)
    for name, short in (("LOG", (*laws.LOG[:7], zero)), ("SIN", (*laws.SIN[:3], zero)), ("COS", (*laws.COS[:2], zero))):
        with monkeypatch.context() as patch:
            patch.setattr(laws, name, short)
            radii, turns = (r, np.zeros_like(r)) if name == "LOG" else (np.full_like(angles, LARGEST), angles)
            assert largest_error(laws.box_muller(radii, turns), radii, turns) > BOUND
    assert largest_error(laws.box_muller(r, angles), r, angles) <= BOUND


def test_a_fused_multiply_add_would_be_noticed():
    """Negative control: with (simulated) contraction some values in a hundred change, so the checks above would fail."""
    r, r2 = some_radii(2**20), all_over_the_turn(2**20)
    right, fused = laws.box_muller(r, r2), laws.box_muller(r, r2, laws.fused)
    assert largest_error(fused, r, r2) <= BOUND  # near enough to hide from the accuracy check
    for a, b in zip(right, fused, strict=True):
        assert np.mean(laws.bits(a) != laws.bits(b)) > 0.01


def is_correctly_rounded_root(root, x) -> np.ndarray:
    """Whether root is the binary32 number nearest to sqrt(x): x lies between the squares of root's two half-way points.

    Half-way points have 25 bits, so that their squares are exact in float64; no square root is taken here.
    """
    below = (root.astype(np.float64) + np.nextafter(root, np.float32(0)).astype(np.float64)) / 2
    above = (root.astype(np.float64) + np.nextafter(root, np.float32(np.inf)).astype(np.float64)) / 2
    return (below * below <= x) & (x <= above * above)


def test_every_square_root_is_correctly_rounded_on_all_backends():
    for r in all_radii():
        x = laws.log_argument(r)
        for backend in laws.QUICK_BACKENDS:
            radius, _ = BOX_MULLER[backend](r, np.zeros_like(r))  # times cos 0, which is 1
            assert is_correctly_rounded_root(radius, x).all()
    # negative control: x times the reciprocal root, as fast code takes it
    wrong = x * (np.float32(1) / np.sqrt(x))
    assert not is_correctly_rounded_root(wrong, x).all()


@backends
def test_the_largest_and_smallest_radii_are_finite_and_not_zero(backend):
    """The logarithm's argument is never 0 and never 1."""
    radius, sine = BOX_MULLER[backend](words([LARGEST, 511, SMALLEST, SMALLEST - 511]), words([0] * 4))
    np.testing.assert_array_equal(sine, [0, 0, 0, 0])
    large, small = math.sqrt(-2 * math.log(0.5 * 2.0**-23)), math.sqrt(-2 * math.log1p(-(2.0**-24)))
    np.testing.assert_allclose(radius, [large, large, small, small], rtol=1e-6)


@backends
def test_whole_perturbations_have_the_transcriptions_bits(backend):
    """Through the sweep itself, on enough elements that a compiler's rewriting of the loop would show."""
    z = fk.SeedPool(KEY, 8, "gaussian").perturbation("w", 1_000_003, 5, backend)
    np.testing.assert_array_equal(laws.bits(z), laws.bits(laws.gaussian_z(KEY, "w", 1_000_003, 5)))


@backends
def test_the_transcription_is_near_pythons_own_float64(backend):
    z = fk.SeedPool(KEY, 8, "gaussian").perturbation("w", 20_001, 7, backend)
    assert np.abs(z - np.array(laws.gaussian_z64(KEY, "w", 20_001, 7))).max() <= BOUND


# --- distribution (fixed keys: nothing here is left to chance) ---

SAMPLE = 2**18


def looks_normal(z) -> bool:
    """Kolmogorov-Smirnov at one in a thousand, and the first four moments within five standard errors."""
    z = z.astype(np.float64)
    moments = [(z.mean(), 0, 1), ((z**2).mean(), 1, 2), ((z**3).mean(), 0, 15), ((z**4).mean(), 3, 96)]
    near = all(abs(value - expected) <= 5 * math.sqrt(variance / len(z)) for value, expected, variance in moments)
    return near and stats.kstest(z, "norm").pvalue > 1e-3


@backends
@pytest.mark.parametrize("key", [0, KEY, 2**64 - 1])
def test_a_perturbation_is_normally_distributed(backend, key):
    z = fk.SeedPool(key, 4096, "gaussian").perturbation("w", SAMPLE, 17, backend)
    assert looks_normal(z)
    for part in range(4):  # cosines and sines, first and second pairs
        assert looks_normal(z[part::4])


def test_the_normality_check_notices_other_distributions():
    """Negative control."""
    z = fk.SeedPool(KEY, 4096, "gaussian").perturbation("w", SAMPLE, 17).astype(np.float64)
    assert not looks_normal(z * 1.02)
    assert not looks_normal(z + 0.02)
    assert not looks_normal(np.clip(z, -2.5, 2.5))
    assert not looks_normal(np.where(z > 0, z, z * 1.03))
    assert not looks_normal(stats.norm.ppf(np.random.default_rng(0).random(SAMPLE)) * 0.9 + 0.1)


def test_seeds_names_and_neighbouring_elements_are_uncorrelated():
    """Correlations of normal samples have a standard error of n^-1/2; five of them."""
    pool = fk.SeedPool(KEY, 4096, "gaussian")
    z = pool.perturbation("w", SAMPLE, 17).astype(np.float64)
    others = [pool.perturbation("w", SAMPLE, 18), pool.perturbation("v", SAMPLE, 17), z[::-1]]
    others += [np.roll(z, shift) for shift in (1, 2, 3, 4, 8, 128, 512)]
    for other in others:
        assert abs(np.mean(z * other)) < 5 / math.sqrt(SAMPLE)
        assert abs(np.mean((z**2 - 1) * (other.astype(np.float64) ** 2 - 1))) < 5 * 2 / math.sqrt(SAMPLE)
    assert abs(np.mean(z * (0.02 * z + others[0]))) > 5 / math.sqrt(SAMPLE)  # negative control
