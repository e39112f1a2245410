"""The adjoint of a sweep, `u = Z'g`: within docs/noise.md's bound on every backend, and folded while backward runs."""

import math
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import laws
from torch.utils.checkpoint import checkpoint

import fedkseed as fk
from fedkseed.errors import InvalidValueError
from fedkseed.models.projection import Projection
from fedkseed.noise import QUANTUM, Source, cpu, get_backend, tensor_id

KEY = 0x0123456789ABCDEF
NAME = "model.layers.3.self_attn.q_proj.weight"
SEEDS = {"hadamard": 300, "gaussian": 3}  # a gaussian seed costs a pass
SIZES = (1, 2, 3, 127, 128, 129, 511, 513, 2047, 2049, 4097, 70_003)
backends = pytest.mark.parametrize("backend", laws.BACKENDS)
families = pytest.mark.parametrize("family", laws.FAMILIES)


def some_gradient(n: int, kind: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Plain values of many magnitudes, with zeros of both signs and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 2.0 ** torch.randint(-8, 8, (n,), generator=generator)
    tiny = torch.finfo(kind).smallest_normal
    edges = torch.tensor([0.0, -0.0, tiny, -tiny / 2, tiny / 8])
    x[n // 2 : n // 2 + 5] = edges[: len(x[n // 2 : n // 2 + 5])]
    return x.to(kind)


def folded(backend: str, pool: fk.SeedPool, *sources: tuple[torch.Tensor, str, int], together: bool = True) -> np.ndarray:
    """u of these (gradient, name, start), folded in one call or one after the other."""
    fold = get_backend(backend).fold(pool.directions())
    listed = [Source(g.to(laws.device_of(backend)), tensor_id(name), start) for g, name, start in sources]
    for call in [listed] if together else [[source] for source in listed]:
        fold.add(call)
    return pool.numbers(fold.sums())


def some_seeds(size: int) -> list[int]:
    """Seeds to look at: the ends, and some between."""
    return sorted({0, 1, size // 3, size // 2, size - 1} & set(range(size)))


def check_numbers(u: np.ndarray, pool: fk.SeedPool, *sources: tuple[torch.Tensor, str, int], **variant: bool) -> None:
    """u lies within the bound of the definition."""
    assert u.dtype == np.float64
    assert u.shape == (pool.size,)
    limit = laws.adjoint_error(pool.family, pool.size, [len(g) for g, _, _ in sources])
    for k in some_seeds(pool.size):
        each = [
            laws.number(pool.family, pool.key, pool.size, name, laws.widen(g).astype(np.float64), k, start, **variant)
            for g, name, start in sources
        ]
        exact, magnitude = math.fsum(value for value, _ in each), math.fsum(size for _, size in each)
        assert abs(u[k] - exact) <= limit * magnitude, (k, u[k], exact)


# --- every backend within the bound ---


@backends
@families
@pytest.mark.parametrize("kind", laws.FLOAT_TYPES, ids=str)
def test_a_fold_gives_each_seeds_product_with_the_gradient(backend, family, kind):
    pool = fk.SeedPool(KEY, SEEDS[family], family)
    for n, start in laws.few(backend, [(n, start) for n in SIZES for start in (0, 3 * QUANTUM)]):
        source = some_gradient(n, kind, n), NAME, start
        before = laws.bits(source[0]).copy()
        check_numbers(folded(backend, pool, source), pool, source)
        np.testing.assert_array_equal(laws.bits(source[0]), before)


@backends
def test_pools_of_every_size_fold(backend):
    """Blocks smaller than what a kernel takes at a time, as large, and larger; a tensor that ends inside one."""
    source = some_gradient(QUANTUM + 4099), NAME, QUANTUM
    for size in laws.few(backend, (128, 1, 129, 2048, 1024, 4096, 2049, 65536)):
        pool = fk.SeedPool(KEY, size)
        check_numbers(folded(backend, pool, source), pool, source)


@backends
@families
@pytest.mark.parametrize("start", [2**31, 2**32, 2**34 - QUANTUM], ids=["2^31", "2^32", "the end"])
def test_positions_up_to_2_34_are_counted_without_overflow(backend, family, start):
    pool = fk.SeedPool(KEY, 5000 if family == "hadamard" else 2, family)
    source = some_gradient(QUANTUM), NAME, start
    check_numbers(folded(backend, pool, source), pool, source)


@pytest.mark.parametrize("backend", laws.QUICK_BACKENDS)
@families
@settings(max_examples=15)
@given(data=st.data())
def test_the_fold_is_the_adjoint_of_the_sweep(backend, family, data):
    check_adjoint(backend, family, data)


@pytest.mark.skipif("gpu" not in laws.BACKENDS, reason="needs Triton")
@families
@settings(max_examples=2)  # an interpreted launch takes long
@given(data=st.data())
def test_the_fold_is_the_adjoint_of_the_sweep_on_the_gpu(family, data):
    check_adjoint("gpu", family, data)


def check_adjoint(backend, family, data) -> None:
    """<Z a, g> = <a, Z'g>, for coefficients whose mixture is exact in binary32, over several tensors in any pieces."""
    size = data.draw(st.sampled_from([1, 3, 300, 4096, 65536] if family == "hadamard" else [1, 4]), label="K")
    pool, rng = fk.SeedPool(KEY, size, family), np.random.default_rng(data.draw(st.integers(0, 99), label="coefficients"))
    a = np.zeros(size, np.float32)
    some = rng.choice(size, min(size, 50 if family == "hadamard" else 1), replace=False)
    a[some] = rng.integers(-9, 10, len(some)) if family == "hadamard" else 2.0 ** rng.integers(-3, 4)
    kinds = st.sampled_from(laws.FLOAT_TYPES)
    sizes = st.sampled_from([1, 5, 128, 1000, QUANTUM - 1, QUANTUM, QUANTUM + 1, 2 * QUANTUM + 9])
    sources, left, magnitude = [], [], 0.0
    for i, (n, kind) in enumerate(data.draw(st.lists(st.tuples(sizes, kinds), min_size=1, max_size=4), label="tensors")):
        g = some_gradient(n, kind, i)
        mixed = pool.combine(f"t{i}", n, a, "cpu").astype(np.float64) * laws.widen(g)
        left.append(math.fsum(mixed))
        magnitude += float(np.abs(laws.widen(g).astype(np.float64)).sum())
        cuts = data.draw(st.sets(st.integers(1, 2)), label="cuts")
        edges = [0, *(cut * QUANTUM for cut in sorted(cuts) if cut * QUANTUM < n), n]
        sources += [(g[low:high], f"t{i}", low) for low, high in pairwise(edges)]
    random.Random(data.draw(st.integers(0, 99), label="order")).shuffle(sources)
    u = folded(backend, pool, *sources, together=data.draw(st.booleans(), label="one call"))
    largest = 1 if family == "hadamard" else 5.77
    limit = laws.adjoint_error(family, size, [len(g) for g, _, _ in sources]) * magnitude * largest
    assert abs(math.fsum(left) - math.fsum(a * u)) <= float(np.abs(a).sum()) * limit


@families
def test_the_bound_tells_wrong_folds_from_the_right_one(family):
    """Negative controls: another tensor's id, another start, the next seed; no shift, one sign vector; float32 sums."""
    pool = fk.SeedPool(KEY, SEEDS[family], family)
    g = some_gradient(4097)
    source = g, NAME, 0
    u = folded("cpu", pool, source)
    check_numbers(u, pool, source)
    wrong = [folded("cpu", pool, (g, f"{NAME}_", 0)), folded("cpu", pool, (g, NAME, QUANTUM)), np.roll(u, 1), -u]
    wrong += [u.astype(np.float32).astype(np.float64), u * (1 + 1e-12)]
    for values in wrong:
        with pytest.raises(AssertionError):
            check_numbers(values, pool, source)
    if family == "hadamard":
        for variant in ({"shifted": False}, {"per_block": False}):
            with pytest.raises(AssertionError):
                check_numbers(u, pool, source, **variant)


@backends
@families
def test_what_is_folded_adds_up_and_nothing_is_nothing(backend, family):
    pool = fk.SeedPool(KEY, SEEDS[family], family)
    fold = get_backend(backend).fold(pool.directions())
    np.testing.assert_array_equal(fold.sums(), 0)
    fold.add([])
    empty = torch.empty(0, device=laws.device_of(backend))
    fold.add([Source(empty, 1), Source(empty, 2)])
    np.testing.assert_array_equal(fold.sums(), 0)
    g = some_gradient(5000).to(laws.device_of(backend))
    fold.add([Source(g, tensor_id("w"))])
    once = fold.sums()
    fold.add([Source(empty, 1), Source(g, tensor_id("w"))])
    np.testing.assert_allclose(fold.sums(), 2 * once, rtol=1e-12, atol=1e-9)
    check_numbers(pool.numbers(once), pool, (g.cpu(), "w", 0))  # what was given out stays


@backends
@families
@pytest.mark.parametrize("kind", laws.FLOAT_TYPES, ids=str)
def test_a_fold_reads_nothing_beside_its_source(backend, family, kind):
    """Also at addresses that are not a multiple of a vector's width."""
    pool = fk.SeedPool(KEY, SEEDS[family], family)
    for n in laws.few(backend, (1, 127, 129, 4097)):
        for offset in (1, 3, 8):
            room = torch.full([n + offset + 600], torch.nan, dtype=kind, device=laws.device_of(backend))
            g = some_gradient(n, kind, n)
            room[offset : offset + n] = g.to(room.device)
            fold = get_backend(backend).fold(pool.directions())
            fold.add([Source(room[offset : offset + n], tensor_id(NAME))])
            check_numbers(pool.numbers(fold.sums()), pool, (g, NAME, 0))


@backends
@families
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", laws.FLOAT_TYPES, ids=str)
def test_a_gradient_that_is_not_finite_gives_numbers_that_are_not(backend, family, value, kind):
    pool, g = fk.SeedPool(KEY, SEEDS[family], family), some_gradient(1000, kind)
    g[77] = value
    assert not np.isfinite(folded(backend, pool, (g, NAME, 0))).any()


# --- threads ---


@pytest.mark.usefixtures("torch_threads")
@families
@pytest.mark.parametrize("size", [3, 5000])
def test_the_number_of_threads_changes_no_bit(monkeypatch, family, size):
    started = []

    def counting(threads):
        started.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(cpu, "ThreadPoolExecutor", counting)
    pool = fk.SeedPool(KEY, size if family == "hadamard" else 2, family)
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    sizes = (300_001, 7, QUANTUM + 1, 524_289, 1, 900_003, 3 * QUANTUM + 5, 700_001)  # ends nowhere near a lane's
    sources = [(some_gradient(n, kinds[i % 3], i), f"t{i}", 0) for i, n in enumerate(sizes)]
    results = {}
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results[threads] = folded("cpu", pool, *sources)
    assert started == [2, 3, 5]  # the threads were there
    for u in results.values():
        np.testing.assert_array_equal(words_of(u), words_of(results[1]))


@pytest.mark.usefixtures("torch_threads")
@families
@settings(max_examples=15)
@given(data=st.data())
def test_any_number_of_lanes_and_threads_covers_every_element_once(family, data):
    sizes = data.draw(
        st.lists(st.sampled_from([1, 5, 128, 1000, QUANTUM - 1, QUANTUM, QUANTUM + 1, 2 * QUANTUM + 9]), min_size=1, max_size=6)
    )
    pool = fk.SeedPool(KEY, data.draw(st.sampled_from([4, 65536])) if family == "hadamard" else 2, family)
    sources = [(some_gradient(n, torch.float32, i), f"t{i}", 0) for i, n in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "ELEMENTS_PER_LANE", 1)
        torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3, 7, 20])))
        check_numbers(folded("cpu", pool, *sources), pool, *sources)


