"""The GPU backend: the reference's bits first, then speed against a copy's and against the published way.

`python -m benchmarks gpu` (`make bench-gpu`) takes under eight minutes on a data-centre GPU. Times are of device events, after
a warm-up, as medians. In Triton's interpreter everything runs once at toy sizes, so that this file works when it is needed;
those times mean nothing and are not written.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch

import fedkseed as fk
from fedkseed.kseed.steps import StepSettings, local_steps
from fedkseed.models.parameters import named_parameters
from fedkseed.models.projection import Projection
from fedkseed.noise import Slot, Source, get_backend, tensor_id
from fedkseed.noise.gpu import INTERPRETED

from .harness import Row, report

DEVICE = "cpu" if INTERPRETED else "cuda"
FAMILIES = ("hadamard", "gaussian")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
PAGES = (2, 4, 8)


@dataclass(frozen=True)
class Size:
    """A Llama's shape: its name, layers, width, hidden width, heads, heads of keys and values, and vocabulary."""

    name: str
    layers: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Plan:
    """What is measured: models and their types, pools (of folds others), tokens, local steps at a time, how often, and elements
    to compare."""

    sizes: tuple[Size, ...]
    types: tuple[torch.dtype, ...]
    pools: tuple[int, ...]
    fold_pools: tuple[int, ...]
    tokens: int
    steps: int
    rounds: int
    slow_rounds: int
    compared: int
    large: Size | None = None


SIZES = (Size("135M", 30, 576, 1536, 9, 3, 49152), Size("1.3B", 24, 2048, 5632, 32, 32, 32000))
LARGE = Size("13B", 40, 5120, 13824, 40, 40, 32000)
REAL = Plan(SIZES, (torch.bfloat16, torch.float32), (1024, 4096), (1024, 4096, 65536), 256, 4, 20, 3, 300_007, LARGE)
TOY = Plan((Size("toy", 1, 16, 24, 2, 1, 40),), (torch.bfloat16,), (2,), (2,), 8, 1, 1, 1, 300)


def llama(size: Size, dtype: torch.dtype) -> torch.nn.Module:
    """A Llama of that shape with random weights; 135M and 1.3B of them, embeddings tied and untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        tie_word_embeddings=size.width < 2048,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def check_bits(n: int) -> None:
    """Every pair of types, both families, aligned or not, one page and three, against the reference.

    Raises:
        RuntimeError: a bit differs; then no time means anything.
    """
    for family in FAMILIES:
        pools = [fk.SeedPool(key, size, family) for key, size in ((0xFEDCBA9876543210, 300), (7, 3), (8, 5000))]
        if family == "gaussian":
            pools = [fk.SeedPool(pool.key, 3, family) for pool in pools]
        rng = np.random.default_rng(0)
        mixtures = [pool.mixture_of(rng.standard_normal(pool.size).astype(np.float32)) for pool in pools]
        for out_type in TYPES:
            for base_type in (*TYPES, None):
                noise = torch.randn(n + 1, generator=torch.Generator().manual_seed(1))
                for offset, pages in ((0, 1), (1, 1), (0, 3))[:: 2 if INTERPRETED else 1]:
                    base = None if base_type is None else noise.to(base_type)[offset : n + offset]
                    right, out = torch.empty(n, dtype=out_type), torch.empty(n, dtype=out_type, device=DEVICE)
                    get_backend("reference").prepare([Slot(right, base, tensor_id("w"))])(*mixtures[:pages])
                    there = None if base_type is None else noise.to(base_type).to(DEVICE)[offset : n + offset]
                    get_backend("gpu").prepare([Slot(out, there, tensor_id("w"))])(*mixtures[:pages])
                    if not torch.equal(out.cpu().view(torch.uint8), right.view(torch.uint8)):
                        where = f"{family}, {base_type} to {out_type}, offset {offset}, {pages} pages"
                        raise RuntimeError(f"{where}: bits differ from the reference")


def check_folds(n: int) -> None:
    """Every type, both families, aligned or not: within the bound of docs/noise.md of the reference, and the same bits twice.

    Raises:
        RuntimeError: they are not; then no time means anything.
    """
    for pool in (fk.SeedPool(3, 300), fk.SeedPool(3, 4096), fk.SeedPool(3, 65536), fk.SeedPool(3, 3, "gaussian")):
        for kind in TYPES[: 1 if INTERPRETED else None]:
            noise = torch.randn(n + 1, generator=torch.Generator().manual_seed(1)).to(kind)
            for offset in (0, 1)[: 1 if INTERPRETED else 2]:
                found = []
                for backend, device in (("reference", "cpu"), ("gpu", DEVICE), ("gpu", DEVICE)):
                    fold = get_backend(backend).fold(pool.directions())
                    fold.add([Source(noise.to(device)[offset : n + offset], tensor_id("w"))])
                    found.append(pool.numbers(fold.sums()))
                limit = 2 * 5.77 * (n / 128 + 65) * 2.0**-53 * float(noise.double().abs().sum())
                if not np.abs(found[0] - found[1]).max() <= limit or found[1].tobytes() != found[2].tobytes():
                    raise RuntimeError(f"{pool.family}, K = {pool.size}, {kind}, offset {offset}: the fold is wrong")


def times(run: Callable[[], object], rounds: int, warm_up: int = 1) -> list[float]:
    """Seconds of each round by the device's own clock."""
    for _ in range(0 if INTERPRETED else warm_up):
        run()
    if INTERPRETED:
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def spread(what: str, values: list[float], unit: str, **budget: float) -> Row:
    return Row(what, statistics.median(values), unit, min(values), max(values), **budget)


