"""The tables of docs/rewards.md: exact match as reward, beside a control, policy gradients and the loss.

    python dev/experiments/rewards.py OUT [--task demo|sums] [--model FOLDER] [--device cuda] [--rows ROW ...] [--seeds 1 2 3]
        [--lr RATE ...] [--eps DISTANCE ...]

Every run of a task has the same number of forward passes of a record, an answer being one and a backward pass two. OUT gets
a JSON file for each run; runs that are there are not repeated, and one that was killed goes on. --lr and --eps are in
place of a row's own, each with each. `sums` wants SmolLM2-135M as --model.
"""

import argparse
import json
import statistics
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import sums
import torch

import fedkseed as fk
from fedkseed import demo
from fedkseed.data import collate, encode, get_template
from fedkseed.evaluation import Decoder, evaluate_loss, exact_match, generate, response_log_probs
from fedkseed.files import write_atomically
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.randomness import derive, generator

DIRECTIONS = 8
POLICY_GRADIENT = "policy gradient"


@dataclass(frozen=True)
class Task:
    """What is learnt, and at which settings.

    Attributes:
        records: module with `clients(seed)` and `held_out(seed)`.
        settings: of all runs.
        steps: that a client takes in a round of a run on scores, of 16 answers a record each.
        scored: of runs on scores, rates aside.
        rates: of runs on scores, by how they are scaled.
        answer: longest held-out answer in tokens.
        prompts, group: of a step of the policy gradient: prompts, and answers to each.
        policy_lr: its rate, for all weights.
    """

    records: types.ModuleType
    settings: dict[str, Any]
    steps: int
    scored: dict[str, Any]
    rates: dict[str, float]
    answer: int
    prompts: int
    group: int
    policy_lr: float

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The settings of each row beside those of all."""
        passes = 2 * DIRECTIONS * self.steps  # of a record
        scored = {"objective": "exact-match", "local_steps": self.steps, "directions": DIRECTIONS}
        reward = {**scored, **self.scored, "lr": self.rates["z-scores"]}
        adam = {"algorithm": "fedkseed-grad", "local_optimizer": "adam", "lr": 2e-3}
        return {
            "reward": reward,
            "reward, control": {**reward, "responses": "shuffled"},
            "loss, two points": {"local_steps": passes // 2, "lr": "auto"},
            "loss, gradients": {**adam, "local_steps": passes // 3},
            POLICY_GRADIENT: {"lr": self.policy_lr},
            "reward, ranks": {**reward, "scaling": "ranks", "lr": self.rates["ranks"]},
            "reward, raw slopes": {**reward, "scaling": "none", "lr": self.rates["none"]},
            "reward, drawn": {**reward, "temperature": 0.5},
            **self._rows_of_few(reward, passes),
        }

    def _rows_of_few(self, reward: dict[str, Any], passes: int) -> dict[str, Any]:
        """Those that move the values' projections alone, at rates of the demo's tasks."""
        few = {"train": "*.v_proj.*"}
        scored = {**reward, **few, "lr": 1.6e-2, "eps": 1e-1}
        return {
            "reward, values' projections": scored,
            "reward, values' projections, control": {**scored, "responses": "shuffled"},
            "loss, values' projections": {
                "directions": DIRECTIONS,
                "local_steps": passes // (DIRECTIONS + 1),
                "lr": 4.8e-3,
                **few,
            },
        }

    @property
    def passes(self) -> int:
        """Forward passes of a record in a run on scores."""
        one = self.settings
        cohort = max(1, int(one["fraction_train"] * one["num_clients"]))
        return 2 * DIRECTIONS * self.steps * one["batch_size"] * one["num_rounds"] * cohort


COMMON = {
    "partition": "client", "num_rounds": 6, "schedule": "linear", "num_seeds": 4096, "aggregator": "mean", "eval_every": 3,
    "eval_limit": "all", "max_length": 96, "template": "plain",
}  # fmt: skip
TASKS = {
    "demo": Task(
        demo,
        {**COMMON, "num_clients": 20, "fraction_train": 0.1, "batch_size": 16},
        5,
        {"eps": 3e-2, "max_new_tokens": 2},
        {"z-scores": 2e-3, "ranks": 6e-3, "none": 2e-3},
        answer=12, prompts=8, group=8, policy_lr=1e-3,
    ),
    "sums": Task(
        sums,
        {**COMMON, "num_clients": 10, "fraction_train": 0.2, "batch_size": 64, "template": str(sums.TEMPLATE)},
        4,
        {"eps": 4e-3, "max_new_tokens": 2},
        {"z-scores": 3e-4, "ranks": 1e-3, "none": 1.7e-5},
        answer=2, prompts=16, group=8, policy_lr=1e-5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run: a row of a table with one seed.

    Attributes:
        task: what is learnt.
        model: folder.
        device: where.
        row: its name.
        seed: of records and run.
        settings: the row's.
    """

    task: Task
    model: str
    device: str
    row: str
    seed: int
    settings: dict[str, Any]

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.model)

    @property
    def name(self) -> str:
        """Of its files; rates that are not the row's own are in it."""
        own = self.task.rows[self.row]
        chosen = [f"{key}{self.settings[key]:g}" for key in ("lr", "eps") if self.settings.get(key) != own.get(key)]
        return "-".join([*self.row.replace(",", "").split(), *chosen, str(self.seed)])

    def federated(self, folder: Path) -> dict[str, Any]:
        """By a federation of simulated clients."""
        records = self.task.records
        train = [{**asdict(e), "client": name} for name, own in records.clients(self.seed).items() for e in own]
        data = {"data": train, "eval_data": list(map(asdict, records.held_out(self.seed)))}
        place = {"model": self.model, "device": self.device, "seed": self.seed}
        result = fk.simulate({**self.task.settings, **data, **self.settings, **place}, run=folder)
        model = load_model(self.model, "float32", self.device)
        before = self.scores(model)
        fk.apply(model, result.ledger)
        rounds = [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if e["event"] == "round"]
        traffic = statistics.mean(e["bytes_down"] + e["bytes_up"] for e in rounds)
        course = {"losses": result.history, "rewards": result.rewards, "moved_rms": rounds[-1].get("moved_rms")}
        return {
            **before,
            **self.scores(model, "after_"),
            **course,
            "bytes": traffic,
            "seconds": sum(e["seconds"] for e in rounds),
        }

    def policy_gradient(self) -> dict[str, Any]:
        """GRPO with one step a group (REINFORCE; rewards less their group's mean, over its spread) on the pooled records."""
        task, rate, model = self.task, self.settings["lr"], load_model(self.model, "float32", self.device)
        before = self.scores(model)
        model.requires_grad_(True)
        records = [record for own in task.records.clients(self.seed).values() for record in own]
        decoder, adam = Decoder(model, self.tokenizer), torch.optim.Adam(model.parameters(), rate)
        steps = task.passes // (4 * task.prompts * task.group)  # an answer costs 1 pass, and 3 more with its gradient
        for step in range(steps):
            for part in adam.param_groups:
                part["lr"] = rate * (1 - step / steps)
            drawn = generator(self.seed, "prompts", step).choice(len(records), task.prompts, replace=False)
            asked = [records[i] for i in drawn for _ in range(task.group)]
            prompts = [e.input_ids[: e.prompt_length] for e in self.encoded(asked)]
            keys = [derive(self.seed, "answers", step, i) for i in range(len(prompts))]
            texts = decoder.answers(prompts, len(prompts), 2, temperature=1.0, keys=keys)
            rewards = np.array([text.strip() == e.output for text, e in zip(texts, asked, strict=True)], float)
            groups = rewards.reshape(-1, task.group)
            advantages = ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)).reshape(-1)
            telling = [i for i in range(len(asked)) if advantages[i] and texts[i].strip()]
            if not telling:
                continue
            answered = self.encoded([replace(asked[i], output=texts[i].strip()) for i in telling])
            lengths = [example.num_targets for example in answered]
            weights = torch.tensor(advantages[telling] / lengths, dtype=torch.float32, device=model.device)
            adam.zero_grad()
            (-(weights * response_log_probs(model, collate(answered, 0, model.device))).sum() / len(asked)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
        return {**before, **self.scores(model, "after_"), "steps": steps}

    def scores(self, model: Any, prefix: str = "base_") -> dict[str, float]:
        """Held-out exact match of greedy answers, and the loss."""
        model.train(False)
        records = self.task.records.held_out(self.seed)
        examples = self.encoded(records)
        answers = generate(model, self.tokenizer, examples, 128, self.task.answer)
        loss = evaluate_loss(model, examples, 64, 0).loss
        return {f"{prefix}exact_match": exact_match(answers, [r.output for r in records]), f"{prefix}loss": loss}

    def encoded(self, records: list[Any]) -> Any:
        """Records as token ids."""
        settings = self.task.settings
        return encode(records, self.tokenizer, settings["max_length"], get_template(settings["template"])).examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=TASKS, default="demo")
    parser.add_argument("--model", default=str(demo.model_folder()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=TASKS["demo"].rows, default=list(TASKS["demo"].rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--lr", nargs="+", type=float, default=[None])
    parser.add_argument("--eps", nargs="+", type=float, default=[None])
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    given.out.mkdir(parents=True, exist_ok=True)
    for run in runs(given):
        path = given.out / f"{run.name}.json"
        if path.exists():
            continue
        result = run.policy_gradient() if run.row == POLICY_GRADIENT else run.federated(given.out / run.name)
        known = {"task": given.task, "row": run.row, "seed": run.seed, "settings": run.settings, **result}
        write_atomically(path, json.dumps(known, indent=1).encode())
        print(run.name, result, flush=True)
    table(given.out)


def runs(given: argparse.Namespace) -> Iterator[Run]:
    """Those that are asked for, the first seed of all rows first."""
    task = TASKS[given.task]
    for seed, row, lr, eps in product(given.seeds, given.rows, given.lr, given.eps):
        chosen = {key: value for key, value in (("lr", lr), ("eps", eps)) if value is not None}
        yield Run(task, given.model, given.device, row, seed, {**task.rows[row], **chosen})


def table(out: Path) -> None:
    """What is in OUT, a line for each row and its rates."""
    found = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    heads = ("what is tuned on", "lr", "eps", "exact answers, base", "after", "by seed", "held-out loss, base", "after")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    kinds = dict.fromkeys((one["row"], one["settings"].get("lr"), one["settings"].get("eps")) for one in found)
    for row, lr, eps in kinds:
        same = [one for one in found if (one["row"], one["settings"].get("lr"), one["settings"].get("eps")) == (row, lr, eps)]
        by_seed = ", ".join(f"{one['seed']}: {one['after_exact_match']:.3f}" for one in same)
        base, after = (spread([one[f"{when}_exact_match"] for one in same]) for when in ("base", "after"))
        losses = (spread([one[f"{when}_loss"] for one in same]) for when in ("base", "after"))
        print(f"| {row} | {lr} | {eps} | {base} | {after} | {by_seed} | {' | '.join(losses)} |")


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
