"""Secure sums from end to end: the exact sum, dropouts, what a server sees, and what clients refuse to tell it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from tests.support.sums import CLIP, LENGTH, WHERE, client, cohort, names, plain_mean, plan, play, terms, trained, without

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import pack_fields
from fedkseed.secure.client import SumClient, _State, coded
from fedkseed.secure.fixed_point import FixedPoint
from fedkseed.secure.masks import common_masks, own_mask
from fedkseed.secure.messages import (
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    Roster,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
    as_positions,
    pieces,
    threshold_of,
)
from fedkseed.secure.primitives import KeyPair, combine
from fedkseed.secure.server import SecureSum

# --- The sum ---


@pytest.mark.parametrize("size", [3, 4, 7, 12])
def test_the_sum_is_that_of_the_vectors_without_masks_bit_for_bit(size: int) -> None:
    server, _ = play(plan(names(size)), cohort(size))
    assert server.summed is not None
    assert (server.refusals, server.missing) == ([], [])
    weights = dict(zip(server._roster.names, server._roster.weights, strict=True))
    assert np.array_equal(server.summed.mean, plain_mean(weights, names(size), size))
    exact = sum(weights[name] * trained(name).vector for name in names(size))
    assert np.abs(server.summed.mean - exact).max() < size * CLIP / 2**31
    loss = sum(weights[name] * (trained(name).loss or 0) for name in names(size))
    assert server.summed.loss == pytest.approx(loss, abs=1e-6)
    assert server.summed.dropped_steps == sum(trained(name).dropped_steps for name in names(size))
    assert sum(server.summed.weights.values()) == pytest.approx(1)
    assert max(server.summed.weights.values()) <= 0.5 + 1e-12


def test_what_all_dropped_has_no_loss() -> None:
    clients = {name: SumClient(name, lambda request: replace(trained("x"), loss=None), terms) for name in names(4)}
    server, _ = play(plan(names(4)), clients)
    assert server.summed is not None
    assert server.summed.loss is None


# --- Dropouts ---


@pytest.mark.parametrize("phase", range(4))
@pytest.mark.parametrize("size", [6, 10])
def test_a_third_may_leave_in_any_phase_and_one_more_may_not(size: int, phase: int) -> None:
    leaving = names(size)[1 : 1 + size // 3]
    server, _ = play(plan(names(size)), cohort(size), without(phase, leaving))
    assert server.summed is not None
    assert server.missing == leaving
    stayed = names(size) if phase == 3 else sorted(set(names(size)) - set(leaving))
    assert list(server.summed.weights) == stayed
    weights = dict(zip(server._roster.names, server._roster.weights, strict=True))
    assert np.array_equal(server.summed.mean, plain_mean(weights, stayed, len(server._roster.names)))
    if phase > 1:  # who sends no keys, or no shares, is of no roster, which is smaller then
        server, _ = play(plan(names(size)), cohort(size), without(phase, names(size)[: 1 + size // 3]))
        assert server.summed is None


def test_a_third_may_leave_a_few_in_each_phase() -> None:
    def leave(phase: int, name: str, data: bytes) -> bytes | None:
        return None if name in names(12)[: phase + 1] else data

    server, _ = play(plan(names(12)), cohort(12), leave)
    assert server.summed is not None
    assert list(server.summed.weights) == names(12)[3:]


def test_two_are_no_cohort_and_min_replies_holds() -> None:
    assert play(plan(names(3)), cohort(3), without(0, names(1)))[0].summed is None
    assert play(plan(names(6), min_replies=6), cohort(6), without(2, names(1)))[0].summed is None


# --- What the server sees of one client ---


def masked_numbers(heard: list[dict[str, bytes]], name: str) -> np.ndarray:
    return MaskedReply.decode(heard[2][name]).vector


def is_uniform(numbers: np.ndarray) -> bool:
    """Chi-square over the values of each byte, p above 1e-4 for each of the four."""
    by_byte = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)
    return all(stats.chisquare(np.bincount(by_byte[:, i], minlength=256)).pvalue > 1e-4 for i in range(4))


def test_a_masked_vector_is_uniform_and_one_without_masks_is_not() -> None:
    size, length = 3, 20_000
    _, heard = play(plan(names(size), length=length), cohort(size, length))
    name = names(size)[0]
    seen = masked_numbers(heard, name)
    assert is_uniform(seen)
    coding = FixedPoint(CLIP, size)
    bare = coded(trained(name, length), coding, 1 / 6)
    assert not is_uniform(bare)
    assert abs(np.corrcoef(seen[:length].view(np.int32), trained(name, length).vector)[0, 1]) < 0.03


def test_a_late_vector_of_one_who_was_said_to_have_left_is_uniform_only_by_its_own_mask() -> None:
    """The reason for own masks (Bonawitz et al., section 4.0.2): the server has taken the masks in common off, and the vector
    comes after all. With the own mask still on it says nothing; without one, the control, it lies open."""
    size, length = 3, 20_000
    clients, late = cohort(size, length), names(size)[0]
    kept, own = {}, {}

    def hold_back(phase: int, name: str, data: bytes) -> bytes | None:
        if phase == 2 and name == late:
            kept["vector"] = data
            return None
        return data

    def look(phase: int, name: str, data: bytes) -> bytes | None:
        if phase == 2 and name == late:
            own["seed"] = clients[late].state
        return data

    server, _ = play(plan(names(size), length=length), clients, hold_back, look)
    assert server.summed is not None
    about = server._roster.digest(WHERE)
    secrets = _State.decode(own["seed"])
    common = common_masks(KeyPair(secrets.mask_seed), 0, (1, 2), server._roster, about, length + 3)
    open_but_for_its_own = MaskedReply.decode(kept["vector"]).vector - common
    assert is_uniform(open_but_for_its_own)
    bare = open_but_for_its_own - own_mask(secrets.own_seed, length + 3)
    assert not is_uniform(bare)
    coding = FixedPoint(CLIP, size)
    weight = server._roster.weights[0]
    assert np.array_equal(bare, coded(trained(late, length), coding, weight))


def test_fewer_shares_than_the_threshold_say_nothing_and_as_many_give_the_secret() -> None:
    size = 7
    clients = cohort(size)
    before: dict[str, bytes] = {}

    def look(phase: int, name: str, data: bytes) -> bytes | None:
        if phase == 2:
            before[name] = clients[name].state
        return data

    _, heard = play(plan(names(size)), clients, on_request=look)
    seed = _State.decode(before["client-000"]).own_seed
    held = {i: pieces(UnmaskReply.decode(heard[3][name]).shares, 16)[0] for i, name in enumerate(names(size))}
    need = threshold_of(size)
    assert combine([(i, held[i]) for i in range(need)]) == seed
    assert combine([(i, held[i]) for i in range(need - 1)]) != seed


def test_what_a_client_keeps_after_unmasking_has_no_secret() -> None:
    clients = cohort(4)
    play(plan(names(4)), clients)
    assert all(len(each.state) < 64 for each in clients.values())


# --- A server that asks for more than a sum ---


def until(phase: int, size: int = 6) -> tuple[SecureSum, dict[str, SumClient]]:
    """A conversation that has come to a phase, whose requests are not answered yet."""
    server, clients = SecureSum(plan(names(size))), cohort(size)
    for _ in range(phase):
        server.hear([(name, clients[name].answer(data)) for name, data in server.ask().items()])
    return server, clients


def changed_unmask(request: UnmaskRequest) -> dict[str, UnmaskRequest]:
    return {
        "a second set of survivors": replace(request, stayed=as_positions([0, 1, 2, 3, 5]), left=as_positions([4])),
        "the same once more": request,
    }


def test_a_server_that_asks_two_survivor_sets_is_refused() -> None:
    server, clients = until(3)
    data = server.ask()["client-000"]
    clients["client-000"].answer(data)
    for other in changed_unmask(UnmaskRequest.decode(data)).values():
        with pytest.raises(ProtocolError, match=r"has answered phase 0 .* and each is answered once"):
            clients["client-000"].answer(other.encode())


@pytest.mark.parametrize(
    ("stayed", "left", "reason"),
    [
        ([0, 1, 2, 3, 4], [4, 5], "'client-004' is said to have stayed and left; its vector would lie open"),
        ([0, 1, 2, 3, 4], [], "those who stayed and left are others than the roster"),
        ([0, 1, 2, 3, 4, 5, 6], [], "those who stayed and left are others than the roster"),
        ([0, 1, 2], [3, 4, 5], "3 of 6 clients stayed; expected at least 4"),
        ([1, 2, 3, 4, 5], [0], "'client-000' is not among those who stayed, and was asked"),
        ([2, 1, 0, 3, 4, 5], [], "position 2 is followed by 1; expected ascending positions"),
        ([], [0, 1, 2, 3, 4, 5], "'client-000' is not among those who stayed"),
    ],
    ids=str,
)
def test_a_request_to_unmask_more_than_a_sum_is_refused(stayed: list[int], left: list[int], reason: str) -> None:
    server, clients = until(3)
    honest = server.ask()["client-000"]
    before = clients["client-000"].state
    fields = pack_fields("d?", [*WHERE, "client-000", as_positions(stayed), as_positions(left)])
    with pytest.raises(ProtocolError, match=reason):
        clients["client-000"].answer(fields)
    assert clients["client-000"].state == before
    clients["client-000"].answer(honest)


def test_no_phase_is_answered_twice_or_out_of_its_order() -> None:
    server, clients = SecureSum(plan(names(4))), cohort(4)
    asked: list[bytes] = []
    one = clients["client-000"]
    while not server.over:
        requests = server.ask()
        server.hear([(name, clients[name].answer(data)) for name, data in requests.items()])
        asked.append(requests["client-000"])
        for earlier in asked[1:]:
            with pytest.raises(ProtocolError, match="each is answered once"):
                one.answer(earlier)
    with pytest.raises(ProtocolError, match=r"has helped to unmask round 3, attempt 1; it takes part in no second sum of it"):
        one.answer(asked[0])
    with pytest.raises(ProtocolError, match="no second sum"):
        one.answer(KeysRequest(WHERE[0], 3, 0, "client-000").encode())
    one.answer(KeysRequest(WHERE[0], 3, 2, "client-000").encode())
    with pytest.raises(ProtocolError, match="round 3, attempt 1 wants phase 1"):
        one.answer(asked[1])


def test_a_second_masked_vector_is_not_sent_of_one_attempt() -> None:
    """Under the same own mask two vectors would show their difference."""
    server, clients = until(2)
    data = server.ask()["client-000"]
    clients["client-000"].answer(data)
    fewer = replace(MaskedRequest.decode(data), sealed=bytes(48 * 5))
    with pytest.raises(ProtocolError, match="each is answered once"):
        clients["client-000"].answer(fewer.encode())


def test_a_client_does_nothing_that_the_others_are_not_asked_for() -> None:
    """Steps so short that the others add nothing, or seeds that are its own, would leave it alone in the sum."""
    server, clients = until(2)
    request = MaskedRequest.decode(server.ask()["client-000"])
    with pytest.raises(ProtocolError, match="'client-000' is asked to do something else than the roster's clients"):
        clients["client-000"].answer(replace(request, train=b"other").encode())


ROSTERS: dict[str, tuple[Callable[[Roster], Roster], str]] = {
    "a weight that hides nothing": (lambda r: replace(r, weights=(0.6, *[0.08] * 5)), "expected above 0, at most 0.5"),
    "weights that run over": (lambda r: replace(r, weights=(0.5, *[0.2] * 5)), "together; expected at most 1"),
    "no weight": (lambda r: replace(r, weights=(0.5, 0.0, *[0.1] * 4)), "expected above 0"),
    "names out of order": (lambda r: replace(r, names=r.names[::-1]), "expected distinct names in ascending order"),
    "one key of two clients": (lambda r: replace(r, mask_keys=(r.mask_keys[0], *r.mask_keys[:5])), "has a key twice"),
    "other keys of its own": (
        lambda r: replace(r, mask_keys=(KeyPair(bytes(16)).public, *r.mask_keys[1:])), "has other keys of 'client-000'"
    ),
    "without it": (
        lambda r: Roster(
            *(part[1:] for part in (r.names, r.weights, r.mask_keys, r.share_keys, r.signatures)), r.terms, r.clip
        ),
        "the roster lacks 'client-000'",
    ),
    "two clients": (
        lambda r: Roster(
            *(part[:2] for part in (r.names, r.weights, r.mask_keys, r.share_keys, r.signatures)), r.terms, r.clip
        ),
        "size of the roster is 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), ROSTERS.values(), ids=ROSTERS)
def test_a_roster_that_betrays_a_client_is_refused(change: Callable[[Roster], Roster], reason: str) -> None:
    server, clients = until(1)
    request = SharesRequest.decode(server.ask()["client-000"])
    with pytest.raises(ProtocolError, match=reason):
        clients["client-000"].answer(replace(request, roster=change(request.roster)).encode())


def test_clients_that_were_shown_two_rosters_share_nothing() -> None:
    """Their shares are bound to the roster, so that the sum fails rather than leaks."""

    def two_faced(phase: int, name: str, data: bytes) -> bytes | None:
        if phase == 1 and name >= "client-003":
            request = SharesRequest.decode(data)
            fake = replace(request.roster, weights=tuple(weight * 0.9 for weight in request.roster.weights))
            return replace(request, roster=fake).encode()
        return data

    server, _ = play(plan(names(6)), cohort(6), on_request=two_faced)
    assert server.summed is None
    assert "shares of its secret came, of which no 4 give it back" in server.refusals[0].reason


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), 1e12])
def test_a_clip_that_no_sum_has_is_refused(clip: float) -> None:
    server, clients = until(1)
    request = SharesRequest.decode(server.ask()["client-000"])
    fields = pack_fields("b?", [*request.where, request.client, *request.roster.flat()[:-1], clip])
    with pytest.raises(ProtocolError, match="clip is"):
        clients["client-000"].answer(fields)


@pytest.mark.parametrize("count", [0, 4, 6])
def test_a_vector_is_masked_with_the_whole_roster_or_not_sent(count: int) -> None:
    server, clients = until(2)
    request = MaskedRequest.decode(server.ask()["client-000"])
    with pytest.raises(ProtocolError, match=f"sealed shares of {count} clients came; the roster has 5 others"):
        clients["client-000"].answer(replace(request, sealed=bytes(48 * count)).encode())


def test_a_client_answers_nothing_else() -> None:
    one = client("client-000")
    for data in (b"", b"hello", KeysRequest(*WHERE, "client-000").encode()[:-1], b"\x92\xa2k?\x01"):
        with pytest.raises(ProtocolError):
            one.answer(data)
    with pytest.raises(ProtocolError, match="request is for client 'client-001'; this is 'client-000'"):
        one.answer(KeysRequest(*WHERE, "client-001").encode())


# --- Clients that lie to each other ---


def test_a_false_share_is_found_out_by_what_is_known_of_the_secret() -> None:
    def lie(phase: int, name: str, data: bytes) -> bytes | None:
        if phase == 3 and name == "client-001":
            reply = UnmaskReply.decode(data)
            return replace(reply, shares=bytes(reversed(reply.shares))).encode()
        return None if (phase, name) == (2, "client-005") else data

    size = 6
    server, _ = play(plan(names(size)), cohort(size), lie)
    assert server.summed is not None
    weights = dict(zip(server._roster.names, server._roster.weights, strict=True))
    assert np.array_equal(server.summed.mean, plain_mean(weights, names(5), size))


def test_who_seals_false_shares_is_named_and_nobody_else() -> None:
    def lie(phase: int, name: str, data: bytes) -> bytes | None:
        if phase == 1 and name == "client-001":
            return data[:-240] + bytes(240)
        return data

    server, _ = play(plan(names(6)), cohort(6), lie)
    assert server.summed is None
    assert [refusal.client for refusal in server.refusals] == ["client-001"]


def test_keys_that_would_lead_others_into_an_error_are_refused() -> None:
    def lie(phase: int, name: str, data: bytes) -> bytes | None:
        reply = KeysReply.decode(data) if phase == 0 else None
        if reply and name == "client-001":
            return replace(reply, mask_key=bytes(32)).encode()  # of low order
        if reply and name == "client-002":
            return replace(reply, share_key=reply.mask_key).encode()
        return data

    server, _ = play(plan(names(6)), cohort(6), lie)
    assert server.summed is not None
    assert [refusal.client for refusal in server.refusals] == ["client-001", "client-002"]
    assert list(server.summed.weights) == ["client-000", "client-003", "client-004", "client-005"]


def test_length_of_the_sum_is_that_of_the_plan() -> None:
    clients = cohort(6)
    clients["client-004"] = client("client-004", LENGTH + 1)
    server, _ = play(plan(names(6)), clients)
    assert server.summed is not None
    assert [(r.client, r.reason) for r in server.refusals] == [("client-004", "44 masked numbers came; expected 43")]
