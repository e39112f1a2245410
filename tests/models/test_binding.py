"""A bound model: every weight has the bits that docs/noise.md gives it; what is refused changes nothing."""

import gc
import itertools
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import laws
from tests.support.generators import global_states, seed_globally
from tests.support.rows import backends, families, half_types, quick_backends

import fedkseed as fk
from fedkseed.errors import BackendError, BindingError, FedKSeedError, InvalidValueError
from fedkseed.kseed.steps import StepSettings, local_steps
from fedkseed.models.closed_page import ClosedPage
from fedkseed.noise import get_backend

KEY = 0xFEDCBA9876543210
SHAPES = {
    "embed.weight": (67, 33),
    "block.0.w": (130, 5),
    "block.1.w": (128,),
    "block.1.scale": (),
    "long": (65536 + 131,),
    "none": (0, 4),
    "norm.weight": (129,),
}
SIZES = {"hadamard": 5, "gaussian": 4}


def tensors_of(precision: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    kinds = itertools.cycle(laws.FLOAT_TYPES if precision == "mixed" else [getattr(torch, precision)])
    return {name: laws.some_weights(shape, next(kinds), i) for i, (name, shape) in enumerate({**SHAPES, **shapes}.items())}


def pool_of(family: str, size: int | None = None) -> fk.SeedPool:
    return fk.SeedPool(KEY, SIZES[family] if size is None else size, family)


def weights_of(tensors: dict[str, torch.Tensor], pool: fk.SeedPool) -> list[laws.Weight]:
    """What docs/noise.md says of a model with these tunable tensors, by canonical name."""
    return [laws.Weight(name, x, x.dtype, pool.family, pool.key, pool.size) for name, x in tensors.items()]


def assert_follows(model: torch.nn.Module, weights: list[laws.Weight]) -> None:
    for weight in weights:
        now = laws.bits(model.get_parameter(weight.name))
        np.testing.assert_array_equal(now, weight.now, err_msg=weight.name)


def coefficients_of(size: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


# --- every precision follows the rules, bit for bit ---

amounts = st.floats(-2, 2, width=32) | st.floats(-2, 2) | st.sampled_from([0.0, -0.0, 1e-3, -1e-3, 1e-40, 2.0**-24])


@st.composite
def operations(draw, size: int):
    """Rebuilds (from one of three vectors, so that some repeat), perturbations and moves."""
    index = st.integers(0, size - 1)
    steps = st.one_of(
        st.tuples(st.just("rebuild"), st.sampled_from([0, 1, 2])),
        st.tuples(st.just("perturb"), index, amounts),
        st.tuples(st.just("move"), st.lists(st.tuples(index, amounts), max_size=4)),
    )
    return draw(st.lists(steps, min_size=1, max_size=6))


@quick_backends
@families
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "mixed"])
@settings(max_examples=6)
@given(data=st.data())
def test_any_sequence_of_operations_leaves_the_bits_of_the_definition(precision, family, backend, data):
    check_operations(precision, family, backend, data.draw(operations(SIZES[family])))


@pytest.mark.skipif("gpu" not in laws.BACKENDS, reason="needs Triton")
@families
def test_a_sequence_of_operations_leaves_the_bits_of_the_definition_on_the_gpu(family):
    steps = [("perturb", 1, 0.5), ("rebuild", 0), ("move", [(0, 0.25), (2, -1.0), (0, 1e-3)]), ("rebuild", 0)]
    check_operations("mixed", family, "gpu", steps)


def check_operations(precision, family, backend, steps) -> None:
    pool, tensors = pool_of(family), tensors_of(precision, long=(4096 + 131,))
    model, weights = laws.module_of(tensors, backend=backend), weights_of(tensors, pool)
    bound = fk.bind(model, pool, backend=backend)
    assert_follows(model, weights)
    for kind, *arguments in steps:
        if kind == "rebuild":
            a = coefficients_of(pool.size, *arguments) * np.float32(arguments != [0])  # one of them all zeros
            bound.rebuild(a)
            for weight in weights:
                weight.rebuild(a)
        elif kind == "perturb":
            bound.perturb(*arguments)
            for weight in weights:
                weight.move([arguments[0]], [arguments[1]])
        else:
            indices, changes = [k for k, _ in arguments[0]], [amount for _, amount in arguments[0]]
            bound.move(indices, changes)
            for weight in weights:
                weight.move(indices, changes)
        assert_follows(model, weights)
    assert bound.digest() == laws.model_digest(dict(model.named_parameters()))


@given(data=st.data())
@settings(max_examples=10)
def test_large_pools_and_many_small_tensors_follow_the_definition(data):
    size = data.draw(st.sampled_from([128, 129, 1024, 4096, 65536]), label="K")
    pool = pool_of("hadamard", size)
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 127, 576, 4097, 70_000]), min_size=1, max_size=5), label="sizes")
    kinds = itertools.cycle(laws.FLOAT_TYPES)
    tensors = {f"t{i}.weight": laws.some_weights((n,), next(kinds), i) for i, n in enumerate(sizes)}
    model, weights = laws.module_of(tensors), weights_of(tensors, pool)
    bound = fk.bind(model, pool)
    a = coefficients_of(size)
    bound.rebuild(a)
    bound.move([size - 1, 0], [0.5, -0.25])
    for weight in weights:
        weight.rebuild(a)
        weight.move([size - 1, 0], [0.5, -0.25])
    assert_follows(model, weights)


