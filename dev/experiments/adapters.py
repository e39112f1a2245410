"""Quality against bytes of the file as saved: K numbers beside PEFT's adapters and full fine-tuning, on one small model.

    python dev/experiments/adapters.py MODEL DATA.jsonl OUT [METHOD ...] [--device cuda] [--jobs 8] [--limit SECONDS]
    python dev/experiments/adapters.py MODEL DATA.jsonl OUT [METHOD ...] --time
    python dev/experiments/adapters.py MODEL DATA.jsonl OUT --table

Every method takes the same steps on the same batches of a seed, by Adam (0.9, 0.99) with a rate that falls linearly to zero.
One grid serves all, 1 and 3 times powers of ten. A method's search begins with three rates about a middle of its own, and goes
on next to the best so far, until five rates are tried and the best has worse ones on both sides. The best is the one with the
least loss on the records for choosing, seed 1. Seeds 1 to 3 at that rate are told by the loss on other held-out records. The
control trains on the same records with their responses shuffled, at the same rate.

A cell, one method at a rate and seed, is a file of OUT/cells, written whole or not at all. What is there is not run again, so
the script goes on where it was ended. With --limit no cell begins later than so many seconds after the start. --time measures
the seconds of a step, for which nothing else may run. --table prints what there is.
"""

import argparse
import copy
import gc
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

import fedkseed as fk
from fedkseed.baselines import fresh_lora
from fedkseed.data import EncodedExample, collate, encode, pad_token_id, read_examples, shuffle_responses
from fedkseed.errors import FedKSeedError
from fedkseed.evaluation import evaluate_loss, mean_loss
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.models.lora import seed_lora
from fedkseed.randomness import generator

RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))
LEAST_TRIES = 5
SEEDS = (1, 2, 3)
BATCH, NUM_CHOOSING, NUM_HELD_OUT = 8, 100, 200
TIMED, WARM_UP = 25, 5
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
FACTORS = ["k_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Method:
    """What is tuned: K numbers (`size`), a PEFT adapter (`config`), or neither, which is all weights."""

    title: str
    middle: float
    size: int = 0
    movement: Any = "absolute"
    config: Callable[[], Any] | None = None
    has_control: bool = False
    rank: int = 0  # of the LoRA adapter, as `fedkseed lora` makes it, whose matrices the K numbers move; 0: all weights


def numbers(size: int, control: bool = False) -> Method:
    return Method(f"K = {size:,}", 3e-3, size, has_control=control)


def in_proportion(size: int) -> Method:
    return Method(f"K = {size:,}, proportional", 1e-2, size, "proportional")


def of_lora(size: int) -> Method:
    return Method(f"K = {size:,}, LoRA's matrices", 1e-2, size, rank=8)


METHODS = {  # in the order in which they are begun
    "k-4096": numbers(4096, control=True),
    "lora-1": Method(
        "LoRA r=1", 1e-2, config=lambda: peft.LoraConfig(r=1, lora_alpha=1, target_modules=LINEAR), has_control=True
    ),
    "lora-8": Method(
        "LoRA r=8", 3e-3, config=lambda: peft.LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR), has_control=True
    ),
    "all": Method("all weights", 1e-4),
    "ia3": Method("IA3", 3e-2, config=lambda: peft.IA3Config(target_modules=FACTORS, feedforward_modules=["down_proj"])),
    "tinylora": Method("TinyLoRA", 3e-3, config=lambda: peft.TinyLoraConfig(target_modules=LINEAR)),
    "ln": Method("LN-tuning", 1e-2, config=lambda: peft.LNTuningConfig(target_modules=NORMS)),
    "vera": Method("VeRA", 1e-2, config=lambda: peft.VeraConfig(target_modules=LINEAR)),
    "k-256": numbers(256),
    "k-1024": numbers(1024),
    "k-16384": numbers(16384),
    "k-65536": numbers(65536),
    "k-4096-proportional": in_proportion(4096),
    "k-256-proportional": in_proportion(256),
    "k-1024-proportional": in_proportion(1024),
    "k-16384-proportional": in_proportion(16384),
    "k-65536-proportional": in_proportion(65536),
    "k-4096-lora": of_lora(4096),
    "k-16384-lora": of_lora(16384),
}


