"""Rebuild and perturb against the speed of memory and against the published way, on SmolLM2-135M's tensor shapes."""

from itertools import cycle

import numpy as np
import torch

import fedkseed as fk
from fedkseed.models.parameters import named_parameters
from fedkseed.noise import Slot, get_backend, tensor_id

from .harness import Row, absolute, measure, ratio, report

PAGES = (1, 2, 4, 8)
VOCABULARY, WIDTH, KEYS, HIDDEN, LAYERS = 49152, 576, 192, 1536, 30


def shapes() -> dict[str, tuple[int, ...]]:
    """The 272 parameter tensors of SmolLM2-135M (tied embeddings): 134,515,008 numbers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        head = f"model.layers.{layer}."
        found |= {
            f"{head}self_attn.{p}_proj.weight": (n, WIDTH) for p, n in (("q", WIDTH), ("k", KEYS), ("v", KEYS), ("o", WIDTH))
        }
        found |= {f"{head}mlp.{p}_proj.weight": (HIDDEN, WIDTH) for p in ("gate", "up")}
        found |= {f"{head}mlp.down_proj.weight": (WIDTH, HIDDEN)}
        found |= {f"{head}{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")}
    return found


class Tensors(torch.nn.Module):
    """A model that is nothing but parameters of given names and shapes."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in shapes().items():
            module: torch.nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.randn(shape) * 0.02))


def fold(bound: fk.Binding, gradients: dict[str, torch.Tensor]) -> None:
    """Gradients one by one, as backward makes them."""
    with bound.folding() as projection:
        for name, gradient in gradients.items():
            projection.add(name, gradient)
    projection.numbers()


