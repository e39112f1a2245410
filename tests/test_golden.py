"""Golden digests: whole runs of every algorithm, of which no bit may change while code is moved.

What is hashed is what leaves the program: the bytes of each round's requests and replies, the bytes of the last
checkpoint, those of the published ledger, and the weights that are rebuilt from it; of FedKSeed-Pro also how likely each
seed is. The answers are in vectors/golden_digests.json; `python -m tests.test_golden` writes them anew, which is right only
where a format or an algorithm is meant to change.

A run is real from its files to its messages, but for two seams: `exact_loss` in place of the model's, and `SignSteps` in
place of torch's Adam, whose bits differ between processors even in a first step. They and all settings are chosen so
that every operation is exact or rounded once, whatever the machine, the number of threads and the libraries for vectors
and matrices:

- the model's weights and an adapter's first tensors are given in few bits, since torch's random numbers are not the same
  on all machines;
- a learning rate of SGD is a power of two, so that a fused multiply-add gives what a multiplication and an addition do;
- folded gradients are binary32 numbers of one order of magnitude, so that float64 adds some thousands of them up exactly,
  in whatever order; with gaussian noise they would be products of 48 bits, so that no run of fedkseed-grad has it, and none
  has Adam on K numbers, whose corrections are powers that libraries round differently;
- four rounds of the cosine schedule: none of its cosines is near the middle between two numbers;
- only the exponentials of FedKSeed-Pro may differ in their last bit, which moves no draw but by a chance of 1e-12.
"""

import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file, save_file

from fedkseed.baselines import Parameters, TunedTensors, attach, fingerprint
from fedkseed.baselines import client as baseline_client
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.flower.envelope import unwrap
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model
from fedkseed.runs import task as module_of_mean_loss
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import Records, prepare
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation
from tests.support.flower_grid import MemoryGrid, as_in_a_task, node, started
from tests.support.runs import Watcher
from tests.support.tiny import tiny_model

VECTORS = Path(__file__).parent / "vectors" / "golden_digests.json"
CLIENTS = {"ada": 3, "bob": 5, "cy": 6, "dee": 8}
"""How many records each has: no two alike, and shares that are rounded."""
COMMON = {
    "fraction_train": 0.75,
    "num_rounds": 4,
    "local_steps": 5,
    "batch_size": 2,
    "eval_every": 4,
    "max_length": 48,
    "seed": 7,
    "lr": 0.001,
}
SEEDED = {"eps": 0.01, "num_seeds": 24, "aggregator": "mean"}
PRO = {"algorithm": "fedkseed-pro", "importance_start": 1.5, "importance_clip": 1.5}
SGD, ADAM = {"lr": 0.25}, {"lr": 0.01}
LORA = {"lora_rank": 4, "lora_alpha": 12.0}


def seeded(**changes: Any) -> dict[str, Any]:
    return COMMON | SEEDED | changes


def tensors(algorithm: str, **changes: Any) -> dict[str, Any]:
    return COMMON | {"algorithm": algorithm} | changes


RUNS: dict[str, dict[str, Any]] = {
    "fedkseed hadamard float16": seeded(),
    "fedkseed hadamard float32": seeded(wire="float32"),
    "fedkseed gaussian float16": seeded(noise="gaussian"),
    "fedkseed gaussian float32": seeded(noise="gaussian", wire="float32"),
    "fedkseed hadamard, weights in bfloat16": seeded(dtype="bfloat16"),
    "fedkseed gaussian, weights in bfloat16": seeded(dtype="bfloat16", noise="gaussian"),
    "fedkseed equal": seeded(weighting="equal"),
    "fedkseed linear": seeded(schedule="linear"),
    "fedkseed cosine": seeded(schedule="cosine"),
    "fedkseed epochs": seeded(local_unit="epochs", local_steps=2),
    "fedkseed loss_clip": seeded(loss_clip=0.03),
    "fedkseed three directions, loss_clip": seeded(directions=3, loss_clip=0.03),
    "fedkseed-pro hadamard float16": seeded(**PRO),
    "fedkseed-pro gaussian float32": seeded(**PRO, noise="gaussian", wire="float32"),
    "fedkseed-pro as it comes": seeded(algorithm="fedkseed-pro"),
    "fedkseed-pro equal linear epochs loss_clip": seeded(
        **PRO, weighting="equal", schedule="linear", local_unit="epochs", local_steps=2, loss_clip=0.03
    ),
    "fedavg": tensors("fedavg", **SGD),
    "fedavg equal epochs": tensors("fedavg", **SGD, weighting="equal", local_unit="epochs", local_steps=2),
    "ferret": tensors("ferret", lr=2.0**-5, num_seeds=512),
    "fedit": tensors("fedit", **ADAM, **LORA),
    "fedit-sgd": tensors("fedit-sgd", **SGD, **LORA),
    "fedprompt": tensors("fedprompt", **ADAM, num_virtual_tokens=3),
    "fedptuning": tensors("fedptuning", **ADAM, num_virtual_tokens=3),
    "fedzo": tensors("fedzo", eps=0.01),
    "fedzo gaussian linear loss_clip": tensors("fedzo", eps=0.01, noise="gaussian", schedule="linear", loss_clip=0.03),
}
GRAD = {"algorithm": "fedkseed-grad", "aggregator": "mean", "num_seeds": 128, "lr": 2.0**-9}
RUNS |= {
    "fedkseed-grad": tensors(**GRAD),
    "fedkseed-grad coefficients int8 momentum pages": tensors(
        **GRAD | {"lr": 2.0**-16}, basis="coefficients", wire="int8", server_optimizer="momentum", rounds_per_page=2
    ),
    "fedkseed-grad proportional sign pages, half two-point": tensors(
        **GRAD, eps=0.01, wire="sign", movement="proportional", rounds_per_page=3, two_point_clients=0.5, schedule="linear"
    ),
    "fedkseed-grad int2 signs, weights in bfloat16": tensors(
        **GRAD, dtype="bfloat16", wire="int2", local_optimizer="sign", server_optimizer="sign", server_lr=2.0**-9
    ),
}
REPEATED = "fedkseed, round 2 repeated"
"""Its first attempt gets nothing but junk."""
RUNS[REPEATED] = seeded(min_replies=3)
names = pytest.mark.parametrize("name", RUNS)


