"""Run the demo's federation with given settings, and its control; append what came of it to dev/pretrain/results.jsonl.

    OMP_NUM_THREADS=1 python dev/pretrain/find_settings.py [--seeds 1 2 3] [--control] [--set lr=1e-4 num_rounds=20 ...]

A line of the results: the settings, the held-out loss, exact match and prompt margins before and after, seconds. The
*margin* is the loss of the held-out responses after other held-out records' prompts minus that after their own; *within
kind* the wrong prompts are of the same kind. The control (`--control`) trains the same clients on the same prompts with
the responses of all of them dealt out anew among all of them.
"""

import argparse
import ast
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkseed import demo
from fedkseed.data import EncodedExample, Example, collate, encode, pad_token_id, shuffle_responses
from fedkseed.demo.tasks import HELD_OUT_KIND, TRAINED_KINDS
from fedkseed.evaluation import evaluate_loss
from fedkseed.models.loading import load_tokenizer
from fedkseed.randomness import generator
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.observer import Probe
from fedkseed.runs.records import Records
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation

HERE = Path(__file__).resolve().parent
NEW_TOKENS = 8


class Quiet:
    def note(self, text: str) -> None:
        pass

    def progress(self, activity: str, done: int, total: int) -> None:
        pass

    def probe(self, probe: Probe) -> None:
        pass

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "evaluation":
            print(f"  round {event['server_round']}: {event['eval_loss']:.4f}", flush=True)


@torch.inference_mode()
def greedy(model: Any, examples: Sequence[EncodedExample], pad_id: int, eos_id: int) -> list[list[int]]:
    """The most likely continuation of each prompt, without EOS."""
    texts = [list(map(int, example.input_ids[: example.prompt_length])) for example in examples]
    given = [len(text) for text in texts]
    going = set(range(len(texts)))
    for _ in range(NEW_TOKENS):
        order = sorted(going)
        batch = collate([EncodedExample(np.array(texts[i], np.int32), 1) for i in order], pad_id)
        last = torch.tensor([len(texts[i]) - 1 for i in order])
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[torch.arange(len(order)), last]
        for i, token in zip(order, logits.argmax(-1).tolist(), strict=True):
            if token == eos_id:
                going.remove(i)
            else:
                texts[i].append(token)
        if not going:
            break
    return [text[n:] for text, n in zip(texts, given, strict=True)]


class Measure:
    """The measures on held-out records."""

    def __init__(self, held_out: Sequence[Example], tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.pad_id, self.examples = tokenizer, pad_token_id(tokenizer), list(held_out)

        def encoded(examples: Sequence[Example]) -> list[EncodedExample]:
            return list(encode(examples, tokenizer, max_length).examples)

        kinds = [*TRAINED_KINDS, HELD_OUT_KIND]
        by_kind = {kind: [e for e in held_out if e.category == kind] for kind in kinds}
        trained = [e for e in held_out if e.category != HELD_OUT_KIND]
        self.all = encoded(held_out)
        self.sets = {"all": self.all, "trained_kinds": encoded(trained), "new_kind": encoded(by_kind[HELD_OUT_KIND])}
        # responses given to wrong prompts: the same responses, so that the difference of the losses is the prompts' doing
        self.wrong = encoded(shuffle_responses(held_out, generator(0, "wrong prompts")))
        self.wrong_within = encoded(
            [e for kind in kinds for e in shuffle_responses(by_kind[kind], generator(0, "wrong prompts", kind))]
        )

    def __call__(self, model: torch.nn.Module) -> dict[str, Any]:
        def loss(examples: Sequence[EncodedExample]) -> float:
            return evaluate_loss(model, examples, 34, self.pad_id).loss

        result: dict[str, Any] = {f"loss_{name}": loss(examples) for name, examples in self.sets.items()}
        result["margin"] = loss(self.wrong) - result["loss_all"]
        result["margin_within_kind"] = loss(self.wrong_within) - result["loss_all"]
        said = [self.tokenizer.decode(ids) for ids in greedy(model, self.all, self.pad_id, int(self.tokenizer.eos_token_id))]
        hits = [text == e.output for text, e in zip(said, self.examples, strict=True)]
        for name in (*TRAINED_KINDS, HELD_OUT_KIND):
            of = [hit for hit, e in zip(hits, self.examples, strict=True) if e.category == name]
            result[f"exact_match_{name}"] = sum(of) / len(of)
        result["exact_match"] = sum(hits) / len(hits)
        result["said"] = dict(list(zip((f"{e.instruction} {e.input}" for e in self.examples), said, strict=True))[::11])
        return result


def run(settings: dict[str, Any], seed: int, control: bool, model: str, folder: Path) -> dict[str, Any]:
    data = folder / "unused.jsonl"
    data.touch()  # the clients' records are given, not read
    config = build({**settings, "seed": seed, "model": model, "data": data})
    tokenizer = load_tokenizer(model)
    clients = demo.clients(seed)
    if control:
        flat = shuffle_responses([e for records in clients.values() for e in records], generator(seed, "control"))
        place = iter(flat)
        clients = {name: [next(place) for _ in records] for name, records in clients.items()}
    held_out = demo.held_out(seed)
    encoded = {name: list(encode(records, tokenizer, config.max_length).examples) for name, records in clients.items()}
    measure = Measure(held_out, tokenizer, config.max_length)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    simulation = Simulation(
        RunFolder.create(folder / f"run-{seed}-{control}-{time.time()}", config),
        Records(encoded, measure.all, [], measure.pad_id),
        Quiet(),
    )
    before = measure(simulation.model)
    started, started_cpu = time.perf_counter(), time.process_time()
    simulation.train()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    after = measure(simulation.model)
    rounds = [event for event in simulation.run.metrics() if event["event"] == "round"]
    return {
        "seed": seed,
        "control": control,
        "before": before,
        "after": after,
        "loss_change": after["loss_all"] / before["loss_all"] - 1,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "cpu_seconds_in_all": round(time.process_time() - begin_cpu, 1),
        "seconds_in_all": round(time.perf_counter() - begin, 1),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "bytes_down": rounds[-1]["bytes_down"],
        "bytes_up": rounds[-1]["bytes_up"],
        "ledger_bytes": simulation.run.ledger_path.stat().st_size,
        "two_point_steps": len(rounds) * rounds[-1]["num_replies"] * config.local_steps,
        "curve": [e["eval_loss"] for e in simulation.run.metrics() if e["event"] == "evaluation"],
    }


def value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--model", default=str(demo.model_folder()))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--note", default="")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {**demo.SETTINGS, **{name: value(text) for name, _, text in (item.partition("=") for item in args.set)}}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            result = run(settings, seed, args.control, args.model, Path(folder))
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"note": args.note, "settings": settings} | result) + "\n")
            b, a = result["before"], result["after"]
            print(
                f"seed {seed} control {args.control} {' '.join(args.set)}: loss {b['loss_all']:.3f} -> {a['loss_all']:.3f} "
                f"({result['loss_change']:+.1%}), new kind {b['loss_new_kind']:.3f} -> {a['loss_new_kind']:.3f}, "
                f"exact match {b['exact_match']:.2f} -> {a['exact_match']:.2f}, margin {b['margin']:.2f} -> {a['margin']:.2f}, "
                f"within kind {b['margin_within_kind']:.2f} -> {a['margin_within_kind']:.2f}, "
                f"{result['cpu_seconds']} s of CPU, {result['seconds']} s, load {result['load_average']:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
