"""A client's private records as an algorithm sees them: a number of examples, their loss, batches of their positions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError, ProtocolError
from fedkseed.federation.envelope import Request
from fedkseed.randomness import generator

if TYPE_CHECKING:
    import torch


class Task(Protocol):
    """A client's private records, and the loss of the model on some of them."""

    @property
    def num_examples(self) -> int:
        """How many records there are."""
        ...

    def loss(self, records: NDArray[np.int64]) -> float:
        """Mean loss at the model's current weights on the records at these positions."""
        ...


@runtime_checkable
class DrawingTask(Task, Protocol):
    """A task whose loss may depend on draws, as on answers that are drawn from the model."""

    def drawn_loss(self, records: NDArray[np.int64], key: int) -> float:
        """The loss under the draws of a key: of equal keys they are equal, so that two probes differ by their weights only."""
        ...


class DifferentiableTask(Task, Protocol):
    """A task whose loss can be backpropagated."""

    def differentiable_loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        """The loss as a tensor to call `backward` on, 0-dim."""
        ...


def check_addressee(request: Request, name: str, base: bytes) -> None:
    """Refuse a request for another client or base model.

    Raises:
        ProtocolError: it is.
    """
    if request.client != name:
        raise ProtocolError(f"request is for client {request.client!r}; this is {name!r}")
    if request.base != base:
        raise ProtocolError(
            f"request is for base model {request.base.hex()[:16]}..., this client has {base.hex()[:16]}...; "
            "load the same base weights as the server"
        )


def by_step(order: Iterator[NDArray[np.int64]]) -> Callable[[int], NDArray[np.int64]]:
    """The batch of a step, the same one as often as the step is asked for; steps come in their order."""
    current: NDArray[np.int64] = np.empty(0, np.int64)
    at = -1

    def batch(step: int) -> NDArray[np.int64]:
        nonlocal current, at
        if step != at:
            current, at = next(order), step
        return current

    return batch


def examples_of(task: Task) -> int:
    """How many records a task has; asked before any work, since a reply must say so.

    Raises:
        InvalidValueError: it has none, or their number is no integer.
    """
    try:
        if isinstance(task.num_examples, bool):
            raise TypeError
        number = operator.index(task.num_examples)
    except TypeError:
        raise InvalidValueError(
            f"num_examples of a task is {task.num_examples!r:.40}; expected how many records it has, an integer"
        ) from None
    if number < 1:
        raise InvalidValueError(f"a client has {number} records; expected at least one, so leave it out")
    return number


def local_batches(task: Task, batch_size: int, place: tuple[int, int, int, str]) -> Callable[[int], NDArray[np.int64]]:
    """The batches of a client's local steps, by step; they depend on the exchange's place (`Head.place`) alone.

    Raises:
        InvalidValueError: see `examples_of`.
    """
    return by_step(batches(examples_of(task), batch_size, generator(*place, "batches")))


def batches(num_examples: int, batch_size: int, draw: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Batches of record positions without end: each pass over the records is in a fresh random order."""
    while True:
        order = draw.permutation(num_examples)
        for first in range(0, num_examples, batch_size):
            yield order[first : first + batch_size]
