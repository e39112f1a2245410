"""The tables of docs/rewards.md: the demo's tasks with exact match as reward, beside the loss, a control and policy gradients.

    python dev/experiments/rewards.py OUT [VARIANT ...]

Every run of a table has the same number of forward passes of a record, an answer being one and a backward pass two. Runs that
are done are not repeated.
"""

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedkseed as fk
from fedkseed.data import Example, collate, encode
from fedkseed.demo import clients, held_out, model_folder
from fedkseed.evaluation import Decoder, evaluate_loss, exact_match, generate, response_loss
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.randomness import derive, generator

SEEDS = (1, 2, 3)
PASSES = 15_360
ROUNDS = 6
COMMON = {
    "model": str(model_folder()), "partition": "client", "num_clients": 20, "fraction_train": 0.1, "num_rounds": ROUNDS,
    "batch_size": 16, "max_length": 96, "schedule": "linear", "num_seeds": 4096, "aggregator": "mean", "eval_every": 3,
    "eval_limit": "all",
}  # fmt: skip
REWARD = {
    "objective": "exact-match", "local_steps": 5, "directions": 8, "eps": 3e-2, "lr": 2e-3, "max_new_tokens": 2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "reward": REWARD,
    "reward, control": {**REWARD, "responses": "shuffled"},
    "reward, ranks": {**REWARD, "scaling": "ranks", "lr": 6e-3},
    "reward, raw slopes": {**REWARD, "scaling": "none", "lr": 2e-3},
    "loss, two points": {"local_steps": 40, "lr": "auto"},
    "loss, gradients": {
        "algorithm": "fedkseed-grad", "local_optimizer": "adam", "local_steps": 26, "lr": 2e-3,
    },
    "policy gradient": {"lr": 1e-3, "prompts": 8, "group": 8},
}  # fmt: skip
"""26 steps of 16 records, 3 passes each, in 6 rounds of 2 clients are 14,976; an answer of the policy gradient costs 4."""


def main() -> None:
    out, *chosen = sys.argv[1:]
    for seed in SEEDS:
        for name in chosen or VARIANTS:
            path = folder(Path(out), name, seed)
            if not (path / "result.json").exists():
                result = policy_gradient(seed) if name == "policy gradient" else federated(path, seed, VARIANTS[name])
                path.mkdir(parents=True, exist_ok=True)
                (path / "result.json").write_text(json.dumps(result))
                print(name, seed, result, flush=True)
    table(Path(out), chosen or list(VARIANTS))


def federated(path: Path, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    train = [{**asdict(e), "client": name} for name, own in clients(seed).items() for e in own]
    data = {"data": train, "eval_data": list(map(asdict, held_out(seed)))}
    result = fk.simulate({**COMMON, **data, **settings, "seed": seed}, run=path)
    model, tokenizer = load_model(str(model_folder()), "float32", "cpu"), load_tokenizer(str(model_folder()))
    before = scores(model, tokenizer, seed)
    fk.apply(model, result.ledger)
    rounds = [e for e in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if e["event"] == "round"]
    traffic = statistics.mean(e["bytes_down"] + e["bytes_up"] for e in rounds)
    seconds = sum(e["seconds"] for e in rounds)
    return {**prefixed(before, "base_"), **scores(model, tokenizer, seed), "bytes": traffic, "seconds": seconds}


def policy_gradient(seed: int) -> dict[str, float]:
    """GRPO with one step a group (REINFORCE; rewards less their group's mean, over its spread) on the pooled records."""
    settings = VARIANTS["policy gradient"]
    model, tokenizer = load_model(str(model_folder()), "float32", "cpu"), load_tokenizer(str(model_folder()))
    before = scores(model, tokenizer, seed)
    model.requires_grad_(True)
    records = [record for own in clients(seed).values() for record in own]
    decoder, adam = Decoder(model, tokenizer), torch.optim.Adam(model.parameters(), settings["lr"])
    steps = PASSES // (4 * settings["prompts"] * settings["group"])
    for step in range(steps):
        for part in adam.param_groups:
            part["lr"] = settings["lr"] * (1 - step / steps)
        drawn = generator(seed, "prompts", step).choice(len(records), settings["prompts"], replace=False)
        asked = [records[i] for i in drawn for _ in range(settings["group"])]
        prompts = [e.input_ids[: e.prompt_length] for e in encode(asked, tokenizer, 96).examples]
        keys = [derive(seed, "answers", step, i) for i in range(len(prompts))]
        texts = decoder.answers(prompts, len(prompts), 2, temperature=1.0, keys=keys)
        rewards = np.array([text.strip() == e.output for text, e in zip(texts, asked, strict=True)], float)
        groups = rewards.reshape(-1, settings["group"])
        advantages = ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)).reshape(-1)
        telling = [i for i in range(len(asked)) if advantages[i] and texts[i].strip()]
        adam.zero_grad()
        for sign in (1.0, -1.0):  # binary rewards: within a group one advantage each; passes by equal weights
            for value in sorted({abs(advantages[i]) for i in telling if advantages[i] * sign > 0}):
                same = [i for i in telling if advantages[i] == sign * value]
                answered = encode([replace(asked[i], output=texts[i].strip()) for i in same], tokenizer, 96).examples
                loss, _ = response_loss(model, collate(answered, 0))
                (sign * value * loss / len(asked)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    return {**prefixed(before, "base_"), **scores(model, tokenizer, seed), "steps": steps}


def scores(model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
    """Held-out exact match of greedy answers, and the loss."""
    model.train(False)
    records: list[Example] = held_out(seed)
    examples = encode(records, tokenizer, 96).examples
    answers = generate(model, tokenizer, examples, 64, 12)
    loss = evaluate_loss(model, examples, 8, 0).loss
    return {"exact_match": exact_match(answers, [record.output for record in records]), "loss": loss}


def prefixed(values: dict[str, float], prefix: str) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


def table(out: Path, names: list[str]) -> None:
    heads = ("what is tuned on", "exact answers, base", "after", "held-out loss, base", "after", "seeds")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name in names:
        files = [folder(out, name, seed) / "result.json" for seed in SEEDS]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if found:
            columns = ("base_exact_match", "exact_match", "base_loss", "loss")
            cells = [spread([one[column] for one in found]) for column in columns]
            print(f"| {name} | {' | '.join(cells)} | {[round(one['exact_match'], 3) for one in found]} |")


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
