"""A few answers before and after, kept in a run's folder for its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fedkseed.data import Example
from fedkseed.errors import RunError
from fedkseed.federation import Checkpoint
from fedkseed.files import write_atomically
from fedkseed.kseed.ledger import Ledger

ANSWERS = "answers.json"
MOST = 20
"""More are not kept: a page shows a few."""


@dataclass(frozen=True)
class Answer:
    """What the base model and the tuned one made of a record.

    Attributes:
        asked: its instruction, and its input below.
        wanted: its response.
        before: the base model's answer.
        after: the tuned model's.
    """

    asked: str
    wanted: str
    before: str
    after: str


def answer_to(record: Example, before: str, after: str) -> Answer:
    """Both models' answers to a record."""
    asked = f"{record.instruction}\n\n{record.input}" if record.input.strip() else record.instruction
    return Answer(asked, record.output, before, after)


def of_ledger_or_round(ledger: Ledger | None, num_rounds: int) -> str:
    """Whose answers they are: a ledger's, by its digest; a baseline's tensors, which take long to read, by their round."""
    return ledger.digest() if ledger else f"round {num_rounds}"


def keep_answers(folder: Path, checkpoint: Checkpoint, answers: Sequence[Answer]) -> None:
    """Write a run's answers, in place of older ones.

    Args:
        folder: the run's.
        checkpoint: whose answers they are.
        answers: the first few are kept.

    Raises:
        RunError: they cannot be written.
    """
    whose = of_ledger_or_round(checkpoint if isinstance(checkpoint, Ledger) else None, checkpoint.round)
    content = {"of": whose, "answers": [asdict(answer) for answer in answers[:MOST]]}
    try:
        write_atomically(folder / ANSWERS, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{folder / ANSWERS}: cannot keep the answers for the report ({error.strerror})") from error


def kept_answers(folder: Path, whose: str) -> tuple[Answer, ...]:
    """Those of a checkpoint; none if there are none, or if the file is damaged, which costs a page but its answers."""
    try:
        content = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
        if content["of"] != whose:
            return ()
        return tuple(Answer(*(str(answer[field.name]) for field in fields(Answer))) for answer in content["answers"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
