"""Many tuned models over one base in memory: a swap of ledgers against PEFT's `set_adapter` and loading a merged model.

The model has SmolLM2-135M's shapes and random weights. Times are CPU seconds of this process, so that a busy machine does not
count. A model that is loaded is mapped, and read in its first forward pass only, so loading and swapping are compared with one.
What PEFT saves in switching it pays in every forward pass, which goes through the adapter's matrices too.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fedkseed as fk
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.rounding import rounded

from .harness import Row, absolute, measure, ratio, report
from .step import TOKENS, smollm2

RANK = 8
TENANTS = ("one", "two")


def ledgers(model: torch.nn.Module, size: int) -> dict[str, Ledger]:
    """A ledger for each tenant, in pools of their own, as a run publishes it: float16 under one power of two."""
    found = {}
    for key, name in enumerate(TENANTS):
        bound = fk.bind(model, fk.SeedPool(key, size), backend="cpu")
        numbers = rounded(1e-5 * np.random.default_rng(key).standard_normal(size), "float16")
        found[name] = Ledger(bound.pool, bound.identity(), "float16", 1, numbers, None)
    return found


def with_adapters(model: torch.nn.Module) -> Any:
    """The model with a LoRA adapter for each tenant, PEFT's places for a Llama, neither of them zero."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, adapter_name=TENANTS[0])
    adapted.add_adapter(TENANTS[1], config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return adapted.eval()


def bytes_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def main(rounds: int = 5) -> None:
    model, adapted = smollm2(), with_adapters(smollm2())
    small, large = ledgers(model, 4096), ledgers(model, 65536)
    both = {name: fk.merge([small[name], large[name]], [1, 1]) for name in TENANTS}
    ids = torch.randint(0, 49152, (1, TOKENS))
    weights = [parameter.detach() for parameter in model.parameters()]
    moves = [torch.zeros_like(x) for x in weights]

    def add() -> None:
        for x, move in zip(weights, moves, strict=True):
            torch.add(x, move, out=x)

    def switch(to: str) -> None:
        fk.swap(model, holds.pop(), to_ledger := kinds[to][len(turns) % 2])
        holds.append(to_ledger)
        turns.append(to)

    def set_adapter() -> None:
        turns.append("peft")
        adapted.set_adapter(TENANTS[len(turns) % 2])

    @torch.inference_mode()
    def forward(one: Any, tokens: int = TOKENS) -> None:
        one(input_ids=ids[:, :tokens], use_cache=False)

    kinds = {name: list(one.values()) for name, one in (("4096", small), ("65536", large), ("pages", both))}
    turns: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        merged, saved = Path(place) / "merged", Path(place) / "adapter"
        with fk.applied(model, kinds["4096"][0], backend="cpu") as first:
            model.save_pretrained(merged)
            adapted.save_pretrained(saved, save_embedding_layers=False)
            holds = [first]
            seconds = measure(
                {
                    "add": add,
                    "swap": lambda: switch("4096"),
                    "swap 65536": lambda: switch("65536"),
                    "swap pages": lambda: switch("pages"),
                    "set_adapter": set_adapter,
                    "load and forward": lambda: forward(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)),
                    "swap and forward": lambda: (switch("4096"), forward(model)),
                    "forward": lambda: forward(model),
                    "forward with an adapter": lambda: forward(adapted),
                    "token": lambda: forward(model, 1),
                    "token with an adapter": lambda: forward(adapted, 1),
                    "load": lambda: AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
                },
                rounds,
                time.process_time,
            )
        sizes = {
            "ledger, K = 4,096": len(small["one"].encode()),
            "ledger, K = 65,536": len(large["one"].encode()),
            f"LoRA adapter, r = {RANK}": bytes_of(saved / TENANTS[1], "*.safetensors"),
            "merged model": bytes_of(merged, "*.safetensors"),
        }
    rows = [
        absolute("swap, K = 4,096", seconds["swap"], 1000, "ms"),
        ratio("swap, K = 4,096 / torch.add(w, x, out=w)", seconds["swap"], seconds["add"]),
        ratio("swap, K = 65,536 / torch.add", seconds["swap 65536"], seconds["add"]),
        ratio("swap, pages of both / torch.add", seconds["swap pages"], seconds["add"]),
        ratio(
            "loading a merged model and a forward pass / swap and one", seconds["load and forward"], seconds["swap and forward"]
        ),
        ratio("loading a merged model, mapped and not read / swap", seconds["load"], seconds["swap"]),
        ratio("swap, K = 4,096 / PEFT's set_adapter", seconds["swap"], seconds["set_adapter"]),
        ratio(
            f"forward pass of {TOKENS} tokens, with an adapter / plain", seconds["forward with an adapter"], seconds["forward"]
        ),
        ratio("forward pass of 1 token, with an adapter / plain", seconds["token with an adapter"], seconds["token"]),
        *(Row(f"bytes of a tenant's file: {name}", n, "bytes", n, n) for name, n in sizes.items()),
    ]
    report("Tuned models in turn over one base of SmolLM2-135M's shapes on the CPU, float32", "swap-cpu", rows)