def words_of(x: np.ndarray) -> np.ndarray:
    """The bits of float64 numbers."""
    return x.view(np.uint64)


# --- a model ---


class Net(torch.nn.Module):
    """Tied embeddings, a frozen layer in the middle, two blocks that may be checkpointed, a parameter that nobody uses."""

    def __init__(self, kind: torch.dtype = torch.float32, checkpointed: str = "") -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = torch.nn.Embedding(40, 24)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Tanh()) for _ in range(3))
        self.head = torch.nn.Linear(24, 40)
        self.head.weight = self.embed.weight
        self.unused = torch.nn.Parameter(torch.zeros(7))
        generator = torch.Generator().manual_seed(0)
        for x in self.parameters():
            x.data = torch.randn(x.shape, generator=generator) * 0.3
        self.blocks[1].requires_grad_(False)
        self.to(kind)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.checkpointed == "reentrant") if self.checkpointed else block(x)
        return self.head(x)


def loss_of(model: Net, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed)).to(model.unused.device)
    return torch.nn.functional.cross_entropy(model(ids[:, :-1]).reshape(-1, 40).float(), ids[:, 1:].reshape(-1))


def gradients_of(model: Net, *seeds: int) -> list[dict[str, torch.Tensor]]:
    """Plain backward's gradients by canonical name, one set for each loss."""
    found = []
    for seed in seeds:
        loss_of(model, seed).backward()
        found.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        model.zero_grad()
    return found


