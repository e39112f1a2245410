"""Three sites with records of their own, the settings of both kinds of run, and answers that are none."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedkseed.flower.envelope import wrap
from fedkseed.kseed.messages import TrainReply
from fedkseed.runs.settings import SimulationConfig, build
from fedkseed.runs.simulation import Simulation
from tests.support.runs import simulation
from tests.support.tiny import tiny_model, tiny_records

SITES = ("site-a", "site-b", "site-c")
RUN = {
    "num-rounds": 3,
    "fraction-train": 1.0,
    "local-steps": 6,
    "batch-size": 2,
    "lr": 0.01,
    "eps": 0.01,
    "num-seeds": 64,
    "max-length": 48,
    "seed": 7,
    "min-clients": 3,
    "min-replies": 2,
    "deadline": 2.0,
}


def make_sites(folder: Path) -> Path:
    """A model, a file of records for each site (12, 15, 18), all of them in one file with the sites' names, held-out ones."""
    tiny_model(folder / "model")
    lines = tiny_records(folder / "all.jsonl", 60).read_text().splitlines()
    with (folder / "joint.jsonl").open("w") as joint:
        for i, name in enumerate(SITES):
            own, lines = lines[: 12 + 3 * i], lines[12 + 3 * i :]
            (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in own))
            joint.writelines(json.dumps({**json.loads(line), "client": name}) + "\n" for line in own)
    (folder / "held-out.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def simulated_settings(sites: Path, **changes: Any) -> SimulationConfig:
    """Those of `fedkseed simulate` with the same clients."""
    settings = {key.replace("-", "_"): value for key, value in RUN.items() if key not in ("min-clients", "deadline")}
    files = {"model": str(sites / "model"), "data": sites / "joint.jsonl", "eval_data": sites / "held-out.jsonl"}
    return build({**settings, **files, "partition": "client", **changes})


def simulated(sites: Path, run: Path, **changes: Any) -> Simulation:
    """`fedkseed simulate` with the same clients."""
    return simulation(run, simulated_settings(sites, **changes).model_dump())[0]


def fields_changed(data: bytes, position: int, value: Any) -> bytes:
    """A reply with one raw field changed, past what a `TrainReply` would let through."""
    fields = msgpack.unpackb(data)
    fields[position] = value
    changed: bytes = msgpack.packb(fields)
    return changed


def with_scalar(data: bytes, value: float) -> bytes:
    numbers = np.frombuffer(TrainReply.decode(data).projected_grads.numbers, "<f2").copy()
    numbers[0] = value
    return fields_changed(data, 12, numbers.tobytes())


def another(data: bytes, **changes: Any) -> bytes:
    return replace(TrainReply.decode(data), **changes).encode()


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", "not msgpack"),
    "noise": (lambda data: b"\xc1junk", "not msgpack"),
    "cut short": (lambda data: data[:-3], "not msgpack"),
    "oversized": (lambda data: data + bytes(2 << 20), "at most 1048576 are accepted"),
    "not a number": (lambda data: with_scalar(data, np.nan), "not finite"),
    "infinite": (lambda data: with_scalar(data, -np.inf), "not finite"),
    "beyond max_grad": (lambda data: with_scalar(data, 20000), "a projected gradient is 20000; at most 10000"),
    "no loss": (lambda data: fields_changed(data, 14, float("nan")), "loss is nan"),
    "too many scalars": (lambda data: fields_changed(data, 12, bytes(2 * 7)), "7 scalars came for 6 seeds"),
    "wrong round": (lambda data: another(data, server_round=9), "reply to another request: server_round is 9"),
    "wrong attempt": (lambda data: another(data, attempt=2), "reply to another request: attempt is 2"),
    "wrong run": (lambda data: another(data, run_id=bytes(8)), "reply to another request: run_id"),
    "wrong base": (lambda data: another(data, base=bytes(32)), "reply to another request: base"),
    "wrong coefficients": (lambda data: another(data, digest=bytes(32)), "reply to another request: digest"),
    "another's name": (lambda data: another(data, client="site-a"), "reply to another request: client is 'site-a'"),
    "no weight": (lambda data: fields_changed(data, 9, 0), "num_examples is 0"),
    "negative weight": (lambda data: fields_changed(data, 9, -5), "num_examples is -5"),
    "huge weight": (lambda data: another(data, num_examples=10**12), "num_examples is 1000000000000; this client came with "),
    "a negative loss": (lambda data: fields_changed(data, 14, -1.0), "loss is -1; 0 to"),
    "an absurd loss": (lambda data: fields_changed(data, 14, 1e9), "loss is 1e+09; 0 to"),
}
RECORDS: dict[str, tuple[Callable[[Message, bytes], Message | list[Message]], str]] = {
    "an error": (lambda message, data: Message(Error(2, "I\ncannot"), reply_to=message), "answered with an error: I cannot"),
    "no record": (lambda message, data: Message(RecordDict(), reply_to=message), "expected one record"),
    "arrays": (
        lambda message, data: Message(RecordDict({"fedkseed": ArrayRecord([np.zeros(9)])}), reply_to=message),
        "expected one record",
    ),
    "another record beside": (
        lambda message, data: Message(RecordDict({**wrap(data), "w": MetricRecord({"n": 1})}), reply_to=message),
        "expected one record",
    ),
    "a text": (
        lambda message, data: Message(RecordDict({"fedkseed": ConfigRecord({"message": "x"})}), reply_to=message),
        "message is str; expected bytes",
    ),
}
CORRUPTIONS: dict[str, tuple[Callable[[Message, bytes], Any], str]] = {
    **{
        name: ((lambda message, data, change=change: Message(wrap(change(data)), reply_to=message)), reason)
        for name, (change, reason) in BYTES.items()
    },
    **RECORDS,
}