@dataclass(frozen=True)
class Cell:
    """One training. Of kind `time` only its speed counts; of kind `base` there is none."""

    method: str
    lr: float = 0.0
    seed: int = 0
    kind: str = "run"

    def path(self, out: Path) -> Path:
        return out / "cells" / f"{self.method}--{self.lr:g}--{self.seed}--{self.kind}.json"


BASE = Cell("base", kind="base")


@dataclass(frozen=True)
class Records:
    """Encoded records: for training, with their responses and with others', for choosing and for telling."""

    train: list[EncodedExample]
    shuffled: list[EncodedExample]
    choosing: list[EncodedExample]
    held_out: list[EncodedExample]
    pad: int

    @classmethod
    def of(cls, model: str, data: Path, max_tokens: int) -> "Records":
        tokenizer, examples = load_tokenizer(model), read_examples(data)
        encoded = encode(examples, tokenizer, 100_000)
        short = [i for i, example in enumerate(encoded.examples) if len(example.input_ids) <= max_tokens]
        order = [short[i] for i in generator(0, "adapters").permutation(len(short))]
        told = NUM_CHOOSING + NUM_HELD_OUT
        train = [examples[encoded.kept[i]] for i in order[told:]]
        shuffled = encode(shuffle_responses(train, generator(0, "adapters", "control")), tokenizer, 100_000)
        of = [encoded.examples[i] for i in order]
        return cls(of[told:], list(shuffled.examples), of[:NUM_CHOOSING], of[NUM_CHOOSING:told], pad_token_id(tokenizer))


