"""The algorithms: one row says all that the rest of the project must know of one.

Nothing else compares an algorithm's name: what depends on it asks its row. Adding an algorithm is a row here, and a builder
in `fedkseed.runs.algorithms` if what it sends is of a new kind (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm is.

    Attributes:
        name: what settings, checkpoints and messages call it.
        title: what a person calls it.
        about: a few words for the help.
        sends: what a client's reply holds: `scalars`, one for each prescribed seed; `changes` of K numbers; or `tensors`, what
            is tuned as a whole.
        measures: how a client finds its way: `two-point`, two forward passes a step, or `gradient`, backpropagation.
        draws: how a round's seeds are chosen: `uniform`, by `importance`, or `fresh` ones, used once; None: there are none.
        attaches: what is tuned in place of all parameters: adapters (`lora`) or a soft prompt (`prompt`, `prompt-encoder`).
        projects: whether the tensors that are sent are coordinates along K seeds of what local steps have changed.
        steps: the optimiser of a client's local steps, `sgd` or `adam`.
        usual_lr: a learning rate to look around.
        on_flower: whether it runs on Flower.
        settings: those that not every algorithm takes, and this one does.
    """

    name: str
    title: str
    about: str
    sends: Literal["scalars", "changes", "tensors"]
    measures: Literal["two-point", "gradient"]
    draws: Literal["uniform", "importance", "fresh"] | None = None
    attaches: Literal["lora", "prompt", "prompt-encoder"] | None = None
    projects: bool = False
    steps: Literal["sgd", "adam"] = "sgd"
    usual_lr: float = 1e-5
    on_flower: bool = False
    settings: tuple[str, ...] = ()

    @property
    def needs_noise(self) -> bool:
        """Whether a client moves weights along perturbations."""
        return self.draws is not None or self.sends == "changes" or self.projects

    @property
    def has_ledger(self) -> bool:
        """Whether the tuned model is K numbers."""
        return self.sends in ("scalars", "changes")

    @property
    def has_pages(self) -> bool:
        """Whether these are several pools' numbers, one after the other."""
        return self.sends == "changes"

    @property
    def needs_peft(self) -> bool:
        """Whether something is attached to the model."""
        return self.attaches is not None

    @property
    def has_soft_prompt(self) -> bool:
        """Whether what is attached takes room in the model's context."""
        return self.attaches in ("prompt", "prompt-encoder")

    @property
    def passes_per_step(self) -> int:
        """What a local step costs in forward passes: two probes, or one and a backward pass that costs two."""
        return 2 if self.measures == "two-point" else 3

    def takes(self, setting: str) -> bool:
        """Whether a setting means anything to it."""
        return setting in self.settings or setting not in SOME_TAKE


PROBES = ("eps", "noise", "loss_clip", "max_grad")
OWN_TENSORS = ("train", "freeze")
SEEDS = (
    *PROBES,
    *OWN_TENSORS,
    "num_seeds",
    "wire",
    "dtype",
    "audit_log",
    "aggregator",
    "summation",
    "edges",
    "objective",
    "dpo_beta",
)
CHANGES = (
    "rounds_per_page", "basis", "movement", "local_optimizer", "server_optimizer", "server_lr", "two_point_clients",
    "checkpointing",
)  # fmt: skip
SCALARS = ("directions", "shared_seeds", "compile", "scaling", "temperature", "max_new_tokens", "max_moved")
SUMS = ("secure_sums", "secure_clip")
TENSORS = ("max_value",)
LORA = (*TENSORS, "lora_rank", "lora_alpha")
PROMPT = (*TENSORS, "num_virtual_tokens")

ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm(
            "fedkseed", "FedKSeed", "draws seeds uniformly",
            "scalars", "two-point", "uniform", on_flower=True, settings=(*SEEDS, *SCALARS, "importance_clip", *SUMS),
        ),
        Algorithm(
            "fedkseed-pro", "FedKSeed-Pro", "prefers seeds whose gradients were large",
            "scalars", "two-point", "importance", on_flower=True,
            settings=(*SEEDS, *SCALARS, "importance_clip", "importance_start"),
        ),
        Algorithm(
            "fedkseed-grad", "FedKSeed-grad", "gradients folded onto K directions, for clients that can backpropagate",
            "changes", "gradient", usual_lr=1e-3, on_flower=True, settings=(*SEEDS, *CHANGES, *TENSORS, *SUMS),
        ),
        Algorithm(
            "fedavg", "FedAvg", "all parameters by SGD",
            "tensors", "gradient", usual_lr=0.05, settings=(*TENSORS, *OWN_TENSORS),
        ),
        Algorithm(
            "ferret", "Ferret", "all parameters by SGD, whose change is projected afterwards",
            "tensors", "gradient", projects=True, usual_lr=0.01, settings=(*TENSORS, "noise", "num_seeds", *OWN_TENSORS),
        ),
        Algorithm(
            "fedit", "FedIT", "LoRA by Adam",
            "tensors", "gradient", attaches="lora", steps="adam", usual_lr=1e-3, settings=LORA,
        ),
        Algorithm(
            "fedit-sgd", "FedIT-SGD", "LoRA by SGD",
            "tensors", "gradient", attaches="lora", usual_lr=0.05, settings=LORA,
        ),
        Algorithm(
            "fedprompt", "FedPrompt", "a soft prompt by Adam",
            "tensors", "gradient", attaches="prompt", steps="adam", usual_lr=0.01, settings=PROMPT,
        ),
        Algorithm(
            "fedptuning", "FedPTuning", "a soft prompt through an encoder, by Adam",
            "tensors", "gradient", attaches="prompt-encoder", steps="adam", usual_lr=0.01, settings=PROMPT,
        ),
        Algorithm(
            "fedzo", "FedZO", "all parameters, zeroth-order",
            "tensors", "two-point", "fresh", settings=(*PROBES, *TENSORS, *OWN_TENSORS),
        ),
    )
}  # fmt: skip
"""All of them, by name."""

SOME_TAKE = frozenset(setting for row in ALGORITHMS.values() for setting in row.settings)
"""The settings that not every algorithm takes."""


def that_take(setting: str) -> Iterator[str]:
    """The names of the algorithms that take a setting."""
    return (name for name, row in ALGORITHMS.items() if row.takes(setting))