@backends
@families
@pytest.mark.parametrize(
    ("kind", "largest", "stays", "overflows"),
    [
        (torch.float16, 65504.0, 15.99, 16.0),
        (torch.bfloat16, torch.finfo(torch.bfloat16).max, 2.0**118, 2.0**119),
        (torch.float32, torch.finfo(torch.float32).max, 2.0**102, 2.0**103),
    ],
    ids=str,
)
def test_overflow_in_the_cast_gives_infinity_and_only_there(backend, family, kind, largest, stays, overflows):
    """Half a last place above the largest number is the first that rounds to infinity; hadamard adds exactly that."""
    w0 = torch.tensor([largest, -largest]).to(kind).repeat(100)
    for amount in (stays, overflows):
        pool = pool_of(family, 1)
        model = laws.module_of({"w": w0}, backend=backend)
        weight = laws.Weight("w", w0, kind, family, KEY, 1)
        weight.rebuild(np.array([amount], np.float32))
        fk.bind(model, pool, backend=backend).rebuild(np.array([amount], np.float32))
        np.testing.assert_array_equal(laws.bits(model.w), weight.now)
        if family == "hadamard":
            grew = torch.from_numpy(pool.perturbation("w", 200, 0)) == torch.sign(w0.float())
            assert torch.isinf(model.w).tolist() == (grew & (amount == overflows)).tolist()


@backends
@half_types
def test_subnormal_weights_move_by_their_last_place(backend, kind):
    unit = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps  # the smallest subnormal number
    w0 = torch.full([300], 3 * unit, dtype=kind)
    model = laws.module_of({"w": w0}, backend=backend)
    fk.bind(model, pool_of("hadamard", 1), backend=backend).rebuild(np.array([unit], np.float32))
    z = pool_of("hadamard", 1).perturbation("w", 300, 0)
    np.testing.assert_array_equal(model.w.detach().cpu().double().numpy(), (3 + z.astype(np.float64)) * unit)


@backends
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_weight_of_minus_zero_gets_the_sign_that_the_sum_gives(backend, precision):
    """Nobody skips zeros: -0 + (+0) is +0, and only -0 + (-0), which gaussian sums never give, stays -0."""
    w0 = torch.full([300], -0.0, dtype=getattr(torch, precision))
    for family in laws.FAMILIES:
        model = laws.module_of({"w": w0}, backend=backend)
        bound = fk.bind(model, pool_of(family), backend=backend)
        assert torch.signbit(model.w).all()
        bound.rebuild(np.zeros(SIZES[family], np.float32))
        assert (model.w == 0).all()
        sign, _ = laws.signs_and_buckets(KEY, SIZES[family], "w", 300)
        kept = sign == 1 if family == "hadamard" else np.zeros(300, bool)
        np.testing.assert_array_equal(torch.signbit(model.w).cpu().numpy(), kept)


@half_types
def test_one_cast_keeps_what_a_sequential_replay_loses(kind):
    """Each of 128 equal steps is below half a last place of the weights; their sum is not."""
    pool = pool_of("hadamard", 128)
    w0 = torch.ones(512, dtype=kind)
    step = torch.finfo(kind).eps / 8
    a = np.full(128, step, np.float32)
    model, sequential = laws.module_of({"w": w0}), w0.float()
    fk.bind(model, pool).rebuild(a)
    for k in range(128):
        sequential = (sequential + step * torch.from_numpy(pool.perturbation("w", 512, k))).to(kind).float()
    exact = 1 + pool.combine("w", 512, a).astype(np.float64)
    assert np.abs(exact - 1).max() > 10 * torch.finfo(kind).eps
    assert np.abs(model.w.detach().double().numpy() - exact).max() <= torch.finfo(kind).eps * np.abs(exact).max() / 2
    assert (sequential != model.w.float()).any()  # the control: the replay is elsewhere


# --- moves ---


@families
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "mixed"])
def test_amounts_of_one_index_are_added_in_float64_and_rounded_once(precision, family):
    """0.1 + 1e9 - 1e9 is 0.1 but for float64's rounding; in float32 it would be 0."""
    models = [laws.module_of(tensors_of(precision)) for _ in range(3)]
    bounds = [fk.bind(model, pool_of(family)) for model in models]
    bounds[0].move([2, 1, 2, 2], [0.1, 0.5, 1e9, -1e9])
    bounds[1].move([1, 2], [0.5, 0.1 + 1e9 - 1e9])
    bounds[2].move([1], [0.5])
    assert laws.all_bits(models[0]) == laws.all_bits(models[1])
    assert laws.all_bits(models[0]) != laws.all_bits(models[2])


@families
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_the_order_and_the_container_of_indices_do_not_matter(precision, family):
    results = []
    for indices, changes in (
        ([3, 0, 1], [0.5, -0.25, 0.125]),
        ((0, 1, 3), (-0.25, 0.125, 0.5)),
        (np.array([1, 3, 0], np.uint16), np.array([0.125, 0.5, -0.25], np.float32)),
    ):
        model = laws.module_of(tensors_of(precision))
        fk.bind(model, pool_of(family)).move(indices, changes)
        results.append(laws.all_bits(model))
    assert results[0] == results[1] == results[2]


@families
def test_an_empty_move_adds_zeros_and_keeps_what_half_precision_is(family):
    tensors = tensors_of("mixed")
    model = laws.module_of(tensors)
    bound, weights = fk.bind(model, pool_of(family)), weights_of(tensors, pool_of(family))
    a = coefficients_of(SIZES[family])
    bound.rebuild(a)
    bound.move([], [])
    bound.move(np.array([], np.int64), np.array([]))
    for weight in weights:
        weight.rebuild(a)
        weight.move([], [])
        weight.move([], [])
    assert_follows(model, weights)


