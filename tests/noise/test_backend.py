"""The backends' one operation, the sweep, and how a backend is chosen: every law over every backend."""

import functools
import importlib
import logging
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import laws
from tests.support.rows import backends, families, half_types, kinds

import fedkseed as fk
from fedkseed.errors import BackendError, InvalidValueError
from fedkseed.noise import QUANTUM, HadamardMixture, Slot, cpu, get_backend, tensor_id

KEY = 0x0123456789ABCDEF
NAME = "model.layers.3.self_attn.q_proj.weight"


SEEDS = {"hadamard": 300, "gaussian": 3}  # a gaussian seed costs a pass


def coefficients_for(family: str, size: int | None = None, seed: int = 0):
    """float32[K] of plain values; of a large gaussian pool, three are not zero."""
    size = SEEDS[family] if size is None else size
    a = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    if family == "gaussian" and size > 3:
        a[np.random.default_rng(seed).permutation(size)[3:]] = 0
    return a


def mixture_for(family: str, size: int | None = None, seed: int = 0):
    coefficients = coefficients_for(family, size, seed)
    return fk.SeedPool(KEY, len(coefficients), family).mixture_of(coefficients)


@functools.cache
def noise_for(family: str):
    """What `mixture_for(family)` is on the tensor NAME, by the transcription; a shorter tensor has its beginning."""
    return laws.noise_sum(family, KEY, NAME, 70_003, coefficients_for(family))


def of_patterns(patterns, kind: torch.dtype) -> torch.Tensor:
    """A tensor of these bits."""
    signed = np.asarray(patterns).astype(np.int32 if kind == torch.float32 else np.uint16)
    return torch.from_numpy(signed if kind == torch.float32 else signed.view(np.int16)).view(kind)


