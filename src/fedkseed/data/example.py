"""One instruction record, whatever file it came from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked, on what, and the wanted answer.

    Attributes:
        instruction: the request.
        input: the text that the request is about; "" where there is none.
        output: the response to learn.
        category: a name that partitions may go by; "" where there is none.
        client: who holds the record, where the file says so; "" where it does not.
    """

    instruction: str
    input: str
    output: str
    category: str
    client: str = ""
