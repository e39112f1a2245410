"""The table of attacks of docs/security.md: what hostile clients cost, by the rule that makes one change of all replies.

    OMP_NUM_THREADS=1 python dev/experiments/attacks.py --data DOLLY --model STORIES260K --work WORK [--seeds 1 2 3] [--kept]

Ten clients, all asked in each of ten rounds; the hostile ones answer what an honest one would, changed as the attack has it.
Every run is one of `fedkseed.runs.simulation`, message by message. WORK gets a folder for each run; those that are done are
not repeated. The raw results and the table go to results/runs/attacks.
"""

import argparse
import json
import statistics
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from archive import RAW, pack, said, unpack
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from fedkseed.kseed.change_client import ChangeClient
from fedkseed.kseed.change_messages import ChangeReply
from fedkseed.kseed.coding import encode
from fedkseed.kseed.messages import TrainReply
from fedkseed.kseed.rounding import pack as packed
from fedkseed.runs.folder import CONFIG, RunFolder
from fedkseed.runs.observer import Nobody
from fedkseed.runs.records import Records, prepare
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation

KEPT = Path(__file__).resolve().parents[2] / "results" / "runs" / "attacks"
LIMIT = 9_999.0
CLAIMED = 10_000_000
COMMON = {
    "num_clients": 10, "fraction_train": 1.0, "num_rounds": 10, "partition": "dirichlet", "alpha": 5.0, "max_length": 48,
    "batch_size": 2, "eval_every": 10, "eval_limit": "all", "schedule": "linear",
}  # fmt: skip
TWO_POINT = {"local_steps": 8, "lr": 2e-4, "eps": 1e-3, "num_seeds": 1024}
GRAD = {"algorithm": "fedkseed-grad", "local_steps": 1, "lr": 0.05, "num_seeds": 4096}
RULES = ("mean", "clipped", "trimmed-mean", "median", "krum")
ROWS = {f"gradients, {rule}": GRAD | {"aggregator": rule} for rule in RULES}
ROWS |= {f"two-point, {rule}": TWO_POINT | {"aggregator": rule} for rule in RULES[:2]}
ROWS |= {f"two-point, shared seeds, {rule}": TWO_POINT | {"aggregator": rule, "shared_seeds": "on"} for rule in RULES}


@dataclass(frozen=True)
class Attack:
    """What the first clients do: how many they are, and what becomes of their numbers in a round; None if they say nothing."""

    hostile: int
    change: Callable[[np.ndarray, int], np.ndarray] | None
    claimed: int | None = None


def one_at_the_limit(numbers: np.ndarray, server_round: int) -> np.ndarray:
    changed = numbers.copy()
    changed[0] = LIMIT
    return changed


ATTACKS = {
    "honest": Attack(0, None),
    "attacker absent": Attack(1, None),
    "all at the limit": Attack(1, lambda numbers, i: np.full(len(numbers), LIMIT)),
    "one at the limit": Attack(1, one_at_the_limit),
    "times -10": Attack(1, lambda numbers, i: -10 * numbers),
    "times -1": Attack(1, lambda numbers, i: -numbers),
    "10^7 records, times -1": Attack(1, lambda numbers, i: -numbers, CLAIMED),
    "signs, 20 %": Attack(2, lambda numbers, i: -numbers),
    "signs, 40 %": Attack(4, lambda numbers, i: -numbers),
    "slow poisoner": Attack(1, lambda numbers, i: -(1.3**i) * numbers),
}
FEW = ("honest", "times -10", "times -1", "signs, 20 %", "signs, 40 %", "slow poisoner")
FEWER = ("honest", "times -10", "signs, 20 %", "signs, 40 %")


def asked_of(row: str) -> tuple[str, ...]:
    """Every attack of the default rule and of mean gradients; of the others those that tell them apart."""
    if row in ("gradients, mean", "gradients, clipped", "two-point, clipped"):
        return tuple(ATTACKS)
    if "shared seeds" in row:
        return FEWER[:1] if row.endswith(" mean") else FEWER
    return FEW


class Client:
    """A client with an attack in between."""

    def __init__(self, client: Any, attack: Attack, num_examples: int) -> None:
        self.client, self.task, self._attack, self._num_examples = client, client.task, attack, num_examples

    def answer(self, data: bytes, on_step: Any = None) -> bytes:
        if self._attack.change is None:
            return b""
        said, change = self.client.answer(data, on_step), self._attack.change
        if isinstance(self.client, ChangeClient):
            reply = ChangeReply.decode(said)
            numbers = change(reply.numbers.decode(self.client.pages[-1].pool.size), reply.server_round)
            return replace(reply, numbers=encode(numbers, reply.numbers.wire), num_examples=self._num_examples).encode()
        scalars = TrainReply.decode(said)
        grads = scalars.projected_grads
        numbers = np.clip(change(grads.unpack().astype(float), scalars.server_round), -LIMIT, LIMIT)
        sent = packed(numbers, grads.precision, grads.exponent)
        return replace(scalars, projected_grads=sent, dropped=(), num_examples=self._num_examples).encode()


