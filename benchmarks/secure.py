"""Secure sums: what a round takes of a client and of the server, in CPU seconds and bytes, against the size of the cohort.

Training is left out: a client's vector is ready. Every message passes through its bytes. A third of the largest cohort leaves
after it has shared its secrets, which costs the server most.
"""

import time
from collections import defaultdict

import numpy as np

from fedkseed.secure.client import SumClient, Trained
from fedkseed.secure.server import Plan, SecureSum

from .harness import Row, report

SIZE = 4096
COHORTS = (10, 30, 100)
REQUEST = 8_700
"""Bytes of a training request."""


def play(size: int, leaving: int) -> tuple[list[float], list[float], list[float], float]:
    """One round: CPU seconds, bytes up and bytes down of each client that stays, and the server's CPU seconds."""
    names = [f"client-{i:03}" for i in range(size)]
    trained = Trained(np.random.default_rng(1).standard_normal(SIZE), 2.0, 0)
    clients = {name: SumClient(name, lambda request: trained, lambda request: bytes(32)) for name in names}
    train, sizes = dict.fromkeys(names, bytes(REQUEST)), dict.fromkeys(names, 100)
    server = SecureSum(Plan((bytes(8), 1, 0), train, sizes, bytes(32), SIZE, 1000.0))
    seconds, up, down, own = (defaultdict(float) for _ in range(4))
    gone = set(names[:leaving])
    for phase in range(4):
        begin = time.process_time()
        messages = server.ask()
        own["server"] += time.process_time() - begin
        replies = []
        for name, data in messages.items():
            if phase >= 2 and name in gone:
                continue
            begin = time.process_time()
            reply = clients[name].answer(data)
            seconds[name] += time.process_time() - begin
            down[name] += len(data)
            up[name] += len(reply)
            replies.append((name, reply))
        begin = time.process_time()
        server.hear(replies)
        own["server"] += time.process_time() - begin
    assert server.summed is not None
    stayed = [name for name in names if name not in gone]
    return *([each[name] for name in stayed] for each in (seconds, up, down)), own["server"]


def row(what: str, values: list[float], unit: str, **budget: float) -> Row:
    return Row(what, float(np.median(values)), unit, min(values), max(values), **budget)


def main() -> None:
    rows = []
    play(5, 1)  # not counted
    for size in COHORTS:
        for leaving in sorted({0, size // 3 if size == COHORTS[-1] else 0}):
            seconds, up, down, server = play(size, leaving)
            case = f"{size} clients" + (f", {leaving} leave" if leaving else "")
            largest = size == COHORTS[-1]
            both = [(a + b) / 1000 for a, b in zip(up, down, strict=True)]
            rows += [
                row(f"{case}: CPU of a client", seconds, "s", **({"must": 1.0} if largest else {})),
                row(f"{case}: bytes of a client, up", [n / 1000 for n in up], "KB"),
                row(f"{case}: bytes of a client, both ways", both, "KB", **({"must": 100.0} if largest else {})),
                row(f"{case}: CPU of the server", [server], "s"),
            ]
    report(f"Secure sums of {SIZE:,} numbers (spread: over the clients of one round)", "secure-cpu", rows)
