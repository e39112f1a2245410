"""Our own bytes inside Flower's records, and the small messages that only a federation in the field needs."""

from __future__ import annotations

import math
from typing import Annotated, Self

from flwr.app import ConfigRecord, Message, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import check_name
from fedkseed.text import one_line

RECORD, FIELD = "fedkseed", "message"
MAX_SMALL_BYTES = 4096
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def wrap(data: bytes) -> RecordDict:
    """A message's bytes as the one value of the one record of a Flower message."""
    return RecordDict({RECORD: ConfigRecord({FIELD: data})})


def unwrap(message: Message) -> bytes:
    """The bytes that a Flower message carries.

    Raises:
        ProtocolError: it carries an error, or anything else than one such value.
    """
    if message.has_error():
        raise ProtocolError(f"the node answered with an error: {one_line(message.error.reason, 300)}")
    content = message.content
    if list(content) != [RECORD] or RECORD not in content.config_records or list(content.config_records[RECORD]) != [FIELD]:
        raise ProtocolError(f"expected one record {RECORD!r} with one value {FIELD!r}, found others")
    data = content.config_records[RECORD][FIELD]
    if not isinstance(data, bytes):
        raise ProtocolError(f"{FIELD} is {type(data).__name__}; expected bytes")
    return data


class _Small(BaseModel):
    """A message of a few fields, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def encode(self) -> bytes:
        """The message's bytes."""
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not such a message, or a field is out of its range.
        """
        if len(data) > MAX_SMALL_BYTES:
            raise ProtocolError(f"message has {len(data)} bytes; at most {MAX_SMALL_BYTES} are accepted")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ProtocolError(f"not a {cls.__name__} message ({where:.80} {problem['msg']:.120})") from None


class Hello(_Small):
    """Client to server, once for each start of its node: who I am.

    Attributes:
        name: its stable name.
        base: fingerprint of its base weights.
        num_examples: records to train on.
        num_eval_examples: records to evaluate on.
        num_eval_tokens: their response tokens, the most that an evaluation may claim.
        backpropagation: whether it can backpropagate; only algorithms whose clients should ask.
    """

    name: str
    base: Digest
    num_examples: Annotated[int, Field(ge=1, le=2**53)]
    num_eval_examples: Annotated[int, Field(ge=0, le=2**53)]
    num_eval_tokens: Annotated[int, Field(ge=0, le=2**53)] = 0
    backpropagation: bool = True

    @field_validator("name")
    @classmethod
    def _printable(cls, value: str) -> str:
        check_name(value)
        return value


class Lacking(_Small):
    """Client to server, in place of a reply: I have lost pages that the request builds on; send all of them.

    Attributes:
        pages: how many it has.
    """

    pages: Annotated[int, Field(ge=0, le=65535)]


class Evaluation(_Small):
    """Client to server: the loss of its evaluation records under a ledger.

    Attributes:
        ledger: digest of the published ledger that was asked about.
        loss: nats per response token.
        num_examples: records.
        num_tokens: response tokens, which are the loss's weight.
        reward: mean score of its records, of a run that is tuned on scores.
    """

    ledger: Digest
    loss: float
    num_examples: Annotated[int, Field(ge=1, le=2**53)]
    num_tokens: Annotated[int, Field(ge=1, le=2**53)]
    reward: float | None = None

    @field_validator("loss", "reward")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be finite")
        return value
