"""A client's local steps by backpropagation, in K numbers: fold the gradient, step, rebuild (docs/gradients.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.errors import NoBackwardError
from fedkseed.federation.optimizer import Optimizer
from fedkseed.kseed.coding import LARGEST
from fedkseed.kseed.pages import Basis, to_coefficients
from fedkseed.models.closed_page import ClosedPage, Movement
from fedkseed.noise.pool import SeedPool

F64 = NDArray[np.float64]


class Folded(Protocol):
    """A gradient seen from a pool."""

    def table(self) -> F64:
        """In the table's basis."""
        ...

    def numbers(self) -> F64:
        """In the coefficients' basis."""
        ...


class Foldable(Protocol):
    """What gradient steps need of a model; `fedkseed.Binding` has it."""

    pool: SeedPool

    def rebuild(self, coefficients: NDArray[np.float32]) -> None:
        """Set the weights to base plus coefficients."""
        ...

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        """Move the weights by `sum_i amounts[i] z_indices[i]`."""
        ...

    def open_page(self, pool: SeedPool, closed: Sequence[ClosedPage], movement: Movement) -> None:
        """See the weights as base, closed pages and an open one."""
        ...

    def folding(self) -> AbstractContextManager[Folded]:
        """Fold gradients as backward makes them."""
        ...


@dataclass(frozen=True)
class GradientSteps:
    """What came of n local steps: the change of the page's numbers float64[K], dropped steps, losses float64[n]."""

    change: F64
    dropped: tuple[int, ...]
    losses: F64


def gradient_steps(
    model: Foldable,
    start: F64,
    basis: Basis,
    num_steps: int,
    measure: Callable[[int], tuple[F64, float]],
    optimizer: Optimizer,
    lr: float,
) -> GradientSteps:
    """Take local steps along projected gradients, each `numbers <- numbers + step(u, lr)`, and rebuild the weights in between.

    A step whose loss or gradient is not finite, or that would lead beyond what can be sent, leaves the numbers where they
    were.

    Args:
        model: its open page is the one that `start` is about; left at the numbers that the steps have led to.
        start: the page's numbers, float64[K].
        basis: which numbers they are.
        num_steps: how many steps.
        measure: the gradient by the page's numbers at the current weights, float64[K], and the loss, of step t.
        optimizer: what a gradient is turned into; its state begins here.
        lr: learning rate.
    """
    numbers, state = start.copy(), optimizer.start(len(start))
    losses, dropped = np.full(num_steps, math.nan), []
    model.rebuild(to_coefficients(numbers, basis))
    for t in range(num_steps):
        gradient, losses[t] = measure(t)
        if not (math.isfinite(losses[t]) and np.isfinite(gradient).all()):
            dropped.append(t)
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            change, following = optimizer.step(gradient, lr, state)
            moved = numbers + change
        if not (np.abs(moved - start) <= LARGEST).all():
            dropped.append(t)
            continue
        numbers, state = moved, following
        model.rebuild(to_coefficients(numbers, basis))
    return GradientSteps(numbers - start, tuple(dropped), losses)


def folded_gradient(model: Foldable, basis: Basis, loss: Callable[[], torch.Tensor]) -> tuple[F64, float]:
    """The gradient of a loss at the current weights by a page's numbers, float64[K], and the loss.

    Args:
        model: see `gradient_steps`.
        basis: which numbers they are.
        loss: 0-dim, to call `backward` on; where it is not finite nothing is backpropagated.

    Raises:
        NoBackwardError: the model cannot be backpropagated through.
    """
    with torch.inference_mode(False), model.folding() as fold:  # whatever the caller is in: it turns gradients on too
        value = _differentiable(loss)
        if math.isfinite(value.item()):
            _backward(value)
    return fold.table() if basis == "table" else fold.numbers(), value.item()


def _differentiable(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return loss()
    except RuntimeError as error:
        if "Inference tensors cannot be saved for backward" in str(error):
            raise NoBackwardError("its records or weights were made inside torch.inference_mode()") from error
        raise


def _backward(loss: torch.Tensor) -> None:
    """Backpropagate. What else goes wrong, want of memory or a bug, is none of a model's inability."""
    if not loss.requires_grad:
        raise NoBackwardError("its loss does not depend on the parameters by operations that have a gradient")
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise NoBackwardError(str(error)) from error
