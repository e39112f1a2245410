"""One instruction record, whatever file it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Turn = Mapping[str, Any]
"""One message of a conversation, as chat templates take it: `role`, `content` (a text, perhaps an empty one) and more."""


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked, on what, and the wanted answer.

    Attributes:
        instruction: the request.
        input: the text that the request is about; "" where there is none.
        output: the response to learn.
        category: a name that partitions and tables may go by; "" where there is none.
        client: who holds the record, where the source says so; "" where it does not.
        history: of a conversation all messages before the response, for chat templates; the other templates take
            `instruction` (the user's last text) and `input` (the other messages as text).
        alone: the output is a text to learn as a whole, with no prompt before it.
        fault: why the record cannot be learnt, though its source can be read; "" if it can. Encoding drops and counts it.
        rejected: a worse response than the output, to prefer that one to; "" where there is none.
        where: file and line, for messages.
    """

    instruction: str
    input: str
    output: str
    category: str
    client: str = ""
    history: tuple[Turn, ...] = field(default=(), hash=False)
    alone: bool = False
    fault: str = ""
    rejected: str = ""
    where: str = field(default="", compare=False, repr=False)
