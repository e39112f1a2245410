"""What a reply weighs, and what a client may be called."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkseed.errors import ProtocolError
from fedkseed.federation import FederationConfig, shares
from fedkseed.federation.aggregators import AGGREGATORS
from fedkseed.federation.envelope import check_name

SIZES = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 2**53), min_size=1, max_size=9)
MAX_SHARES = st.none() | st.floats(0.05, 1)
RULES = st.sampled_from(sorted(AGGREGATORS))


def weights(sizes: dict[str, int], max_share: float | None = None, rule: str = "mean") -> dict[str, float]:
    config = FederationConfig(lr=1e-3, max_share=max_share, aggregator=rule, shared_seeds="on")
    return shares(sizes, config.largest_share(len(sizes)))


@given(SIZES, MAX_SHARES, RULES)
def test_shares_are_one_in_all_and_none_is_above_the_limit(sizes: dict[str, int], max_share: float | None, rule: str) -> None:
    found, n = weights(sizes, max_share, rule), len(sizes)
    allowed = max(0.5 if rule == "mean" else 0.0, 2 / n) if max_share is None else max(max_share, 1 / n)
    assert list(found) == list(sizes)
    assert math.isclose(sum(found.values()), 1)
    assert min(found.values()) > 0
    assert max(found.values()) <= allowed * (1 + 1e-12)
    below = [name for name in sizes if found[name] < allowed * (1 - 1e-9)]
    assert all(math.isclose(found[a] * sizes[b], found[b] * sizes[a], rel_tol=1e-9) for a in below for b in below)
    assert all(sizes[held] >= sizes[name] for held in sizes.keys() - set(below) for name in below)


def test_shares_by_paper_and_pencil() -> None:
    assert weights({"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}
    assert weights({"a": 98, "b": 1, "c": 1}) == pytest.approx({"a": 2 / 3, "b": 1 / 6, "c": 1 / 6})
    assert weights({"a": 10**7, "b": 10, "c": 20, "d": 10}) == {"a": 0.5, "b": 0.125, "c": 0.25, "d": 0.125}
    assert weights({"a": 6, "b": 3, "c": 1}, 0.4) == {"a": 0.4, "b": 0.4, "c": pytest.approx(0.2)}
    assert weights({"a": 9, "b": 1}, 0.1) == {"a": 0.5, "b": 0.5}
    assert weights({}) == {}
    five = {"a": 10**7, "b": 10, "c": 20, "d": 10, "e": 20}
    assert [weights(five, None, rule)["a"] for rule in ("mean", "clipped", "median")] == [0.5, 0.4, 0.4]


def test_shares_that_no_limit_touches_are_the_plain_quotients() -> None:
    """To the bit: ledgers of before stay what they were."""
    sizes = {"a": 7, "b": 11, "c": 13}
    assert weights(sizes) == {name: size / 31 for name, size in sizes.items()}


@pytest.mark.parametrize(
    "name", ["site-a", "Site A", "client-007", "клиент", "診療所 A", "São Paulo", "Zürich 2", "Ω", "a_b.c:d"]
)
def test_names_that_are_taken(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "printable"),
        ("a\nb", "printable"),
        ("a" * 65, "printable"),
        (7, "printable"),
        ("site-a ", "reads as 'site-a'"),
        (" site-a", "reads as 'site-a'"),
        ("site  a", "reads as 'site a'"),
        ("\uff53ite-a", "reads as 'site-a'"),
        ("Sa\u0303o", "reads as 'São'"),
        ("site-\u0430", "mixes CYRILLIC and LATIN"),
        ("\u0391lpha", "mixes GREEK and LATIN"),
    ],
)
def test_names_that_may_be_taken_for_others_are_refused(name: object, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)
