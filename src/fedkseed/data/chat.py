"""The template `chat`: the tokenizer's own chat template, asked what it takes rather than trusted."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from fedkseed.data.example import Example, Turn
from fedkseed.data.jinja import literal, presets
from fedkseed.data.rendered import Rendered
from fedkseed.data.special import control_tokens, leading_text
from fedkseed.data.values import is_whole, texts_in
from fedkseed.errors import InvalidValueError, ModelError
from fedkseed.text import nearest, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Refused = Literal["stop", "fold", "drop"]
FIXED_DAY = date(2024, 7, 26)
"""The date that Llama's templates print where they know none."""
CALENDAR = """\
{% macro strftime_now(format) %}{% for part in format.replace('%%', '\\x01').split('%') %}\
{% set n = 0 if loop.first else 2 if part[:1] in ('-', '#') else 1 %}\
{{ (fedkseed_days[part[:n]] + part[n:]).replace('\\x01', '%') }}{% endfor %}{% endmacro %}
"""
"""Takes the place of transformers' function of this name, which reads the clock. Newer versions pass no functions to a
template, so it is one in the template's own language, over a table of what each letter stands for."""
LETTERS = "aAbBcdDeFGHIjmMpSTuUVwWxXyYZz"
MARKS = range(0xF0000, 0xFFFFE)
"""Characters of a private plane, which stand for special tokens' names while a template works on a text."""