def some_base(n: int, kind: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Plain values with zeros of both signs, subnormals, the largest numbers and infinities among them."""
    torch_generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=torch_generator).to(kind)
    largest, tiny = torch.finfo(kind).max, torch.finfo(kind).smallest_normal
    edges = torch.tensor([0.0, -0.0, tiny, -tiny / 2, tiny / 8, largest, -largest, torch.inf, -torch.inf]).to(kind)
    x[: min(n, 9)] = edges[: min(n, 9)]
    if n > 5000:
        x[4990:4999] = edges
    return x


def swept(backend, mixture, base, kind, name=NAME, start=0, n=None):
    """cast(base + mixture) in a tensor of the given type; base may be None."""
    device = laws.device_of(backend)
    out = torch.full([len(base) if n is None else n], 7, dtype=kind, device=device)
    base = None if base is None else base.to(device)
    get_backend(backend).prepare([Slot(out, base, tensor_id(name), start)])(mixture)
    return out.cpu()


# --- cast(widen(base) + s) for all pairs of types ---

SIZES = (1, 2, 3, 127, 128, 129, 511, 512, 513, 4095, 4096, 4097, 70_003)


@backends
@families
@pytest.mark.parametrize("out_kind", laws.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("base_kind", laws.FLOAT_TYPES, ids=str)
def test_a_sweep_stores_the_rounded_sum_of_base_and_mixture(backend, family, base_kind, out_kind):
    mixture = mixture_for(family)
    for n in laws.few(backend, SIZES):
        base = some_base(n, base_kind)
        before = laws.bits(base).copy()
        expected = laws.cast(laws.add(laws.widen(base), noise_for(family)[:n]), out_kind)
        np.testing.assert_array_equal(laws.bits(swept(backend, mixture, base, out_kind)), expected)
        np.testing.assert_array_equal(laws.bits(base), before)


@backends
@families
@kinds
def test_a_sweep_without_base_stores_the_rounded_mixture(backend, family, kind):
    for n in laws.few(backend, SIZES):
        out = swept(backend, mixture_for(family), None, kind, n=n)
        np.testing.assert_array_equal(laws.bits(out), laws.cast(noise_for(family)[:n], kind))


@backends
@kinds
def test_a_sweep_without_base_keeps_the_mixtures_zeros_of_both_signs(backend, kind):
    mixture = HadamardMixture(KEY, np.zeros(128, np.float32))
    out = swept(backend, mixture, None, kind, n=300)
    assert (out == 0).all()
    sign, _ = laws.signs_and_buckets(KEY, 128, NAME, 300)
    np.testing.assert_array_equal(np.signbit(out.float().numpy()), sign == 1)


@backends
@families
@kinds
def test_a_sweep_in_place_equals_one_into_another_tensor(backend, family, kind):
    base = some_base(70_003, kind).to(laws.device_of(backend))
    expected = swept(backend, mixture_for(family), base, kind)
    get_backend(backend).prepare([Slot(base, base, tensor_id(NAME))])(mixture_for(family))
    np.testing.assert_array_equal(laws.bits(base), laws.bits(expected))


@backends
@families
@kinds
def test_a_sweep_writes_nothing_beside_its_slot(backend, family, kind):
    """Also at addresses that are not a multiple of a vector's width."""
    device = laws.device_of(backend)
    for n in laws.few(backend, (1, 127, 129, 513, 4097)):
        for offset in (1, 3, 8):
            room = torch.full([n + offset + 600], 3, dtype=kind, device=device)
            noise = torch.randn(n, generator=torch.Generator().manual_seed(n))
            source = torch.cat([torch.ones(offset + 1), noise]).to(device, kind)
            out, base = room[offset : offset + n], source[offset + 1 :]
            get_backend(backend).prepare([Slot(out, base, tensor_id(NAME))])(mixture_for(family))
            expected = swept("reference", mixture_for(family), base.clone(), kind)
            np.testing.assert_array_equal(laws.bits(out), laws.bits(expected))
            assert (room[:offset] == 3).all()
            assert (room[offset + n :] == 3).all()


@backends
def test_a_sweep_serves_any_mixture_as_often_as_wanted(backend):
    device = laws.device_of(backend)
    base, out = some_base(5000, torch.bfloat16).to(device), torch.empty(5000, device=device)
    sweep = get_backend(backend).prepare([Slot(out, base, tensor_id(NAME))])
    for mixture in (*map(mixture_for, laws.FAMILIES), mixture_for("hadamard", seed=1), mixture_for("gaussian", 5, seed=1)):
        sweep(mixture)
        np.testing.assert_array_equal(laws.bits(out), laws.bits(swept("reference", mixture, base, torch.float32)))


@backends
@families
@pytest.mark.parametrize(
    ("base_kind", "out_kind"), [(torch.float32,) * 2, (torch.float16, torch.bfloat16), (None, torch.float16)]
)
def test_a_sweep_of_several_mixtures_adds_them_in_their_order(backend, family, base_kind, out_kind):
    """cast(((widen(base) + s_1) + s_2) + s_3), pools of other keys and sizes, one of a single seed; one cast at the end."""
    pools = [fk.SeedPool(KEY + i, size, family) for i, size in enumerate((SEEDS[family], 1, 2 * SEEDS[family]))]
    numbers = [coefficients_for(family, pool.size, seed) for seed, pool in enumerate(pools)]
    mixtures = [pool.mixture_of(a) for pool, a in zip(pools, numbers, strict=True)]
    for n in laws.few(backend, (1, 129, 4097, 9001)):
        base = None if base_kind is None else some_base(n, base_kind)
        out = torch.full([n], 7, dtype=out_kind, device=laws.device_of(backend))
        slot = Slot(out, None if base is None else base.to(out.device), tensor_id(NAME))
        get_backend(backend).prepare([slot])(*mixtures)
        sums = [laws.noise_sum(family, pool.key, NAME, n, a) for pool, a in zip(pools, numbers, strict=True)]
        first = sums[0] if base is None else laws.add(laws.widen(base), sums[0])
        expected = laws.cast(functools.reduce(laws.add, sums[1:], first), out_kind)
        np.testing.assert_array_equal(laws.bits(out), expected)
        if out_kind == torch.float32 and n > 4096:  # the control: where no cast hides it, the order shows
            assert (laws.bits(functools.reduce(laws.add, sums[::-1], laws.widen(base))) != expected).any()


@pytest.mark.parametrize("backend", [backend for backend in laws.BACKENDS if backend != "reference"])
def test_one_sweep_is_of_one_family(backend):
    x = torch.zeros(300, device=laws.device_of(backend))
    with pytest.raises(BackendError, match="mixtures of several families"):
        get_backend(backend).prepare([Slot(x, x, 1)])(mixture_for("hadamard"), mixture_for("gaussian"))
    assert (x == 0).all()


@backends
@families
def test_a_sweep_of_no_slots_or_empty_ones_does_nothing(backend, family):
    get_backend(backend).prepare([])(mixture_for(family))
    device = laws.device_of(backend)
    empty, full = torch.empty(0, device=device), torch.zeros(5, device=device)
    get_backend(backend).prepare([Slot(empty, empty, 1), Slot(full, full, 2), Slot(empty, None, 3)])(mixture_for(family))
    assert (full != 0).all()


# --- half precision, pattern by pattern ---


@backends
@half_types
def test_widening_is_exact_for_every_half_pattern(backend, kind):
    """A mixture of zeros added to each of the 65,536 patterns, into float32."""
    patterns = np.arange(65536)
    mixture = HadamardMixture(KEY, np.zeros(128, np.float32))
    wide = swept(backend, mixture, of_patterns(patterns, kind), torch.float32)
    values = laws.decode(patterns, kind)
    np.testing.assert_array_equal(wide.numpy(), values.astype(np.float32))  # (NaN where NaN is due, too)
    nonzero = ~np.isnan(values) & (values != 0)
    np.testing.assert_array_equal(laws.bits(wide)[nonzero], laws.bits(values.astype(np.float32))[nonzero])
    np.testing.assert_array_equal(wide.numpy(), of_patterns(patterns, kind).float().numpy())  # torch's opinion

    # the zeros: -0 + (-0) is -0, every other sum of two zeros is +0
    sign, _ = laws.signs_and_buckets(KEY, 128, NAME, 65536)
    negative = np.signbit(values) & (sign == 1)
    np.testing.assert_array_equal(np.signbit(wide.numpy())[values == 0], negative[values == 0])


@backends
@half_types
def test_every_half_pattern_comes_back_from_a_round_trip(backend, kind):
    patterns = np.arange(65536)
    mixture = HadamardMixture(KEY, np.zeros(128, np.float32))
    back = swept(backend, mixture, of_patterns(patterns, kind), kind)
    values = laws.decode(patterns, kind)
    kept = ~np.isnan(values) & (values != 0)
    np.testing.assert_array_equal(laws.bits(back)[kept], patterns[kept])
    assert torch.isnan(back).numpy().tolist() == np.isnan(values).tolist()


def hard_to_round(kind: torch.dtype) -> np.ndarray:
    """float32 patterns: every half-precision value and every middle of two, and their neighbours; edges; a sample."""
    halves = laws.decode(np.arange(65536), kind).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)]).astype(np.float64)
    middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    overflow = 2 * finite[-1] - finite[-2]
    with np.errstate(over="ignore"):
        ends = np.array([(finite[-1] + overflow) / 2, overflow, 3e38, np.inf], np.float64).astype(np.float32)
    around = laws.bits(np.concatenate([halves, middles, ends, -ends])).astype(np.int64)
    around = (around[:, None] + np.array([-2, -1, 0, 1, 2])).reshape(-1)
    subnormals = np.concatenate([np.arange(3000), np.arange(0, 2**23, 4099), np.arange(2**23 - 3000, 2**23 + 3000)])
    special = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF]
    sample = np.arange(2**18, dtype=np.int64) * 2654435761 + 1
    return (np.concatenate([around, subnormals, subnormals + 2**31, special, sample]) % 2**32).astype(np.uint32)


