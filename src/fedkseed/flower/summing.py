"""A node's part in secure sums: its answers to the phases, what it keeps between them, and its key beside the others'.

What it keeps lies in the context that Flower hands it with each message, and that the SuperNode holds in memory. It travels to
the process that answers beside the message, and comes back beside the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
from flwr.app import ConfigRecord, Context

from fedkseed.errors import ConfigError, ProtocolError
from fedkseed.flower.envelope import FIELD, Lacking

if TYPE_CHECKING:  # torch comes with it, which what hands messages on does without
    from fedkseed.flower.config import Node

SECRETS = "fedkseed-secure-sums"
"""The record of a node's state."""


def is_on(context: Context) -> bool:
    """Whether the run's server learns sums only."""
    return context.run_config.get("secure-sums") == "on"


def with_kept(context: Context, data: bytes) -> bytes:
    """A message beside what the node keeps."""
    records = context.state.config_records
    packed: bytes = msgpack.packb([records[SECRETS][FIELD] if SECRETS in records else b"", data])
    return packed


def kept(context: Context, data: bytes) -> bytes:
    """The answer of what `answer` gave; what the node keeps from now on is in its context."""
    state, reply = msgpack.unpackb(data)
    context.state[SECRETS] = ConfigRecord({FIELD: state})
    return bytes(reply)


def answer(node: Node, name: str, train: Callable[[bytes], bytes], data: bytes) -> bytes:
    """The answer to a message of any phase, beside what the node keeps from now on.

    Args:
        node: its settings.
        name: its client's.
        train: the answer to the algorithm's own request.
        data: of `with_kept`.

    Raises:
        ProtocolError: see `SumClient.answer`.
        ConfigError: the extra or the node's key is missing.
    """
    from fedkseed.runs.algorithms import roles_of
    from fedkseed.runs.extras import require_secure

    require_secure(node.config)
    from fedkseed.runs.sums import sum_client

    def trained(request: bytes) -> bytes:
        reply = train(request)
        try:
            Lacking.decode(reply)
        except ProtocolError:
            return reply
        raise _LacksPagesError(reply)

    state, message = msgpack.unpackb(data)
    identity = None if node.key is None or node.keys is None else NodeIdentity(node.key, node.keys)
    client = sum_client(name, roles_of(node.config.facts), trained, identity)
    client.state = state
    try:
        reply = client.answer(message)
    except _LacksPagesError as lacking:
        reply = lacking.answer
    packed: bytes = msgpack.packb([client.state, reply])
    return packed


class _LacksPagesError(Exception):
    """The training request builds on pages that are not here; the node's answer says so."""

    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.answer = answer


class NodeIdentity:
    """A node's own key and the others' public ones, as files that did not come from the server.

    Args:
        key: its private key, the one that the SuperNode has.
        keys: a folder with `NAME.pub` of every client.

    Raises:
        ConfigError: the key cannot be read or used.
    """

    def __init__(self, key: Path, keys: Path) -> None:
        from fedkseed.secure.primitives import NodeKey

        self._keys = keys
        try:
            self._key = NodeKey.read(key.read_bytes())
        except OSError as error:
            raise ConfigError(f"node-config key is {str(key)!r}: cannot read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"node-config key is {str(key)!r}: {error}") from error

    def sign(self, data: bytes) -> bytes:
        """See `fedkseed.secure.client.Identity`."""
        return self._key.sign(data)

    def check(self, name: str, data: bytes, signature: bytes) -> None:
        """See `fedkseed.secure.client.Identity`."""
        from fedkseed.secure.primitives import verify

        path = self._keys / f"{name}.pub"
        if "/" in name or name.startswith("."):
            raise ProtocolError(f"client name {name!r} can be no file's; rename it, or leave out keys in the node-config")
        try:
            public = path.read_bytes()
        except OSError as error:
            raise ProtocolError(
                f"no public key of {name!r} here ({error.strerror}); put {path.name} into the folder keys of the node-config"
            ) from error
        if not verify(public, data, signature):
            raise ProtocolError(
                f"the keys that came for {name!r} are not signed by {path.name}: somebody between the nodes has put in others, "
                "or that file is not its node's"
            )