@quick_backends
@half_types
def test_half_precision_hadamard_moves_that_cancel_leave_exactly_what_rebuild_gives(backend, kind):
    """As local training moves: a step back along one seed and forth along the next, amounts exact in float64."""
    pool, w0 = pool_of("hadamard", 200), laws.some_weights((5000,), kind, 3)
    model, fresh = laws.module_of({"w": w0}, backend=backend), laws.module_of({"w": w0}, backend=backend)
    bound = fk.bind(model, pool, backend=backend)
    a = (np.round(coefficients_of(200) * 2**16) / 2**16).astype(np.float32)
    bound.rebuild(a)
    rng, eps = np.random.default_rng(5), 2.0**-11
    final, seeds = a.astype(np.float64), rng.integers(0, 200, 40)
    bound.perturb(seeds[0], eps)
    for k, following in itertools.pairwise([*seeds, 0]):
        bound.perturb(k, -2 * eps)
        update = float(rng.integers(-500, 500)) * 2.0**-16
        final[k] -= update
        bound.move([k, following], [eps - update, eps])
    bound.perturb(0, -eps)
    assert (final == final.astype(np.float32)).all()  # else "cancel exactly" would be an empty condition
    fk.bind(fresh, pool, backend=backend).rebuild(final.astype(np.float32))
    assert laws.all_bits(model) == laws.all_bits(fresh)
    # control: float32 in between, and half precision in place, would not have come back
    naive = w0.clone()
    for k in seeds.tolist():
        z = torch.from_numpy(pool.perturbation("w", 5000, k))
        for amount in (eps, -2 * eps, eps):
            naive = (naive.float() + amount * z).to(kind)
    assert not torch.equal(naive, w0)


@quick_backends
@half_types
def test_half_precision_gaussian_follows_a_float32_centre(backend, kind):
    """Twenty moves, each far below half a last place, add up; cast after each, they would be lost."""
    pool, w0 = pool_of("gaussian"), torch.ones(1000, dtype=kind)
    model, weight = laws.module_of({"w": w0}, backend=backend), laws.Weight("w", w0, kind, "gaussian", KEY, 4)
    bound = fk.bind(model, pool, backend=backend)
    step = torch.finfo(kind).eps / 20
    lost = w0.clone()
    for _ in range(20):
        bound.perturb(1, step)
        weight.move([1], [step])
        lost = (lost.float() + step * torch.from_numpy(pool.perturbation("w", 1000, 1))).to(kind)
    np.testing.assert_array_equal(laws.bits(model.w), weight.now)
    moved = (model.w.cpu() != w0).float().mean()
    assert moved > 2 * (lost != w0).float().mean()


@families
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "mixed"])
def test_rebuild_forgets_all_moves(precision, family):
    tensors, a = tensors_of(precision), coefficients_of(SIZES[family])
    model, fresh = laws.module_of(tensors), laws.module_of(tensors)
    bound, other = fk.bind(model, pool_of(family)), fk.bind(fresh, pool_of(family))
    bound.rebuild(a)
    bound.move([0, 2], [0.3, 0.7])
    bound.perturb(1, -0.1)
    bound.rebuild(a)
    other.rebuild(a)
    assert laws.all_bits(model) == laws.all_bits(fresh)
    bound.perturb(1, 0.2)
    other.perturb(1, 0.2)
    assert laws.all_bits(model) == laws.all_bits(fresh)


@families
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_rebuild_does_not_depend_on_where_the_weights_are(precision, family):
    """Also when it repeats the last coefficients, and the caller changed the weights or the array in between."""
    tensors, a = tensors_of(precision), coefficients_of(SIZES[family])
    model = laws.module_of(tensors)
    bound = fk.bind(model, pool_of(family))
    bound.rebuild(a)
    right = laws.all_bits(model)
    with torch.no_grad():
        for x in model.parameters():
            x.fill_(3)
    bound.rebuild(a)
    assert laws.all_bits(model) == right
    changed = a.copy()
    bound.rebuild(changed)
    changed[0] += 1
    bound.perturb(0, 0.5)
    bound.rebuild(changed)
    expected = laws.module_of(tensors)
    fk.bind(expected, pool_of(family)).rebuild(changed)
    assert laws.all_bits(model) == laws.all_bits(expected) != right


@pytest.mark.parametrize(
    ("precision", "family"), [*((p, "hadamard") for p in ("float32", "float16", "bfloat16", "mixed")), ("float32", "gaussian")]
)
def test_local_steps_sweep_each_weight_twice_a_step(monkeypatch, precision, family):
    """Counted in the kernel layer: n steps are 2 n + 1 passes over the weights, whatever their precision."""
    swept = []
    prepare = get_backend("cpu").prepare

    def counting(slots):
        sweep = prepare(slots)

        def counted(mixture):
            swept.extend(slot.out.data_ptr() for slot in slots)
            sweep(mixture)

        return counted

    monkeypatch.setattr(get_backend("cpu"), "prepare", counting)
    model = laws.module_of(tensors_of(precision))
    bound = fk.bind(model, pool_of(family), backend="cpu")
    local_steps(bound, [0, 1, 2], lambda step: float(step), StepSettings(lr=1e-3, eps=2.0**-10))
    assert {address: swept.count(address) for address in swept} == {x.data_ptr(): 7 for x in model.parameters()}


@families
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_moves_follow_a_parameter_whose_memory_is_replaced(precision, family):
    """`parameter.data = ...`, as `module.to` does it: the old memory stays as it is, the new one moves."""
    tensors = tensors_of(precision)
    model = laws.module_of(tensors)
    bound, weights = fk.bind(model, pool_of(family)), weights_of(tensors, pool_of(family))
    old = []
    for step in range(3):
        bound.move([step], [0.5])
        for weight in weights:
            weight.move([step], [0.5])
        assert_follows(model, weights)
        old += [(x.data, x.data.clone()) for x in model.parameters()]
        for x in model.parameters():
            x.data = x.data.clone()
    assert all(torch.equal(x, kept) for x, kept in old)


