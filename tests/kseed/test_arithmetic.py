"""Arithmetic of ledgers: that of the weights within the rounding that docs/ledgers.md states, and its laws to the bit."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.changes import flat, quadratic_model

import fedkseed as fk
from fedkseed.errors import InvalidValueError, LedgerError
from fedkseed.kseed.arithmetic import pages_of
from fedkseed.kseed.coding import BITS, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page
from fedkseed.kseed.rounding import rounded

K = 128
HALF_ULP = 2.0**-24
BASE = fk.bind(quadratic_model(), fk.SeedPool(0, K)).identity()
POOLS = [fk.SeedPool(9, K), fk.SeedPool(3, K), fk.SeedPool(3, 7), fk.SeedPool(3, 5, "gaussian")]


def scalars(pool: fk.SeedPool, seed: int, precision: str = "float16") -> Ledger:
    numbers = 0.05 * np.random.default_rng(seed).standard_normal(pool.size)
    return Ledger(pool, BASE, precision, seed % 50, rounded(numbers, precision), None)


def paged(
    pools: Sequence[fk.SeedPool], seed: int, wire: str = "int4", basis: Any = "coefficients", movement: Any = "absolute"
) -> Ledger:
    rng = np.random.default_rng(seed)
    pages = [
        Page(pool, basis, movement, tuple(encode(0.05 * rng.standard_normal(pool.size), wire) for _ in range(1 + seed % 2)))
        for pool in pools
    ]
    return Ledger.of_pages(BASE, seed % 50, pages, wire, None)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Of any form: scalars of one pool, or pages of several, alike in all but their keys as a run's are."""
    seed = draw(st.integers(0, 2**16))
    if draw(st.booleans()):
        return scalars(draw(st.sampled_from(POOLS)), seed, draw(st.sampled_from(["float16", "float32"])))
    wire = draw(st.sampled_from(list(BITS)))
    pools = draw(st.permutations(POOLS[:2]))[: draw(st.integers(1, 2))]
    return paged(pools, seed, wire, draw(st.sampled_from(["table", "coefficients"])))


weights = st.floats(-3, 3, allow_nan=False).filter(lambda x: abs(x) > 1e-3)


def tuned(ledger: Any) -> NDArray[np.float64]:
    """All weights of the base with it, float64[d]."""
    model = quadratic_model()
    fk.apply(model, ledger, backend="cpu")
    return flat(model)


def length(ledger: Ledger) -> float:
    """The most that it can move a weight."""
    return sum(
        float(np.abs(page.coefficients().astype(float)).sum()) * (5 if page.pool.family == "gaussian" else 1)
        for page in pages_of(ledger)
    )


def coefficients(ledger: Ledger) -> dict[Any, NDArray[np.float64]]:
    return {(page.movement, page.pool): page.coefficients().astype(np.float64) for page in pages_of(ledger)}


# --- Weights ---


@settings(max_examples=12)
@given(st.lists(st.tuples(ledgers(), weights), min_size=1, max_size=3))
def test_a_weighted_sum_of_ledgers_is_that_of_the_weights(terms: list[tuple[Ledger, float]]) -> None:
    """The bound: a few roundings to float32, of each page's coefficients, of its sum and of the weight, here and there."""
    merged = fk.merge([ledger for ledger, _ in terms], [factor for _, factor in terms])
    base = flat(quadratic_model())
    expected = base + sum(factor * (tuned(ledger) - base) for ledger, factor in terms)
    roundings = 4 + 8 * sum(len(pages_of(ledger)) for ledger, _ in terms)
    reach = np.abs(base).max() + sum(abs(factor) * (length(ledger) + np.abs(base).max()) for ledger, factor in terms)
    found, bound = tuned(merged), roundings * HALF_ULP * reach
    assert np.abs(found - expected).max() <= bound
    wrong = base + sum(-factor * (tuned(ledger) - base) for ledger, factor in terms)
    assert np.abs(found - wrong).max() > bound or np.abs(expected - base).max() <= bound  # the control


