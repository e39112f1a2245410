"""What a template makes of an example: texts that it wrote itself and texts of the record, told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedkseed.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt and its response, which follows with nothing between.

    Attributes:
        parts: the prompt in parts, each with whether it is the record's own text. What the template wrote may hold special
            tokens; in a record's own text their names are text like any other.
        response: the record's own text.
        end: what the template writes behind an answer of the assistant's; "" where it says nothing of it.
        fault: why the template cannot take the example; "" if it can. Then encoding drops and counts it.
    """

    parts: tuple[tuple[str, bool], ...]
    response: str
    end: str = ""
    fault: str = ""

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return "".join(text for text, _ in self.parts)


Template = Callable[[Example, "PreTrainedTokenizerBase"], Rendered]
"""(example, tokenizer) -> what the example becomes."""
