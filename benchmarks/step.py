"""A local step against its two forward passes, the memory of training against inference, and the bytes of a round.

The model is a Llama with SmolLM2-135M's shapes and random weights: speed and memory do not depend on their values.
"""

import json
import subprocess
import sys
import tempfile
from unittest.mock import patch

import numpy as np
import torch

import fedkseed as fk
from fedkseed.data import EncodedExample, collate
from fedkseed.evaluation import mean_loss
from fedkseed.federation import FederationConfig
from fedkseed.kseed.messages import TrainReply
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.server import Server, start
from fedkseed.kseed.steps import GRAD_EXPONENT, StepSettings, local_steps
from fedkseed.models.identity import BaseIdentity

from .harness import Row, absolute, measure, ratio, report

TOKENS = 128
STEPS = 4
PROBE = r"""
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
import fedkseed as fk
from fedkseed.runs.memory import peak_memory
from fedkseed.kseed.gradient_steps import folded_gradient, gradient_steps
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.kseed.steps import StepSettings, local_steps
from fedkseed.runs.task import checkpoint_activations
folder, mode = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = torch.arange(128)[None]
def differentiable(step):
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
@torch.inference_mode()
def loss(step):
    return differentiable(step).item()
if mode == "inference":
    [loss(t) for t in range(6)]
elif mode.startswith("gradient"):
    model.eval()
    if mode.endswith("checkpointing"):
        checkpoint_activations(model)
    bound = fk.bind(model, fk.SeedPool(1, 65536), base=folder)
    gradient_steps(
        bound, np.zeros(65536), "table", 3,
        lambda t: folded_gradient(bound, "table", lambda: differentiable(t)), OPTIMIZERS["adam"], 1e-6,
    )
else:
    bound = fk.bind(model, fk.SeedPool(1, 4096), base=None if mode == "copy" else folder)
    bound.rebuild(np.full(4096, 1e-6, np.float32))
    local_steps(bound, [1, 2, 3], loss, StepSettings(lr=1e-6, eps=1e-3))
    bound.rebuild(np.zeros(4096, np.float32))
print(peak_memory("cpu") // 1024)
"""