def test_apply_takes_several_ledgers_and_adds_them_up(tmp_path: Path) -> None:
    a, b = scalars(POOLS[0], 1), paged(POOLS[:2], 2)
    b.save(tmp_path / "b")
    both = tuned([a, b])
    assert both.tobytes() == tuned(a + b).tobytes() == tuned([a, tmp_path / "b"]).tobytes()
    assert both.tobytes() != tuned(a).tobytes()


@given(ledgers(), st.integers(-4, 4))
def test_a_power_of_two_scales_to_the_bit(ledger: Ledger, exponent: int) -> None:
    scaled = coefficients(2.0**exponent * ledger)
    for both, a in coefficients(ledger).items():
        assert np.array_equal(scaled[both], np.ldexp(a, exponent))


@given(st.lists(st.tuples(ledgers(), weights), min_size=1, max_size=4))
def test_every_coefficient_is_rounded_once(terms: list[tuple[Ledger, float]]) -> None:
    """Within half a unit in the last place of the exact sum; of tables as a whole, which more roundings lead to."""
    merged = fk.merge([ledger for ledger, _ in terms], [factor for _, factor in terms])
    exact: dict[Any, list[tuple[float, Page]]] = {}
    for ledger, factor in terms:
        for page in pages_of(ledger):
            exact.setdefault((page.movement, page.pool), []).append((factor, page))
    for both, a in coefficients(merged).items():
        tables = any(page.basis == "table" for _, page in exact[both])
        columns = np.stack([f * (x.coefficients() if tables else x.numbers()).astype(float) for f, x in exact[both]], axis=1)
        wanted = np.array([math.fsum(column) for column in columns.tolist()])
        bound = HALF_ULP * (8 * np.abs(columns).sum(1).max() if tables else np.abs(wanted))
        assert (np.abs(a - wanted) <= bound * 1.000001 + 1e-30).all()


# --- Laws ---


@given(st.lists(st.tuples(ledgers(), weights), min_size=2, max_size=3))
def test_the_order_of_ledgers_does_not_matter_to_the_bit(terms: list[tuple[Ledger, float]]) -> None:
    found = {fk.merge(*map(list, zip(*order, strict=True))).digest() for order in itertools.permutations(terms)}
    assert len(found) == 1
    a, b = terms[0][0], terms[1][0]
    assert (a + b).digest() == (b + a).digest()
    assert (a + b).encode() == fk.merge([b, a], [1, 1]).encode()


@given(ledgers(), ledgers(), ledgers())
def test_grouping_matters_to_roundings_only(a: Ledger, b: Ledger, c: Ledger) -> None:
    one, other = (a + b) + c, a + (b + c)
    pools = [{page.pool for page in pages_of(x)} for x in (a, b, c)]
    if not (pools[0] & pools[1] or pools[1] & pools[2] or pools[0] & pools[2]):
        assert one.digest() == other.digest()  # where nothing is added up there is nothing to round
    assert coefficients(one).keys() == coefficients(other).keys()
    reach = sum(length(x) for x in (a, b, c))
    for both, x in coefficients(one).items():
        assert np.abs(x - coefficients(other)[both]).max() <= 8 * HALF_ULP * reach


@given(ledgers(), ledgers())
def test_what_was_added_can_be_taken_away(a: Ledger, b: Ledger) -> None:
    back, wanted = (a + b) - b, coefficients(a)
    for both, x in coefficients(back).items():
        assert np.abs(x - wanted.get(both, 0.0)).max() <= 8 * HALF_ULP * (length(a) + length(b))
    if not {page.pool for page in pages_of(a)} & {page.pool for page in pages_of(b)}:
        assert len(back.pages) == len(pages_of(a))  # what has gone leaves no page behind
    nothing = a - a
    assert (len(nothing.pages), nothing.pages[0].parts) == (1, ())
    assert tuned(nothing).tobytes() == flat(quadratic_model()).tobytes()


@given(ledgers(), weights, weights)
def test_scales_multiply(a: Ledger, x: float, y: float) -> None:
    assert (x * (y * a)).digest() == ((x * y) * a).digest() == ((y * a) * x).digest()


