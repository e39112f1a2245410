"""A million clients: the server alone, and the server behind a hundred edges, with synthetic replies in one round.

K = 4096, 200 steps, float16, the default rule; every client is asked and replies. Requests are planned and encoded first, then
replies come, so that no request is still there when its reply is checked. Seconds are of the CPU, one thread each; what
synthetic clients take is left out. The edges are in four processes beside the server's.
"""

import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fedkseed.federation import FederationConfig
from fedkseed.federation.edge import Edge
from fedkseed.federation.edge_round import EdgeRound
from fedkseed.federation.envelope import Request
from fedkseed.kseed.messages import TrainReply
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.server import Server, start
from fedkseed.kseed.steps import GRAD_EXPONENT
from fedkseed.models.identity import BaseIdentity

from .harness import Row, report

STEPS, SEEDS, EDGES, PROCESSES = 200, 4096, 100, 4
COUNTS = (10_000, 1_000_000)
BASE = BaseIdentity.of({"w": bytes(32)})
CONFIG = FederationConfig(
    lr=1e-5, fraction_train=1.0, local_steps=STEPS, num_seeds=SEEDS, num_rounds=2, summation="exact", max_examples=10**6
)
Figures = dict[str, Any]


class Clients:
    """Synthetic ones, with scalars of their own, and what they take."""

    def __init__(self) -> None:
        self.seconds, self.up = 0.0, 0

    def replies(self, head: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            begin = time.process_time()
            draw = np.random.default_rng(int(name[-7:]))
            numbers = pack(draw.standard_normal(STEPS), "float16", GRAD_EXPONENT)
            reply = TrainReply(**head | {"client": name}, num_examples=50, projected_grads=numbers, loss=2.0).encode()
            self.up += len(reply)
            self.seconds += time.process_time() - begin
            yield name, reply


def named(count: int) -> list[str]:
    return [f"client-{i:07}" for i in range(count)]


def peak() -> float:
    """Mebibytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def encoded(requests: Sequence[Request]) -> int:
    return sum(len(request.encode()) for request in requests)


def alone(connection: Connection, count: int) -> None:
    """A server that hears every client."""
    names, before = named(count), peak()
    server, clients = Server(CONFIG, start(CONFIG, BASE), names), Clients()
    begin = time.process_time()
    requests = server.plan()
    down = encoded(requests)
    planned = time.process_time() - begin
    begin = time.process_time()
    server.absorb(clients.replies(requests[0].head(), names))
    absorbed = time.process_time() - begin - clients.seconds
    connection.send(
        {
            "plan": planned,
            "absorb": absorbed,
            "memory": peak() - before,
            "down": down,
            "up": clients.up,
            "digest": server.ledger.digest(),
        }
    )


def edges(connection: Connection, count: int, process: int) -> None:
    """Some of a hundred edges, which answer what the server's process asks until it sends None."""
    names, before = named(count), peak()
    mine = {edge: Edge(edge, Server(CONFIG, BASE, None), names[i::EDGES]) for i, edge in hosted(process)}
    clients, seconds, down, opened = Clients(), dict.fromkeys(mine, 0.0), 0, set[str]()
    while (message := connection.recv()) is not None:
        name, data = message
        edge, begin, theirs = mine[name], time.process_time(), clients.seconds
        if name in opened:
            answer = edge.answer(data)
        else:
            opened.add(name)
            requests = edge.open(data)
            down += encoded(requests)
            answer = edge.close(clients.replies(requests[0].head(), names[int(name[-3:]) :: EDGES]))
        seconds[name] += time.process_time() - begin - (clients.seconds - theirs)
        connection.send(answer)
    connection.send({"seconds": [*seconds.values()], "memory": peak() - before, "down": down, "up": clients.up})


def hosted(process: int) -> list[tuple[int, str]]:
    """The edges of a process, with their numbers."""
    return [(i, f"edge-{i:03}") for i in range(process, EDGES, PROCESSES)]


def behind_edges(connection: Connection, count: int) -> None:
    """A server behind edges, which other processes have."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(PROCESSES)]
    processes = [context.Process(target=edges, args=(there, count, i)) for i, (_, there) in enumerate(pipes)]
    for process in processes:
        process.start()
    names, before = named(count), peak()
    server = Server(CONFIG, start(CONFIG, BASE), names)
    behind = {f"edge-{i:03}": names[i::EDGES] for i in range(EDGES)}
    down, up, begin = 0, 0, time.process_time()
    attempt = EdgeRound(server, behind)

    def exchange(process: int) -> list[tuple[str, bytes]]:
        here, answers = pipes[process][0], []
        for _, edge in hosted(process):
            here.send((edge, messages[edge]))
            answers.append((edge, here.recv()))
        return answers

    with ThreadPoolExecutor(PROCESSES) as pool:
        while not attempt.over:
            messages = attempt.ask()
            answers = [answer for some in pool.map(exchange, range(PROCESSES)) for answer in some]
            down, up = down + sum(map(len, messages.values())), up + sum(len(data) for _, data in answers)
            attempt.hear(answers)
    seconds = time.process_time() - begin
    assert attempt.outcome is not None
    assert len(attempt.outcome.contributions) == count
    figures = {"seconds": seconds, "memory": peak() - before, "down": down, "up": up, "digest": server.ledger.digest()}
    theirs = []
    for here, _ in pipes:
        here.send(None)
        theirs.append(here.recv())
    for process in processes:
        process.join()
    connection.send(figures | {"edges": theirs})


def measured(target: Any, count: int) -> Figures:
    """What a process of its own finds, so that memory is its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, count))
    process.start()
    figures: Figures = here.recv()
    process.join()
    return figures