@backends
@half_types
def test_rounding_is_to_nearest_even_for_all_hard_patterns(backend, kind):
    patterns = hard_to_round(kind)
    mixture = HadamardMixture(KEY, np.zeros(128, np.float32))
    base = of_patterns(patterns, torch.float32)
    rounded = laws.bits(swept(backend, mixture, base, kind))
    values = patterns.view(np.float32)
    sign, _ = laws.signs_and_buckets(KEY, 128, NAME, len(patterns))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        sums = values + np.where(sign == 1, np.float32(-0.0), np.float32(0))
    expected = laws.encode(sums, kind)
    np.testing.assert_array_equal(rounded, expected)  # a NaN becomes the canonical one, so that digests agree

    # what others say of all but NaN and zeros
    plain = ~np.isnan(values) & (values != 0)
    np.testing.assert_array_equal(rounded[plain], laws.bits(base.to(kind))[plain])
    if kind == torch.float16:
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(rounded[plain], values.astype(np.float16).view(np.uint16)[plain])


@half_types
def test_truncation_ties_away_and_a_lost_bit_would_be_noticed(kind):
    """Negative control: the patterns above tell wrong roundings from the right one."""
    patterns = hard_to_round(kind)
    patterns = patterns[np.isfinite(patterns.view(np.float32))]
    right = laws.encode(patterns.view(np.float32), kind)
    dropped = 16 if kind == torch.bfloat16 else 13  # fraction bits that a normal value loses
    last, half = np.uint32(1 << dropped), np.uint32(1 << (dropped - 1))
    tie = patterns % last == half
    wrong = {
        "truncation": patterns - patterns % last,
        "ties away from zero": np.where(tie, patterns + half, patterns),
        "a bit lost before the rounding": patterns - patterns % np.uint32(2),
    }
    for values in wrong.values():
        assert (laws.encode(values.view(np.float32), kind) != right).any()


