"""One instruction record, whatever file it came from."""

from dataclasses import dataclass

Turn = tuple[str, str]
"""(role, text) of one message of a conversation; the role is system, user or assistant."""


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked, on what, and the wanted answer.

    Attributes:
        instruction: the request.
        input: the text that the request is about; "" where there is none.
        output: the response to learn.
        category: a name that partitions and tables may go by; "" where there is none.
        client: who holds the record, where the source says so; "" where it does not.
        history: the messages before the instruction, for chat templates; `input` has them as text for the others.
    """

    instruction: str
    input: str
    output: str
    category: str
    client: str = ""
    history: tuple[Turn, ...] = ()
