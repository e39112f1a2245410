"""Special tokens: a template may write them; where a record's own text has their names, they stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fedkseed.data.cache import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parts = Sequence[tuple[str, bool]]
"""A text in parts, each with whether it is a record's own."""


def control_tokens(tokenizer: PreTrainedTokenizerBase, ending: str = "") -> list[str]:
    """The names of the tokens that mean something to a model beside their letters, longest first.

    These are the special ones, and of those that were merely added the ones in what ends an assistant's turn.
    """
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token.content) for token in added if token.special or token.content in ending}
    names |= set(map(str, tokenizer.all_special_tokens))
    return sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))


def end_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How a response ends.

    Args:
        text: what the template writes behind an answer.
        tokenizer: it has an EOS token.

    Returns:
        The ids of the text up to its first control token, without the blanks before it; EOS alone where it has none.
    """
    match = re.search("|".join(map(re.escape, control_tokens(tokenizer, text))), text)
    if not text or match is None:
        return [_id(tokenizer, str(tokenizer.eos_token))]
    return token_ids(tokenizer, [text[: match.end()].lstrip()])[0]


def leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before any text by default: usually BOS or nothing."""
    full: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[: next(at, 0)]


def leading_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What to write before a text so that it begins with these ids: their names, or "" where it does so by itself."""
    ids = leading_specials(tokenizer)
    if token_ids(tokenizer, [text])[0][: len(ids)] == ids:
        return ""
    return "".join(str(tokenizer.convert_ids_to_tokens(i)) for i in ids)


def _id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]  # a list for a list


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> TokenIds:
    """The ids of texts in which the names of special tokens are these tokens; none are added."""
    # verbose=False: no advice about the model's own maximum length, max_length is ours to keep
    ids: TokenIds = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


class TextEncoder:
    """Texts in parts become ids; names of control tokens in a record's own part stay text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        control: the names of the control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._names = re.compile("|".join(map(re.escape, control)) or "(?!)")
        unknown = tokenizer.unk_token  # which any text may become, where it is not also what ends one
        self._ids = {_id(tokenizer, name) for name in control if name != unknown or name == tokenizer.eos_token}

    def encode(self, texts: Sequence[Parts]) -> TokenIds:
        """The ids of each text."""
        wholes = ["".join(text for text, _ in parts) for parts in texts]
        named = [i for i, whole in enumerate(wholes) if self._names.search(whole) and self._has_own(texts[i], whole)]
        ids = token_ids(self._tokenizer, wholes) if wholes else []
        for i in named:
            ids[i] = self._apart(texts[i], wholes[i])
        return ids

    def _has_own(self, parts: Parts, whole: str) -> bool:
        return len(self._written(parts, whole)) < len(self._names.findall(whole))

    def _written(self, parts: Parts, whole: str) -> list[re.Match[str]]:
        """The control tokens that the template wrote."""
        ends = [0]
        for text, _ in parts:
            ends.append(ends[-1] + len(text))
        spans = [span for span, (_, own) in zip(pairwise(ends), parts, strict=True) if not own]
        found = self._names.finditer(whole)
        return [match for match in found if any(first <= match.start() and match.end() <= last for first, last in spans)]

    def _apart(self, parts: Parts, whole: str) -> list[int]:
        """The ids of what is between the template's control tokens, all of it text, and of these tokens."""
        ids: list[int] = []
        place = 0
        for match in self._written(parts, whole):
            ids += self._text(whole[place : match.start()])
            ids.append(_id(self._tokenizer, match[0]))
            place = match.end()
        return ids + self._text(whole[place:])

    def _text(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if self._ids.isdisjoint(ids):
            return ids
        # a tokenizer that knows the name all the same, as a piece or an added token; nothing is known by half its name
        cuts = [0, *(match.start() + 1 for match in self._names.finditer(text)), len(text)]
        pieces = [text[first:last] for first, last in pairwise(cuts) if first < last]
        return [i for piece in token_ids(self._tokenizer, pieces) for i in piece]