# --- What is exact ---


def few_bits(shape: torch.Size, kind: int, centre: float = 0.0) -> torch.Tensor:
    """Multiples of 2^-8 about a centre, other ones for every kind."""
    numbers = (37 * torch.arange(shape.numel()) + 11 * kind) % 61 - 30
    return (numbers.float() / 256 + centre).reshape(shape)


def exact_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Squares of what is tuned, less a target that is a function of the batch and the tensor, float64, 0-dim.

    Its value is a sum that is rounded once, to a multiple of 2^-20; its gradient is (w - target) / 8, rounded once.
    """
    token = int(batch.input_ids.sum()) + batch.input_ids.shape[1]
    named = sorted((name, x) for name, x in model.named_parameters() if x.requires_grad)
    away = [x.float() - (5 * (token + i) % 16 - 8) / 64 for i, (_, x) in enumerate(named)]
    numbers = [number for x in away for number in x.detach().reshape(-1).tolist()]
    value = round(math.fsum(number * number for number in numbers) * 2**16) / 2**20
    along = torch.stack([(x * x).sum() / 16 for x in away]).sum()
    return torch.tensor(value, dtype=torch.float64) + (along - along.detach())  # of this sum only the gradient counts


class SignSteps(torch.optim.Optimizer):
    """What Adam's first step is but for its epsilon: the learning rate against the gradient's sign."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


def golden_model(folder: Path) -> Path:
    """The tiny model's architecture and tokenizer, with weights of few bits."""
    file = tiny_model(folder) / "model.safetensors"
    shapes = {name: x.shape for name, x in sorted(load_file(file).items())}
    weights = {name: few_bits(shape, i, float(len(shape) == 1)) for i, (name, shape) in enumerate(shapes.items())}
    save_file(weights, file, {"format": "pt"})
    return folder


