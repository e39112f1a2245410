"""What server and clients of a baseline say to each other: a head, and tensors as the bytes of a safetensors file."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedkseed.baselines.parameters import Tensors
from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import MAX_STEPS, Reply, Request, check_integer, pack_fields, shown, unpack_fields
from fedkseed.files import safetensors_header
from fedkseed.text import one_line

REQUEST, REPLY = "t?", "t!"
ROOM = 4096
ROOM_PER_TENSOR = 512
"""Bytes that a message may have beyond its numbers: what safetensors says of each tensor, and the head."""


def size_cap(shapes: dict[str, torch.Size]) -> int:
    """The largest message, in bytes, that tensors of these shapes can need."""
    return ROOM + sum(4 * shape.numel() + ROOM_PER_TENSOR for shape in shapes.values())


def pack_tensors(tensors: Tensors) -> bytes:
    """The bytes of a safetensors file, the same for equal tensors."""
    data: bytes = save({name: tensors[name].contiguous() for name in sorted(tensors)})
    return data


def unpack_tensors(data: Any) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file's bytes.

    Raises:
        ProtocolError: they are not.
    """
    if not isinstance(data, bytes):
        raise ProtocolError(f"tensors are {shown(data)}; expected the bytes of a safetensors file")
    try:
        safetensors_header(io.BytesIO(data))
        tensors: dict[str, torch.Tensor] = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ProtocolError(f"tensors are not a safetensors file ({one_line(error, 80)})") from error
    return tensors


def tensors_digest(tensors: bytes) -> bytes:
    """SHA-256 of packed tensors."""
    return hashlib.sha256(tensors).digest()


@dataclass(frozen=True)
class TensorRequest(Request):
    """Server to client: train from these tensors, and send back where that led.

    Attributes:
        run_id, server_round, attempt, client, base, lr, batch_size: see `Request`.
        digest: see `Request`; of the packed tensors.
        algorithm: its name; it says what is tuned, and by which steps.
        steps: local steps.
        tensors: as packed.
    """

    algorithm: str
    steps: int
    tensors: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("number of steps", self.steps, 1, MAX_STEPS)
        if not isinstance(self.algorithm, str):
            raise ProtocolError(f"algorithm is {shown(self.algorithm)}; expected its name")
        if tensors_digest(self.tensors) != self.digest:
            raise ProtocolError("the tensors do not have the digest that came with them; expected what was sent")

    @property
    def num_steps(self) -> int:
        """How many local steps are asked for."""
        return self.steps

    def encode(self) -> bytes:
        """The message's bytes."""
        head = [self.run_id, self.server_round, self.attempt, self.client, self.base, self.digest, self.lr, self.batch_size]
        return pack_fields(REQUEST, [*head, self.algorithm, self.steps, self.tensors])

    @classmethod
    def decode(cls, data: bytes, max_bytes: int) -> TensorRequest:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a request of this version, are too many, or a field is out of its range.
        """
        fields = unpack_fields(data, REQUEST, "request", 11, max_bytes)
        if not isinstance(fields[-1], bytes):
            raise ProtocolError(f"tensors are {shown(fields[-1])}; expected the bytes of a safetensors file")
        return cls(*fields)


@dataclass(frozen=True)
class TensorReply(Reply):
    """Client to server: the tensors after training.

    Attributes:
        run_id, server_round, attempt, client, base, digest, num_examples, loss: see `Reply`.
        dropped: how many steps were dropped, for a loss that was not finite.
        tensors: as packed.
    """

    dropped: int
    tensors: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("number of dropped steps", self.dropped, 0, MAX_STEPS)

    @property
    def num_dropped(self) -> int:
        """How many steps the client dropped."""
        return self.dropped

    def encode(self) -> bytes:
        """The message's bytes."""
        head = [self.run_id, self.server_round, self.attempt, self.client, self.base, self.digest]
        return pack_fields(REPLY, [*head, self.num_examples, self.loss, self.dropped, self.tensors])

    @classmethod
    def decode(cls, data: bytes, max_bytes: int) -> TensorReply:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a reply of this version, are too many, or a field is out of its range.
        """
        return cls(*unpack_fields(data, REPLY, "reply", 10, max_bytes))