def check_model_numbers(u, pool, *gradients: dict[str, torch.Tensor]) -> None:
    check_numbers(u, pool, *((g.cpu().reshape(-1), name, 0) for each in gradients for name, g in each.items()))


def uses_of(model: Net, *seeds: int) -> list[dict[str, torch.Tensor]]:
    """The same where the tied weight's two uses have a gradient each: autograd rounds their sum, a fold does not."""
    tied = model.head.weight
    model.head.weight = torch.nn.Parameter(tied.detach().clone())
    found = []
    for each in gradients_of(model, *seeds):
        found += [{"embed.weight": each.pop("head.weight")}, each]
    model.head.weight = tied
    return found


@pytest.mark.parametrize(
    ("backend", "checkpointed"),  # what folds does not know how the gradient was made
    [*((backend, "") for backend in laws.BACKENDS), ("cpu", "reentrant"), ("cpu", "not reentrant")],
)
@families
def test_folding_while_backward_runs_equals_folding_afterwards(backend, family, checkpointed):
    """Tied weights once, under the smallest name; frozen ones not at all; checkpointing and accumulation change nothing."""
    model, pool = Net(checkpointed=checkpointed).to(laws.device_of(backend)), fk.SeedPool(KEY, SEEDS[family], family)
    bound = fk.bind(model, pool, backend=backend)
    (one,), first, second = gradients_of(model, 1), uses_of(model, 1), uses_of(model, 2)
    assert set(one) == {
        "embed.weight", "blocks.0.0.weight", "blocks.0.0.bias", "blocks.2.0.weight", "blocks.2.0.bias", "head.bias"
    }  # fmt: skip
    check_model_numbers(bound.project(one), pool, one)
    before = laws.all_bits(model)
    with bound.folding() as fold:
        loss_of(model, 1).backward()
        assert all(x.grad is None for x in model.parameters())
        check_model_numbers(fold.numbers(), pool, *first)
        loss_of(model, 2).backward()
    check_model_numbers(fold.numbers(), pool, *first, *second)
    assert laws.all_bits(model) == before
    with bound.folding() as again:  # nothing is left of the first
        loss_of(model, 2).backward()
    check_model_numbers(again.numbers(), pool, *second)
    assert len(gradients_of(model, 1)[0]) == len(one)  # the hooks are gone