class Bench:
    """A process's copy of the base model, and what it does with it."""

    def __init__(self, model: str, records: Records, steps: int, device: str, deadline: float) -> None:
        if device != "cpu":
            torch.set_float32_matmul_precision("high")  # TF32, for all methods alike
        self.base, self.records = load_model(model, "float32", device), records
        self.steps, self.device, self.deadline = steps, device, deadline

    def run(self, cell: Cell) -> dict[str, Any]:
        if time.time() > self.deadline:
            raise TimeoutError(f"{cell.method}: the time is over")
        if cell.kind == "base":
            return self.losses(self.base)
        try:
            return self.train(cell)
        except FedKSeedError as error:  # numbers that are not finite, or too large for the file
            return {"choosing": math.inf, "loss": math.inf, "error": str(error)}

    def train(self, cell: Cell) -> dict[str, Any]:
        method, before = METHODS[cell.method], self.memory(reset=True)
        torch.manual_seed(cell.seed)  # of PEFT's initial values
        model: Any = copy.deepcopy(self.base)
        if method.size:
            if method.rank:
                model = fresh_lora(model, method.rank, "the base model")
                seed_lora(model, cell.seed)
            pool = fk.SeedPool(key=cell.seed, size=method.size)
            model, optimizer = fk.prepare(model, pool, lr=cell.lr, movement=method.movement)
        else:
            if method.config is not None:
                with few_singular_values():
                    model = peft.get_peft_model(model, method.config())
            tuned = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(tuned, lr=cell.lr, betas=(0.9, 0.99))
        steps = TIMED if cell.kind == "time" else self.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        train = self.records.shuffled if cell.kind == "control" else self.records.train
        order = generator(cell.seed, "adapters", "batches").integers(len(train), size=(steps, BATCH))
        seconds = []
        for rows in order:
            start = time.perf_counter()
            mean_loss(model, collate([train[i] for i in rows], self.records.pad, self.device)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if cell.kind == "time":
                self.wait()
            seconds.append(time.perf_counter() - start)
        if cell.kind == "time":
            return {"seconds": statistics.median(seconds[WARM_UP:])}
        found = {"numbers": sum(p.numel() for group in optimizer.param_groups for p in group["params"])}
        if self.device != "cpu":
            found["peak_bytes"] = self.memory() - before
        return {**found, **saved_bytes(model, method), **self.losses(model)}

    def losses(self, model: Any) -> dict[str, Any]:
        def loss(examples: Sequence[EncodedExample]) -> float:
            return evaluate_loss(model, examples, 32, self.records.pad).loss

        return {"choosing": loss(self.records.choosing), "loss": loss(self.records.held_out)}

    def memory(self, reset: bool = False) -> int:
        """Bytes of the device at most since the last reset; at a reset those that are in use. 0 on the CPU."""
        if self.device == "cpu":
            return 0
        if reset:
            gc.collect()  # of the model before it, which its hooks hold in a cycle
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


@contextmanager
def few_singular_values() -> Iterator[None]:
    """TinyLoRA keeps two singular values of each matrix and asks for all, which takes half a minute; here are those two."""

    def svd(w: torch.Tensor, full_matrices: bool) -> tuple[torch.Tensor, ...]:
        if w.shape[0] > w.shape[1]:
            return tuple(x.T if x.dim() > 1 else x for x in reversed(svd(w.T, full_matrices)))
        wide = w.double()
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        s, u = squares[-2:].flip(0).sqrt(), vectors[:, -2:].flip(1)
        return tuple(x.to(w.dtype) for x in (u, s, (u / s).T @ wide))

    original, torch.linalg.svd = torch.linalg.svd, svd
    try:
        yield
    finally:
        torch.linalg.svd = original


def saved_bytes(model: Any, method: Method) -> dict[str, int]:
    """Of the file of weights as saved; of an adapter with random projections also of one that leaves them out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)

        def adapter() -> int:
            model.save_pretrained(path, save_embedding_layers=False)
            return (path / "adapter_model.safetensors").stat().st_size

        if method.size:
            fk.ledger_of(model).save(path / "ledger.safetensors")
            return {"bytes": (path / "ledger.safetensors").stat().st_size}
        if method.config is None:
            model.save_pretrained(path)
            return {"bytes": (path / "model.safetensors").stat().st_size}
        found, config = {"bytes": adapter()}, model.peft_config["default"]
        if getattr(config, "save_projection", False):
            config.save_projection = False
            found["bytes_without_projections"] = adapter()
        return found


BENCH: Bench


def begin(*arguments: Any) -> None:
    """Make a process's bench."""
    global BENCH
    torch.set_num_threads(1)
    BENCH = Bench(*arguments)


def fill(cell: Cell, out: Path) -> None:
    """Run a cell and write its file."""
    path = cell.path(out)
    found = BENCH.run(cell)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found))
    part.replace(path)
    print(path.stem, found, flush=True)


class Driver:
    """Decides which cells a method needs; `fill` has some of them run."""

    def __init__(self, out: Path, fill: Callable[[list[Cell]], None]) -> None:
        self.out, self.fill = out, fill

    def results(self, cells: list[Cell]) -> list[dict[str, Any]]:
        self.fill([cell for cell in cells if not cell.path(self.out).exists()])
        return [json.loads(cell.path(self.out).read_text()) for cell in cells]

    def method(self, name: str) -> None:
        """All cells of a method, or of the base model."""
        try:
            self.results(cells_of(name, self.search(name)) if name in METHODS else [BASE])
        except Exception as error:  # of one method; the others go on
            print(f"{name}: {type(error).__name__}: {error}", flush=True)

    def search(self, name: str) -> float:
        """The best rate by the records for choosing."""
        middle = RATES.index(METHODS[name].middle)
        low, high = middle - 1, middle + 1
        while True:
            found = self.results([Cell(name, lr, SEEDS[0]) for lr in RATES[low : high + 1]])
            losses = [finite_or_inf(each["choosing"]) for each in found]
            best = low + losses.index(min(losses))
            if high - low + 1 >= LEAST_TRIES and low < best < high:
                return RATES[best]
            below, above = best - low, high - best
            down = below < above or (below == above and losses[0] <= losses[-1])
            if (low == 0 and down) or (high == len(RATES) - 1 and not down):
                return RATES[best]
            low, high = (low - 1, high) if down else (low, high + 1)


