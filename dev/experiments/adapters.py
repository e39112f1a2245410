"""Quality against bytes of the file as saved: K numbers beside PEFT's adapters and full fine-tuning, on one small model.

    python dev/experiments/adapters.py MODEL DATA.jsonl OUT [--steps 100]

Every method takes the same steps on the same batches, by Adam with a rate that falls linearly to zero. Its rate is the best of
one grid that all share, by the loss on records for choosing, seed 1; then seeds 1 to 3 are told by the loss on other held-out
records. Results are lines of OUT/results.jsonl; what is there already is not run again. At the end it prints the table.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

import fedkseed as fk
from fedkseed.data import collate, encode, pad_token_id, read_examples
from fedkseed.evaluation import evaluate_loss, mean_loss
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.randomness import generator

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SIZES = (256, 1024, 4096, 16384, 65536)
SEEDS = (1, 2, 3)
BATCH, MAX_TOKENS, NUM_CHOOSING, NUM_HELD_OUT, NUM_TRAIN = 8, 80, 100, 200, 750
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
FACTORS = ["k_proj", "v_proj", "down_proj"]
PEFT: dict[str, Callable[[], Any]] = {
    "LoRA r=1": lambda: peft.LoraConfig(r=1, lora_alpha=1, target_modules=LINEAR),
    "LoRA r=8": lambda: peft.LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR),
    "IA3": lambda: peft.IA3Config(target_modules=FACTORS, feedforward_modules=["down_proj"]),
    "LN-tuning": lambda: peft.LNTuningConfig(target_modules=NORMS),
    "VeRA": lambda: peft.VeraConfig(target_modules=LINEAR),
    "VeRA, projections not saved": lambda: peft.VeraConfig(target_modules=LINEAR, save_projection=False),
    "TinyLoRA": lambda: peft.TinyLoraConfig(target_modules=LINEAR),
    "TinyLoRA, projections not saved": lambda: peft.TinyLoraConfig(target_modules=LINEAR, save_projection=False),
}
NUMBERS = {f"K = {size:,}": size for size in SIZES}
METHODS = (
    "K = 4,096",
    "LoRA r=1",
    "IA3",
    "TinyLoRA",
    "TinyLoRA, projections not saved",
    "LN-tuning",
    "all weights",
    "K = 256",
    "K = 1,024",
    "K = 16,384",
    "K = 65,536",
    "LoRA r=8",
    "VeRA",
    "VeRA, projections not saved",
)
SAME = {"VeRA, projections not saved": "VeRA", "TinyLoRA, projections not saved": "TinyLoRA"}
"""What differs in its file only."""


class Task:
    """A model's folder, and records for training, choosing and telling."""

    def __init__(self, folder: str, data: Path) -> None:
        self.folder, tokenizer = folder, load_tokenizer(folder)
        encoded = encode(read_examples(data), tokenizer, 100_000).examples
        short = [example for example in encoded if len(example.input_ids) <= MAX_TOKENS]
        order = generator(0, "adapters").permutation(len(short))
        shuffled = [short[i] for i in order]
        self.choosing, rest = shuffled[:NUM_CHOOSING], shuffled[NUM_CHOOSING:]
        self.held_out, self.train = rest[:NUM_HELD_OUT], rest[NUM_HELD_OUT : NUM_HELD_OUT + NUM_TRAIN]
        self.pad = pad_token_id(tokenizer)

    def loss(self, model: Any, examples: Any) -> float:
        return evaluate_loss(model, examples, 32, self.pad).loss

    def run(self, method: str, lr: float, seed: int, steps: int, out: Path) -> dict[str, Any]:
        torch.manual_seed(seed)  # of PEFT's initial values
        model: Any = load_model(self.folder, "float32")
        betas = {"betas": (0.9, 0.99)}
        if method in NUMBERS:
            model, optimizer = fk.prepare(model, fk.SeedPool(key=seed, size=NUMBERS[method]), lr=lr)
        else:
            if method in PEFT:
                model = peft.get_peft_model(model, PEFT[method]())
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, **betas)
        numbers = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = generator(seed, "adapters", "batches").integers(len(self.train), size=(steps, BATCH))
        for rows in order:
            mean_loss(model, collate([self.train[i] for i in rows], self.pad)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        saved = out / "saved"
        if method in NUMBERS:
            saved.mkdir(exist_ok=True)
            fk.ledger_of(model).save(saved / "ledger.safetensors")
            size = (saved / "ledger.safetensors").stat().st_size
        else:
            model.save_pretrained(saved, **({"save_embedding_layers": False} if method in PEFT else {}))
            name = "adapter_model.safetensors" if method in PEFT else "model.safetensors"
            size = (saved / name).stat().st_size
        held_out = self.loss(model, self.held_out)
        choosing = self.loss(model, self.choosing)
        return {
            "method": method,
            "lr": lr,
            "seed": seed,
            "numbers": numbers,
            "bytes": size,
            "choosing": choosing,
            "loss": held_out,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    task, results = Task(args.model, args.data), args.out / "results.jsonl"
    base = task.loss(load_model(args.model, "float32"), task.held_out)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    def result(method: str, lr: float, seed: int) -> dict[str, Any]:
        for known in done:
            if (known["method"], known["lr"], known["seed"]) == (method, lr, seed):
                return known
        found = task.run(method, lr, seed, args.steps, args.out)
        done.append(found)
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        return found

    print(f"base {base:.4f}\n\n| method | numbers | bytes of the file | rate | held-out loss | seeds |\n|{' --- |' * 6}")
    rows = []
    for method in METHODS:
        rates = [result(SAME.get(method, method), lr, SEEDS[0])["choosing"] for lr in RATES]
        best = RATES[int(np.nanargmin(rates))]
        each = [result(SAME.get(method, method), best, seed) for seed in SEEDS]
        size = result(method, best, SEEDS[0])["bytes"] if method in SAME else each[0]["bytes"]
        losses = [one["loss"] for one in each]
        mean, spread = statistics.mean(losses), statistics.stdev(losses)
        at_end = " (end of the grid)" if best in (RATES[0], RATES[-1]) else ""
        listed = ", ".join(f"{loss:.3f}" for loss in losses)
        rows.append(
            (
                size,
                f"| {method} | {each[0]['numbers']:,} | {size:,} | {best:g}{at_end} | {mean:.3f} ± {spread:.3f} | {listed} |",
            )
        )
        print(rows[-1][1], flush=True)
    (args.out / "table.md").write_text("\n".join(row for _, row in sorted(rows)) + "\n")


if __name__ == "__main__":
    main()