@pytest.mark.slow
@half_types
def test_rounding_agrees_with_torch_on_all_2_32_patterns(kind):
    mixture = HadamardMixture(KEY, np.zeros(128, np.float32))
    for first in range(-(2**31), 2**31, 2**24):
        base = torch.arange(first, first + 2**24, dtype=torch.int32).view(torch.float32)
        ours, theirs = swept("cpu", mixture, base, kind), base.to(kind)
        differ = ours.view(torch.int16) != theirs.view(torch.int16)
        at = differ.nonzero()[:, 0]  # NaN, which has one form here, and zeros of either sign, which the mixture may change
        assert (torch.isnan(base[at]) & torch.isnan(ours[at]) | (ours[at] == 0) & (theirs[at] == 0)).all()


@backends
@families
@kinds
def test_a_nan_stays_one_and_is_canonical_in_half_precision(backend, family, kind):
    base = torch.tensor([1.0, torch.nan, -torch.nan, 2.0]).to(kind).repeat(50)
    out = swept(backend, mixture_for(family), base, kind)
    assert torch.isnan(out).tolist() == [False, True, True, False] * 50
    if kind != torch.float32:  # there sign and payload are not defined
        expected = laws.cast(laws.widen(base) + noise_for(family)[:200], kind)
        np.testing.assert_array_equal(laws.bits(out), expected)


# --- the cut into slots ---


@pytest.mark.parametrize("backend", [backend for backend in laws.BACKENDS if backend != "gpu"])
@families
@settings(max_examples=15)
@given(data=st.data())
def test_the_cut_into_slots_changes_no_bit(backend, family, data):
    check_cut(backend, family, data)


@pytest.mark.skipif("gpu" not in laws.BACKENDS, reason="needs Triton")
@families
@settings(max_examples=4)  # an interpreted launch takes long
@given(data=st.data())
def test_the_cut_into_slots_changes_no_bit_on_the_gpu(family, data):
    check_cut("gpu", family, data)


