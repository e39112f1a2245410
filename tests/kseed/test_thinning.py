"""Published ledgers in fewer bits: what they hold, what they lose, and what is refused."""

import numpy as np
import pytest
import torch
from tests.support.changes import BASE

import fedkseed as fk
from fedkseed.errors import InvalidValueError
from fedkseed.kseed.card import ledger_card
from fedkseed.kseed.coding import encode
from fedkseed.kseed.distance import relative_distance
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page
from fedkseed.kseed.thinning import WIRES, thinned

K = 4096


def paged(wire: str, parts: tuple[int, ...], basis: str = "table", movement: str = "absolute") -> Ledger:
    rng = np.random.default_rng(1)
    pages = [
        Page(fk.SeedPool(i, K), basis, movement, tuple(encode(0.01 * rng.standard_normal(K), wire) for _ in range(count)))  # type: ignore[arg-type]
        for i, count in enumerate(parts)
    ]
    return Ledger.of_pages(BASE, 7, pages, wire, {"numbers": rng.standard_normal(K)})


def scalars() -> Ledger:
    a = np.random.default_rng(2).standard_normal(K).astype(np.float16).astype(np.float32)
    return Ledger(fk.SeedPool(9, K), BASE, "float32", 3, a, None)


@pytest.mark.parametrize("bits", WIRES)
@pytest.mark.parametrize("kind", ["pages of 16 bits", "pages of signs", "scalars"])
def test_every_page_is_coded_anew_in_one_part(bits: int, kind: str) -> None:
    ledger = {
        "pages of 16 bits": lambda: paged("float16", (1, 1, 0)),
        "pages of signs": lambda: paged("sign", (9, 9)),
        "scalars": scalars,
    }[kind]()
    thin = thinned(ledger, bits)
    assert Ledger.decode(thin.encode()).digest() == thin.digest()
    assert (thin.is_checkpoint, thin.round, thin.base.fingerprint) == (False, ledger.round, BASE.fingerprint)
    before = ledger.pages or (Page(ledger.pool, "coefficients", "absolute"),)
    assert [(p.pool, p.basis, p.movement) for p in thin.pages] == [(p.pool, p.basis, p.movement) for p in before]
    for page, was in zip(thin.pages, before, strict=True):
        numbers = was.numbers() if ledger.pages else ledger.coefficients.astype(np.float64)
        assert page.parts == ((encode(numbers, WIRES[bits]),) if numbers.any() else ())
    assert len(thin.encode()) < len(ledger.published().encode())
    assert len(thin.encode()) < 1200 + sum(K * bits // 8 for page in thin.pages if page.parts)


def test_fewer_bits_lose_more() -> None:
    ledger = paged("float16", (1, 1))
    lost = [relative_distance(ledger, thinned(ledger, bits)) for bits in (8, 4, 2, 1)]
    assert lost == sorted(lost)
    assert 0 < lost[0] < 0.02 < lost[1] < 0.2
    assert lost[3] == pytest.approx(np.sqrt(1 - 2 / np.pi), rel=0.02)  # one bit of normal numbers
    assert relative_distance(ledger, ledger.published()) == 0


def test_the_distance_is_that_of_the_weights() -> None:
    """Of all weights of a model; its control is the distance of the pages' tables taken alone."""
    model = torch.nn.Linear(200, 300, bias=False)
    bound = fk.bind(model, fk.SeedPool(0, K))
    rng = np.random.default_rng(0)
    numbers = [encode(scale * rng.standard_normal(K), "float16") for scale in (0.1, 0.01)]
    pages = [Page(fk.SeedPool(i, K), "table", "absolute", (one,)) for i, one in enumerate(numbers)]
    ledger = Ledger.of_pages(bound.identity(), 1, pages, "float16", None)
    thin, base = thinned(ledger, 2), model.weight.detach().clone()
    weights = []
    for one in (ledger, thin):
        with torch.no_grad():
            model.weight.copy_(base)
        fk.apply(model, one)
        weights.append(model.weight.detach().clone())
    measured = float((weights[0] - weights[1]).norm() / (weights[0] - base).norm())
    assert relative_distance(ledger, thin) == pytest.approx(measured, rel=0.02)


def test_what_privacy_cost_stays_with_fewer_bits() -> None:
    privacy = {"unit": "client", "epsilon": 2.0}
    noted = paged("float16", (1, 1)).stamped({"privacy": privacy, "settings": {"lr": 1}})
    assert thinned(noted, 1).made_with == {"privacy": privacy}


def test_a_card_counts_the_numbers_of_all_pages() -> None:
    card = ledger_card("owner/base", paged("int4", (1, 1, 1)).published(), {})
    assert f"# owner/base, tuned with fedkseed: {3 * K:,} numbers" in card
    assert f"| candidate seeds | 3 pages, the last of K = {K:,}, hadamard noise, key 0x0000000000000002 |" in card
    assert f"tuned with fedkseed: {K:,} numbers" in ledger_card("owner/base", paged("int4", (1,)).published(), {})


def test_bits_that_gain_nothing_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"with 4 bits the ledger takes \S+ bytes, \S+ as it is; choose fewer bits"):
        thinned(paged("int4", (1, 1)), 4)
    with pytest.raises(InvalidValueError, match="choose fewer bits"):
        thinned(paged("sign", (2, 1)), 2)
    with pytest.raises(InvalidValueError, match="bits is 16; expected one of 8, 4, 2, 1"):
        thinned(scalars(), 16)
