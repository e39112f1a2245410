"""Cohorts of secure sums without models: every client adds numbers of a generator."""

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.secure.client import SumClient, Trained, coded
from fedkseed.secure.fixed_point import FixedPoint
from fedkseed.secure.server import Plan, SecureSum

F64 = NDArray[np.float64]
WHERE = (b"run-of-8", 3, 1)
LENGTH, CLIP = 40, 8.0
PHASES = ("keys", "shares", "masked numbers", "unmasking")


def names(size: int) -> list[str]:
    return [f"client-{i:03}" for i in range(size)]


def trained(name: str, length: int = LENGTH) -> Trained:
    draw = np.random.default_rng([*name.encode()])
    return Trained(draw.standard_normal(length), float(draw.uniform(1, 4)), int(draw.integers(0, 3)))


def terms(request: bytes) -> bytes:
    return hashlib.sha256(request).digest()


def client(name: str, length: int = LENGTH, **options: Any) -> SumClient:
    return SumClient(name, lambda request: trained(name, length), terms, **options)


def cohort(size: int, length: int = LENGTH) -> dict[str, SumClient]:
    return {name: client(name, length) for name in names(size)}


def plan(clients: Collection[str], **changes: Any) -> Plan:
    """Client number i has i + 1 records."""
    settings: dict[str, Any] = {
        "where": WHERE,
        "train": dict.fromkeys(clients, b"train"),
        "sizes": {name: i + 1 for i, name in enumerate(sorted(clients))},
        "terms": terms(b"train"),
        "length": LENGTH,
        "clip": CLIP,
    }
    return Plan(**(settings | changes))


Meddle = Callable[[int, str, bytes], bytes | None]
"""What becomes of a message on its way, by phase from 0 and by client; None: it is lost."""


def untouched(phase: int, name: str, data: bytes) -> bytes | None:
    return data


def play(
    a_plan: Plan, clients: Mapping[str, SumClient], on_reply: Meddle = untouched, on_request: Meddle = untouched
) -> tuple[SecureSum, list[dict[str, bytes]]]:
    """The whole conversation, and the replies of each phase as the server got them."""
    server, heard = SecureSum(a_plan), []
    while not server.over:
        phase, replies = PHASES.index(server.phase), {}
        for name, data in server.ask().items():
            request = on_request(phase, name, data)
            if request is None:
                continue
            try:
                reply = on_reply(phase, name, clients[name].answer(request))
            except ProtocolError:
                continue
            if reply is not None:
                replies[name] = reply
        server.hear(replies.items())
        heard.append(replies)
    return server, heard


def without(phase: int, leaving: Collection[str]) -> Meddle:
    """These clients' replies do not come from a phase on."""
    return lambda now, name, data: None if now >= phase and name in leaving else data


def plain_mean(weights: Mapping[str, float], in_sum: Collection[str], size: int, length: int = LENGTH) -> F64:
    """The same fixed-point sum without masks."""
    coding, total = FixedPoint(CLIP, size), np.zeros(length + 3, np.uint32)
    for name in in_sum:
        total = total + coded(trained(name, length), coding, weights[name])
    return coding.decode(total[:length], sum(weights[name] for name in sorted(in_sum)))


def stages(one: str) -> list[tuple[SecureSum, SumClient, dict[str, bytes], dict[str, bytes]]]:
    """A sum of four clients before each phase: the server, one of the clients, the phase's requests and its replies."""
    server, clients, found = SecureSum(plan(names(4))), cohort(4), []
    while not server.over:
        before = copy.deepcopy(server), copy.copy(clients[one])
        requests = server.ask()
        replies = {name: clients[name].answer(data) for name, data in requests.items()}
        found.append((*before, requests, replies))
        server.hear(replies.items())
    return found