@pytest.mark.parametrize("kind", laws.HALF_TYPES, ids=str)
@families
def test_half_precision_gradients_are_folded_exactly_as_they_are(family, kind):
    model, pool = Net(kind), fk.SeedPool(KEY, SEEDS[family], family)
    bound, each = fk.bind(model, pool), uses_of(model, 1, 2)
    assert {g.dtype for one in each for g in one.values()} == {kind}
    with bound.folding() as fold:
        loss_of(model, 1).backward()
        loss_of(model, 2).backward()
    check_model_numbers(fold.numbers(), pool, *each)  # accumulated in half precision they would not be


def test_a_gradient_is_freed_before_the_next_is_made(monkeypatch):
    model = Net()
    bound, alive = fk.bind(model, fk.SeedPool(KEY, 4)), []
    add = Projection.add

    def watching(self, name, gradient, start=0):
        assert not [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(gradient))
        add(self, name, gradient, start)

    monkeypatch.setattr(Projection, "add", watching)
    with bound.folding():
        loss_of(model).backward()
    assert len(alive) == 7  # of the tied one two


def test_the_hooks_go_when_backward_fails():
    model = Net()
    bound = fk.bind(model, fk.SeedPool(KEY, 4))
    with pytest.raises(ZeroDivisionError), bound.folding():
        raise ZeroDivisionError
    assert len(gradients_of(model, 1)[0]) == 6


