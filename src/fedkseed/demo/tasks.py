"""The demo's instruction tasks: eight kinds of short questions with one right answer each, dealt out to 20 clients.

A question's *arguments* (the word whose opposite is asked, the list whose first word is wanted) decide where it may
occur, by a hash that nothing else depends on:

- three in eight are the pretraining corpus's: only these occur there under the headings of the instruction format;
- five in eight are the federation's: three of them the clients', two held out.

So no held-out question was seen in tuning, nor either of them with these headings in pretraining. (The *facts* behind
them, such as which words are opposites, were: see `fedkseed.demo.corpus`.) One kind, `category`, no client has at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import numpy as np

from fedkseed.data import Example
from fedkseed.demo.lexicon import CATEGORIES, COLOURS, IRREGULAR, NAMES, NOUNS, OPPOSITES, SEQUENCES, THINGS, WORDS
from fedkseed.randomness import generator

T = TypeVar("T")

NUM_CLIENTS = 20
RECORDS_PER_CLIENT = 40
HELD_OUT_PER_KIND = 16
HELD_OUT_OF_NEW_KIND = 24
FAVOURED_SHARE = 0.9
"""Of a client's records, those of its two favoured kinds (on average); the rest are of any kind."""


@dataclass(frozen=True)
class Question:
    """What is asked and answered, before it is worded.

    Attributes:
        kind: name of its kind.
        argument: what it is about; a word, a list of words, or two sentences.
        about: what of the argument is asked about, where that leaves a choice (else equal to the argument).
        answer: the one right answer.
    """

    kind: str
    argument: str
    about: str
    answer: str

    @property
    def key(self) -> str:
        """What tells questions apart, however they are worded."""
        return f"{self.kind}|{self.argument}|{self.about}"


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        name: of the kind; the records' category.
        draw: a question of this kind.
        wordings: (instruction, input), with places for `argument` and `about`; an empty input is no input.
        statements: sentences that tell question and answer as a fact.
    """

    name: str
    draw: Callable[[np.random.Generator], Question]
    wordings: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]

    def word(self, question: Question, wording: int) -> Example:
        """A question in one of the kind's wordings, with its right answer."""
        fields = {"argument": question.argument, "about": question.about}
        instruction, text = self.wordings[wording]
        return Example(instruction.format(**fields), text.format(**fields), question.answer, self.name)


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of some items, each as likely."""
    return items[int(rng.integers(len(items)))]


def _opposite(rng: np.random.Generator) -> Question:
    pair = pick(rng, OPPOSITES)
    first = int(rng.integers(2))
    return Question("opposite", pair[first], pair[first], pair[1 - first])


def _plural(rng: np.random.Generator) -> Question:
    word = pick(rng, [noun for noun in NOUNS if noun not in IRREGULAR])
    return Question("plural", word, word, word + "s")


def _letter(rng: np.random.Generator) -> Question:
    word = pick(rng, WORDS)
    return Question("letter", word, word, word[0])


def _after(rng: np.random.Generator) -> Question:
    sequence = SEQUENCES[int(rng.choice(len(SEQUENCES), p=[len(s) / sum(map(len, SEQUENCES)) for s in SEQUENCES]))]
    at = int(rng.integers(len(sequence) - 1))
    return Question("after", sequence[at], sequence[at], sequence[at + 1])


def _list(rng: np.random.Generator) -> list[str]:
    return [str(word) for word in rng.choice(WORDS, int(rng.integers(2, 5)), replace=False)]


def _first(rng: np.random.Generator) -> Question:
    words = _list(rng)
    return Question("first", " ".join(words), " ".join(words), words[0])


def _last(rng: np.random.Generator) -> Question:
    words = _list(rng)
    return Question("last", " ".join(words), " ".join(words), words[-1])


def _colour(rng: np.random.Generator) -> Question:
    names, things, colours = (rng.choice(items, 2, replace=False) for items in (NAMES, THINGS, COLOURS))
    text = " ".join(f"{n} has a {c} {t}." for n, c, t in zip(names, colours, things, strict=True))
    asked = int(rng.integers(2))
    return Question("colour", text, str(things[asked]), str(colours[asked]))


def _category(rng: np.random.Generator) -> Question:
    category = pick(rng, list(CATEGORIES))
    word = pick(rng, CATEGORIES[category])
    return Question("category", word, word, category)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "opposite",
            _opposite,
            (
                ("What is the opposite of {argument}?", ""),
                ("Give the opposite of this word.", "{argument}"),
                ("Say what means not {argument}.", ""),
            ),
            ("The opposite of {argument} is {answer}.", "What is not {argument} is {answer}."),
        ),
        Kind(
            "plural",
            _plural,
            (
                ("What is the plural of {argument}?", ""),
                ("Give the plural of this word.", "{argument}"),
                ("Say what many of one {argument} are.", ""),
            ),
            ("The plural of {argument} is {answer}.", "One {argument} and one {argument} are two {answer}."),
        ),
        Kind(
            "letter",
            _letter,
            (
                ("What is the letter that {argument} begins with?", ""),
                ("Give the letter that this word begins with.", "{argument}"),
                ("Say how {argument} is spelled at the start.", ""),
            ),
            ("The word {argument} begins with {answer}.", "The letter of {argument} at the start is {answer}."),
        ),
        Kind(
            "after",
            _after,
            (
                ("What comes after {argument}?", ""),
                ("Give what comes after this.", "{argument}"),
                ("Say what follows {argument}.", ""),
            ),
            ("After {argument} comes {answer}.", "What follows {argument} is {answer}."),
        ),
        Kind(
            "first",
            _first,
            (
                ("What is the first word?", "{argument}"),
                ("Give the first word of this list.", "{argument}"),
                ("Say the word at the head of the list.", "{argument}"),
            ),
            ("The first word of the list {argument} is {answer}.", "At the head of the list {argument} is {answer}."),
        ),
        Kind(
            "last",
            _last,
            (
                ("What is the last word?", "{argument}"),
                ("Give the last word of this list.", "{argument}"),
                ("Say the word at the end of the list.", "{argument}"),
            ),
            ("The last word of the list {argument} is {answer}.", "At the end of the list {argument} is {answer}."),
        ),
        Kind(
            "colour",
            _colour,
            (
                ("What colour is the {about}?", "{argument}"),
                ("Give the colour of the {about}.", "{argument}"),
                ("Say the colour that the {about} has.", "{argument}"),
            ),
            ("{argument} The {about} is {answer}.", "{argument} The colour of the {about} is {answer}."),
        ),
        Kind(
            "category",
            _category,
            (
                ("What kind of thing is {argument}?", ""),
                ("Give the kind of thing that this is.", "{argument}"),
                ("Say what sort of thing {argument} is.", ""),
            ),
            ("The word {argument} is a kind of {answer}.", "The sort of thing that {argument} is is {answer}."),
        ),
    )
}
HELD_OUT_KIND = "category"
TRAINED_KINDS = tuple(name for name in KINDS if name != HELD_OUT_KIND)


def bucket(question: Question) -> int:
    """Which of eight buckets a question is in, whatever its wording: a fixed hash of its arguments."""
    return blake2b(question.key.encode(), digest_size=1).digest()[0] % 8


def is_reserved(question: Question) -> bool:
    """Whether a question is the federation's, so that the pretraining corpus has it under no heading of the format."""
    return bucket(question) >= 3