def finite_or_inf(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def cells_of(name: str, best: float) -> list[Cell]:
    """What is run at the best rate."""
    kinds = ("run", "control") if METHODS[name].has_control else ("run",)
    return [Cell(name, best, seed, kind) for kind in kinds for seed in SEEDS]


def table(out: Path) -> None:
    """Print the rows of which there is something, in the order of their bytes."""

    def read(cell: Cell) -> dict[str, Any]:
        path = cell.path(out)
        return json.loads(path.read_text()) if path.exists() else {}

    rows = []
    for name, method in METHODS.items():
        tried = {lr: found for lr in RATES if (found := read(Cell(name, lr, SEEDS[0])))}
        choosing = {lr: finite_or_inf(found["choosing"]) for lr, found in tried.items()}
        if not tried or not math.isfinite(min(choosing.values())):
            continue
        best = min(choosing, key=lambda lr: choosing[lr])
        first, rest = tried[best], read(Cell(name, method.middle, SEEDS[0], "time"))
        at_end = ", at an end" if best in (min(tried), max(tried)) else ""
        size = f"{first['bytes']:,}"
        if "bytes_without_projections" in first:
            size += f" ({first['bytes_without_projections']:,} without projections)"
        runs, controls = (
            [found["loss"] for seed in SEEDS if (found := read(Cell(name, best, seed, kind)))] for kind in ("run", "control")
        )
        row = [
            method.title,
            f"{first['numbers']:,}",
            size,
            f"{best:g} ({len(tried)} tried{at_end})",
            spread(runs),
            ", ".join(f"{loss:.4f}" for loss in runs),
            spread(controls),
            f"{1000 * rest['seconds']:.0f}" if rest else "",
            f"{first['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in first else "",
        ]
        rows.append((first["bytes"], row))
    base = read(BASE)
    print(
        f"Settings: {(out / 'settings.json').read_text()}. The base model's held-out loss: {base.get('loss', math.nan):.4f}\n"
    )
    titles = ("method", "numbers", "bytes of the file", "rate", "held-out loss", "seeds", "control", "ms a step", "peak MiB")
    print("| " + " | ".join(titles) + " |\n|" + " --- |" * len(titles))
    for _, row in sorted(rows):
        print("| " + " | ".join(row) + " |")


def spread(losses: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(losses):.4f}" + (f" ± {statistics.stdev(losses):.4f}" if losses[1:] else "") if losses else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; all if none is given")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=128, help="longer records take no part")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no cell begins")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; expected of {', '.join(METHODS)}")
    if args.table:
        table(args.out)
        return
    deadline = time.time() + args.limit
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    settings = {"model": Path(args.model).name, "steps": args.steps, "max_tokens": args.max_tokens, "batch": BATCH}
    kept = args.out / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        parser.error(f"{kept} has other settings than {settings}; give another folder")
    kept.write_text(json.dumps(settings))
    records = Records.of(args.model, args.data, args.max_tokens)
    print(f"{len(records.train)} records to train on", flush=True)
    arguments = (args.model, records, args.steps, args.device, deadline)
    names = args.methods or list(METHODS)
    if args.time:
        begin(*arguments)
        for name in names:
            fill(Cell(name, METHODS[name].middle, SEEDS[0], "time"), args.out)
        return
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), begin, arguments) as processes:

        def fill_all(cells: list[Cell]) -> None:
            for future in [processes.submit(fill, cell, args.out) for cell in cells]:
                future.result()

        driver = Driver(args.out, fill_all)
        with ThreadPoolExecutor(args.jobs) as threads:  # as many methods at a time
            list(threads.map(driver.method, [BASE.method, *names]))
    table(args.out)


if __name__ == "__main__":
    main()