def check_cut(backend, family, data) -> None:
    """A tensor in any pieces at multiples of QUANTUM, in any order, among other tensors."""
    size = data.draw(st.sampled_from([1, 300, 4096, 65536]), label="K")
    n = data.draw(st.integers(1, 3), label="quanta") * QUANTUM + data.draw(st.sampled_from([0, 1, 77, 65535]), label="rest")
    kind = data.draw(st.sampled_from(laws.FLOAT_TYPES), label="type")
    cuts = sorted(data.draw(st.sets(st.integers(1, (n - 1) // QUANTUM)), label="cuts")) if n > QUANTUM else []
    edges = [0, *(cut * QUANTUM for cut in cuts), n]
    mixture = mixture_for(family, size)
    base = some_base(n, kind)
    whole = swept("cpu", mixture, base, kind)
    device = laws.device_of(backend)
    base, pieces = base.to(device), torch.full([n], 7, dtype=kind, device=device)
    other = torch.zeros(1000, device=device)
    slots = [Slot(pieces[a:b], base[a:b], tensor_id(NAME), a) for a, b in pairwise(edges)]
    slots.append(Slot(other, other, tensor_id("other")))
    random.Random(data.draw(st.integers(0, 99), label="order")).shuffle(slots)
    get_backend(backend).prepare(slots)(mixture)
    np.testing.assert_array_equal(laws.bits(pieces), laws.bits(whole))
    np.testing.assert_array_equal(
        laws.bits(other), laws.bits(swept("reference", mixture, torch.zeros(1000), torch.float32, "other"))
    )


@backends
@families
@pytest.mark.parametrize("size", [5, 4096, 65536])
@pytest.mark.parametrize("start", [2**31, 2**32, 2**34 - QUANTUM], ids=["2^31", "2^32", "the end"])
def test_positions_up_to_2_34_are_counted_without_overflow(backend, family, size, start):
    coefficients = coefficients_for(family, size)
    mixture = fk.SeedPool(KEY, size, family).mixture_of(coefficients)
    out = swept(backend, mixture, None, torch.float32, start=start, n=QUANTUM)
    if family == "gaussian":  # the transcription walks all K coefficients; three are not zero
        few = np.flatnonzero(coefficients)
        expected = np.zeros(QUANTUM, np.float32)
        for k in few:
            expected = expected + coefficients[k] * laws.gaussian_z(KEY, NAME, QUANTUM, int(k), start)
    else:
        expected = laws.hadamard_sum(KEY, size, NAME, QUANTUM, coefficients, start)
    np.testing.assert_array_equal(laws.bits(out), laws.bits(expected))


# --- threads ---


def model_of_odd_sizes(kinds):
    """Tensors whose ends lie nowhere near a share's."""
    sizes = (300_001, 7, QUANTUM + 1, 524_289, 1, 900_003, 3 * QUANTUM + 5, 128, 700_001)
    return {f"t{i}": some_base(n, kinds[i % len(kinds)], i) for i, n in enumerate(sizes)}


def sweep_model(backend, mixture, tensors):
    tensors = {name: x.to(laws.device_of(backend)) for name, x in tensors.items()}
    outs = {name: torch.full_like(x, 7) for name, x in tensors.items()}
    get_backend(backend).prepare([Slot(outs[name], x, tensor_id(name)) for name, x in tensors.items()])(mixture)
    return {name: laws.bits(x) for name, x in outs.items()}


@pytest.fixture
def thread_counts(monkeypatch):
    """How many threads each sweep started; sweeps in the calling thread are not listed."""
    counts = []

    def counting(threads):
        counts.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(cpu, "ThreadPoolExecutor", counting)
    return counts


@pytest.mark.usefixtures("torch_threads")
@families
@pytest.mark.parametrize("kinds", [[torch.float32], [torch.bfloat16, torch.float32, torch.float16]], ids=["one", "mixed"])
def test_the_number_of_torch_threads_changes_no_bit(family, kinds, thread_counts):
    mixture, tensors = mixture_for(family), model_of_odd_sizes(kinds)
    assert sum(x.numel() for x in tensors.values()) >= 5 * cpu.ELEMENTS_PER_THREAD
    results = {}
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results[threads] = sweep_model("cpu", mixture, tensors)
    assert thread_counts == [2, 3, 5]  # the threads were there
    results["reference"] = sweep_model("reference", mixture, tensors)
    for result in results.values():
        for name, expected in results[1].items():
            np.testing.assert_array_equal(result[name], expected)


@pytest.mark.usefixtures("torch_threads")
@families
@settings(max_examples=15)
@given(data=st.data())
def test_any_number_of_threads_covers_every_element_once(family, data):
    """More threads than pieces, shares that end inside tensors, tensors smaller than a share, in place."""
    sizes = data.draw(
        st.lists(st.sampled_from([1, 5, 128, 1000, QUANTUM - 1, QUANTUM, QUANTUM + 1, 2 * QUANTUM + 9]), min_size=1, max_size=6)
    )
    mixture = mixture_for(family, 4)
    tensors = [torch.arange(n, dtype=torch.float32) for n in sizes]
    expected = [laws.bits(swept("reference", mixture, x, torch.float32, f"t{i}")) for i, x in enumerate(tensors)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "ELEMENTS_PER_THREAD", 1)
        torch.set_num_threads(data.draw(st.sampled_from([2, 3, 4, 7, 16])))
        get_backend("cpu").prepare([Slot(x, x, tensor_id(f"t{i}")) for i, x in enumerate(tensors)])(mixture)
    for x, right in zip(tensors, expected, strict=True):
        np.testing.assert_array_equal(laws.bits(x), right)


@pytest.mark.usefixtures("torch_threads")
@families
def test_sweeps_from_several_python_threads_do_not_disturb_each_other(family):
    torch.set_num_threads(2)
    mixtures = [mixture_for(family, None, seed) for seed in range(4)]
    tensors = {"a": some_base(700_001, torch.float32), "b": some_base(600_001, torch.bfloat16)}
    alone = [sweep_model("cpu", mixture, tensors) for mixture in mixtures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda mixture: sweep_model("cpu", mixture, tensors), mixtures))
    for one, other in zip(alone, together, strict=True):
        for name in tensors:
            np.testing.assert_array_equal(one[name], other[name])


# --- choosing a backend ---


def test_auto_takes_the_cpu_backend_without_a_word(caplog):
    with caplog.at_level(logging.DEBUG):
        assert get_backend("auto").name == "cpu"
        assert get_backend().name == "cpu"
    assert not caplog.records


@backends
def test_a_backend_is_found_by_its_name(backend):
    assert get_backend(backend).name == backend


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.delitem(sys.modules, "fedkseed.noise.cpu", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)  # what `import numba` finds where it is not installed
    with pytest.raises(ImportError):
        importlib.import_module("numba")


@pytest.mark.usefixtures("no_numba")
def test_a_named_backend_that_cannot_run_says_what_to_install():
    pool = fk.SeedPool(KEY, 4)
    for call in (
        lambda: get_backend("cpu"),
        lambda: pool.perturbation("w", 10, 1, backend="cpu"),
        lambda: pool.combine("w", 10, np.zeros(4, np.float32), backend="cpu"),
        lambda: fk.bind(torch.nn.Linear(2, 2), pool, backend="cpu"),
    ):
        with pytest.raises(BackendError, match=r"backend 'cpu' cannot run here .*pip install 'numba"):
            call()


@pytest.mark.usefixtures("no_numba")
def test_auto_falls_back_to_the_reference_with_one_line_in_the_log(caplog):
    with caplog.at_level(logging.DEBUG):
        z = fk.SeedPool(KEY, 4).perturbation("w", 300, 1)
    np.testing.assert_array_equal(z, laws.hadamard_z(KEY, 4, "w", 300, 1))
    assert len(caplog.records) == 1
    record = caplog.records[0]
    assert record.levelno == logging.WARNING
    assert record.name.startswith("fedkseed")
    for word in ("reference", "cpu", "numba"):
        assert word in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("name", ["", "CPU", "numpy", None, 3], ids=repr)
def test_an_unknown_backend_is_refused_with_the_list_of_those_there_are(name):
    with pytest.raises(InvalidValueError, match=r"'auto', 'reference', 'cpu', 'gpu'") as error:
        get_backend(name)
    assert repr(name) in str(error.value)


def test_auto_finds_nothing_for_a_device_without_a_backend():
    with pytest.raises(BackendError, match="no noise backend works on mps devices; move the model to the CPU or to a CUDA GPU"):
        get_backend("auto", "mps")