def copy_times(moved: int, rounds: int) -> list[float]:
    """Seconds of a copy that reads and writes so many bytes in all."""
    source, target = (torch.zeros(moved // 8, dtype=torch.float32, device=DEVICE) for _ in range(2))
    return times(lambda: target.copy_(source), rounds, warm_up=3)


def speed(plan: Plan, size: Size, model: torch.nn.Module, label: str) -> list[Row]:
    """Copy, perturb and rebuild: time and achieved bandwidth, of one read and one write of each weight."""
    weights = [p.detach() for p in model.parameters()]
    moved = 2 * sum(w.nbytes for w in weights)
    copy = copy_times(moved, plan.rounds)
    copied = statistics.median(copy) / moved
    rows = [spread(f"{label}: copy", [moved / s / 1e9 for s in copy], "GB/s")]
    rng = np.random.default_rng(0)
    for family in FAMILIES:
        rounds = plan.rounds if family == "hadamard" else plan.slow_rounds
        for pool_size in plan.pools:
            if family == "gaussian" and pool_size > min(plan.pools) and weights[0].dtype == torch.float32:
                continue  # the same to a few per cent, and half a minute
            bound = fk.bind(model, fk.SeedPool(1, pool_size, family), backend="gpu")
            a = (rng.standard_normal(pool_size) * 1e-6).astype(np.float32)
            steps = iter(range(10**9))

            def rebuild(bound: fk.Binding = bound, a: np.ndarray = a, steps: "iter[int]" = steps) -> None:
                bound.rebuild(a * np.float32(1 + 1e-3 * next(steps)))  # other coefficients, or gaussian copies what it kept

            few = rounds if family == "hadamard" or pool_size == min(plan.pools) else 1
            rebuilt = times(rebuild, few, warm_up=2 if family == "hadamard" else few > 1)
            what = f"{label}: {family}, K = {pool_size}: rebuild"
            if family == "hadamard":
                rows.append(spread(what, [1e3 * s for s in rebuilt], "ms"))
                rows.append(spread(f"{what}, of a copy's bandwidth", [100 * copied * moved / s for s in rebuilt], "%"))
            else:
                rows.append(spread(what, rebuilt, "s"))
        perturbed = times(lambda bound=bound: bound.perturb(1, 1e-4), plan.rounds, warm_up=2)
        rows.append(
            spread(f"{label}: {family}: perturb, of a copy's bandwidth", [100 * copied * moved / s for s in perturbed], "%")
        )
        del bound
    rows += pages(plan, weights, label)

    def published() -> None:  # one seed: reseed the device's generator, draw every tensor anew, add it
        torch.manual_seed(1)
        for w in weights:
            w.add_(torch.normal(0.0, 1.0, w.shape, device=w.device, dtype=w.dtype), alpha=-1e-6)

    one = times(published, plan.slow_rounds)
    rows.append(spread(f"{label}: published pass, one seed", [1e3 * s for s in one], "ms"))
    rows.append(
        spread(f"{label}: published pass, {max(plan.pools)} seeds (extrapolated)", [s * max(plan.pools) for s in one], "s")
    )
    return rows


def pages(plan: Plan, weights: list[torch.Tensor], label: str) -> list[Row]:
    """Several pages added in one launch, beside one page."""
    sweep = get_backend("gpu").prepare([Slot(w.reshape(-1), w.reshape(-1), i) for i, w in enumerate(weights)])
    pools = [fk.SeedPool(key, max(plan.pools)) for key in range(max(PAGES))]
    mixtures = [pool.mixture([1], [1e-6]) for pool in pools]
    one = statistics.median(times(lambda: sweep(mixtures[0]), plan.rounds, warm_up=2))
    rows = []
    for number in PAGES:
        seconds = times(lambda number=number: sweep(*mixtures[:number]), plan.rounds, warm_up=2)
        rows.append(spread(f"{label}: hadamard: {number} pages in one sweep, times one", [s / one for s in seconds], "x"))
    return rows


def folds(plan: Plan, model: torch.nn.Module, label: str) -> list[Row]:
    """Gradients folded all in one call, and tensor by tensor as backward makes them, against a copy's bandwidth: one read."""
    gradients = {e.name: torch.randn_like(e.parameter) for e in named_parameters(model)}
    read = sum(g.nbytes for g in gradients.values())
    copied = statistics.median(copy_times(2 * read, plan.rounds)) / (2 * read)
    rows = []
    for pool_size in plan.fold_pools:
        pool = fk.SeedPool(1, pool_size)
        together, single = (Projection(pool, {DEVICE: get_backend("gpu")}) for _ in range(2))

        def one_by_one(single: Projection = single) -> None:
            for name, gradient in gradients.items():
                single.add(name, gradient)

        runs: dict[str, Callable[[], object]] = {
            "fold": lambda together=together: together.add_all(gradients),
            "fold, tensor by tensor": one_by_one,
        }
        for what, run in runs.items():
            seconds = times(run, plan.rounds, warm_up=2)
            name = f"{label}: hadamard, K = {pool_size}: {what}"
            rows.append(spread(name, [1e3 * s for s in seconds], "ms"))
            rows.append(spread(f"{name}, of a copy's bandwidth", [100 * copied * read / s for s in seconds], "%"))
    gaussian = Projection(fk.SeedPool(1, min(plan.pools), "gaussian"), {DEVICE: get_backend("gpu")}, range(min(8, *plan.pools)))
    seconds = times(lambda: gaussian.add_all(gradients), plan.slow_rounds)
    rows.append(spread(f"{label}: gaussian: fold, one seed", [1e3 * s / min(8, *plan.pools) for s in seconds], "ms"))
    return rows


def peak(run: Callable[[], object]) -> float:
    """MiB that were allocated at most while it ran."""
    if INTERPRETED:
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def wall(run: Callable[[], object]) -> float:
    """Seconds by the wall clock, of something that waits for the device."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gradient(plan: Plan, size: Size, model: torch.nn.Module, label: str) -> list[Row]:
    """A gradient folded as backward makes it, beside a plain backward pass, which keeps all of it; and the rebuild."""
    ids = torch.randint(0, size.vocabulary, (1, plan.tokens), device=DEVICE)

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])

    def plain() -> None:
        value = loss()
        value.backward()
        value.item()
        model.zero_grad(set_to_none=True)

    plain()
    whole, seconds = peak(plain), statistics.median(wall(plain) for _ in range(plan.rounds))
    bound = fk.bind(model, fk.SeedPool(1, max(plan.pools)), backend="gpu")

    def folded() -> None:
        with bound.folding() as fold:
            loss().backward()
        fold.numbers()

    folded()
    used, each = peak(folded), [wall(folded) for _ in range(plan.rounds)]
    numbers = np.full(max(plan.pools), 1e-9, np.float32)
    rebuilt = times(lambda: bound.rebuild(numbers), plan.rounds, warm_up=2)
    return [
        Row(f"{label}: peak memory, weights and a plain backward pass", whole, "MiB", whole, whole),
        Row(f"{label}: peak memory, weights, base and a folded backward pass", used, "MiB", used, used),
        spread(f"{label}: a folded backward pass, times a plain one", [s / seconds for s in each], "x"),
        spread(f"{label}: hadamard, K = {max(plan.pools)}: rebuild after it", [1e3 * s for s in rebuilt], "ms"),
    ]


def step(plan: Plan, size: Size, model: torch.nn.Module, label: str) -> list[Row]:
    """A local step beyond its two forward passes, by the wall clock (each loss waits for the device), and peak memory."""
    ids = torch.randint(0, size.vocabulary, (1, plan.tokens), device=DEVICE)

    @torch.inference_mode()
    def loss(step: int) -> float:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()

    steps, settings = plan.steps, StepSettings(lr=1e-9, eps=1e-3)
    rows = [Row(f"{label}: peak memory, inference alone", (alone := peak(lambda: loss(0))), "MiB", alone, alone)]
    for family in FAMILIES:
        bound = fk.bind(model, fk.SeedPool(1, max(plan.pools), family), backend="gpu")
        used = peak(lambda bound=bound: local_steps(bound, list(range(steps)), loss, settings))
        rows.append(Row(f"{label}: {family}: peak memory, local steps", used, "MiB", used, used))
        over = []
        for _ in range(plan.rounds):
            forwards = wall(lambda: [loss(t) for t in range(2 * steps)])
            whole = wall(lambda bound=bound: local_steps(bound, list(range(steps)), loss, settings))
            over.append(100 * (whole - forwards) / forwards)
        rows.append(spread(f"{label}: {family}: a local step beyond its two forward passes", over, "%"))
    rows.append(spread(f"{label}: two forward passes", [1e3 * forwards / steps], "ms"))
    return rows


def measure(plan: Plan) -> list[Row]:
    check_bits(plan.compared)
    check_folds(plan.compared)
    rows: list[Row] = []
    for size in plan.sizes:
        for dtype in plan.types:
            model = llama(size, dtype)
            label = f"{size.name}, {str(dtype).removeprefix('torch.')}"
            rows += speed(plan, size, model, label)
            rows += folds(plan, model, label)
            if dtype == torch.bfloat16:
                rows += step(plan, size, model, label) + gradient(plan, size, model, label)
            del model
            if not INTERPRETED:
                torch.cuda.empty_cache()
    if plan.large is not None:
        rows += gradient(plan, plan.large, llama(plan.large, torch.bfloat16), f"{plan.large.name}, bfloat16")
    return rows


def main() -> None:
    begin = time.perf_counter()
    rows = measure(TOY if INTERPRETED else REAL)
    print(f"bits equal the reference's; measured in {time.perf_counter() - begin:.0f} s")
    if INTERPRETED:
        return
    properties = torch.cuda.get_device_properties(0)
    report(
        f"Noise and local steps on {properties.name}",
        f"gpu-{properties.name.lower().replace(' ', '-')}",
        rows,
        gpu=properties.name,
        cuda=torch.version.cuda,
        triton=version("triton"),
    )
