"""Secure sums where a model is K numbers: what a client's reply adds to one, and an attempt at a round as a sum.

It needs the extra `secure`; `require_secure` says so before this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedkseed.federation import FederationConfig, Rounds
from fedkseed.federation.envelope import Request
from fedkseed.runs.algorithms import Roles, roles_of
from fedkseed.secure.client import Identity, SumClient, Trained
from fedkseed.secure.server import Plan, SecureSum


def sum_client(name: str, roles: Roles, answer: Callable[[bytes], bytes], identity: Identity | None = None) -> SumClient:
    """A client whose reply is added to a sum in place of being sent.

    Args:
        name: its stable name.
        roles: of its algorithm.
        answer: the client's answer to the algorithm's own request.
        identity: see `SumClient`.
    """

    def train(request: bytes) -> Trained:
        vector, reply = roles.vector(request, answer(request))
        return Trained(vector, reply.loss, reply.num_dropped)

    return SumClient(name, train, roles.terms, identity=identity)


def conversation(config: FederationConfig, server: Rounds[Any, Any], requests: Sequence[tuple[Request, bytes]]) -> SecureSum:
    """The sum of a planned round.

    Args:
        config: the settings.
        server: whose round it is.
        requests: the algorithm's own, and their bytes.
    """
    first, data = requests[0]
    return SecureSum(
        Plan(
            where=(first.run_id, first.server_round, first.attempt),
            train={request.client: data for request, data in requests},
            sizes=server.sizes(),
            terms=roles_of(config.facts).terms(data),
            length=config.num_seeds,
            clip=config.secure_clip,
            max_share=config.max_share,
            min_replies=config.min_replies,
        )
    )