def test_a_binding_lets_go_of_its_memory_at_once():
    """No cycle keeps a copy of the base until the garbage collector comes by."""
    bound = fk.bind(laws.module_of(tensors_of("mixed")), pool_of("gaussian"))
    bound.rebuild(coefficients_of(bound.pool.size))
    bound.move([0], [0.5])
    gone = weakref.ref(bound)
    gc.disable()
    try:
        del bound
        assert gone() is None
    finally:
        gc.enable()


def test_two_bindings_do_not_disturb_each_other():
    tensors = tensors_of("mixed")
    models = [laws.module_of(tensors) for _ in range(2)]
    bounds = [fk.bind(model, pool_of("hadamard")) for model in models]
    before = laws.all_bits(models[1])
    bounds[0].rebuild(coefficients_of(5))
    assert laws.all_bits(models[1]) == before
    bounds[1].perturb(0, 0.5)
    weights = weights_of(tensors, pool_of("hadamard"))
    for weight in weights:
        weight.move([0], [0.5])
    assert_follows(models[1], weights)


# --- names: what the noise depends on, and what not ---


@families
def test_tied_weights_count_once_under_the_smallest_of_their_names(family):
    """In order of code points: capitals come before small letters, and registration doesn't matter."""
    w0 = laws.some_weights((40, 9), torch.float32, 1)
    results = []
    for names in (("embed.weight", "Zhead.weight", "a.weight"), ("a.weight", "embed.weight", "Zhead.weight")):
        tied = torch.nn.Parameter(w0.clone())
        model = laws.module_of(dict.fromkeys(names, tied))
        bound = fk.bind(model, pool_of(family))
        assert bound.digest() == laws.model_digest({"Zhead.weight": tied})
        a = coefficients_of(SIZES[family])
        bound.rebuild(a)
        bound.perturb(1, 0.5)
        weight = laws.Weight("Zhead.weight", w0, torch.float32, family, KEY, SIZES[family])
        weight.rebuild(a)
        weight.move([1], [0.5])
        np.testing.assert_array_equal(laws.bits(tied), weight.now)
        assert all(model.get_parameter(name) is tied for name in names)
        results.append(bound.digest())
    assert results[0] == results[1]


@families
def test_frozen_parameters_and_buffers_are_left_untouched(family):
    tensors = tensors_of("mixed")
    frozen = ("embed.weight", "block.1.w", "norm.weight")
    model = laws.module_of(tensors, frozen)
    model.register_buffer("steps", torch.arange(5.0))
    model.ids = torch.nn.Parameter(torch.arange(3), requires_grad=False)  # of a type that cannot be tuned
    model.wide = torch.nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    addresses = {name: model.get_parameter(name).data_ptr() for name in tensors}
    bound = fk.bind(model, pool_of(family))
    bound.rebuild(coefficients_of(SIZES[family]))
    bound.move([0, 3], [0.5, 0.25])
    for name in frozen:
        np.testing.assert_array_equal(laws.bits(model.get_parameter(name)), laws.bits(tensors[name]))
    assert model.steps.tolist() == [0, 1, 2, 3, 4]
    assert model.ids.tolist() == [0, 1, 2]
    weights = weights_of({name: x for name, x in tensors.items() if name not in frozen}, pool_of(family))
    for weight in weights:
        weight.rebuild(coefficients_of(SIZES[family]))
        weight.move([0, 3], [0.5, 0.25])
    assert_follows(model, weights)  # and what is tuned does not depend on what is frozen
    assert {name: model.get_parameter(name).data_ptr() for name in tensors} == addresses
    assert bound.digest() == laws.model_digest(dict(model.named_parameters()))


@families
def test_neither_the_order_of_parameters_nor_other_tensors_change_a_bit(family):
    tensors = tensors_of("mixed")
    shuffled = dict(sorted(tensors.items(), key=lambda item: laws.tensor_id(item[0])))
    assert list(shuffled) != list(tensors)
    fewer = {name: tensors[name] for name in ("long", "block.0.w")}
    models = [laws.module_of(x) for x in (tensors, shuffled, fewer)]
    bounds = [fk.bind(model, pool_of(family)) for model in models]
    for bound in bounds:
        bound.rebuild(coefficients_of(SIZES[family]))
        bound.move([1, 2], [0.5, 0.25])
    everything, other_order, alone = (laws.all_bits(model) for model in models)
    assert everything == other_order
    assert bounds[0].digest() == bounds[1].digest()
    assert {name: everything[name] for name in fewer} == alone


@pytest.mark.parametrize("names", [["module.weight", "head.weight"], ["encoder.module.weight", "w"], ["my_orig_mod.w", "x"]])
def test_an_innocent_child_named_module_is_no_wrapper(names):
    tensors = {name: laws.some_weights((50,), torch.float32, i) for i, name in enumerate(names)}
    model, weights = laws.module_of(tensors), weights_of(tensors, pool_of("hadamard"))
    fk.bind(model, pool_of("hadamard")).perturb(0, 0.5)
    for weight in weights:
        weight.move([0], [0.5])
    assert_follows(model, weights)


@pytest.mark.parametrize("name", ["größe.重み", "😀", "with space", "a" * 300])
def test_names_may_be_any_text(name):
    w0 = laws.some_weights((50,), torch.float32, 1)
    model = laws.module_of({name: w0})
    bound, weights = fk.bind(model, pool_of("hadamard")), weights_of({name: w0}, pool_of("hadamard"))
    bound.perturb(0, 0.5)
    weights[0].move([0], [0.5])
    assert_follows(model, weights)
    assert bound.digest() == laws.model_digest(dict(model.named_parameters()))


# --- the model stays a model ---


