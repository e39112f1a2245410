"""Pages of a bound model: w = cast(((w0 + p1) + p2) + ...), gone on from or started anew; in proportion; their gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.support import laws

import fedkseed as fk
from fedkseed.errors import InvalidValueError, LedgerError
from fedkseed.kseed.coding import encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page
from fedkseed.models.closed_page import ClosedPage

MOVEMENTS = ("absolute", "proportional")
kinds = pytest.mark.parametrize("kind", laws.FLOAT_TYPES, ids=str)
movements = pytest.mark.parametrize("movement", MOVEMENTS)
SHAPES = {"embed.weight": (11, 30), "layers.0.bias": (), "layers.0.weight": (129,), "norm": (1, 3)}
Spec = tuple[str, int, np.ndarray, str]
"""A page as tests/support/laws.py takes it: family, key, coefficients, movement."""


def tensors(kind: torch.dtype, plain: bool = False) -> dict[str, Any]:
    """With every edge of the format, or without what overflows; two names for one tensor, and a frozen one."""
    found: dict[str, Any] = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        x = laws.some_weights(shape, kind, i)
        found[name] = torch.nn.Parameter(x.clamp(-4, 4) if plain else x)
    found["z.tied"] = found["embed.weight"]
    found["frozen.weight"] = torch.ones(4, dtype=kind)
    return found


def model_of(found: dict[str, Any]) -> torch.nn.Module:
    fresh = {id(x): torch.nn.Parameter(x.detach().clone()) for x in found.values()}
    return laws.module_of({name: fresh[id(x)] for name, x in found.items()}, frozen=("frozen.weight",), backend="cpu")


def spec(seed: int, movement: str = "absolute", family: str = "hadamard", largest: float = 10.0) -> Spec:
    size = 200 if family == "hadamard" else 5
    return family, 1000 + seed, laws.some_coefficients(size, seed, largest=largest), movement


def pool_of(page: Spec) -> fk.SeedPool:
    return fk.SeedPool(page[1], len(page[2]), page[0])


def closed(pages: Sequence[Spec]) -> list[ClosedPage]:
    return [ClosedPage(pool_of(page), page[2], page[3]) for page in pages]  # type: ignore[arg-type]


def at(bound: fk.Binding, pages: Sequence[Spec]) -> dict[str, bytes]:
    """The model's bytes at these pages, the last of which is open."""
    *before, last = pages
    bound.open_page(pool_of(last), closed(before), last[3])  # type: ignore[arg-type]
    bound.rebuild(last[2])
    return laws.all_bits(bound.model)


def by_definition(found: dict[str, Any], kind: torch.dtype, pages: Sequence[Spec], **variant: bool) -> dict[str, bytes]:
    smallest = {id(x): name for name, x in sorted(found.items(), reverse=True)}
    return {
        name: laws.bits(x).tobytes()
        if name == "frozen.weight"
        else laws.paged(smallest[id(x)], x.detach(), kind, pages, **variant).tobytes()
        for name, x in found.items()
    }


def same_but_nan(one: dict[str, bytes], other: dict[str, bytes], kind: torch.dtype) -> bool:
    """Bit for bit; a NaN of an overflow is a NaN."""
    bits = np.uint32 if kind == torch.float32 else np.uint16
    for name in one.keys() | other.keys():
        x, y = (
            torch.from_numpy(np.frombuffer(each[name], bits).copy().view(f"i{bits().itemsize}")).view(kind)
            for each in (one, other)
        )
        if not torch.equal(x.isnan(), y.isnan()) or not np.array_equal(laws.bits(x[~x.isnan()]), laws.bits(y[~y.isnan()])):
            return False
    return True


MIXES: list[list[Spec]] = [
    [spec(0)],
    [spec(0, "proportional")],
    [spec(0), spec(1), spec(2)],
    [spec(0, "proportional"), spec(1, "proportional"), spec(2, "proportional")],
    [spec(0), spec(1, "proportional"), spec(2), spec(3, "proportional")],
    [spec(0, "absolute", "gaussian"), spec(1, "proportional"), spec(2, "absolute", "gaussian")],
    [spec(0, "absolute", largest=1e30), spec(1, "proportional", largest=1e30), spec(2)],
]


