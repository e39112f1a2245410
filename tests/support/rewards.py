"""Functions of (record, answer) as a user's module has them."""

from fedkseed.data import Example


def shortness(record: Example, answer: str) -> float:
    return -float(len(answer))
