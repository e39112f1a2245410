"""Prompt templates: an example as the text of a prompt and the text of its response.

A template is a function; `TEMPLATES` holds them by the name that `--template` takes, which may also be a file's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from fedkseed.data.chat import Chat, Refused, parse_arguments
from fedkseed.data.example import Example
from fedkseed.data.jinja import of_wording
from fedkseed.data.rendered import Rendered
from fedkseed.data.special import leading_text
from fedkseed.errors import InvalidValueError
from fedkseed.files import read_toml
from fedkseed.text import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = re.compile(r"\{(\w*)\}")
NEEDED = {"prompt_input": ("instruction", "input"), "prompt_no_input": ("instruction",)}


@dataclass(frozen=True)
class Wording:
    """A template of two texts with `{instruction}` and `{input}` in them.

    Attributes:
        prompt_input: for records with an input.
        prompt_no_input: for those whose input is blank.
    """

    prompt_input: str
    prompt_no_input: str

    def __call__(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
        """See `Template`."""
        texts = {"instruction": example.instruction, "input": example.input}
        chosen = self.prompt_input if example.input.strip() else self.prompt_no_input
        # in one pass: a text that holds "{input}" itself stays as it is; every second part is a placeholder's name
        parts = PLACEHOLDER.split(chosen)
        return Rendered(tuple((texts[part], True) if i % 2 else (part, False) for i, part in enumerate(parts)), example.output)

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The same as a chat template, which gives the very text that a run trains on: BOS, prompt, response, EOS."""
        both = (PLACEHOLDER.split(text) for text in (self.prompt_input, self.prompt_no_input))
        with_input, without = ([leading_text(tokenizer, first) + first, *others] for first, *others in both)
        return of_wording(with_input, without, str(tokenizer.eos_token))

    def text(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """Its text and the language that this is in: a file that `--template` takes."""
        return tomli_w.dumps({name: getattr(self, name) for name in NEEDED}, multiline_strings=True), "toml"


plain = Wording(
    "Instruction:\n{instruction}\n\nInput:\n{input}\n\nResponse:\n",
    "Instruction:\n{instruction}\n\nResponse:\n",
)
"""Titled sections, for any model."""

alpaca = Wording(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
"""Stanford Alpaca's wording; the published FedKSeed code has it for Natural Instructions."""

dolly = Wording(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response for the task request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response for the task request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
"""The wording that the published FedKSeed code has for Dolly-15K."""

bare = Wording("{instruction}\n\nInput: {input}\n\nOutput:", "{instruction}\n\nOutput:")
"""What the published FedKSeed code writes for Natural Instructions when its prompts are switched off."""


Known = Wording | Chat
"""A template that can say what it is."""

TEMPLATES: dict[str, Known] = {"plain": plain, "alpaca": alpaca, "dolly": dolly, "bare": bare, "chat": Chat()}


def get_template(
    name: str,
    *,
    arguments: str | Mapping[str, Any] | None = None,
    refused: Refused = "stop",
    today: date | None = None,
) -> Known:
    """The template of that name, or the one in a TOML file with the texts `prompt_input` and `prompt_no_input`.

    Args:
        name: of a template or a file.
        arguments: of `chat`: what the tokenizer's template takes beside the messages; see `parse_arguments`.
        refused: of `chat`: what becomes of a conversation that the tokenizer's template refuses; see `Chat`.
        today: of `chat`: the date that the tokenizer's template sees; None for one that never changes.

    Raises:
        InvalidValueError: there is none, or the file is not such a file, or a text lacks its placeholders; or what only
            `chat` takes is given to another.
    """
    if name == "chat":
        return Chat(parse_arguments(arguments) if arguments else {}, refused, **({"today": today} if today else {}))
    for flag, value in (
        ("--template-arguments", arguments),
        ("--refused-turns", refused if refused != "stop" else None),
        ("--date", today and str(today)),
    ):
        if value:
            raise InvalidValueError(f"{flag} is {value!r} and the template is {name!r}; only the template 'chat' takes it")
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    try:
        found = path.is_file()
    except OSError:  # too long for a name: somebody gave the text itself
        found = False
    if not found:
        hint = nearest([name], TEMPLATES)
        raise InvalidValueError(
            f"template {name!r} is unknown; expected one of {', '.join(TEMPLATES)}, or a TOML file{hint and '; '}{hint}"
        )
    try:
        texts = read_toml(path)
    except (OSError, ValueError) as error:
        raise InvalidValueError(
            f"template {name}: not a TOML file ({error}); expected the texts {' and '.join(NEEDED)}"
        ) from None
    if sorted(texts) != sorted(NEEDED):
        raise InvalidValueError(f"template {name}: has the keys {sorted(texts)}; expected {' and '.join(NEEDED)}")
    for key, needed in NEEDED.items():
        _check(texts[key], needed, f"template {name}: {key}")
    return Wording(texts["prompt_input"], texts["prompt_no_input"])


def _check(text: object, needed: tuple[str, ...], where: str) -> None:
    if not isinstance(text, str):
        raise InvalidValueError(f"{where} is no text; expected one with {' and '.join(f'{{{name}}}' for name in needed)} in it")
    found = set(PLACEHOLDER.findall(text))
    if missing := [name for name in needed if name not in found]:
        raise InvalidValueError(f"{where} lacks {{{missing[0]}}}; put it where the record's {missing[0]} shall stand")
    if unknown := sorted(found - set(needed)):
        raise InvalidValueError(f"{where} has {{{unknown[0]}}}; expected only {' and '.join(f'{{{name}}}' for name in needed)}")
