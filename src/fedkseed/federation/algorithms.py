"""The algorithms by name, and which settings each of them takes."""

from __future__ import annotations

from typing import Literal, get_args

Algorithm = Literal["fedkseed", "fedkseed-pro", "fedavg", "fedit", "fedit-sgd", "fedprompt", "fedptuning", "fedzo"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

SEEDS = ("fedkseed", "fedkseed-pro")
"""Those whose clients send scalars; the others send tensors."""
ZEROTH_ORDER = (*SEEDS, "fedzo")
"""Those that need no backpropagation: two forward passes a step."""
LORA = ("fedit", "fedit-sgd")
SOFT_PROMPTS = ("fedprompt", "fedptuning")

TAKEN_BY: dict[str, tuple[str, ...]] = {
    "eps": ZEROTH_ORDER,
    "noise": ZEROTH_ORDER,
    "loss_clip": ZEROTH_ORDER,
    "num_seeds": SEEDS,
    "wire": SEEDS,
    "dtype": SEEDS,
    "importance_clip": SEEDS,
    "importance_start": SEEDS,
    "lora_rank": LORA,
    "lora_alpha": LORA,
    "num_virtual_tokens": SOFT_PROMPTS,
}
"""The settings that not every algorithm takes."""


def takes(algorithm: str, setting: str) -> bool:
    """Whether a setting means anything to an algorithm."""
    return setting not in TAKEN_BY or algorithm in TAKEN_BY[setting]
