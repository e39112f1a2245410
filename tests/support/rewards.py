"""Functions of (record, answer) as a user's module has them."""

from fedkseed.data import Example


def length(record: Example, answer: str) -> float:
    return float(len(answer))


def shortness(record: Example, answer: str) -> float:
    return -float(len(answer))