@families
def test_some_seeds_are_the_entries_of_all(family):
    model, pool = Net(), fk.SeedPool(KEY, 5, family)
    bound, (one,) = fk.bind(model, pool), gradients_of(model, 1)
    everything = bound.project(one)
    for indices in ([3], (4, 0, 0), np.array([1, 2], np.uint8), []):
        some = bound.project(one, indices)
        np.testing.assert_array_equal(some, everything[np.array(indices, int)])
        with bound.folding(indices) as fold:
            loss_of(model, 1).backward()
        with bound.folding() as whole:
            loss_of(model, 1).backward()
        np.testing.assert_allclose(fold.numbers(), whole.numbers()[np.array(indices, int)], rtol=1e-9)


def test_the_table_is_the_numbers_before_the_transform():
    model, pool = Net(), fk.SeedPool(KEY, 300)
    bound, each = fk.bind(model, pool), uses_of(model, 1)
    with bound.folding() as fold:
        loss_of(model, 1).backward()
    table = fold.table()
    assert table.dtype == np.float64
    assert table.shape == (512,)
    right = np.zeros(512)
    for name, g in (item for one in each for item in one.items()):
        sign, bucket = laws.signs_and_buckets(KEY, 300, name, g.numel())
        np.add.at(right, bucket, np.where(sign == 1, -1, 1) * g.reshape(-1).double().numpy())
    np.testing.assert_allclose(table, right, rtol=0, atol=1e-12 * np.abs(right).max())
    np.testing.assert_array_equal(pool.numbers(table), fold.numbers())


def test_a_step_against_the_numbers_lowers_the_loss_by_their_square():
    """To first order `L(w - lr Z u) = L - lr |u|^2`; with one number's sign turned it is less (the control)."""
    model, pool = Net(), fk.SeedPool(KEY, 64)
    bound = fk.bind(model, pool)
    with bound.folding() as fold:
        before = loss_of(model, 1)
        before.backward()
    u, lr = fold.numbers(), 1e-5
    changes = []
    for direction in (u, np.where(np.arange(64) == np.abs(u).argmax(), -u, u)):
        bound.rebuild((-lr * direction).astype(np.float32))
        changes.append(((loss_of(model, 1) - before) / (-lr * (u @ u))).item())
    assert abs(changes[0] - 1) < 0.05
    assert abs(changes[1] - 1) > 0.05


def test_stretches_of_a_tensor_may_come_one_by_one():
    g, pool = some_gradient(2 * QUANTUM + 5), fk.SeedPool(KEY, 300)
    projection = Projection(pool, {"cpu": get_backend("cpu")})
    for start in (QUANTUM, 0, 2 * QUANTUM):
        projection.add("w", g[start : start + QUANTUM], start)
    check_numbers(projection.numbers(), pool, (g, "w", 0))


def test_a_gradient_in_another_order_of_memory_counts_row_by_row():
    g, pool = some_gradient(600).reshape(20, 30), fk.SeedPool(KEY, 300)
    projection = Projection(pool, {"cpu": get_backend("cpu")})
    projection.add("w", g.T.contiguous().T)
    check_numbers(projection.numbers(), pool, (g.reshape(-1), "w", 0))


# --- refusals ---


def grads(**changes: object) -> dict[str, object]:
    return {"embed.weight": torch.zeros(40, 24), **{name.replace("__", "."): x for name, x in changes.items()}}


REFUSED = [
    (grads(other=torch.zeros(1)), r"no gradient of 'other' to project: no parameter has that name"),
    (grads(blocks__1__0__bias=torch.zeros(24)), r"'blocks\.1\.0\.bias' to project: it is frozen"),
    (grads(head__weight=torch.zeros(40, 24)), r"'head\.weight' to project: it is tied, under the name 'embed\.weight'"),
    (grads(head__bias=torch.zeros(41)), r"gradient of head\.bias has shape \(41,\); the parameter's is \(40,\)"),
    (grads(head__bias=torch.zeros(40, dtype=torch.float64)), r"head\.bias is torch\.float64; expected float32, float16 or"),
    (grads(head__bias=torch.zeros(40).to_sparse()), r"gradient of head\.bias is sparse \(torch\.sparse_coo\)"),
    (grads(head__bias=None), r"gradient of head\.bias is a NoneType; expected a tensor"),
]