@dataclass(frozen=True)
class Chat:
    """The tokenizer's chat template: what was said before, then the opening of the assistant's turn.

    Attributes:
        arguments: what the template takes beside the messages, such as `enable_thinking`.
        refused: what becomes of a conversation that the template refuses, or of which it leaves out a turn. `stop` ends with
            a line that names the record; `fold` puts system turns into the user's and joins neighbours of one role;
            `drop` drops the record and counts it. One with tools' turns is always dropped and counted.
        today: the date that the template sees.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    refused: Refused = "stop"
    today: date = FIXED_DAY
    _ends: dict[tuple[str, str], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
        """See `Template`.

        Raises:
            ModelError: the tokenizer has no chat template, its template does not know an argument, or it refuses a
                conversation that is not to be dropped.
        """
        template = self._template(tokenizer)
        turns: Sequence[Turn] = example.history
        if not turns:
            asked = f"{example.instruction}\n\n{example.input}" if example.input.strip() else example.instruction
            turns = [{"role": "user", "content": asked}]
        end = self._end(template, tokenizer)
        marks = _marks(turns, control_tokens(tokenizer, end))
        prompt, reason = self._asked(template, _marked(turns, marks), tokenizer)
        if prompt is None and self.refused == "fold":
            folded, why = self._asked(template, _marked(fold(turns), marks), tokenizer)
            prompt, reason = folded, f"{reason}; folded: {why}"
        if prompt is not None:
            return Rendered(_parts(prompt, marks), example.output, end)
        if self.refused == "drop" or any(turn["role"] not in ("system", "user", "assistant") or _calls(turn) for turn in turns):
            return Rendered((), "", fault=f"the chat template refuses it: {reason}")
        raise ModelError(
            f"{example.where or 'a record'}: the chat template of {tokenizer.name_or_path} refuses it ({reason}); give "
            "--refused-turns fold (system turns go into the user's) or drop (the record is left out), or the template 'plain'"
        )

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The tokenizer's chat template, with what it lacks of what it was used with: the run's arguments and its date, where
        its caller gives none, and BOS, which tokenizers put before other texts only.

        Raises:
            ModelError: see `__call__`.
        """
        template = self._template(tokenizer)
        words = set(re.findall(r"[A-Za-z_]\w*", template))
        seen = {name: value for name, value in self._seen(template).items() if name in words}
        asked, _ = self._asked(template, [{"role": "user", "content": "A question."}], tokenizer)
        if asked is not None and (start := leading_text(tokenizer, asked)):
            template = f"{{{{ {literal(start)} }}}}{template}"
        return presets(seen) + template

    def text(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """Its text and the language that this is in."""
        return self.chat_template(tokenizer), "jinja"

    def _template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        if not tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; use the template 'plain'")
        try:
            template = str(tokenizer.get_chat_template())
        except ValueError as error:  # several templates, and none of them is the usual one
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no usual chat template ({one_line(error)}); use 'plain'"
            ) from None
        for name in self.arguments:
            words = set(re.findall(r"[A-Za-z_]\w*", template))
            if name not in words:
                hint = nearest([name], words) or "leave it out"
                raise ModelError(f"the chat template of {tokenizer.name_or_path} has no argument {name!r}; {hint}")
        return CALENDAR + template if "strftime_now" in template else template

    def _asked(self, template: str, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str]:
        """The prompt, or None and why the template does not take the turns."""
        try:
            prompt = self._render(template, turns, tokenizer)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            return None, one_line(error)
        for i, turn in enumerate(turns):
            if _calls(turn) or (turn["role"] not in ("user", "assistant") and turn["content"].strip()):
                # a template that passes over a turn says nothing; but then another one in its place changes nothing
                try:
                    passed_over = self._render(template, [*turns[:i], _other(turn), *turns[i + 1 :]], tokenizer) == prompt
                except Exception:  # it has looked at it
                    continue
                if passed_over:
                    return None, f"it leaves out the {'calls of tools' if _calls(turn) else 'turn'} of role {turn['role']!r}"
        return prompt, ""

    def _render(self, template: str, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, opened: bool = True) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": opened, **self._seen(template)}
        return str(tokenizer.apply_chat_template([dict(turn) for turn in turns], chat_template=template, **options))

    def _seen(self, template: str) -> dict[str, Any]:
        """What a template is given beside the messages."""
        seen: dict[str, Any] = {"date_string": self.today.strftime("%d %b %Y")}
        if template.startswith(CALENDAR):
            days = {letter: self.today.strftime(f"%{letter}") for letter in LETTERS}
            days |= {f"{sign}{letter}": text.lstrip("0 ") or "0" for letter, text in days.items() for sign in "-#"} | {"": ""}
            seen["fedkseed_days"] = days
        return seen | dict(self.arguments)

    def _end(self, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the template writes behind an answer; "" where that cannot be told."""
        key = (template, str(tokenizer.special_tokens_map))
        if key not in self._ends:
            answer = "An answer."
            turns: list[Turn] = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
            try:
                text = self._render(template, turns, tokenizer, opened=False)
            except Exception:  # as above; a template that knows no answers ends none
                text = ""
            self._ends[key] = text.rpartition(answer)[2] if answer in text else ""
        return self._ends[key]


def fold(turns: Sequence[Turn]) -> list[Turn]:
    """A conversation without system (or developer) turns, whose text is put before the next of the user's, and with the
    texts of neighbours of one role joined."""
    folded: list[dict[str, Any]] = []
    for turn in turns:
        one = {**turn, "role": "user" if turn["role"] in ("system", "developer") else turn["role"]}
        if folded and folded[-1]["role"] == one["role"] and not _calls(folded[-1]) and not _calls(one):
            folded[-1] = {**folded[-1], "content": f"{folded[-1]['content']}\n\n{one['content']}"}
        else:
            folded.append(one)
    return list(folded)


def parse_arguments(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `enable_thinking=false,budget=3` says: values as in TOML, other words as texts.

    Raises:
        InvalidValueError: a part that is not name=value, or a value that a chat template cannot be given in writing.
    """
    if isinstance(given, Mapping):
        return dict(given)
    try:
        arguments: dict[str, Any] = tomllib.loads(f"table = {{{given}}}")["table"]
        return arguments
    except tomllib.TOMLDecodeError:  # a text without quotes, perhaps
        arguments = {}
    for part in given.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not (name.isidentifier() and value):
            raise InvalidValueError(
                f"template_arguments has {part.strip()!r}; expected name=value, such as enable_thinking=false"
            )
        try:
            arguments[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            arguments[name] = value
    return arguments


def arguments_text(given: Mapping[str, Any]) -> str:
    """Arguments as `parse_arguments` reads them.

    Raises:
        InvalidValueError: a name that is none, or a value that TOML has not, such as None.
    """
    for name in given:
        if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
            raise InvalidValueError(f"template_arguments has the name {name!r:.40}; expected one such as enable_thinking")
    return ",".join(f"{name}={_toml(name, value)}" for name, value in given.items())


def _toml(name: str, value: Any) -> str:
    """An argument's value as TOML has it on one line."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return "{" + ", ".join(f"{_toml(name, key)} = {_toml(name, item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(name, item) for item in value) + "]"
    if isinstance(value, str) and is_whole(value):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (int, float)):
        return str(value).lower()  # a truth value, or a number
    if isinstance(value, date):
        return value.isoformat()
    raise InvalidValueError(
        f"template_arguments has {name} = {value!r:.40}; expected a text, a number, a truth value, a date, or lists and tables "
        "of them"
    )


def _calls(turn: Turn) -> bool:
    return bool(turn.get("tool_calls"))


def _other(turn: Turn) -> Turn:
    """The same turn with something else in it."""
    if _calls(turn):
        calls = [
            {**call, **({"function": {**call["function"], "name": "another"}} if "function" in call else {"name": "another"})}
            for call in turn["tool_calls"]
        ]
        return {**turn, "tool_calls": calls}
    return {**turn, "content": f"{turn['content']} and more"}


def _marks(turns: Sequence[Turn], tokens: Sequence[str]) -> dict[str, str]:
    """For each special token that a turn names a character that none of them has."""
    texts = "".join(texts_in(turns))
    free = (chr(code) for code in MARKS if chr(code) not in texts)
    return dict(zip([token for token in tokens if token in texts], free, strict=False))


def _marked(value: Any, marks: Mapping[str, str]) -> Any:
    """The same value with marks in its texts for what they stand for."""
    if isinstance(value, str):
        for token, mark in marks.items():  # the longest first
            value = value.replace(token, mark)
        return value
    if isinstance(value, Mapping):
        return {key: _marked(item, marks) for key, item in value.items()}
    return [_marked(item, marks) for item in value] if isinstance(value, (list, tuple)) else value


def _parts(prompt: str, marks: Mapping[str, str]) -> tuple[tuple[str, bool], ...]:
    """A prompt in parts: the special tokens that the record names are its own text."""
    if not marks:
        return ((prompt, False),)
    names = {mark: token for token, mark in marks.items()}
    parts = re.split("([" + "".join(names) + "])", prompt)
    return tuple((names.get(part, part), part in names) for part in parts if part)
