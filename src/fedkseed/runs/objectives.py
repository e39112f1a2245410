"""What a client measures where a run is tuned on something else than the loss: scores of answers, or preferences.

A `Goal` is found once, where the records are; it makes the tasks that clients train on and that evaluations watch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedkseed.data import EncodedExample, Example
from fedkseed.errors import DataError
from fedkseed.evaluation import NOTHING_ASKED, Score, check_score, find_score
from fedkseed.runs.answer_task import Answers
from fedkseed.runs.preferences import BATCH, Preferences
from fedkseed.runs.settings import RunConfig

if TYPE_CHECKING:
    from fedkseed.runs.learner import Learner

Goal = Answers | Preferences


def goal_of(
    config: RunConfig,
    learner: Learner,
    stop_ids: tuple[int, ...],
    examples: Sequence[EncodedExample],
    records: Sequence[Example],
    score: Score | None = None,
    where: str = "--objective",
) -> Goal | None:
    """What a run's settings tune on; None if that is the loss.

    Args:
        config: the settings.
        learner: model and tokenizer.
        stop_ids: what ends a response.
        examples: all records, to look at before the run.
        records: what they were encoded from.
        score: a function in place of the named one.
        where: what messages call the setting.

    Raises:
        ConfigError: there is no such function.
        DataError: it has no number for a record's own response, a record has no prompt, or the model's context has no room for
            an answer to the longest one.
    """
    if config.goal.pairs:
        return Preferences(config, learner)
    if not config.goal.answers:
        return None
    found = score or find_score(config.objective, where)
    check_score(found, records[0], config.objective)
    if any(example.prompt_length == 0 for example in examples):
        raise DataError(NOTHING_ASKED)
    longest, context = max(example.prompt_length for example in examples), learner.traits.context or math.inf
    if longest + config.max_new_tokens > context:
        raise DataError(
            f"--max-new-tokens is {config.max_new_tokens} and the longest prompt has {longest} tokens; {learner.source} takes "
            f"{context}, so lower it or --max-length, which cuts prompts"
        )
    at_once = max(BATCH, config.batch_size)
    return Answers(config.objective, found, learner, stop_ids, config.max_new_tokens, config.temperature, at_once)
