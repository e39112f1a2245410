"""Prompt templates: an example as the text of a prompt and the text of its response.

A template is a function; `TEMPLATES` holds them by the name that `--template` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedkseed.data.example import Example
from fedkseed.errors import InvalidValueError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Callable[[Example, "PreTrainedTokenizerBase"], tuple[str, str]]
"""(example, tokenizer) -> (prompt, response); the response follows the prompt with nothing between, EOS comes later."""


def plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Titled sections for any model; no input section when the input is blank. The tokenizer is ignored."""
    sections = [f"Instruction:\n{example.instruction}\n\n"]
    if example.input.strip():
        sections.append(f"Input:\n{example.input}\n\n")
    return "".join(sections) + "Response:\n", example.output


def chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The tokenizer's own chat template: one user turn, then the opening of the assistant's.

    Raises:
        ModelError: the tokenizer has no chat template, or its template refuses such a conversation.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use the template 'plain'")
    content = f"{example.instruction}\n\n{example.input}" if example.input.strip() else example.instruction
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            # some templates print today's date, and a resumed run must see the prompts of the first day
            date_string="26 Jul 2024",
        )
    except Exception as error:  # a template is a program of the model's author and may raise anything
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path} failed on a single user turn ({reason}); use the template 'plain'"
        ) from error
    return str(prompt), example.output


TEMPLATES: dict[str, Template] = {"plain": plain, "chat": chat}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        InvalidValueError: there is none.
    """
    if name not in TEMPLATES:
        raise InvalidValueError(f"template {name!r} is unknown; expected one of {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]