def test_merge_without_weights_is_the_mean() -> None:
    a, b, c = scalars(POOLS[0], 1), scalars(POOLS[0], 2), paged(POOLS[:1], 4)
    mean = fk.merge([a, b, c])
    assert mean.digest() == fk.merge([a, b, c], [1 / 3] * 3).digest()
    assert mean.round == 4
    assert not mean.is_checkpoint
    assert (0.5 * a).digest() == (a * 0.5).digest() == (np.float64(0.5) * a).digest() == (np.float32(0.5) * a).digest()
    assert (3 * a).digest() == fk.merge([a], [3.0]).digest()


def test_a_page_of_its_own_keeps_its_bytes() -> None:
    """A tuning in few bits stays one in few bits, however it is scaled."""
    a, b = paged([POOLS[0]], 2, "int4"), paged([POOLS[1]], 4, "sign")
    merged = 0.3 * a + b
    assert {page.parts for page in merged.pages} == {a.pages[0].parts, b.pages[0].parts}
    assert sorted(page.scale for page in merged.pages) == [0.3, 1.0]
    assert len(merged.encode()) < len(a.encode()) + len(b.encode())


# --- Movement in proportion ---


def test_first_pages_in_proportion_add_up_to_the_weights() -> None:
    a, b = (paged([POOLS[0]], seed, movement="proportional") for seed in (2, 4))
    later = scalars(POOLS[0], 3)  # the same pool, but by its sum: a page of its own
    base, merged = flat(quadratic_model()), fk.merge([a, b, later], [0.5, -2, 1])
    expected = base + 0.5 * (tuned(a) - base) - 2 * (tuned(b) - base) + tuned(later) - base
    assert [page.movement for page in merged.pages] == ["proportional", "absolute"]
    assert np.abs(tuned(merged) - expected).max() < 1e-5
    one_after_the_other = (base + (tuned(a) - base) * 0.5) * (tuned(b) / base) ** -2
    assert np.abs(tuned(merged) - one_after_the_other).max() > 1e-3  # the control: they do not multiply


def test_pages_in_proportion_that_multiply_are_refused() -> None:
    a, b = (paged([pool], 2, movement="proportional") for pool in POOLS[:2])
    with pytest.raises(LedgerError, match="pages of several pools move weights in proportion, so their sum is no ledger; "):
        a + b
    with pytest.raises(LedgerError, match="ledger 1 has 2 pages, of which a later one moves weights in proportion: they mul"):
        0.5 * paged(POOLS[:2], 2, movement="proportional")


# --- What it is for ---


def task(first: bool) -> tuple[Ledger, Any]:
    """A tuning that takes down a loss of one half of the weights of `second`, by gradient steps in a pool of its own."""
    model = quadratic_model()
    bound = fk.bind(model, fk.SeedPool(int(first), 256))
    half = slice(0, 160) if first else slice(160, 331)

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return ((model.get_parameter("second")[half] - 1) ** 2).mean()

    a = np.zeros(256)
    for _ in range(20):
        (gradient,) = torch.autograd.grad(loss(model), [model.get_parameter("second")])
        a -= 0.1 * bound.project({"second": gradient})
        bound.rebuild(a.astype(np.float32))
    return Ledger.of(bound, a.astype(np.float32)), loss


def test_task_arithmetic_and_unlearning() -> None:
    (a, loss_a), (b, loss_b) = task(True), task(False)

    def losses(ledger: Ledger | None) -> tuple[float, float]:
        model = quadratic_model()
        if ledger is not None:
            fk.apply(model, ledger)
        return loss_a(model).item(), loss_b(model).item()

    base, only_a = losses(None), losses(a)
    assert only_a[0] < 0.8 * base[0]
    both = losses(a + b)
    assert both[0] < 0.85 * base[0]
    assert both[1] < 0.85 * base[1]
    assert losses((a + b) - b) == pytest.approx(only_a, rel=1e-5)
    assert losses(-1 * a)[0] > 1.1 * base[0]
    between = losses(0.5 * a)
    assert only_a[0] < between[0] < base[0]


# --- Errors: one line, and the ledgers are values ---


