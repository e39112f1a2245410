"""What a run was taught to be asked with, as a chat template in Jinja: vLLM and `apply_chat_template` then ask alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedkseed.errors import InvalidValueError

CONVERSATION = """\
{%- set told = namespace(asked=-1, input='') -%}
{%- set answered = messages[-1].role == 'assistant' and not add_generation_prompt -%}
{%- set before = messages[:-1] if answered else messages -%}
{%- for turn in before -%}{%- if turn.role == 'user' -%}{%- set told.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for turn in before -%}{%- if loop.index0 != told.asked -%}
{%- set told.input = told.input ~ ('\\n\\n' if told.input else '') ~ (turn.role | capitalize) ~ ': ' ~ turn.content -%}
{%- endif -%}{%- endfor -%}
{%- set instruction = before[told.asked].content if told.asked >= 0 else '' -%}
{%- if not told.input and input is defined and input -%}{%- set told.input = input -%}{%- endif -%}
"""
"""Messages as the readers take them apart (`fedkseed.data.conversation.split`): the user's last text is the instruction, the
others are the input, unless the caller gives one."""


def literal(value: Any) -> str:
    """A value as Jinja writes it: a text, finite number, truth value or None, and lists and tables of them.

    Raises:
        InvalidValueError: it is something else, such as a date.
    """
    if isinstance(value, str):
        # Jinja reads the escapes that Python writes
        return '"' + value.encode("unicode_escape").decode().replace('"', '\\"') + '"'
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(key))}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    raise InvalidValueError(f"template_arguments has {value!s:.40}, which no chat template can be given in writing")


def presets(values: Mapping[str, Any]) -> str:
    """Jinja that gives names values where a template's caller gives none."""
    return "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {literal(value)} %}}{{% endif %}}" for name, value in values.items()
    )


def of_wording(with_input: Sequence[str], without: Sequence[str], end: str) -> str:
    """The chat template of two texts.

    Args:
        with_input: a text for records with an input, in parts: every second one is `instruction` or `input`, a placeholder. It
            begins with BOS where the tokenizer has one, which chats get from their template alone.
        without: the same for those without.
        end: what ends a response.
    """

    def written(parts: Sequence[str]) -> str:
        names = {"instruction": "instruction", "input": "told.input"}
        return " ~ ".join(names[part] if i % 2 else literal(part) for i, part in enumerate(parts))

    return (
        f"{CONVERSATION}{{%- if told.input | trim -%}}{{{{ {written(with_input)} }}}}\n"
        f"{{%- else -%}}{{{{ {written(without)} }}}}{{%- endif -%}}\n"
        f"{{%- if answered -%}}{{{{ messages[-1].content ~ {literal(end)} }}}}{{%- endif -%}}"
    )