def golden_files(folder: Path) -> Path:
    """The model, a file of records for each client, all of them in one file with the clients' names, held-out ones."""
    golden_model(folder / "model")
    words = ["a", "big", "small", "and", "or", "animal", "colour", "fruit"]
    answers = ["dog", "cat", "red", "blue", "apple", "pear"]
    made = [
        {"instruction": f"name the {words[i % 8]} {words[i // 3 % 8]}", "response": " ".join(answers[: 1 + i % 5])}
        for i in range(sum(CLIENTS.values()) + 2)
    ]
    lines = iter(made)
    with (folder / "all.jsonl").open("w") as joint:
        for name, count in CLIENTS.items():
            own = [next(lines) for _ in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in own))
            joint.writelines(json.dumps({**record, "client": name}) + "\n" for record in own)
    (folder / "held-out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    return folder


def give_first_tensors(run: RunFolder) -> None:
    """Adapters and soft prompts start at random; here as a checkpoint of round 0 says."""
    model = load_model(run.config.model, "float32")
    base, before = fingerprint(model), {name for name, _ in model.named_parameters()}
    shapes = Parameters(attach(model, run.config)).shapes
    if before.isdisjoint(shapes):
        first = {name: few_bits(shape, i) for i, (name, shape) in enumerate(sorted(shapes.items()))}
        TunedTensors(run.config.algorithm, base, 0, first).save(run.checkpoint_path)


# --- Runs and their digests ---


class Stopped(BaseException):
    pass


@dataclass
class Overheard:
    """Requests and replies by round, in the order in which they were made."""

    requests: dict[int, list[bytes]] = field(default_factory=dict)
    replies: dict[int, list[bytes]] = field(default_factory=dict)

    def note(self, server_round: int, request: bytes, reply: bytes) -> bytes:
        self.requests.setdefault(server_round, []).append(request)
        self.replies.setdefault(server_round, []).append(reply)
        return reply

    def digests(self) -> dict[str, list[str]]:
        kinds = {"requests": self.requests, "replies": self.replies}
        return {kind: [sha256(*said[i]) for i in sorted(said)] for kind, said in kinds.items()}


class Line:
    """A client whose every word is overheard; it may say junk to the first attempt at one round, or end the run in another."""

    def __init__(self, client: Any, where: Simulation, heard: Overheard, junk_in: int | None, stop_in: int | None) -> None:
        self.client, self.task = client, client.task
        self._where, self._heard, self._junk_in, self._stop_in = where, heard, junk_in, stop_in

    def answer(self, data: bytes, on_step: Any = None) -> bytes:
        server_round = self._where.server.checkpoint.round + 1
        if server_round == self._stop_in:
            raise Stopped
        if server_round == self._junk_in and len(self._heard.replies.get(server_round, ())) < self._where.server.cohort_size:
            return self._heard.note(server_round, data, b"junk")
        return self._heard.note(server_round, data, self.client.answer(data, on_step))


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def exact(patch: pytest.MonkeyPatch) -> None:
    """The seams."""
    patch.setattr(module_of_mean_loss, "mean_loss", exact_loss)
    patch.setitem(baseline_client.OPTIMIZERS, "adam", SignSteps)


def run_settings(files: Path, name: str, **changes: Any) -> dict[str, Any]:
    where = {"model": str(files / "model"), "data": str(files / "all.jsonl"), "eval_data": str(files / "held-out.jsonl")}
    return RUNS[name] | where | {"partition": "client"} | changes


@functools.cache
def records_of(files: Path) -> Records:
    """Dealt out once: no setting of `RUNS` matters to it."""
    return prepare(build(run_settings(files, REPEATED)), Watcher())


def go(run: RunFolder, heard: Overheard, junk_in: int | None = None, stop_in: int | None = None) -> Simulation:
    """Do the rounds that are left of a run."""
    federation = Simulation(run, records_of(Path(run.config.model).parent), Watcher())
    federation.clients = {
        name: Line(client, federation, heard, junk_in, stop_in) for name, client in federation.clients.items()
    }
    federation.train()
    return federation


def fresh(files: Path, folder: Path, name: str, **changes: Any) -> RunFolder:
    run = RunFolder.create(folder, build(run_settings(files, name, **changes)))
    if not run.config.facts.has_ledger:
        give_first_tensors(run)
    return run


def unstamped(run: RunFolder) -> bytes:
    """The checkpoint's file without what it was made with, which names the settings themselves."""
    checkpoint: Any = run.load_checkpoint()
    assert run.checkpoint_path.read_bytes() == checkpoint.encode()
    data: bytes = checkpoint.stamped(None).encode()
    return data


def digests(run: RunFolder, heard: Overheard, federation: Simulation) -> dict[str, Any]:
    """What is golden of a run that is over."""
    found: dict[str, Any] = heard.digests() | {"checkpoint": sha256(unstamped(run))}
    if run.config.facts.has_ledger:
        federation.restore()
        weights = sorted(federation.model.named_parameters())
        found["published"] = sha256(Ledger.load(run.ledger_path).published().encode())
        found["weights"] = sha256(*(x.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for _, x in weights))
    if run.config.algorithm == "fedkseed-pro":  # to nine places, since an exponential's last bit is the machine's
        found["probabilities"] = sha256(*(f"{p:.9f}".encode() for p in federation.server.probabilities().tolist()))
    return found


def whole(files: Path, folder: Path, name: str, **changes: Any) -> tuple[dict[str, Any], Simulation]:
    run, heard = fresh(files, folder, name, **changes), Overheard()
    federation = go(run, heard, junk_in=2 if name == REPEATED else None)
    return digests(run, heard, federation), federation


# --- The tests ---


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = json.loads(VECTORS.read_text())
    return answers


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_files(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module", autouse=True)
def an_exact_loss() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        exact(patch)
        yield


def test_every_algorithm_has_a_run(golden: dict[str, dict[str, Any]]) -> None:
    assert {settings.get("algorithm", "fedkseed") for settings in RUNS.values()} == set(ALGORITHMS)
    assert golden.keys() == RUNS.keys()


@names
def test_a_run_gives_its_golden_digests(files: Path, tmp_path: Path, golden: dict[str, dict[str, Any]], name: str) -> None:
    found, federation = whole(files, tmp_path / "run", name)
    assert found == golden[name]
    assert found["checkpoint"] == federation.server.checkpoint.digest() or federation.config.facts.has_ledger
    rounds = [event for event in federation.run.metrics() if event["event"] == "round"]
    assert [event["num_replies"] for event in rounds] == [3] * 4
    dropped = sum(event["dropped_steps"] for event in rounds)
    assert (0 < dropped < sum(event["num_steps"] for event in rounds)) == ("loss_clip" in RUNS[name])


STOPPED = (
    "fedkseed hadamard float16",
    "fedkseed gaussian, weights in bfloat16",
    "fedkseed-pro equal linear epochs loss_clip",
    "fedkseed-grad",  # of one page on a wire that replaces it: elsewhere the server sends all pages once more
    "fedavg",
    "fedit",
    "fedzo gaussian linear loss_clip",
)


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_is_stopped_after_round_2_goes_on_to_the_same(
    files: Path, tmp_path: Path, golden: dict[str, dict[str, Any]], name: str
) -> None:
    heard = Overheard()
    with pytest.raises(Stopped):
        go(fresh(files, tmp_path / "run", name), heard, stop_in=3)
    assert sorted(heard.replies) == [1, 2]
    run = RunFolder.open(tmp_path / "run")
    assert digests(run, heard, go(run, heard)) == golden[name]


@pytest.fixture
def in_a_task() -> Iterator[None]:
    with as_in_a_task():
        yield


ON_FLOWER = (
    "fedkseed hadamard float16",
    "fedkseed gaussian float32",
    "fedkseed-pro hadamard float16",
    "fedkseed-pro equal linear epochs loss_clip",
    "fedkseed-grad",
    "fedkseed-grad coefficients int8 momentum pages",
)


@pytest.mark.usefixtures("in_a_task")
@pytest.mark.parametrize("name", ON_FLOWER)
def test_flower_gives_the_same(files: Path, tmp_path: Path, golden: dict[str, dict[str, Any]], name: str) -> None:
    here = {"run": str(tmp_path / "run"), "min_clients": len(CLIENTS), "min_replies": 3, "deadline": 60.0}
    settings = {key: value for key, value in run_settings(files, name).items() if key not in ("data", "partition")} | here
    config = {key.replace("_", "-"): value for key, value in settings.items()}
    heard, grid = Overheard(), MemoryGrid()

    def overheard(client: str) -> Any:
        answer = node(files, client, config)

        def respond(message: Message) -> Message:
            reply = answer(message)
            assert isinstance(reply, Message)
            if message.metadata.message_type == "train":
                heard.note(int(message.metadata.group_id), unwrap(message), unwrap(reply))
            return reply

        return respond

    for node_id, client in enumerate(CLIENTS, start=101):
        grid.add(node_id, overheard(client))
    ledger = started(config, grid)
    assert heard.digests() == {kind: golden[name][kind] for kind in ("requests", "replies")}
    assert sha256(unstamped(RunFolder.open(tmp_path / "run"))) == golden[name]["checkpoint"]
    assert sha256(ledger.published().encode()) == golden[name]["published"]


# --- Negative controls ---


def test_no_two_runs_are_alike(golden: dict[str, dict[str, Any]]) -> None:
    """Every setting that a run is named after has changed something."""
    for kind in ("checkpoint", "published"):
        found = [answer[kind] for answer in golden.values() if kind in answer]
        assert len(set(found)) == len(found)
    assert all(len(set(answer[kind])) == 4 for answer in golden.values() for kind in ("requests", "replies"))


@pytest.mark.parametrize("name", ["fedkseed hadamard float16", "fedit", "fedzo"])
def test_another_learning_rate_must_not_pass(files: Path, tmp_path: Path, golden: dict[str, dict[str, Any]], name: str) -> None:
    found, _ = whole(files, tmp_path / "run", name, lr=RUNS[name]["lr"] * (1 + 2**-12), num_rounds=2)
    assert found["requests"][0] != golden[name]["requests"][0]
    assert found["requests"][1] != golden[name]["requests"][1]
    assert found["checkpoint"] != golden[name]["checkpoint"]


def write() -> None:
    """The answers anew."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDKSEED_CACHE", str(Path(place) / "cache"))
        exact(patch)
        files = golden_files(Path(place) / "files")
        answers = {name: whole(files, Path(place) / f"run-{i}", name)[0] for i, name in enumerate(RUNS)}
    VECTORS.write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    write()