def test_ledgers_of_different_bases_or_tensors_are_refused(tmp_path: Path) -> None:
    a = scalars(POOLS[0], 1)
    other = replace(a, base=replace(BASE, fingerprint="ab" * 32))
    with pytest.raises(LedgerError) as caught:
        a + other
    assert str(caught.value) == (
        f"ledger 2 is over the base model {'ab' * 8}, ledger 1 over {BASE.fingerprint[:16]}; give ledgers of one base model"
    )
    other.save(tmp_path / "other")
    with pytest.raises(LedgerError, match=f"^{tmp_path}/other is over the base model abab"):
        fk.merge([a, tmp_path / "other"])
    partly = replace(a, base=replace(BASE, frozen=("norm",)))
    with pytest.raises(
        LedgerError, match="ledger 1 tunes 'norm' and ledger 2 does not; give ledgers that tune the same tensors"
    ):
        a - partly
    with pytest.raises(LedgerError, match="ledger 2 tunes 'norm' and ledger 1 does not"):
        partly - a
    model = quadratic_model()
    before = flat(model).tobytes()
    with pytest.raises(LedgerError, match="one base model"):
        fk.apply(model, [a, other])
    assert flat(model).tobytes() == before


@pytest.mark.parametrize("wrong", [math.nan, math.inf, "1", None, True, 1j])
def test_weights_that_are_no_numbers_are_refused(wrong: Any) -> None:
    a = scalars(POOLS[0], 1)
    with pytest.raises(InvalidValueError, match=r"a weight is .*; expected a finite number"):
        fk.merge([a, a], [1, wrong])


def test_ledgers_come_from_anything_that_can_be_gone_through() -> None:
    a, b = scalars(POOLS[0], 1), scalars(POOLS[1], 2)
    assert fk.merge(x for x in [a, b]).digest() == fk.merge([a, b]).digest()  # type: ignore[arg-type]


def test_other_mistakes_are_one_line() -> None:
    a = scalars(POOLS[0], 1)
    for wrong, says in (
        (lambda: fk.merge([]), r"ledgers are \[\]; expected a list of at least one"),
        (lambda: fk.merge(a), "ledgers are <Ledger, published"),  # type: ignore[arg-type]
        (lambda: fk.apply(quadratic_model(), []), "expected a list of at least one"),
        (lambda: fk.merge([a, a], [1]), "1 weights came with 2 ledgers; expected one for each"),
        (lambda: fk.merge([a, a], {0: 0.9, 1: 0.1}), r"^weights are \{0: 0.9, 1: 0.1\}; expected a number for each ledger"),
        (lambda: fk.merge([a, a], {0.9, 0.1}), "^weights are {0.*}; expected a number for each ledger"),  # type: ignore[arg-type]
        (lambda: fk.merge({"a": 1.0}), "^ledgers are {'a': 1.0}; expected a list"),  # type: ignore[arg-type]
        (lambda: fk.merge([a], 1.0), "weights are 1.0; expected a number for each ledger"),  # type: ignore[arg-type]
        (lambda: fk.merge([a, a], [1e38, 1e38]), "a number would be larger than 1.26765e.30, the most that a ledger holds"),
        (lambda: 1e300 * (1e300 * a), "page's scale would be inf|has a coefficient beyond float32"),
        (lambda: 1e40 * a, "page 1 of 1 times 1e.40 has a coefficient beyond float32"),
        (lambda: float("nan") * a, "a weight is nan"),
        (lambda: 10**400 * a, "a weight is 10+; expected a finite number"),
        (lambda: fk.merge(3), "^ledgers are 3; expected a list"),  # type: ignore[arg-type]
        (lambda: fk.merge([None]), r"^ledgers are \[None\]; expected a list"),  # type: ignore[list-item]
        (lambda: fk.apply(quadratic_model(), None), "^ledgers are None; expected a list"),  # type: ignore[arg-type]
        (lambda: fk.apply(quadratic_model(), b"a"), "^ledgers are b'a'; expected a list"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidValueError, match=says) as caught:
            wrong()
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError):
        a + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        "x" * a  # type: ignore[operator]


def test_more_numbers_than_a_ledger_may_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkseed.kseed.pages.MAX_NUMBERS", 300)
    pair = scalars(POOLS[0], 1) + scalars(POOLS[1], 1)
    with pytest.raises(InvalidValueError, match="3 pages hold 384 numbers; a ledger has at most 300"):
        pair + scalars(fk.SeedPool(1, K), 1)