def is_held_out(question: Question) -> bool:
    """Whether a question of the federation's is held out from its clients."""
    return bucket(question) >= 6


def clients(seed: int) -> dict[str, list[Example]]:
    """Each client's records by its name, RECORDS_PER_CLIENT each, all distinct within a client.

    A client favours two of the trained kinds, and has few records of others. Clients may share a record.
    """
    names = [f"client-{i:02}" for i in range(NUM_CLIENTS)]
    return {name: _client(generator(seed, "demo", name), place) for place, name in enumerate(names)}


def held_out(seed: int) -> list[Example]:
    """Records that no client has: HELD_OUT_PER_KIND of each trained kind, then HELD_OUT_OF_NEW_KIND of the new one."""
    draw = generator(seed, "demo", "held out")
    records: list[Example] = []
    for name in TRAINED_KINDS:
        records += _distinct(partial(_record, draw, name, is_held_out), HELD_OUT_PER_KIND)
    # no client has this kind, so all of the federation's questions of it are held out
    return records + _distinct(partial(_record, draw, HELD_OUT_KIND, is_reserved), HELD_OUT_OF_NEW_KIND)


def _client(draw: np.random.Generator, place: int) -> list[Example]:
    # the first favourite goes round the kinds, so that each kind is somebody's
    favourite = TRAINED_KINDS[place % len(TRAINED_KINDS)]
    favourites = [favourite, pick(draw, [kind for kind in TRAINED_KINDS if kind != favourite])]

    def record() -> Example:
        pool = favourites if draw.random() < FAVOURED_SHARE else TRAINED_KINDS
        return _record(draw, pick(draw, pool), lambda question: not is_held_out(question))

    return _distinct(record, RECORDS_PER_CLIENT)


def _record(draw: np.random.Generator, kind: str, admitted: Callable[[Question], bool]) -> Example:
    while True:
        question = KINDS[kind].draw(draw)
        if is_reserved(question) and admitted(question):
            return KINDS[kind].word(question, int(draw.integers(len(KINDS[kind].wordings))))


def _distinct(record: Callable[[], Example], number: int) -> list[Example]:
    records: dict[Example, None] = {}
    while len(records) < number:
        records[record()] = None
    return list(records)
