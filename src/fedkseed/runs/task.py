"""The model and the records of a run as its clients see them: loaded and bound once, timed, with a loss."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from fedkseed.data import EncodedExample, collate
from fedkseed.errors import ModelError
from fedkseed.evaluation import EvalLoss, evaluate_loss, mean_loss
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.binding import Binding, bind
from fedkseed.models.closed_page import ClosedPage, Movement
from fedkseed.models.identity import BaseIdentity
from fedkseed.models.loading import base_path
from fedkseed.models.parameters import is_quantised, named_parameters
from fedkseed.models.projection import Projection
from fedkseed.runs.memory import give_back_at_once
from fedkseed.text import one_line

if TYPE_CHECKING:
    from fedkseed.noise.pool import SeedPool

EVAL_BATCH = 8


class ScoredTask(Protocol):
    """Records of which each has a score under a model."""

    def reward(self, on_progress: Callable[[int, int], None] | None = None) -> float:
        """The mean score of the records that have one, answered greedily; NaN if none has."""
        ...

    def subset(self, places: Sequence[int]) -> Self:
        """The same with some of the records."""
        ...


class Stopwatch:
    """Seconds by activity since it was last read."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time inside as that activity."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The seconds so far, and start anew."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


@dataclass(frozen=True)
class BoundModel:
    """A model bound to a run's pool.

    Attributes:
        model: the module.
        bound: the same as base plus coefficients.
    """

    model: torch.nn.Module
    bound: Binding

    @cached_property
    def identity(self) -> BaseIdentity:
        """Which base model it is."""
        return self.bound.identity()

    def to_base(self) -> None:
        """Set the model's weights to the base's, wherever they were."""
        self.bound.open_page(self.bound.pool)
        self.bound.rebuild(np.zeros(self.bound.pool.size, np.float32))

    def restore(self, ledger: Ledger) -> None:
        """Set the model's weights to those of a ledger over this base."""
        if ledger.pages:
            *closed, page = ledger.pages
            self.bound.open_page(page.pool, [one.closed() for one in closed], page.movement)
        self.bound.rebuild(ledger.coefficients)

    def evaluate(
        self,
        ledger: Ledger,
        examples: Sequence[EncodedExample],
        pad_id: int | None,
        on_progress: Callable[[int, int], None] | None = None,
        watched: ScoredTask | None = None,
    ) -> EvalLoss:
        """The loss of some records under a ledger's model, and the reward of those that are watched; `on_progress` hears how
        many are done."""
        self.restore(ledger)
        result = evaluate_loss(self.model, examples, EVAL_BATCH, pad_id, on_progress)
        return result if watched is None else replace(result, reward=watched.reward())


def tune_all_but(model: torch.nn.Module, frozen: Collection[str]) -> None:
    """Make all parameters those that require a gradient, but for the ones of these canonical names and quantised ones."""
    for parameter in model.parameters():
        parameter.requires_grad_(not is_quantised(parameter))
    for entry in named_parameters(model) if frozen else ():
        if entry.name in frozen:
            entry.parameter.requires_grad_(False)


def bind_loaded(source: str | Path, model: torch.nn.Module, pool: SeedPool, frozen: Collection[str] = ()) -> BoundModel:
    """Bind a model as it was loaded, all of its parameters tunable but for the frozen ones.

    On a CPU the base is read again from the model's own files where they allow it; on a GPU it stays in memory, since the
    file would go through the bus at every rebuild.

    Args:
        source: the folder or hub id that it was loaded from.
        model: as it was loaded.
        pool: of the run.
        frozen: canonical names of the parameters that stay as they are.

    Raises:
        FedKSeedError: the model cannot be bound; see `fedkseed.bind`.
    """
    tune_all_but(model, frozen)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return BoundModel(model, bind(model, pool, base_path(source, model) if on_cpu else None))


class TimedModel:
    """A bound model whose sweeps are timed."""

    def __init__(self, bound: Binding, watch: Stopwatch) -> None:
        self.pool, self._bound, self._watch = bound.pool, bound, watch

    def rebuild(self, coefficients: NDArray[np.float32]) -> None:
        """See `Binding.rebuild`."""
        with self._watch("rebuild"):
            self._bound.rebuild(coefficients)

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        """See `Binding.move`."""
        with self._watch("noise"):
            self._bound.move(indices, amounts)


class TimedPages(TimedModel):
    """The same with pages, and gradients folded."""

    def open_page(self, pool: SeedPool, closed: Sequence[ClosedPage], movement: Movement) -> None:
        """See `Binding.open_page`."""
        with self._watch("rebuild"):
            self._bound.open_page(pool, closed, movement)
        self.pool = pool

    def folding(self) -> AbstractContextManager[Projection]:
        """See `Binding.folding`."""
        return self._bound.folding()


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Make the backward pass recompute each layer's activations, and the process give back what it frees.

    Not by transformers' own switch: it recomputes in training mode only, in which some layers drop activations out at random.

    Raises:
        ModelError: it has no layers that transformers knows as such.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"--checkpointing on: {type(model).__name__} does not support it (no layers are known); leave it out")
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)
    give_back_at_once()


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """What a layer gives, keeping nothing but its inputs for the backward pass; nothing random happens in it."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def compile_passes(model: torch.nn.Module) -> None:
    """Compile the forward pass for batches of all lengths, by two short records now, which takes a minute or more.

    Losses differ from the plain ones by rounding, so a run keeps to one way. The weights may be moved in place as before.

    Raises:
        ModelError: torch cannot compile it here; the model is as it was.
    """
    model.compile(dynamic=True)
    records = [EncodedExample(np.zeros(length, np.int32), length // 2) for length in (16, 24)]
    try:
        with torch.inference_mode():
            mean_loss(model, collate(records, 0, next(model.parameters()).device))
    except Exception as error:  # every backend of torch.compile raises its own
        model._compiled_call_impl = None
        raise ModelError(
            f"--compile on: torch cannot compile {type(model).__name__} here ({one_line(error)}); leave it out"
        ) from error


class TextTask:
    """A client's records and their loss under a model; see `fedkseed.federation.task.DifferentiableTask`."""

    def __init__(
        self, model: torch.nn.Module, examples: Sequence[EncodedExample], pad_id: int | None, watch: Stopwatch
    ) -> None:
        self._model, self._examples, self._pad_id, self._watch = model, examples, pad_id, watch
        self._device = next(model.parameters()).device

    @property
    def num_examples(self) -> int:
        """How many records the client holds."""
        return len(self._examples)

    def loss(self, records: NDArray[np.int64]) -> float:
        """Mean loss over the response tokens of some records."""
        with self._watch("forward"), torch.inference_mode():
            return self._loss(records).item()

    def differentiable_loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        """The same, 0-dim, for backpropagation."""
        with self._watch("forward"):
            return self._loss(records)

    def _loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        batch = collate([self._examples[i] for i in records], self._pad_id, self._device)
        return mean_loss(self._model, batch)
