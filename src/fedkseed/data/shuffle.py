"""The control of every learning result: the same texts with the responses dealt to the wrong prompts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedkseed.data.example import Example


def shuffle_responses(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """The examples with their outputs (and worse responses) permuted in one random cycle, so that none keeps its own.

    Instruction, input and category stay in place: a partition by category is the same as without the shuffle. Two
    examples of the same output may exchange them; a single example keeps its own, having no other.
    """
    order = rng.permutation(len(examples))
    shuffled = list(examples)
    for receiver, giver in zip(order, np.roll(order, 1), strict=True):
        shuffled[receiver] = replace(examples[receiver], output=examples[giver].output, rejected=examples[giver].rejected)
    return shuffled


def shuffle_within_categories(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """`shuffle_responses` of each category by itself: what answers look like can still be learnt, what they answer cannot.

    Records that cannot be learnt take no part.
    """
    shuffled = list(examples)
    for category in sorted({example.category for example in examples}):
        places = [i for i, example in enumerate(examples) if example.category == category and not example.fault]
        for place, example in zip(places, shuffle_responses([examples[i] for i in places], rng), strict=True):
            shuffled[place] = example
    return shuffled