def main(rounds: int = 15) -> None:
    model = Tensors()
    weights = [p.detach() for p in model.parameters()]
    d = sum(w.numel() for w in weights)
    base, other = [w.clone() for w in weights], [torch.randn_like(w) for w in weights]
    rng = np.random.default_rng(0)

    def add_out() -> None:
        for w, w0, x in zip(weights, base, other, strict=True):
            torch.add(w0, x, out=w)

    def add_in_place() -> None:
        for w, x in zip(weights, other, strict=True):
            w.add_(x)

    def copy() -> None:
        for w, w0 in zip(weights, base, strict=True):
            w.copy_(w0)

    def published() -> None:  # one seed: reseed the global generator, draw every tensor anew, add it
        torch.manual_seed(1)
        for w in weights:
            w.add_(torch.normal(0.0, 1.0, w.shape), alpha=-1e-6)

    contenders = {"add_out": add_out, "add_in_place": add_in_place, "copy": copy}
    for size in (1024, 4096, 65536):
        bound = fk.bind(model, fk.SeedPool(1, size))
        coefficients = (rng.standard_normal(size) * 1e-5).astype(np.float32)
        contenders[f"rebuild_{size}"] = lambda bound=bound, a=coefficients: bound.rebuild(a)
        if size == 4096:
            contenders["perturb"] = lambda bound=bound: bound.perturb(7, 1e-3)
            contenders["move_2"] = lambda bound=bound: bound.move([7, 9], [1e-3, -1e-3])
    entries = named_parameters(model)
    slots = [
        Slot(e.parameter.detach().reshape(-1), w0.reshape(-1), tensor_id(e.name))
        for e, w0 in zip(entries, [e.parameter.detach().clone() for e in entries], strict=True)
    ]
    sweep, mixtures = get_backend().prepare(slots), [fk.SeedPool(i, 4096).mixture([7], [1e-3]) for i in range(max(PAGES))]
    for count in PAGES:
        contenders[f"pages_{count}"] = lambda count=count: sweep(*mixtures[:count])
    gradients = {e.name: torch.randn_like(e.parameter) for e in entries}
    flat = [g.reshape(-1) for g in gradients.values()]

    def dot() -> None:
        for g in flat:
            torch.dot(g, g)

    contenders["dot"] = dot
    for size in (1024, 4096, 65536):
        bound = fk.bind(model, fk.SeedPool(1, size))
        contenders[f"project_{size}"] = lambda bound=bound: bound.project(gradients)
        contenders[f"fold_{size}"] = lambda bound=bound: fold(bound, gradients)
    fast = measure(contenders, rounds)

    gaussian = fk.bind(model, fk.SeedPool(1, 4096, "gaussian"))
    # two sets in turn, since rebuilding twice from the same coefficients is a copy
    eight = cycle([np.where(np.arange(4096) % 512 == place, np.float32(1e-6), np.float32(0)) for place in (0, 1)])
    slow = measure(
        {
            "published": published,
            "one": lambda: gaussian.perturb(7, 1e-3),
            "eight": lambda: gaussian.rebuild(next(eight)),
            "fold": lambda: gaussian.project(gradients, range(8)),
        },
        3,
    )
    per_seed = [seconds / 8 for seconds in slow["eight"]]
    per_fold = [seconds / 8 for seconds in slow["fold"]]
    rows: list[Row] = [
        absolute("torch.add(w0, x, out=w), per parameter", fast["add_out"], 1e9 / d, "ns"),
        absolute("w.add_(x), per parameter", fast["add_in_place"], 1e9 / d, "ns"),
        absolute("w.copy_(w0), per parameter", fast["copy"], 1e9 / d, "ns"),
        ratio("hadamard, K = 4096: rebuild / torch.add", fast["rebuild_4096"], fast["add_out"], must=3, aim=1.5),
        ratio("hadamard, K = 1024: rebuild / torch.add", fast["rebuild_1024"], fast["add_out"]),
        ratio("hadamard, K = 65,536: rebuild / torch.add", fast["rebuild_65536"], fast["add_out"]),
        *(
            ratio(
                f"hadamard, K = 4096: rebuild from {count} pages / from one",
                *(fast[f"pages_{count}"], fast["pages_1"]),
                must=0.5 + 0.5 * count,
                aim=1.1 if count <= 4 else None,
            )
            for count in PAGES[1:]
        ),
        ratio("hadamard: one perturbation / w.add_(x)", fast["perturb"], fast["add_in_place"], must=2, aim=1.3),
        ratio("hadamard: move along two / w.add_(x)", fast["move_2"], fast["add_in_place"]),
        absolute("torch.dot(g, g), per parameter", fast["dot"], 1e9 / d, "ns"),
        ratio("hadamard, K = 4096: fold, tensor by tensor / torch.dot", fast["fold_4096"], fast["dot"], must=2, aim=1.5),
        ratio("hadamard, K = 1024: fold, tensor by tensor / torch.dot", fast["fold_1024"], fast["dot"]),
        ratio("hadamard, K = 65,536: fold, tensor by tensor / torch.dot", fast["fold_65536"], fast["dot"], must=2, aim=1.5),
        ratio("hadamard, K = 4096: all gradients in one call / torch.dot", fast["project_4096"], fast["dot"], must=2, aim=1.5),
        ratio(
            "hadamard, K = 65,536: all gradients in one call / torch.dot", fast["project_65536"], fast["dot"], must=2, aim=1.5
        ),
        absolute("published pass, one seed", slow["published"], 1, "s"),
        absolute("gaussian, one seed of a rebuild", per_seed, 1, "s"),
        ratio("gaussian: one seed of a rebuild / published pass", per_seed, slow["published"], must=1 / 2, aim=1 / 5),
        ratio("gaussian: one perturbation / published pass", slow["one"], slow["published"]),
        ratio("gaussian: one seed of a fold / one seed of a rebuild", per_fold, per_seed),
        Row(
            "all 4096 seeds: published way / hadamard rebuild",
            4096 * np.median(slow["published"]) / np.median(fast["rebuild_4096"]),
            "x",
            4096 * min(slow["published"]) / max(fast["rebuild_4096"]),
            4096 * max(slow["published"]) / min(fast["rebuild_4096"]),
        ),
    ]
    report(f"Noise on the CPU, {d:,} float32 parameters", "noise-cpu", rows)