@families
def test_parameters_stay_the_same_objects_in_the_same_memory(family):
    model = laws.module_of(tensors_of("mixed"))
    before = {name: (id(x), x.data_ptr(), x.dtype, x.shape, x.requires_grad) for name, x in model.named_parameters()}
    bound = fk.bind(model, pool_of(family))
    bound.rebuild(coefficients_of(SIZES[family]))
    bound.move([0], [0.5])
    with torch.inference_mode():
        bound.perturb(1, 0.5)
    with torch.no_grad():
        bound.rebuild(coefficients_of(SIZES[family], 1))
    after = {name: (id(x), x.data_ptr(), x.dtype, x.shape, x.requires_grad) for name, x in model.named_parameters()}
    assert after == before
    assert all(x.is_leaf and x.grad is None for x in model.parameters())


def test_binding_leaves_the_model_as_it_is():
    model = laws.module_of(tensors_of("mixed"))
    before = laws.all_bits(model)
    bound = fk.bind(model, pool_of("hadamard"))
    assert laws.all_bits(model) == before
    assert bound.model is model
    assert bound.pool == pool_of("hadamard")


@quick_backends
@families
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_the_global_generators_are_neither_read_nor_moved(precision, family, backend):
    def everything():
        model = laws.module_of(tensors_of(precision), backend=backend)
        bound = fk.bind(model, pool_of(family), backend=backend)
        bound.rebuild(coefficients_of(SIZES[family]))
        bound.move([0, 1], [0.5, 0.25])
        bound.perturb(2, 0.1)
        return bound.digest(), bound.identity().fingerprint

    before = global_states()
    first = everything()
    assert global_states() == before
    seed_globally(1)
    assert everything() == first


@pytest.mark.usefixtures("torch_threads")
@families
def test_the_number_of_threads_changes_no_digest(family):
    """Enough elements that a second thread starts (noise/test_backend.py shows that it does)."""
    tensors = {f"t{i}": laws.some_weights((n,), torch.float32, i) for i, n in enumerate((700_001, 3, 524_289, 65_537))}
    tensors["t4"] = laws.some_weights((900_001,), torch.bfloat16, 9)
    digests = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bound = fk.bind(laws.module_of(tensors), pool_of(family))
        bound.rebuild(coefficients_of(SIZES[family]))
        bound.move([0], [0.5])
        digests.add(bound.digest())
    assert len(digests) == 1


# --- digests ---


def test_the_digest_is_the_one_that_docs_noise_md_writes_down():
    bound = fk.bind(laws.module_of({"w": torch.tensor([[1.0, -2.0]])}), pool_of("hadamard"))
    assert bound.digest() == "bb3a78b280fb7a91d7a074b72c8eeab5b9848eb21d560a9c4f4f331e12d56e3e"


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "mixed"])
def test_the_digest_is_of_names_shapes_dtypes_and_bytes(precision):
    tensors = tensors_of(precision)
    digests = {laws.model_digest(tensors)}
    assert fk.bind(laws.module_of(tensors), pool_of("hadamard")).digest() in digests
    other_bit = tensors["norm.weight"].clone()
    other_bit[-1] = -other_bit[-1]
    changes = [
        {"block.1.v": tensors["block.1.w"], "block.1.w": None},
        {"block.0.w": tensors["block.0.w"].reshape(5, 130)},
        {"block.1.w": tensors["block.1.w"].view(torch.int16 if precision == "float16" else torch.float16)},
        {"norm.weight": other_bit},
        {"none": torch.empty(4, 0)},
        {"none": None},
    ]
    for change in changes:
        changed = {name: x for name, x in {**tensors, **change}.items() if x is not None}
        digest = fk.bind(laws.module_of(changed), pool_of("hadamard")).digest()
        assert digest == laws.model_digest(changed)
        digests.add(digest)
    assert len(digests) == 1 + len(changes)


# --- a real model ---


def load(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)


@pytest.mark.parametrize(
    ("dtype", "family"),
    [(torch.float32, "gaussian"), (torch.float16, "hadamard"), (torch.bfloat16, "hadamard")],  # all six above, on small tensors
    ids=str,
)
def test_a_real_language_model_has_the_bits_of_the_definition(stories260k, dtype, family):
    """Its head is tied to its embedding, which the file holds under the larger of the two names."""
    model = load(stories260k, dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = {min(name, "lm_head.weight") if "embed_tokens" in name else name: x for name, x in model.named_parameters()}
    pool = pool_of(family)
    weights = weights_of({name: x.detach().clone() for name, x in names.items()}, pool)
    assert "lm_head.weight" in names
    bound = fk.bind(model, pool)
    assert bound.digest() == laws.model_digest(names)
    a = coefficients_of(pool.size) / 10
    bound.rebuild(a)
    bound.move([0, 1], [0.01, -0.02])
    for weight in weights:
        weight.rebuild(a)
        weight.move([0, 1], [0.01, -0.02])
    assert_follows(model, weights)
    assert bound.digest() == laws.model_digest(names)


@families
def test_a_real_language_model_rebuilds_the_same_from_its_file(stories260k, family):
    digests = []
    for base in (None, stories260k, stories260k / "model.safetensors"):
        bound = fk.bind(load(stories260k), pool_of(family), base=base)
        bound.rebuild(coefficients_of(SIZES[family]))
        digests.append((bound.digest(), bound.identity().fingerprint))
        bound.perturb(0, 0.25)
        digests[-1] += (bound.digest(),)
    assert digests[0] == digests[1] == digests[2]


def test_perturbing_a_real_language_model_changes_its_loss_and_going_back_restores_it(stories260k):
    model = load(stories260k).eval()
    bound = fk.bind(model, pool_of("hadamard"))
    tokens = torch.arange(1, 60)[None]
    with torch.inference_mode():
        before = model(input_ids=tokens, labels=tokens).loss.item()
        bound.perturb(3, 0.05)
        there = model(input_ids=tokens, labels=tokens).loss.item()
        bound.rebuild(np.zeros(5, np.float32))
        back = model(input_ids=tokens, labels=tokens).loss.item()
    assert there != before
    assert back == before


# --- refused models ---


class Wrapper(torch.nn.Module):
    """What torch.compile (and others) return: the model under one attribute."""

    def __init__(self, attribute: str, model: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(attribute, model)


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))


