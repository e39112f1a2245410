"""The contract table of the baselines, and their local steps by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedkseed as fk
from fedkseed.data import EncodedExample
from tests.support import laws
from tests.support.tiny import tiny_settings

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Baseline:
    """One row of the contract table.

    Attributes:
        lr: a learning rate at which the tiny model learns.
        falls: by how much its held-out loss falls in three rounds, at least.
        optimizer: what its local steps are.
        tunes: which of a model's parameters; of the soft prompts, the part of peft's model that has the prompt; `coordinates`
            of all parameters.
        settings: its own settings.
    """

    lr: float
    falls: float
    optimizer: str
    tunes: str
    settings: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "fedavg": Baseline(0.1, 0.8, "sgd", "all"),
    "ferret": Baseline(0.02, 0.2, "sgd", "coordinates", {"num_seeds": 2048}),
    "fedit": Baseline(0.02, 0.4, "adam", "lora", {"lora_rank": 4, "lora_alpha": 12.0}),
    "fedit-sgd": Baseline(2.0, 0.4, "sgd", "lora", {"lora_rank": 4, "lora_alpha": 12.0}),
    "fedprompt": Baseline(0.05, 0.1, "adam", "prompt", {"num_virtual_tokens": 3}),
    "fedptuning": Baseline(0.01, 0.1, "adam", "encoder", {"num_virtual_tokens": 3}),
    "fedzo": Baseline(0.004, 0.2, "two-point", "all", {"eps": 0.01, "local_steps": 25}),
}
algorithms = pytest.mark.parametrize("algorithm", ROWS)


def row_settings(folder: Path, algorithm: str, **changes: Any) -> dict[str, Any]:
    """`tiny_settings` for a row: without what no baseline takes, with its own learning rate."""
    own = tiny_settings(folder, algorithm=algorithm, lr=ROWS[algorithm].lr, local_steps=10, fraction_train=0.75)
    del own["num_seeds"], own["eps"]
    return own | ROWS[algorithm].settings | changes


def prompt_of(tensors: Tensors) -> torch.Tensor:
    """The soft prompt, float[n, d]: its embeddings, through the encoder of three linear layers where there is one."""
    x = tensors["prompt_encoder.default.embedding.weight"]
    for i in (0, 2, 4):
        if f"prompt_encoder.default.mlp_head.{i}.weight" not in tensors:
            return x
        x = x if i == 0 else x.clamp(min=0)
        x = x @ tensors[f"prompt_encoder.default.mlp_head.{i}.weight"].T + tensors[f"prompt_encoder.default.mlp_head.{i}.bias"]
    return x


def logits_by_hand(base: Any, tunes: str, tensors: Tensors, ids: Sequence[int], scale: float = 1.0) -> torch.Tensor:
    """Logits at one example's tokens, float[t, v], without peft."""
    row = torch.tensor([list(ids)])
    if tunes == "all":
        return torch.func.functional_call(base, dict(tensors), (row,)).logits[0]
    if tunes == "lora":
        weights = dict(base.named_parameters())
        for projection in ("q_proj", "v_proj"):
            where = f"model.layers.0.self_attn.{projection}"
            a, b = (tensors[f"{where}.lora_{matrix}.default.weight"] for matrix in "AB")
            weights[f"{where}.weight"] = weights[f"{where}.weight"] + scale * b @ a
        return torch.func.functional_call(base, weights, (row,)).logits[0]
    prompt = prompt_of(tensors)
    embedded = torch.cat([prompt[None], base.get_input_embeddings()(row)], 1)
    return base(inputs_embeds=embedded).logits[0, len(prompt) :]


def loss_by_hand(
    base: Any, tunes: str, tensors: Tensors, batch: Sequence[EncodedExample], scale: float = 1.0
) -> tuple[torch.Tensor, int]:
    """The summed cross-entropy of the response tokens, one example at a time, and how many they are."""
    total, count = torch.zeros(()), 0
    for example in batch:
        logs = torch.log_softmax(logits_by_hand(base, tunes, tensors, example.input_ids.tolist(), scale), -1)
        for t in range(example.prompt_length, len(example.input_ids)):
            total, count = total - logs[t - 1, int(example.input_ids[t])], count + 1
    return total, count


def train_by_hand(
    optimizer: str, tensors: Tensors, loss: Callable[[Tensors, int], torch.Tensor], steps: int, lr: float
) -> dict[str, torch.Tensor]:
    """Plain SGD, or Adam as Kingma and Ba write it."""
    w = {name: x.clone() for name, x in tensors.items()}
    m = {name: torch.zeros_like(x) for name, x in w.items()}
    v = {name: torch.zeros_like(x) for name, x in w.items()}
    for t in range(1, steps + 1):
        leaves = {name: x.clone().requires_grad_() for name, x in w.items()}
        grads = torch.autograd.grad(loss(leaves, t - 1), list(leaves.values()))
        for name, g in zip(leaves, grads, strict=True):
            if optimizer == "sgd":
                w[name] = w[name] - lr * g
            else:
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                w[name] = w[name] - lr * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


def two_point_by_hand(
    tensors: Tensors, loss: Callable[[Tensors, int], torch.Tensor], pool: fk.SeedPool, lr: float, eps: float
) -> dict[str, torch.Tensor]:
    """w <- w - lr g z_t with g from the two losses at w + eps z_t and w - eps z_t."""
    w = {name: x.clone() for name, x in tensors.items()}
    for t in range(pool.size):
        z = {name: torch.from_numpy(pool.perturbation(name, x.numel(), t)).reshape(x.shape) for name, x in w.items()}
        plus, minus = (float(loss({name: w[name] + s * eps * z[name] for name in w}, t)) for s in (1, -1))
        w = {name: w[name] - lr * (plus - minus) / (2 * eps) * z[name] for name in w}
    return w


def coordinates_by_hand(
    start: Tensors, end: Tensors, key: int, counts: Sequence[int], scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """`Z'(end - start) / K_l`, tensor by tensor in the order of their names, with the oracle's noise."""
    found = []
    for name, count in zip(sorted(start), counts, strict=True):
        change = (end[name].double() - start[name].double()).reshape(-1).numpy()
        sign, bucket = laws.signs_and_buckets(key, count, name, len(change))
        z = 1 - 2 * ((sign + laws.parity(bucket & np.arange(count)[:, None])) & 1)
        found.append(scale * (z @ change) / count)
    return {"coordinates": torch.from_numpy(np.concatenate(found)).float()}


def assert_close(found: Tensors, expected: Tensors, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name] - x).abs().max() <= tolerance, name