def smollm2() -> torch.nn.Module:
    """A Llama of SmolLM2-135M's shapes: 134,515,008 random parameters in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def steps(model: torch.nn.Module, rounds: int) -> list[Row]:
    ids = torch.randint(0, 49152, (1, TOKENS))

    @torch.inference_mode()
    def loss(step: int) -> float:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()

    def forwards() -> None:
        for _ in range(2 * STEPS):
            loss(0)

    settings = StepSettings(lr=1e-9, eps=1e-3)
    contenders = {"forwards": forwards}
    for family in ("hadamard", "gaussian"):
        bound = fk.bind(model, fk.SeedPool(1, 4096, family))
        contenders[family] = lambda bound=bound: local_steps(bound, list(range(STEPS)), loss, settings)

    def published() -> None:  # a seeded normal pass for each move: to +eps, to -eps, and back with the update
        for seed in range(STEPS):
            for factor, probe in ((1e-3, True), (-2e-3, True), (1e-3, False)):
                torch.manual_seed(seed)
                for p in model.parameters():
                    p.data.add_(torch.normal(0.0, 1.0, p.shape), alpha=factor)
                if probe:
                    loss(seed)

    seconds = measure(contenders, rounds)
    seconds |= measure({"published": published}, 1)

    def overhead(name: str, **budget: float) -> Row:
        beyond = [a - b for a, b in zip(seconds[name], seconds["forwards"], strict=True)]
        row = ratio(f"{name}: a local step beyond its two forward passes", beyond, seconds["forwards"], **budget)
        return Row(row.what, 100 * row.value, "%", 100 * row.low, 100 * row.high, row.must, row.aim)

    return [
        absolute("two forward passes, 128 tokens", seconds["forwards"], 1 / STEPS, "s"),
        absolute("hadamard: a local step", seconds["hadamard"], 1 / STEPS, "s"),
        overhead("hadamard", must=35, aim=10),
        overhead("gaussian"),
        absolute(
            "published way: a local step (three seeded normal passes)",
            seconds["published"],
            1 / STEPS,
            "s",
        ),
    ]


def unlike_records(model: torch.nn.Module, rounds: int) -> list[Row]:
    """A forward pass of four records as long as Dolly's are (eighths 1, 3, 5, 7 of them, cut at 256), split and in one."""
    lengths = (41, 86, 161, 256)
    batch = collate([EncodedExample(np.full(n, 7, np.int32), n // 2) for n in lengths], pad_id=0)

    @torch.inference_mode()
    def loss() -> float:
        return mean_loss(model, batch).item()

    def in_one_pass() -> float:
        with patch("fedkseed.data.batch.PASS_COST", 1 << 40):
            return loss()

    seconds = measure({"one": in_one_pass, "split": loss}, rounds)
    positions = sum(part.input_ids.numel() for _, part in batch.passes())
    padding = 100 * (1 - sum(lengths) / positions)
    return [
        ratio("a batch of four unlike records, in several passes / in one", seconds["split"], seconds["one"]),
        Row("padding in it", padding, "%", padding, padding, must=10),
    ]


def memory(model: torch.nn.Module) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peak: dict[str, list[float]] = {
            name: [] for name in ("inference", "path", "copy", "gradient", "gradient with checkpointing")
        }
        for _ in range(3):
            for mode, values in peak.items():
                output = subprocess.run([sys.executable, "-c", PROBE, folder, mode], capture_output=True, text=True, check=True)
                values.append(json.loads(output.stdout) / 1024)
    return [
        absolute("peak RSS, inference alone", peak["inference"], 1, "MiB"),
        ratio("peak RSS, local training with base=path / inference", peak["path"], peak["inference"], must=1.15, aim=1.05),
        ratio("peak RSS, local training with a copy of the base / inference", peak["copy"], peak["inference"]),
        ratio("peak RSS, gradient client / inference", peak["gradient"], peak["inference"]),
        ratio(
            "peak RSS, gradient client with checkpointing / inference",
            peak["gradient with checkpointing"],
            peak["inference"],
            must=1.5,
            aim=1.35,
        ),
    ]


def bytes_of_a_round(num_seeds: int, algorithm: str, wire: str) -> int:
    """Encoded request and reply of one client with 200 steps, from a server that has trained."""
    config = FederationConfig(lr=1e-6, num_seeds=num_seeds, algorithm=algorithm, wire=wire, num_rounds=2)
    server = Server(
        config, start(config, BaseIdentity("0" * 64, np.zeros(272, np.uint32))), [f"client-{i:03}" for i in range(200)]
    )
    rng = np.random.default_rng(0)
    for _ in range(2):
        request, replies = server.plan()[0], []
        for one in server.plan():
            grads = rng.standard_normal(200) * 3
            packed = pack(grads, wire, GRAD_EXPONENT)
            replies.append((one.client, TrainReply(**one.head(), num_examples=70, projected_grads=packed, loss=2.0).encode()))
        total = len(request.encode()) + len(dict(replies)[request.client])
        server.absorb(replies)
    return total


def message_bytes() -> list[Row]:
    rows = []
    budgets = {(4096, "fedkseed"): (17988, 9700), (1024, "fedkseed-pro"): (9796, 3700)}
    for (num_seeds, algorithm), (must, aim) in budgets.items():
        for wire in ("float16", "float32"):
            n = bytes_of_a_round(num_seeds, algorithm, wire)
            rows.append(Row(f"{algorithm}, K = {num_seeds}, {wire}: bytes per client and round", n, "bytes", n, n, must, aim))
    return rows


def main(rounds: int = 7) -> None:
    model = smollm2()
    rows = [*steps(model, rounds), *unlike_records(model, rounds), *memory(model), *message_bytes()]
    report("A local step of SmolLM2-135M's shapes on the CPU, float32, batch 1", "step-cpu", rows)
