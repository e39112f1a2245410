"""What the server does for a cohort: seconds, memory and traffic for so many synthetic replies in one round.

    python benchmarks/flower_server.py 1000 100000

One process for each number, so that memory is its own. K = 4096, 200 steps, float16; every client is asked and replies.
"""

import json
import subprocess
import sys
import time

import numpy as np

from fedkseed.federation import FederationConfig
from fedkseed.kseed.messages import TrainReply, TrainRequest
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.server import Server, start
from fedkseed.kseed.steps import GRAD_EXPONENT
from fedkseed.models.identity import BaseIdentity
from fedkseed.runs.memory import peak_memory

STEPS, SEEDS = 200, 4096


def replies(requests: tuple[TrainRequest, ...]) -> list[tuple[str, bytes]]:
    numbers = pack(np.random.default_rng(1).standard_normal(STEPS), "float16", GRAD_EXPONENT)
    made = []
    for r in requests:
        made.append((r.client, TrainReply(**r.head(), num_examples=50, projected_grads=numbers, loss=2.0).encode()))
    return made


def peak() -> float:
    """Gibibytes so far."""
    return peak_memory("cpu") / 2**30


def measure(count: int) -> dict[str, float]:
    config = FederationConfig(lr=1e-5, fraction_train=1.0, local_steps=STEPS, num_seeds=SEEDS, num_rounds=2)
    names = [f"client-{i:07}" for i in range(count)]
    server = Server(config, start(config, BaseIdentity.of({"w": bytes(32)})), names)
    begin, before = time.perf_counter(), peak()
    requests = server.plan()
    planned, after_plan = time.perf_counter() - begin, peak()
    down = sum(len(request.encode()) for request in requests[:100]) / len(requests[:100])
    answers = replies(requests)
    begin = time.perf_counter()
    outcome = server.absorb(answers)
    absorbed = time.perf_counter() - begin
    assert len(outcome.contributions) == count
    up = sum(len(data) for _, data in answers) / count
    return {
        "clients": count,
        "plan_seconds": round(planned, 3),
        "absorb_seconds": round(absorbed, 3),
        "plan_gib": round(after_plan - before, 3),
        "peak_gib": round(peak(), 3),
        "bytes_down": down,
        "bytes_up": up,
        "gigabytes_both_ways": round(count * (down + up) / 1e9, 3),
    }


def main() -> None:
    if sys.argv[1] == "--one":
        print(json.dumps(measure(int(sys.argv[2]))))
        return
    for count in sys.argv[1:]:
        subprocess.run([sys.executable, __file__, "--one", count], check=True)


if __name__ == "__main__":
    main()