@kinds
@pytest.mark.parametrize("pages", MIXES, ids=lambda pages: "-".join(page[3][:3] for page in pages))
def test_pages_are_what_the_definition_says(kind: torch.dtype, pages: list[Spec]) -> None:
    """Whether they are opened one after the other, each from what came before, or all at once; from memory or a file."""
    found = tensors(kind)
    step_by_step, at_once = (fk.bind(model_of(found), pool_of(pages[0])) for _ in range(2))
    for count in range(1, len(pages) + 1):
        expected = by_definition(found, kind, pages[:count])
        assert same_but_nan(at(step_by_step, pages[:count]), expected, kind)
        assert laws.all_bits(step_by_step.model) == at(at_once, pages[:count])
    fresh = fk.bind(model_of(found), pool_of(pages[0]))
    assert at(fresh, pages) == laws.all_bits(step_by_step.model)
    assert fresh.digest() == step_by_step.digest()


@kinds
@pytest.mark.parametrize("pages", [*MIXES[2:5], [spec(0, family="gaussian"), spec(1)]], ids=["abs", "pro", "both", "families"])
def test_without_room_for_their_sum_pages_are_added_in_every_pass(
    kind: torch.dtype, pages: list[Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits, over a base in a file: rebuilt, moved there and back, and read again where memory is short."""
    found = tensors(kind, plain=True)
    save_file({name: x.detach() for name, x in found.items() if name != "z.tied"}, tmp_path / "base.safetensors")
    monkeypatch.setattr("fedkseed.models.pages.fit_again", lambda *args: False)
    bound = fk.bind(model_of(found), pool_of(pages[0]), tmp_path / "base.safetensors")
    for count in (1, 2, len(pages), 1, len(pages)):
        assert at(bound, pages[:count]) == by_definition(found, kind, pages[:count])
    together = all(page[3] == "absolute" and page[0] == "hadamard" for page in pages)
    assert (len(bound._pages.mixtures) == len(pages) - 1) == together
    assert (bound._pages.start is bound._base) == together
    bound.move([1, 3], [0.25, -0.5])
    bound.move([1, 3], [-0.25, 0.5])
    if kind != torch.float32 or pages[-1][3] == "proportional":
        assert laws.all_bits(bound.model) == by_definition(found, kind, pages)
    bound.open_page(pool_of(pages[0]), [], "absolute")
    bound.rebuild(np.zeros(len(pages[0][2]), np.float32))
    assert bound._pages.mixtures == ()


def test_a_page_in_proportion_needs_the_sum_of_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened after others that every pass has added so far, over the same closed pages."""
    found, pages = tensors(torch.float32, plain=True), [spec(0), spec(1), spec(2)]
    monkeypatch.setattr("fedkseed.models.pages.fit_again", lambda *args: False)
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    at(bound, pages)
    assert len(bound._pages.mixtures) == 2
    turned = [*pages[:2], (*pages[2][:3], "proportional")]
    assert at(bound, turned) == by_definition(found, torch.float32, turned)
    assert bound._pages.mixtures == ()
    assert at(bound, pages) == by_definition(found, torch.float32, pages)


def test_an_interrupted_turn_of_pages_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is gone on from in place: half done, it is nothing to go on from."""
    found, pages = tensors(torch.float32, plain=True), [spec(0), spec(1), spec(2)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    at(bound, pages[:2])

    def interrupted(backends: Any, base: Any, outputs: dict[str, torch.Tensor], closed: Any) -> None:
        next(iter(outputs.values())).add_(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedkseed.models.pages.add_pages", interrupted)
        with pytest.raises(KeyboardInterrupt):
            at(bound, pages)
    assert at(bound, pages[:2]) == by_definition(found, torch.float32, pages[:2])
    assert at(bound, pages) == by_definition(found, torch.float32, pages)


@kinds
def test_the_definition_tells_wrong_ways_apart(kind: torch.dtype) -> None:
    """The negative controls: a cast after every page (what half precision loses), the pages' sums added first."""
    found, pages = tensors(kind, plain=True), [spec(i) for i in range(4)]
    right = at(fk.bind(model_of(found), pool_of(pages[0])), pages)
    assert right == by_definition(found, kind, pages)
    assert (right != by_definition(found, kind, pages, cast_each=True)) == (kind != torch.float32)
    if kind == torch.float32:  # elsewhere the cast hides them
        assert right != by_definition(found, kind, pages, together=True)
        assert right != by_definition(found, kind, pages[::-1])
    assert right != by_definition(found, kind, [(*page[:3], "proportional") for page in pages])


@kinds
@movements
def test_a_base_in_a_file_gives_the_same(kind: torch.dtype, movement: str, tmp_path: Path) -> None:
    """Read again through a memory map, whatever the weights in memory are then."""
    found, pages = tensors(kind), [spec(0, movement), spec(1, movement), spec(2, movement)]
    save_file({name: x.detach() for name, x in found.items() if name != "z.tied"}, tmp_path / "base.safetensors")
    model = model_of(found)
    bound = fk.bind(model, pool_of(pages[0]), tmp_path / "base.safetensors")
    for x in model.parameters():
        if x.requires_grad:
            x.data.zero_()
    for count in (1, 2, 3):
        assert same_but_nan(at(bound, pages[:count]), by_definition(found, kind, pages[:count]), kind)


@kinds
def test_a_list_that_diverges_starts_anew(kind: torch.dtype) -> None:
    """Another key, coefficient, movement or order, a shorter list: never what was left of the old one."""
    found, pages = tensors(kind, plain=True), [spec(i) for i in range(4)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    other = pages[1][2].copy()
    other[3] = np.nextafter(other[3], np.float32(9))
    for changed in (
        pages,
        [pages[0], (*pages[1][:2], other, "absolute"), *pages[2:]],
        pages,
        [pages[0], (*pages[1][:3], "proportional"), *pages[2:]],
        [pages[0], ("hadamard", 5, *pages[1][2:]), *pages[2:]],
        [pages[1], pages[0], *pages[2:]],
        pages[:2],
        pages[2:],
        [*pages, spec(9)],
        pages[3:],
        pages,
    ):
        assert at(bound, changed) == by_definition(found, kind, changed)


def test_going_on_starts_from_what_is_there() -> None:
    """Only new pages are added: the base is read once for the first page, and never again."""
    found, pages = tensors(torch.float32, plain=True), [spec(i) for i in range(4)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    at(bound, pages[:2])
    held, bound._base = bound._base, None  # type: ignore[assignment]
    assert at(bound, pages[:2]) == by_definition(found, torch.float32, pages[:2])
    assert at(bound, pages) == by_definition(found, torch.float32, pages)
    bound._base = held
    assert at(bound, pages[:1]) == by_definition(found, torch.float32, pages[:1])


@kinds
@movements
@pytest.mark.parametrize("family", laws.FAMILIES)
def test_moves_that_cancel_leave_a_page_where_it_was(kind: torch.dtype, movement: str, family: str) -> None:
    """Exactly where weights are computed anew (half precision hadamard, and all that move in proportion), else nearly."""
    found, pages = tensors(kind, plain=True), [spec(0), spec(1, movement, family, 1.0)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    before = at(bound, pages)
    for _ in range(3):
        bound.move([1, 3], [0.25, -0.5])
        assert laws.all_bits(bound.model) != before
        bound.move([3, 1], [0.5, -0.25])
    exact = movement == "proportional" or (kind != torch.float32 and family == "hadamard")
    if exact:
        assert laws.all_bits(bound.model) == before
    at(bound, pages)
    assert laws.all_bits(bound.model) == before


@kinds
def test_a_move_in_proportion_is_a_rebuild(kind: torch.dtype) -> None:
    found, pages = tensors(kind, plain=True), [spec(0), spec(1, "proportional", largest=1.0)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    at(bound, pages)
    bound.move([0, 7], [0.125, 2.0])
    moved = pages[1][2].astype(np.float64)
    moved[[0, 7]] += [0.125, 2.0]
    assert laws.all_bits(bound.model) == by_definition(
        found, kind, [pages[0], (*pages[1][:2], moved.astype(np.float32), "proportional")]
    )


@kinds
@settings(max_examples=6)
@given(data=st.data())
def test_any_pages_in_any_steps(kind: torch.dtype, data: st.DataObject) -> None:
    found = tensors(kind)
    count = data.draw(st.integers(1, 3))
    pages = [spec(i, data.draw(st.sampled_from(MOVEMENTS))) for i in range(count)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    for stop in [*data.draw(st.lists(st.integers(1, count), max_size=2)), count]:
        assert same_but_nan(at(bound, pages[:stop]), by_definition(found, kind, pages[:stop]), kind)


# --- apply ---


def paged_ledger(bound: fk.Binding, movement: str, count: int, basis: str = "table", wire: str = "sign") -> Ledger:
    rng = np.random.default_rng(count)
    pages = [
        Page(fk.SeedPool(40 + i, 128), basis, movement, tuple(encode(0.02 * rng.standard_normal(128), wire) for _ in range(3)))  # type: ignore[arg-type]
        for i in range(count)
    ]
    return Ledger.of_pages(bound.identity(), 3 * count, pages, wire, None)


@kinds
@movements
@pytest.mark.parametrize("count", [1, 2, 4])
def test_apply_gives_the_bindings_digest(kind: torch.dtype, movement: str, count: int, tmp_path: Path) -> None:
    found = tensors(kind)
    model, other = model_of(found), model_of(found)
    bound = fk.bind(model, fk.SeedPool(0, 128))
    ledger = paged_ledger(bound, movement, count)
    *before, last = ledger.pages
    bound.open_page(last.pool, [page.closed() for page in before], last.movement)
    bound.rebuild(last.coefficients())
    ledger.save(tmp_path / "ledger.safetensors")
    applied = fk.apply(other, tmp_path / "ledger.safetensors")
    assert applied.digest() == ledger.digest()
    assert laws.all_bits(other) == laws.all_bits(model)
    assert fk.bind(other, fk.SeedPool(0, 128)).digest() == bound.digest()
    specs = [(page.pool.family, page.pool.key, page.coefficients(), page.movement) for page in ledger.pages]
    assert same_but_nan(laws.all_bits(other), by_definition(found, kind, specs), kind)
    assert laws.all_bits(other) != laws.all_bits(model_of(found))


# --- the adjoint ---


@pytest.mark.parametrize("family", laws.FAMILIES)
@kinds
def test_folding_is_the_adjoint_of_a_move_in_proportion(kind: torch.dtype, family: str) -> None:
    """<d w, g> = <d a, u> with d w_i = w_i sum_k z_k[i] d a_k, w as the page found it: u = Z'(w g).

    w g is rounded once to binary32, so that each term may be off by 2^-24 of itself.
    """
    found, pages = tensors(kind, plain=True), [spec(0, largest=1.0), spec(1, "proportional", family, 1.0)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    at(bound, pages)
    draw = torch.Generator().manual_seed(5)
    gradients = {
        name: torch.randn(x.shape, generator=draw).to(kind) for name, x in bound.model.named_parameters() if x.requires_grad
    }
    u = bound.project(gradients)
    pool = pool_of(pages[1])
    exact, size, absolute = np.zeros(pool.size), np.zeros(pool.size), np.zeros(pool.size)
    for name, g in gradients.items():
        start = laws.paged(name, found[name].detach(), torch.float32, pages[:1]).view(np.float32).astype(np.float64)
        for k in range(pool.size):
            z = laws.seed_noise(family, pool.key, pool.size, name, g.numel(), k)
            terms = laws.widen(g).astype(np.float64) * start * z
            exact[k] += terms.sum()
            size[k] += np.abs(terms).sum()
            absolute[k] += (laws.widen(g).astype(np.float64) * z).sum()
    bound_ = size * 2.0**-24 * (1 + 1e-6) + 1e-12
    assert (np.abs(u - exact) <= bound_).all()
    assert not (np.abs(u - absolute) <= bound_).any()  # the control: the adjoint of an absolute move


@movements
def test_the_projection_is_the_losss_derivative(movement: str) -> None:
    """Of a quadratic in float32 weights: backward, folded, against central differences of the loss by each number."""
    found = tensors(torch.float32, plain=True)
    bound = fk.bind(model_of(found), fk.SeedPool(3, 128))
    rng = np.random.default_rng(0)
    first, open_page = (
        ("hadamard", key, (0.01 * rng.standard_normal(200)).astype(np.float32), moved)
        for key, moved in ((1, "absolute"), (2, movement))
    )
    at(bound, [first, open_page])

    def loss() -> torch.Tensor:
        """Each use of a tied tensor counts: inside `folding` it is a leaf of its own."""
        named = bound.model.named_parameters(remove_duplicate=False)
        return torch.stack([((x.double() - 0.3) ** 2).sum() for _, x in named]).sum()

    with bound.folding() as fold:
        loss().backward()
    u = fold.numbers()
    a, eps = open_page[2], np.float32(2.0**-6)
    for k in (0, 1, 99, 199):
        losses, places = [], []
        for sign in (1, -1):
            moved = a.copy()
            moved[k] += sign * eps
            bound.rebuild(moved)
            losses.append(loss().item())
            places.append(float(moved[k]))
        slope = (losses[0] - losses[1]) / (places[0] - places[1])
        assert slope == pytest.approx(u[k], rel=1e-3, abs=1e-2)
    assert np.abs(u).max() > 1


def test_frozen_tensors_and_second_names_are_left_alone() -> None:
    found, pages = tensors(torch.float32, plain=True), [spec(0), spec(1, "proportional")]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    bits = at(bound, pages)
    assert bits["frozen.weight"] == laws.bits(found["frozen.weight"]).tobytes()
    assert bits["z.tied"] == bits["embed.weight"]


# --- what is refused ---


def test_bad_pages_change_nothing() -> None:
    found, pages = tensors(torch.float32, plain=True), [spec(0), spec(1)]
    bound = fk.bind(model_of(found), pool_of(pages[0]))
    before = at(bound, pages)
    nan = pages[0][2].copy()
    nan[5] = np.nan
    pool = pool_of(pages[1])
    for bad, movement, reason in (
        ([ClosedPage(pool, nan)], "absolute", "coefficient 5 is nan"),
        ([ClosedPage(pool, nan[:3])], "absolute", r"shape \(3,\); the pool has K = 200"),
        ([*closed(pages), ClosedPage(pool, nan)], "absolute", "coefficient 5 is nan"),
        ([], "sideways", "movement is 'sideways'; expected absolute or proportional"),
        ([ClosedPage(pool, pages[0][2], "")], "absolute", "movement is ''; expected"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidValueError, match=reason):
            bound.open_page(pool, bad, movement)  # type: ignore[arg-type]
        bound.rebuild(pages[1][2])
        assert laws.all_bits(bound.model) == before


def test_a_matrix_of_zeros_is_not_moved_in_proportion_without_a_word() -> None:
    """Such as the second one of a fresh LoRA adapter; a bias of zeros is no reason."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    torch.nn.init.zeros_(model[0].bias)
    bound = fk.bind(model, fk.SeedPool(1, 8, "gaussian"))
    bound.open_page(bound.pool, [], "proportional")
    torch.nn.init.zeros_(model[1].weight)
    bound = fk.bind(model, fk.SeedPool(1, 8, "gaussian"))
    with pytest.raises(InvalidValueError, match=r"^movement is 'proportional' and 1\.weight is all zeros, which no proportion"):
        bound.open_page(bound.pool, [], "proportional")
    assert bound.movement == "absolute"


def test_coefficients_alone_are_no_ledger_of_pages_or_of_movement_in_proportion() -> None:
    pool = fk.SeedPool(1, 8, "gaussian")
    bound = fk.bind(torch.nn.Linear(3, 2), pool)
    bound.open_page(pool, [], "proportional")
    with pytest.raises(LedgerError, match="what 1 page with proportional movement are"):
        fk.Ledger.of(bound, [0.5] * 8)
    bound.open_page(pool, [ClosedPage(fk.SeedPool(2, 8, "gaussian"), np.ones(8, np.float32), "absolute")])
    with pytest.raises(LedgerError, match="what 2 pages with absolute movement are"):
        fk.Ledger.of(bound, [0.5] * 8)
    bound.open_page(pool)
    assert fk.Ledger.of(bound, [0.5] * 8).pool == pool
