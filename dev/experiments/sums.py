"""A verifiable task that SmolLM2-135M half knows: sums of two numbers of two digits, behind two that are worked out.

The base model is right in about a third of them. Every ordered pair of numbers from 10 to 49 belongs to one client, is
held out, or is left; which, the seed says. Answers have two digits, each a token of SmolLM2's.
"""

from itertools import product
from pathlib import Path

from fedkseed.data import Example
from fedkseed.randomness import generator

TEMPLATE = Path(__file__).with_suffix(".toml")
WORKED = "12 + 7 = 19\n5 + 26 = 31"
NUMBERS = range(10, 50)
NUM_CLIENTS, RECORDS_PER_CLIENT, HELD_OUT = 10, 128, 256


def clients(seed: int) -> dict[str, list[Example]]:
    """Each client's records by its name."""
    dealt = _records(seed)[HELD_OUT:]
    return {f"client-{i}": dealt[i * RECORDS_PER_CLIENT : (i + 1) * RECORDS_PER_CLIENT] for i in range(NUM_CLIENTS)}


def held_out(seed: int) -> list[Example]:
    """Records that no client has."""
    return _records(seed)[:HELD_OUT]


def _records(seed: int) -> list[Example]:
    records = [Example(WORKED, f"{a} + {b}", str(a + b), "sum") for a, b in product(NUMBERS, repeat=2)]
    return [records[i] for i in generator(seed, "sums").permutation(len(records))]