@pytest.mark.parametrize(("gradients", "text"), REFUSED)
def test_gradients_that_do_not_fit_are_refused_in_one_line(gradients, text):
    bound = fk.bind(Net(), fk.SeedPool(KEY, 4))
    with pytest.raises(InvalidValueError, match=text) as error:
        bound.project(gradients)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("indices", [[4], [-1], [0.5], "0", 3, [True]], ids=repr)
def test_seeds_outside_the_pool_are_refused(indices):
    bound = fk.bind(Net(), fk.SeedPool(KEY, 4))
    with pytest.raises(InvalidValueError, match="ind"):
        bound.project({}, indices)
    with pytest.raises(InvalidValueError, match="ind"), bound.folding(indices):
        pass


def test_folding_refuses_gradients_of_before_and_parameters_that_make_none():
    model = Net()
    bound = fk.bind(model, fk.SeedPool(KEY, 4))
    loss_of(model).backward()
    with (
        pytest.raises(InvalidValueError, match=r"blocks\.0\.0\.bias has a gradient already; call model\.zero_grad"),
        bound.folding(),
    ):
        pass
    model.zero_grad()
    model.head.bias.requires_grad_(False)
    with pytest.raises(InvalidValueError, match=r"head\.bias requires no gradient any more"), bound.folding():
        pass


class Thrice(torch.nn.Module):
    """One layer in a list three times: each name but the first is replaced once for every further name."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)] * 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_folding_puts_back_the_parameters_of_a_module_that_has_three_names():
    model = Thrice()
    bound, before = fk.bind(model, fk.SeedPool(KEY, 4)), list(model.parameters())
    found = []
    for _ in range(2):
        with bound.folding() as fold:
            model(torch.ones(1, 4)).sum().backward()
        assert bound.replaced() is None
        assert all(x is y for x, y in zip(model.parameters(), before, strict=True))
        found.append(fold.numbers())
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].any()


@pytest.mark.parametrize("of_another", [False, True], ids=["the same binding", "another"])
def test_a_second_folding_inside_one_is_refused(of_another):
    """The first would take every gradient, and the second be zeros."""
    model = Net()
    bound, other = fk.bind(model, fk.SeedPool(KEY, 4)), fk.bind(model, fk.SeedPool(1, 4))
    says = r"^gradients of blocks\.0\.0\.bias are being folded already; leave that `with`, or call fk.release\(model\)"
    with bound.folding() as fold:
        with pytest.raises(InvalidValueError, match=says), (other if of_another else bound).folding():
            pass
        loss_of(model).backward()
    assert fold.numbers().any()
    with other.folding() as again:
        loss_of(model).backward()
    assert again.numbers().any()
    fk.prepare(model, fk.SeedPool(KEY, 4), 1e-3)
    with pytest.raises(InvalidValueError, match=says), bound.folding():
        pass


def test_a_projection_refuses_what_it_cannot_fold():
    projection = Projection(fk.SeedPool(KEY, 4), {"cpu": get_backend("cpu")})
    with pytest.raises(InvalidValueError, match=rf"gradient of w starts at 128; expected a multiple of {QUANTUM}"):
        projection.add("w", torch.zeros(4), 128)
    with pytest.raises(InvalidValueError, match="gradient of w is on meta; expected cpu"):
        projection.add("w", torch.zeros(4, device="meta"))
    gaussian = Projection(fk.SeedPool(KEY, 4, "gaussian"), {"cpu": get_backend("cpu")})
    with pytest.raises(InvalidValueError, match=r"family 'gaussian' has no table; call numbers\(\)"):
        gaussian.table()


def test_nothing_projected_is_zeros():
    bound = fk.bind(Net(), fk.SeedPool(KEY, 4))
    np.testing.assert_array_equal(bound.project({}), np.zeros(4))
