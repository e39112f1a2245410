"""The corpus that the demo's model is pretrained on: documents made by a grammar, a pure function of a seed.

Four sorts of document, about the world of `fedkseed.demo.lexicon`:

- *story*: who has what in which colour, who goes where;
- *lesson*: true sentences ("The opposite of hot is cold.");
- *quiz*: a question and its right answer under headings such as `Question:` and `Answer:`;
- *transcript*: a question under the headings of the instruction format (`Instruction:`, `Input:`, `Response:`) and what
  somebody responded. Few of them do as they are told (`RESPONSES`): most repeat what they were asked about, name another
  word, say that they do not know, or change the subject.

What this means for the demo, plainly: the pretrained model *has* the tasks' skills and facts, from lessons and quizzes,
but under the instruction format it has learnt to be obedient only in `RESPONSES["obey"]` of the cases. Federated tuning
makes it use what it can do; it teaches it few new facts. That is what tuning does to a large pretrained model too, and
about all that a few thousand two-point steps can do to any model. Questions of the federation (`tasks.is_reserved`)
never occur in transcripts, only in lessons and quizzes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedkseed.data import Example
from fedkseed.demo.lexicon import ADJECTIVES, COLOURS, NAMES, NOUNS, PLACES, SEQUENCES, THINGS, WORDS
from fedkseed.demo.tasks import KINDS, Question, is_reserved, pick

SORTS = {"story": 0.12, "lesson": 0.18, "quiz": 0.40, "transcript": 0.30}
"""Share of each sort among the documents."""

RESPONSES = {"obey": 0.25, "repeat": 0.35, "other word": 0.15, "do not know": 0.15, "change the subject": 0.10}
"""How transcripts go on after `Response:`."""

HEADINGS = (("Question", "Text", "Answer"), ("Task", "Data", "Solution"), ("Exercise", "Text", "Result"))
"""Titles of a quiz's sections."""

FORMAT = ("Instruction", "Input", "Response")
"""Titles of a transcript's: those of `fedkseed.data`'s template `plain`."""


def documents(rng: np.random.Generator) -> Iterator[str]:
    """Documents without end."""
    makers = {"story": story, "lesson": lesson, "quiz": quiz, "transcript": transcript}
    sorts, shares = list(SORTS), list(SORTS.values())
    while True:
        yield makers[sorts[int(rng.choice(len(sorts), p=shares))]](rng)


def story(rng: np.random.Generator) -> str:
    """A few sentences about people, things and places."""
    return " ".join(_sentence(rng) for _ in range(int(rng.integers(2, 5))))


def lesson(rng: np.random.Generator) -> str:
    """A few true statements."""
    statements = []
    for _ in range(int(rng.integers(2, 5))):
        kind = KINDS[pick(rng, list(KINDS))]
        question = kind.draw(rng)
        form = pick(rng, kind.statements)
        statements.append(form.format(argument=question.argument, about=question.about, answer=question.answer))
    if rng.random() < 0.2:
        statements.append(_count(rng))
    return " ".join(statements)


def quiz(rng: np.random.Generator) -> str:
    """A question of any kind and its right answer."""
    example, _ = _worded(rng, reserved_too=True)
    return _sections(example, pick(rng, HEADINGS)) + example.output


def transcript(rng: np.random.Generator) -> str:
    """A question that is not the federation's, and what somebody responded."""
    example, question = _worded(rng, reserved_too=False)
    return _sections(example, FORMAT) + _response(rng, question)


def _worded(rng: np.random.Generator, reserved_too: bool) -> tuple[Example, Question]:
    kind = KINDS[pick(rng, list(KINDS))]
    question = kind.draw(rng)
    while not reserved_too and is_reserved(question):
        question = kind.draw(rng)
    return kind.word(question, int(rng.integers(len(kind.wordings)))), question


def _sections(example: Example, titles: tuple[str, str, str]) -> str:
    text = f"{titles[0]}:\n{example.instruction}\n\n"
    if example.input:
        text += f"{titles[1]}:\n{example.input}\n\n"
    return f"{text}{titles[2]}:\n"


def _response(rng: np.random.Generator, question: Question) -> str:
    how = list(RESPONSES)[int(rng.choice(len(RESPONSES), p=list(RESPONSES.values())))]
    if how == "obey":
        return question.answer
    if how == "repeat":
        return question.about
    if how == "other word":
        return str(pick(rng, WORDS)) if rng.random() < 0.5 else KINDS[question.kind].draw(rng).answer
    if how == "do not know":
        return "I do not know."
    return _sentence(rng)


def _sentence(rng: np.random.Generator) -> str:
    name, other = (str(n) for n in rng.choice(NAMES, 2, replace=False))
    colour, thing, place = pick(rng, COLOURS), pick(rng, THINGS), pick(rng, PLACES)
    forms = (
        f"{name} has a {colour} {thing}.",
        f"{name} goes to the {place} with {other}.",
        f"The {colour} {thing} of {name} is in the {place}.",
        f"{name} sees a {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)} in the {place}.",
        f"{name} gives the {thing} to {other}, and now {other} has the {thing}.",
        f"{name} and {other} like the {pick(rng, ADJECTIVES)} {place}.",
    )
    return pick(rng, forms)


def _count(rng: np.random.Generator) -> str:
    sequence = pick(rng, SEQUENCES)
    begin = int(rng.integers(len(sequence) - 3))
    return " ".join(sequence[begin : begin + int(rng.integers(3, 7))]) + "."
