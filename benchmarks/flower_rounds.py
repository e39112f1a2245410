"""What a round on Flower costs: seconds, bytes on the wire and memory, with so many nodes as processes of this machine.

    python benchmarks/flower_rounds.py NODES ROUNDS [MODEL]

Bytes are counted by a TCP proxy between the nodes and the gate, TLS and HTTP included. Without MODEL the tests' model of
4,000 parameters is tuned, so that hardly anything is left but overhead.
"""

import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from socket import SHUT_WR, create_connection, create_server, socket
from statistics import mean
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import itertools

from tests.support import flower_deployment
from tests.support.flower_deployment import Deployment, free_port
from tests.support.tiny import tiny_model, tiny_records

STEPS = 200
KINDS = ("launcher", "worker", "supernode")


class CountingProxy:
    """Hands TCP on to a port of this machine and counts the bytes of each direction."""

    def __init__(self, target: int) -> None:
        self.port, self._target, self.up, self.down, self.connections = free_port(), target, 0, 0, 0
        self._listener = create_server(("127.0.0.1", self.port), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near = self._listener.accept()[0]
            try:
                far = create_connection(("127.0.0.1", self._target))
            except OSError:  # the deployment has ended
                near.close()
                continue
            self.connections += 1
            for source, sink, name in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._copy, args=(source, sink, name), daemon=True).start()

    def _copy(self, source: socket, sink: socket, name: str) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
            sink.shutdown(SHUT_WR)
        except OSError:
            pass


class Usage:
    """The largest memory of each kind of process below some others, sampled: proportional set size in MiB."""

    def __init__(self, roots: list[int]) -> None:
        self._roots = roots
        self.largest: dict[str, float] = {}
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            for root in self._roots:
                try:
                    family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
                    total = 0.0
                    for process in family:
                        kind = next((w for w in KINDS if w in " ".join(process.cmdline())), "")
                        size = process.memory_full_info().pss / 2**20
                        total += size
                        self.largest[kind] = max(self.largest.get(kind, 0.0), size)
                    self.largest["all of a node"] = max(self.largest.get("all of a node", 0.0), total)
                except psutil.Error:
                    continue
            time.sleep(0.5)


def cpu_seconds(root: int) -> dict[str, float]:
    """What each kind of process of a node has spent, the forks that have ended among the launcher's."""
    spent = dict.fromkeys(KINDS, 0.0)
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        kind = next((w for w in KINDS if w in " ".join(process.cmdline())), None)
        if kind is not None:
            times = process.cpu_times()
            spent[kind] += times.user + times.system + (times.children_user + times.children_system) * (kind == "launcher")
    return spent


def main() -> None:
    nodes, rounds = int(sys.argv[1]), int(sys.argv[2])
    flower_deployment.PATIENCE = 1800.0
    with tempfile.TemporaryDirectory() as place, Deployment(Path(place) / "deployment") as deployment:
        folder = Path(place)
        model = Path(sys.argv[3]) if len(sys.argv) > 3 else tiny_model(folder / "model")
        lines = tiny_records(folder / "all.jsonl", 30 * nodes).read_text().splitlines(keepends=True)
        names = [f"node-{i:02}" for i in range(nodes)]
        deployment.make_credentials(*names)
        deployment.start_superlink()
        deployment.start_gate()
        proxy = CountingProxy(deployment.gate_port)
        deployment.gate_port = proxy.port
        deployment.register(*names)
        for i, name in enumerate(names):
            data = folder / f"{name}.jsonl"
            data.write_text("".join(lines[30 * i : 30 * i + 30]))
            deployment.start_node(name, data, model)
        usage = Usage([deployment.processes[name].pid for name in names[:1]])
        time.sleep(30)
        idle, begin = (proxy.up, proxy.down), time.perf_counter()
        time.sleep(30)
        quiet = [
            (now - before) / nodes / (time.perf_counter() - begin)
            for now, before in zip((proxy.up, proxy.down), idle, strict=True)
        ]
        config: dict[str, Any] = {
            "run": deployment.run,
            "model": model,
            "num-rounds": rounds,
            "min-clients": nodes,
            "local-steps": STEPS,
            "num-seeds": 4096,
            "batch-size": 1,
            "max-length": 48,
            "lr": 1e-5,
            "algorithm": "fedkseed",
            "schedule": "constant",
            "deadline": 1800.0,
            "eval-every": 1000,
        }
        deployment.submit(config)
        counts, busy, first = [], {}, deployment.processes[names[0]].pid
        for done in range(1, rounds + 1):
            deployment.wait_for_round(done)
            counts.append((proxy.up, proxy.down))
            busy[done] = cpu_seconds(first)
        events = [json.loads(line) for line in (deployment.run / "metrics.jsonl").read_text().splitlines()]
        spent = [re.findall(r"steps in ([\d.]+) s .* after ([\d.]+) s of loading", deployment.log(name)) for name in names]
        flat = [(float(a), float(b)) for one in spent for a, b in one]
        wire = [[(b - a) / nodes for a, b in zip(x, y, strict=True)] for x, y in itertools.pairwise(counts)]
        result = {
            "nodes": nodes,
            "round_seconds": [round(e["seconds"], 1) for e in events if e["event"] == "round"],
            "training_seconds": round(mean(a for a, _ in flat), 2),
            "loading_seconds_of_the_first_round": round(max(b for _, b in flat), 2),
            "payload_bytes_down_up": [[e["bytes_down"], e["bytes_up"]] for e in events if e["event"] == "round"][-1],
            "wire_bytes_up_down_per_node_and_round": [[round(x) for x in pair] for pair in wire],
            "idle_bytes_per_node_and_second_up_down": [round(x) for x in quiet],
            "connections": proxy.connections,
            "largest_mib": {name: round(value) for name, value in usage.largest.items()},
            "cpu_seconds_of_a_node_and_round": {
                kind: round((busy[rounds][kind] - busy[1][kind]) / (rounds - 1), 2) for kind in KINDS
            },
            "load_average": psutil.getloadavg(),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