def with_parameter(parameter: torch.nn.Parameter) -> torch.nn.Module:
    model = small()
    model.odd = parameter
    return model


def with_child(child: torch.nn.Module) -> torch.nn.Module:
    model = small()
    model.inner = child
    return model


def overlapping() -> torch.nn.Module:
    memory = torch.zeros(10)
    model = small()
    model.first, model.second = torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[5:])
    return model


def contained() -> torch.nn.Module:
    memory = torch.zeros(100)
    model = small()
    model.all, model.a, model.b = (torch.nn.Parameter(x) for x in (memory, memory[5:7], memory[50:60]))
    return model


def frozen_alias() -> torch.nn.Module:
    """A frozen parameter in the memory of a tuned one would be moved with it."""
    model = small()
    model.frozen = torch.nn.Parameter(model[0].weight.data, requires_grad=False)
    return model


REFUSED_MODELS = {
    "compiled": (lambda: Wrapper("_orig_mod", small()), r"_orig_mod\.0\.\w+ .*wrapped model .*'_orig_mod'.*bare module"),
    "parallel": (lambda: torch.nn.DataParallel(small()), r"module\.0\.\w+ .*wrapped model .*'module'.*bare module"),
    "both": (lambda: Wrapper("_orig_mod", torch.nn.DataParallel(small())), r"_orig_mod\.module\..*bare module"),
    "parallel of compiled": (lambda: Wrapper("module", Wrapper("_orig_mod", small())), "bare module"),
    "compiled part": (lambda: with_child(Wrapper("_orig_mod", small())), r"inner\._orig_mod\..*wrapped"),
    "parallel part": (lambda: with_child(torch.nn.DataParallel(small())), r"inner\.module\..*wrapped"),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(small()), r"module\.0.*bare module"),
    "no parameters": (torch.nn.ReLU, "ReLU has no parameters"),
    "all frozen": (lambda: small().requires_grad_(False), "no parameter requires a gradient"),
    "meta": (lambda: small().to("meta"), "is on the meta device; load"),
    "one on meta": (lambda: with_parameter(torch.nn.Parameter(torch.empty(3, device="meta"))), "odd is on the meta device"),
    "sparse": (lambda: with_parameter(torch.nn.Parameter(torch.eye(3).to_sparse())), "odd is sparse .*dense"),
    "float64": (lambda: with_parameter(torch.nn.Parameter(torch.ones(3).double())), "odd is torch.float64; .*float32, float16"),
    "complex": (lambda: with_parameter(torch.nn.Parameter(torch.ones(3) + 1j)), "odd is torch.complex64; .*float32"),
    "transposed": (lambda: with_parameter(torch.nn.Parameter(torch.ones(3, 4).T)), "odd is not contiguous"),
    "expanded": (lambda: with_parameter(torch.nn.Parameter(torch.ones(1).expand(4))), "odd is not contiguous"),
    "overlapping": (overlapping, "first and second share memory"),
    "contained": (contained, "share memory"),
    "frozen alias": (frozen_alias, "share memory"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_that_noise_cannot_be_applied_to_is_refused(case):
    build, message = REFUSED_MODELS[case]
    model = build()
    dense = [x for x in model.parameters() if x.layout == torch.strided and x.device.type != "meta"]
    before = [x.detach().clone() for x in dense]
    with pytest.raises(BindingError, match=message) as error:
        fk.bind(model, pool_of("hadamard"))
    assert "\n" not in str(error.value)
    assert all(torch.equal(x, y) for x, y in zip(dense, before, strict=True))


def test_a_lazy_part_has_no_values_before_it_has_run():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that they are new
        model = with_child(torch.nn.LazyLinear(4))
    with pytest.raises(BindingError, match=r"^inner\.weight has no values yet; run the model once, then bind it$"):
        fk.bind(model, pool_of("hadamard"))
    model.inner(torch.ones(1, 3))
    fk.bind(model, pool_of("hadamard"))


@pytest.mark.parametrize("model", ["MODEL", None, small])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(BindingError, match=r"^model is a (str|NoneType|function); expected a torch\.nn\.Module$"):
        fk.bind(model, pool_of("hadamard"))


def test_a_model_that_torch_compile_made_is_refused():
    """The real wrapper, in case torch gives it another name one day."""
    with pytest.raises(BindingError, match=r"wrapped model"):
        fk.bind(torch.compile(small(), backend="eager"), pool_of("hadamard"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a second device that no backend supports")
def test_a_frozen_meta_parameter_is_refused_too():
    """Its values count for the digest."""
    model = small()
    model.odd = torch.nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    with pytest.raises(BindingError, match="odd is on the meta device"):
        fk.bind(model, pool_of("hadamard"))


@pytest.mark.parametrize("backend", ["tpu", "numpy", ""])
def test_a_backend_that_is_not_there_is_refused(backend):
    with pytest.raises((BackendError, InvalidValueError), match=repr(backend)):
        fk.bind(small(), pool_of("hadamard"), backend=backend)


def test_a_model_on_a_device_that_the_backend_does_not_work_on_is_refused(monkeypatch):
    monkeypatch.setattr(get_backend("reference"), "device", "cuda")  # as the gpu backend's is where there is one
    model = small()
    before = laws.all_bits(model)
    message = r"0\.bias is on cpu, where backend 'reference' does not work; move the model to 'cuda', or choose backend 'auto'"
    with pytest.raises(BackendError, match=message):
        fk.bind(model, pool_of("hadamard"), backend="reference")
    assert laws.all_bits(model) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@families
def test_a_model_spread_over_devices_has_the_bits_of_one_on_the_cpu(family):
    tensors = tensors_of("mixed")
    spread, whole = laws.module_of(tensors), laws.module_of(tensors)
    spread.block.to("cuda")
    spread.embed.to(f"cuda:{torch.cuda.device_count() - 1}")
    for model in (spread, whole):
        bound = fk.bind(model, pool_of(family))
        bound.rebuild(coefficients_of(SIZES[family]))
        bound.move([0, 2], [0.25, -0.5])
    assert laws.all_bits(spread) == laws.all_bits(whole)


# --- a model whose memory was replaced ---


def to_another_layout(model):
    model.to(memory_format=torch.channels_last)


REPLACED = {
    "layout": (to_another_layout, r"^weight is torch.* on cpu, not contiguous, and was torch.* when the model was bound"),
    "type": (torch.nn.Module.double, r"^(bias|weight) is torch\.float64 on cpu, and was torch\.float(32|16) on cpu when"),
    "type that could be moved": (torch.nn.Module.bfloat16, r"^(bias|weight) is torch\.bfloat16 on cpu, and was torch\.float"),
}


@families
@pytest.mark.parametrize("case", REPLACED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_can_no_longer_be_moved_is_said_to_be(dtype, case, family):
    """A copy of its weights would move, and they would not."""
    change, says = REPLACED[case]
    pool = pool_of(family)
    model, other = (torch.nn.Conv2d(3, 4, 3, dtype=dtype) for _ in range(2))
    other.load_state_dict(model.state_dict())
    bound, expected = fk.bind(model, pool), fk.bind(other, pool)
    values = {name: x.detach().clone() for name, x in model.named_parameters()}
    change(model)
    before = laws.all_bits(model)
    for call in (
        lambda: bound.rebuild(coefficients_of(pool.size)),
        lambda: bound.perturb(1, 0.5),
        lambda: bound.open_page(fk.SeedPool(1, 4), [ClosedPage(pool, coefficients_of(pool.size))]),
    ):
        with pytest.raises(BindingError, match=says) as error:
            call()
        assert "\n" not in str(error.value)
    assert laws.all_bits(model) == before
    for name, x in model.named_parameters():
        x.data = values[name]
    for b in (bound, expected):  # nothing has changed meanwhile
        b.perturb(2, 0.25)
    assert bound.digest() == expected.digest()


def test_a_model_on_another_device_than_it_was_bound_on_is_said_to_be(monkeypatch):
    model = small()
    bound = fk.bind(model, pool_of("hadamard"))
    before = laws.all_bits(model)
    kinds = [(dtype, torch.device("cuda")) for dtype, _ in bound._kinds]
    monkeypatch.setattr(bound, "_kinds", kinds)  # as if it had been bound there
    with pytest.raises(BindingError, match=r"^0\.bias is torch\.float32 on cpu, and was torch\.float32 on cuda when the model"):
        bound.rebuild(coefficients_of(5))
    assert laws.all_bits(model) == before


def test_weights_in_another_layout_are_still_what_they_are():
    model = torch.nn.Conv2d(3, 4, 3)
    bound = fk.bind(model, pool_of("hadamard"))
    bound.rebuild(coefficients_of(5))
    to_another_layout(model)
    assert bound.moved_from(coefficients_of(5)) is None
    assert bound.moved_from(coefficients_of(5, 1)) == "bias"


def test_a_weight_that_is_no_number_is_where_it_was():
    model = torch.nn.Linear(3, 4)
    model.weight.data[0, 0] = NAN
    bound = fk.bind(model, pool_of("hadamard"))
    assert bound.moved_from(np.zeros(5, F32)) is None
    bound.rebuild(coefficients_of(5))
    assert bound.moved_from(coefficients_of(5)) is None
    model.weight.data[0, 1] = NAN
    assert bound.moved_from(coefficients_of(5)) == "weight"


# --- refused calls change nothing ---

NAN, INF = float("nan"), float("inf")
F32 = np.float32
REFUSED_CALLS = {
    "rebuild: None": (lambda b: b.rebuild(None), "coefficients are NoneType; expected"),
    "rebuild: list": (lambda b: b.rebuild([0, 0, 0.1, 0, 0]), "coefficient 2 is 0.1; float32 cannot hold it: round it first"),
    "rebuild: float64": (lambda b: b.rebuild(np.full(5, 1e39)), r"coefficient 0 is 1e\+39; it must be finite in float32"),
    "rebuild: tensor": (lambda b: b.rebuild(torch.full((5,), 0.1).double() / 3), "coefficient 0 is .*; float32 cannot hold it"),
    "rebuild: short": (lambda b: b.rebuild(np.zeros(4, F32)), r"shape \(4,\); the pool has K = 5"),
    "rebuild: long": (lambda b: b.rebuild(np.zeros(6, F32)), r"shape \(6,\); the pool has K = 5"),
    "rebuild: matrix": (lambda b: b.rebuild(np.zeros((1, 5), F32)), r"shape \(1, 5\); the pool has K = 5"),
    "rebuild: nan": (lambda b: b.rebuild(np.array([0, 1, NAN, 0, 0], F32)), "coefficient 2 is nan; all must be finite"),
    "rebuild: inf": (lambda b: b.rebuild(np.array([0, 1, 0, 0, INF], F32)), "coefficient 4 is inf; all must be finite"),
    "perturb: negative": (lambda b: b.perturb(-1, 0.5), "index is -1; expected an integer from 0 to 4"),
    "perturb: K": (lambda b: b.perturb(5, 0.5), "index is 5; expected an integer from 0 to 4"),
    "perturb: float": (lambda b: b.perturb(1.0, 0.5), "index is 1.0; expected an integer"),
    "perturb: bool": (lambda b: b.perturb(True, 0.5), "index is True; expected an integer"),
    "perturb: nan": (lambda b: b.perturb(1, NAN), "amount for index 1 is nan; it must be finite"),
    "perturb: inf": (lambda b: b.perturb(1, -INF), "amount for index 1 is -inf; it must be finite"),
    "perturb: beyond float32": (lambda b: b.perturb(1, 1e39), r"amount for index 1 is 1e\+39; it must be finite in float32"),
    "perturb: None": (lambda b: b.perturb(1, None), "amount.*None"),
    "perturb: text": (lambda b: b.perturb(1, "0.5"), "amount.*'0.5'"),
    "perturb: complex": (lambda b: b.perturb(1, 1j), "amount.*1j"),
    "perturb: huge integer": (lambda b: b.perturb(1, 10**400), "amount for index 1 is .*finite"),
    "move: scalar arrays": (lambda b: b.move(np.array(1), np.array(0.5)), "indices"),
    "move: second index": (lambda b: b.move([0, 7], [1.0, 1.0]), "index is 7; expected an integer from 0 to 4"),
    "move: second amount": (lambda b: b.move([0, 3], [1.0, NAN]), "amount for index 3 is nan; it must be finite"),
    "move: fewer amounts": (lambda b: b.move([0, 1], [1.0]), "2 indices came with 1 amounts"),
    "move: more amounts": (lambda b: b.move([0], [1.0, 2.0]), "1 indices came with 2 amounts"),
    "move: float indices": (lambda b: b.move(np.array([0.0]), [1.0]), r"index is .*0\.0.*; expected an integer"),
    "move: sum beyond float32": (lambda b: b.move([2, 2], [3e38, 3e38]), r"amount for index 2 is 6e\+38; .*finite"),
    "move: infinities that cancel": (lambda b: b.move([2, 2], [INF, -INF]), "amount for index 2 is nan; it must be finite"),
    "move: no list of indices": (lambda b: b.move(3, [0.5]), "indices"),
    "move: no list of amounts": (lambda b: b.move([3], 0.5), "amounts"),
}


COEFFICIENTS_AS = {
    "list": lambda a: a.tolist(),
    "float64": lambda a: a.astype(np.float64),
    "tensor": torch.tensor,
    "parameter": lambda a: torch.nn.Parameter(torch.tensor(a)),
}


@families
@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("kind", COEFFICIENTS_AS)
def test_coefficients_may_be_a_list_float64_or_a_tensor(kind, precision, family):
    """They are the same weights to the bit, also after a move."""
    tensors = {name: tensors_of(precision)[name] for name in ("embed.weight", "block.0.w", "block.1.w")}
    a = coefficients_of(5)
    bound, other = (fk.bind(laws.module_of(tensors), pool_of(family, 5)) for _ in range(2))
    other.rebuild(a)
    bound.rebuild(COEFFICIENTS_AS[kind](a))
    assert bound.digest() == other.digest()
    for b in (bound, other):
        b.move([1, 3], [0.25, -0.5])
    assert bound.digest() == other.digest()


@families
@pytest.mark.parametrize("case", REFUSED_CALLS)
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_refused_call_changes_nothing(precision, case, family):
    """Neither the weights nor what later moves start from: the model goes on as one that never saw the call."""
    call, message = REFUSED_CALLS[case]
    pool = pool_of(family, 5)
    tensors = {name: tensors_of(precision)[name] for name in ("embed.weight", "block.0.w", "block.1.w")}
    bound, other = (fk.bind(laws.module_of(tensors), pool) for _ in range(2))
    for b in (bound, other):
        b.rebuild(coefficients_of(5))
        b.move([0, 2], [0.25, 0.125])
    before = bound.digest()
    with pytest.raises(InvalidValueError, match=message) as error:
        call(bound)
    assert "\n" not in str(error.value)
    assert bound.digest() == before
    for b in (bound, other):
        b.perturb(2, 0.5)
    assert bound.digest() == other.digest()
    for b in (bound, other):
        b.rebuild(coefficients_of(5))
    assert bound.digest() == other.digest()


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "mixed"])
def test_a_move_that_takes_a_coefficient_beyond_float32_is_refused_and_changes_nothing(precision):
    """Each amount is finite, the coefficient that half-precision weights are computed from would not be."""
    model = laws.module_of(tensors_of(precision))
    bound = fk.bind(model, pool_of("hadamard"))
    bound.move([2], [3e38])
    before = bound.digest()
    with pytest.raises(InvalidValueError, match=r"coefficient 2 .*finite"):
        bound.move([0, 2], [0.5, 3e38])
    assert bound.digest() == before
    bound.move([2], [-3e38])
    other = laws.module_of({name: x for name, x in tensors_of(precision).items() if x.dtype != torch.float32})
    fk.bind(other, pool_of("hadamard")).rebuild(np.zeros(5, F32))
    assert {name: raw for name, raw in laws.all_bits(model).items() if name in laws.all_bits(other)} == laws.all_bits(other)


def test_all_refusals_are_of_one_tree():
    """`except FedKSeedError` catches each of them, `except ValueError` those that come from a value."""
    model = small()
    bound = fk.bind(model, pool_of("hadamard"))
    for call in (lambda: bound.perturb(9, 1.0), lambda: fk.bind(torch.nn.ReLU(), pool_of("hadamard"))):
        with pytest.raises(FedKSeedError):
            call()
        with pytest.raises(ValueError, match=r"index is 9|ReLU"):
            call()
