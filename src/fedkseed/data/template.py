"""Prompt templates: an example as the text of a prompt and the text of its response.

A template is a function; `TEMPLATES` holds them by the name that `--template` takes, which may also be a file's.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed.data.chat import Chat, Refused, parse_arguments
from fedkseed.data.example import Example
from fedkseed.data.rendered import Rendered, Template
from fedkseed.errors import InvalidValueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = re.compile(r"\{(\w*)\}")
NEEDED = {"prompt_input": ("instruction", "input"), "prompt_no_input": ("instruction",)}


def wording(prompt_input: str, prompt_no_input: str) -> Template:
    """A template of two texts with `{instruction}` and `{input}` in them, the second for records with a blank input."""

    def template(example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
        texts = {"instruction": example.instruction, "input": example.input}
        chosen = prompt_input if example.input.strip() else prompt_no_input
        # in one pass: a text that holds "{input}" itself stays as it is; every second part is a placeholder's name
        parts = PLACEHOLDER.split(chosen)
        return Rendered(tuple((texts[part], True) if i % 2 else (part, False) for i, part in enumerate(parts)), example.output)

    return template


plain = wording(
    "Instruction:\n{instruction}\n\nInput:\n{input}\n\nResponse:\n",
    "Instruction:\n{instruction}\n\nResponse:\n",
)
"""Titled sections, for any model."""

alpaca = wording(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
"""Stanford Alpaca's wording; the published FedKSeed code has it for Natural Instructions."""

dolly = wording(
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response for the task request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response for the task request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
"""The wording that the published FedKSeed code has for Dolly-15K."""

bare = wording("{instruction}\n\nInput: {input}\n\nOutput:", "{instruction}\n\nOutput:")
"""What the published FedKSeed code writes for Natural Instructions when its prompts are switched off."""


TEMPLATES: dict[str, Template] = {"plain": plain, "alpaca": alpaca, "dolly": dolly, "bare": bare, "chat": Chat()}


def get_template(
    name: str,
    *,
    arguments: str | Mapping[str, Any] | None = None,
    refused: Refused = "stop",
    today: date | None = None,
) -> Template:
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
    for flag, value in (("--template-arguments", arguments), ("--refused-turns", refused if refused != "stop" else None)):
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
        raise InvalidValueError(f"template {name!r} is unknown; expected one of {', '.join(TEMPLATES)}, or a TOML file")
    try:
        texts = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidValueError(
            f"template {name}: not a TOML file ({error}); expected the texts {' and '.join(NEEDED)}"
        ) from None
    if sorted(texts) != sorted(NEEDED):
        raise InvalidValueError(f"template {name}: has the keys {sorted(texts)}; expected {' and '.join(NEEDED)}")
    for key, needed in NEEDED.items():
        _check(texts[key], needed, f"template {name}: {key}")
    return wording(texts["prompt_input"], texts["prompt_no_input"])


def _check(text: object, needed: tuple[str, ...], where: str) -> None:
    if not isinstance(text, str):
        raise InvalidValueError(f"{where} is no text; expected one with {' and '.join(f'{{{name}}}' for name in needed)} in it")
    found = set(PLACEHOLDER.findall(text))
    if missing := [name for name in needed if name not in found]:
        raise InvalidValueError(f"{where} lacks {{{missing[0]}}}; put it where the record's {missing[0]} shall stand")
    if unknown := sorted(found - set(needed)):
        raise InvalidValueError(f"{where} has {{{unknown[0]}}}; expected only {' and '.join(f'{{{name}}}' for name in needed)}")