def row(what: str, value: float, unit: str, spread: Sequence[float] = ()) -> Row:
    return Row(what, value, unit, min(spread, default=value), max(spread, default=value))


def rows_alone(count: int) -> tuple[list[Row], str]:
    flat, what = measured(alone, count), f"{count:,} clients, server alone"
    return [
        row(f"{what}: plan and encode", flat["plan"], "s"),
        row(f"{what}: absorb", flat["absorb"], "s"),
        row(f"{what}: memory", flat["memory"], "MiB"),
        row(f"{what}: bytes both ways", (flat["down"] + flat["up"]) / 1e6, "MB"),
    ], flat["digest"]


def rows_behind(count: int) -> tuple[list[Row], str]:
    tiered, what = measured(behind_edges, count), f"{count:,} clients"
    theirs = {name: [one[name] for one in tiered["edges"]] for name in ("memory", "down", "up")}
    work = [seconds for one in tiered["edges"] for seconds in one["seconds"]]
    memory = [mebibytes / (EDGES / PROCESSES) for mebibytes in theirs["memory"]]
    return [
        row(f"{what}, {EDGES} edges: the server's work", tiered["seconds"], "s"),
        row(f"{what}, {EDGES} edges: the server's memory", tiered["memory"], "MiB"),
        row(f"{what}, {EDGES} edges: the server's bytes both ways", (tiered["down"] + tiered["up"]) / 1e6, "MB"),
        row(f"{what}, {EDGES} edges: an edge's work", float(np.median(work)), "s", work),
        row(f"{what}, {EDGES} edges: an edge's memory", float(np.median(memory)), "MiB", memory),
        row(f"{what}, {EDGES} edges: an edge's bytes with its clients", sum(theirs["down"] + theirs["up"]) / EDGES / 1e6, "MB"),
    ], tiered["digest"]


def main(alone: Sequence[int] = COUNTS, behind: Sequence[int] = COUNTS) -> None:
    rows: list[Row] = []
    ledgers: dict[int, str] = {}
    for count, measure in [*((count, rows_alone) for count in alone), *((count, rows_behind) for count in behind)]:
        found, digest = measure(count)
        rows += found
        if ledgers.setdefault(count, digest) != digest:
            raise SystemExit(f"{count} clients: the ledger behind edges is {digest}, alone it is {ledgers[count]}")
    report("A round of very many clients, alone and through edges (CPU seconds; one run)", "edges-cpu", rows)
