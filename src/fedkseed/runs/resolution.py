"""Whether weights of half precision resolve the distance at which a two-point step probes them."""

from __future__ import annotations

import torch

from fedkseed.models.parameters import is_plain_float
from fedkseed.runs.observer import WARNING

SAMPLED = 4096
"""Elements of a tensor that are looked at."""
TOLERATED = 0.1
"""Share of weights that may stay where they are without a warning."""
FURTHER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""What is proposed instead: the first that is resolved."""


def unmoved(model: torch.nn.Module, eps: float) -> float:
    """The share of a model's weights that adding `eps` and rounding leaves as they are, from an even sample of each tensor."""
    kept = total = 0.0
    for parameter in model.parameters():
        if not is_plain_float(parameter) or parameter.is_meta or not parameter.numel():
            continue
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)]
        moved = (some.double() + eps).to(some.dtype)
        kept += (moved == some).double().mean().item() * flat.numel()
        total += flat.numel()
    return kept / total if total else 0.0


def eps_warning(model: torch.nn.Module, eps: float) -> str | None:
    """A warning if more weights than are tolerated do not resolve `eps`; None if all is well."""
    share = unmoved(model, eps)
    if share <= TOLERATED:
        return None
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    enough = next((f"--eps {further:g} or more, or " for further in FURTHER if unmoved(model, further) <= TOLERATED), "")
    return (
        f"{WARNING}--eps {eps:g} is below what {dtype} resolves: a probe leaves {100 * share:.0f} % of the weights "
        f"where they are; take {enough}--dtype float32"
    )
