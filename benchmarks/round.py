"""A round's cost against the number of clients in its cohort and against K: the clients' work and the server's, apart.

The model and the records are the demo's; FedKSeed-Pro, whose server does more. Every message passes through its bytes, and
nothing is written to a disk. One process does the clients' work one after the other, so it grows with the cohort here;
between sites it does not.
"""

from collections.abc import Callable, Sequence

import fedkseed as fk
from fedkseed.data import EncodedExample, encode, pad_token_id
from fedkseed.demo import SETTINGS, clients, model_folder
from fedkseed.federation import FederationConfig
from fedkseed.kseed.client import Client
from fedkseed.kseed.server import Server, seed_pool, start
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.runs.simulation import Stopwatch, TextTask

from .harness import absolute, measure, ratio, report

COHORTS = (1, 2, 4, 8)
SIZES = (256, 1024, 4096, 16384)
SIZE, COHORT = 4096, 2
"""What the other of the two is while one varies."""
STEPS = 5


class Federation:
    """The stages of one round after the other, each to be timed by itself."""

    def __init__(self, examples: dict[str, Sequence[EncodedExample]], pad_id: int, cohort: int, size: int) -> None:
        config = FederationConfig(
            algorithm="fedkseed-pro",
            num_rounds=1000,
            fraction_train=(cohort + 0.5) / len(examples),
            local_steps=STEPS,
            batch_size=SETTINGS["batch_size"],
            lr=1e-6,
            eps=SETTINGS["eps"],
            num_seeds=size,
        )
        model = load_model(model_folder(), "float32")
        bound = fk.bind(model, seed_pool(config))
        self._server = Server(config, start(config, bound.identity()), list(examples))
        self._clients = {
            name: Client(name, bound, bound.identity(), TextTask(model, own, pad_id, Stopwatch()))
            for name, own in examples.items()
        }
        self._requests: dict[str, bytes] = {}
        self._replies: dict[str, bytes] = {}

    def plan(self) -> None:
        self._requests = {request.client: request.encode() for request in self._server.plan()}

    def train(self) -> None:
        self._replies = {name: self._clients[name].answer(request) for name, request in self._requests.items()}

    def absorb(self) -> None:
        self._server.absorb(self._replies.items())
        self._server.ledger.encode()


def main(rounds: int = 4) -> None:
    tokenizer = load_tokenizer(model_folder())
    examples = {name: encode(own, tokenizer, SETTINGS["max_length"]).examples for name, own in clients(1).items()}
    contenders: dict[str, Callable[[], object]] = {}
    cases = {(cohort, SIZE) for cohort in COHORTS} | {(COHORT, size) for size in SIZES}
    for case in sorted(cases):
        federation = Federation(examples, pad_token_id(tokenizer), *case)
        for stage in ("plan", "train", "absorb"):  # in this order within a turn
            contenders[f"{stage} {case}"] = getattr(federation, stage)
    seconds = measure(contenders, rounds)
    work = {case: seconds[f"train {case}"] for case in cases}
    server = {case: [a + b for a, b in zip(seconds[f"plan {case}"], seconds[f"absorb {case}"], strict=True)] for case in cases}
    first, smallest = (1, SIZE), (COHORT, SIZES[0])
    rows = [
        absolute("1 client, K = 4,096: the client's work", work[first], 1, "s"),
        absolute("1 client, K = 4,096: the server's work", server[first], 1000, "ms"),
    ]
    for who, times in (("the clients' work", work), ("the server's work", server)):
        for cohort in COHORTS[1:]:
            rows.append(ratio(f"{who}: {cohort} clients / 1 client", times[cohort, SIZE], times[first]))
        for size in SIZES[1:]:
            rows.append(ratio(f"{who}: K = {size:,} / K = {SIZES[0]}", times[COHORT, size], times[smallest]))
    for case in ((COHORTS[-1], SIZE), (COHORT, SIZES[-1])):
        what = f"{case[0]} clients, K = {case[1]:,}: the server's work / the clients'"
        rows.append(ratio(what, server[case], work[case]))
    report(f"A round of the demo's model on the CPU, {STEPS} local steps of 8 records", "round-cpu", rows)
