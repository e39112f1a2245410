"""`fedkseed demo`: a whole federation in half a minute, with the model and the tasks that the package brings along."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from fedkseed.cli.console import say, say_command, show_table
from fedkseed.cli.display import watching
from fedkseed.cli.interrupts import interruptible, with_run
from fedkseed.data import Example, encode, read_examples
from fedkseed.demo import SETTINGS, clients, held_out, model_folder
from fedkseed.errors import RunError, RunFolderError
from fedkseed.evaluation import exact_match, generate
from fedkseed.files import write_atomically
from fedkseed.kseed.ledger import Ledger
from fedkseed.report import report
from fedkseed.report.summary import PAPER_BYTES
from fedkseed.runs.answers import answer_to, keep_answers
from fedkseed.runs.folder import RunFolder, new_folder
from fedkseed.runs.learner import Learner, load_learner
from fedkseed.runs.observer import Observer
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import SimulationConfig, build
from fedkseed.runs.simulation import Simulation
from fedkseed.text import counted

MAX_ANSWER = 12


def demo(run: Path | None, seed: int) -> None:
    """Tune the built-in model by gradients in K numbers over 20 simulated clients and show what came of it.

    Args:
        run: the run's folder; None makes one under `runs/`.
        seed: of the tasks' records and of the run.

    Raises:
        FedKSeedError: the folder holds a run, or cannot be written.
    """
    folder = run or new_folder(Path("runs"), "demo-")
    RunFolder.check_free(folder)
    with interruptible(with_run(folder, ("fedkseed", "simulate", "--resume", folder))):
        _carry_out(folder, seed)


def _carry_out(folder: Path, seed: int) -> None:
    config, records = _write_data(folder, seed)
    begin = time.perf_counter()
    with watching(config) as observer:
        observer.note(
            "20 clients hold instruction tasks of seven kinds; one kind is held out. Gradients in 4,096 numbers tune all of it."
        )
        kept = RunFolder.create(folder, config)
        learner = load_learner(config, observer)
        simulation = Simulation(kept, prepare(config, observer, learner=learner), observer, learner.model)
        before = _answers(simulation, learner, records, observer)
        simulation.train()
        simulation.restore()
        after = _answers(simulation, learner, records, observer)
    seconds = time.perf_counter() - begin
    told = [answer_to(record, *pair) for record, *pair in zip(records, before, after, strict=True)]
    keep_answers(folder, simulation.server.checkpoint, told)
    page = report(folder)
    _show(simulation, kept.ledger_path, records, before, after)
    say()
    say(f"{seconds:.0f} seconds. Charts and everything else about the run: {page}")
    say()
    say("Go on:")
    say_command(("fedkseed", "evaluate", folder, "--answers", 20))
    say_command(("fedkseed", "export", folder, "tuned-model"))
    say_command(
        (
            *("fedkseed", "simulate", "--model", "YOUR-MODEL", "--data", "YOUR.jsonl"),
            *("--algorithm", "fedkseed-grad", "--local-optimizer", "adam", "--lr", "auto", "--num-clients", 20),
            *("--fraction-train", 0.2, "--num-rounds", 8, "--local-steps", 5, "--batch-size", 4, "--max-length", 128),
            *("--run", "runs/first"),
        )
    )
    say()


def _write_data(folder: Path, seed: int) -> tuple[SimulationConfig, list[Example]]:
    """The tasks as the files that any run has, and the settings that name them."""
    data = folder / "data"
    records = held_out(seed)
    train = [Example(e.instruction, e.input, e.output, e.category, name) for name, own in clients(seed).items() for e in own]
    files = {data / "train.jsonl": _lines(train).encode(), data / "held-out.jsonl": _lines(records).encode()}
    try:
        for file, content in files.items():
            if file.exists() and file.read_bytes() != content:
                raise RunFolderError(f"{file} holds other records than this demo's; choose another --run")
        data.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_atomically(file, content)
    except OSError as error:
        raise RunError(f"{folder}: cannot write the run folder ({error.strerror}); choose another --run") from error
    named = {"model": str(model_folder()), "data": data / "train.jsonl", "eval_data": data / "held-out.jsonl"}
    return build({**SETTINGS, **named, "partition": "client", "seed": seed}), records


def _lines(examples: Iterable[Example]) -> str:
    return "".join(json.dumps(asdict(example)) + "\n" for example in examples)


def _answers(simulation: Simulation, learner: Learner, records: list[Example], observer: Observer) -> list[str]:
    prompts = encode(records, learner.tokenizer, learner.max_length(simulation.config.max_length)).examples
    heard = partial(observer.progress, "answering held-out records")
    return generate(simulation.model, learner.tokenizer, prompts, 64, MAX_ANSWER, heard)


def _show(simulation: Simulation, ledger: Path, records: list[Example], before: list[str], after: list[str]) -> None:
    events = simulation.run.metrics()
    losses = [event["eval_loss"] for event in events if event["event"] == "evaluation"]
    traffic = [event["bytes_down"] + event["bytes_up"] for event in events if event["event"] == "round"]
    weights = 2 * events[0]["weight_bytes"]
    references = [record.output for record in records]
    unseen = [i for i, record in enumerate(records) if record.category not in _trained(simulation)]
    change = 100 * (losses[-1] / losses[0] - 1)
    rows: list[tuple[str, ...]] = [("held-out loss", f"{losses[0]:.4f}", f"{losses[-1]:.4f} ({change:+.1f} %)")]
    for name, places in (("exact answers", range(len(records))), ("of the kind that no client has", unseen)):
        shares = [exact_match([answers[i] for i in places], [references[i] for i in places]) for answers in (before, after)]
        rows.append((name, *(f"{100 * share:.0f} %" for share in shares)))
    show_table(("", "before", "after"), rows)
    improved = [i for i in range(len(records)) if after[i].strip() == references[i] != before[i].strip()]
    for i in improved[:1]:
        asked = " ".join(filter(None, (records[i].instruction, records[i].input)))
        say()
        for name, text in (("asked", asked), ("before", before[i].strip()), ("after", after[i].strip())):
            say(f"{name:<10}{text}")
    mean, config = sum(traffic) / len(traffic), simulation.config
    say()
    rounds, total = counted(config.num_rounds, "round"), len(simulation.clients)
    say(
        f"what travelled: in each of {rounds} {config.cohort_size(total)} of {total} clients got the model's "
        f"{config.num_seeds:,} numbers so far and sent back how their records change them; no record left its client"
    )
    say(
        f"bytes per client and round, both ways: {mean:,.0f} (the paper: {PAPER_BYTES:,}; "
        f"sending the weights both ways: {weights:,})"
    )
    published = len(Ledger.load(ledger).published().encode())
    say(f"the tuned model is {config.num_seeds:,} numbers over its base, {published:,} bytes when published: {ledger}")


def _trained(simulation: Simulation) -> set[str]:
    return {record.category for record in read_examples(simulation.run.path / "data" / "train.jsonl")}