def lean(model: Any) -> Callable[..., Any]:
    """The model's forward pass without what transformers does around it, which is most of so small a model's time."""
    core, config = model.model, model.config
    cos, sin = (x[0].clone() for x in core.rotary_emb(core.embed_tokens.weight, torch.arange(512)[None]))
    eps, heads = config.rms_norm_eps, (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[: x.shape[-2]] + torch.cat((-second, first), -1) * sin[: x.shape[-2]]

    def forward(input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = False, logits_to_keep: Any = 0) -> Any:
        x = core.embed_tokens.weight[input_ids]
        for layer in core.layers:
            attention, mlp = layer.self_attn, layer.mlp
            h = rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, eps)
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            q, k, v = (
                linear(h, p.weight).unflatten(-1, (n, -1)).transpose(1, 2) for p, n in zip(projections, heads, strict=True)
            )
            seen = scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
            x = x + linear(seen.transpose(1, 2).flatten(2), attention.o_proj.weight)
            h = rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight, eps)
            x = x + linear(silu(linear(h, mlp.gate_proj.weight)) * linear(h, mlp.up_proj.weight), mlp.down_proj.weight)
        x = rms_norm(x[:, logits_to_keep], x.shape[-1:], core.norm.weight, eps)
        return types.SimpleNamespace(logits=linear(x, model.lm_head.weight))

    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(forward(ids, logits_to_keep=slice(5, 9)).logits, model(ids).logits[:, 5:9])
    return forward


def cut(source: Path, out: Path) -> Path:
    """Short records of Dolly without a context, so that a forward pass is one: to train on, and every sixth to evaluate on."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    short = [r for r in records if not r["context"] and len(r["instruction"]) < 45 and 5 < len(r["response"]) < 40]
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", [r for i, r in enumerate(short) if i % 6]), ("held-out", short[::6])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen), encoding="utf-8")
    return out.resolve()


def simulate(folder: Path, settings: Mapping[str, Any], attack: Attack, records: Callable[..., Records]) -> None:
    """One run, from the beginning or from where it is."""
    config = build(dict(settings))
    known = records(config)
    config = config.model_copy(update={"eval_limit": known.config.eval_limit, "max_length": known.config.max_length})
    run = RunFolder.open(folder) if (folder / CONFIG).exists() else RunFolder.create(folder, config)
    federation = Simulation(run, known, Nobody())
    federation.model.forward = lean(federation.model)
    sizes = dict(known.sizes)
    for name in sorted(federation.clients)[: attack.hostile]:
        sizes[name] = attack.claimed or sizes[name]
        federation.clients[name] = Client(federation.clients[name], attack, sizes[name])
    federation.server.admit(list(sizes), sizes)
    federation.train()


def losses(folder: Path) -> list[float]:
    """The held-out losses of a run so far: the base model's and the last."""
    file = folder / "metrics.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [event["eval_loss"] for event in events if event["event"] == "evaluation"]


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def table(work: Path, seeds: list[int]) -> str:
    """What attacks take of the gain of the same rule's honest run, and rules of that of the honest mean, in percent.

    The mean over the seeds that are there, from where to where, and how many they are if not all.
    """

    def ran(row: str, name: str) -> list[list[float]]:
        return [losses(work / slug(row) / slug(name) / str(seed)) for seed in seeds]

    lines = [f"| rule | {' | '.join(ATTACKS)} |", f"| --- |{' --- |' * len(ATTACKS)}"]
    for row in ROWS:
        cells = []
        for name in ATTACKS:
            against = ran(f"{row.partition(',')[0]}, mean" if name == "honest" else row, "honest")
            pairs = [pair for pair in zip(ran(row, name), against, strict=True) if len(pair[0]) == len(pair[1]) == 2]
            lost = [100 * (now[1] - honest[1]) / (honest[0] - honest[1]) for now, honest in pairs]
            if not lost:
                cells.append("")
                continue
            notes = [f"{min(lost):.3g} to {max(lost):.3g}"] if len(lost) > 1 else []
            notes += [f"{len(lost)} of {len(seeds)} seeds"] if len(lost) < len(seeds) else []
            cells.append(f"{statistics.mean(lost):.3g} ({'; '.join(notes)})")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def keep(work: Path, places: Mapping[str, str]) -> str:
    """Settings and metrics of all runs as one archive; this machine's folders are taken out."""
    files = {}
    for file in sorted([*work.rglob("config.toml"), *work.rglob("metrics.jsonl")]):
        text = file.read_text(encoding="utf-8")
        for place, name in places.items():
            text = text.replace(place, name)
        files[file.relative_to(work).as_posix()] = text.encode()
    KEPT.mkdir(parents=True, exist_ok=True)
    pack(files, KEPT / RAW)
    return said(KEPT / RAW)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS))
    parser.add_argument("--kept", action="store_true", help="begin with the runs of results/runs/attacks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = args.work / "runs"
    if args.kept and not runs.exists():
        unpack(KEPT / RAW, runs)
    data = cut(args.data, args.work)
    prepared: dict[int, Records] = {}

    def records(config: Any) -> Records:
        """Dealt out once for each seed: no rule matters to it."""
        if config.seed not in prepared:
            prepared[config.seed] = prepare(config, Nobody())
        return prepared[config.seed]

    for seed in args.seeds:
        for row in args.rows:
            for name in [name for name in args.attacks if name in asked_of(row)]:
                folder = runs / slug(row) / slug(name) / str(seed)
                if len(losses(folder)) < 2:
                    where = {
                        "model": str(args.model),
                        "data": str(data / "train.jsonl"),
                        "eval_data": str(data / "held-out.jsonl"),
                        "seed": seed,
                    }
                    simulate(folder, COMMON | ROWS[row] | where, ATTACKS[name], records)
                    print(row, "|", name, "|", seed, "|", losses(folder), flush=True)
    text = table(runs, args.seeds)
    (KEPT).mkdir(parents=True, exist_ok=True)
    said_of = keep(runs, {f"{data}/": "", f"{args.model.resolve()}": args.model.name})
    (KEPT / "table.md").write_text(f"{text}\n{said_of}")
    print(text)


if __name__ == "__main__":
    main()
