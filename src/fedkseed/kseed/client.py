"""The client as a state machine: bytes of a request in, bytes of a reply out. It knows neither transport nor data format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.task import Task, batches, by_step, check_addressee
from fedkseed.kseed.messages import TrainReply, TrainRequest
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.steps import GRAD_EXPONENT, Movable, StepSettings, local_steps
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
from fedkseed.randomness import generator


class Model(Movable, Protocol):
    """What a client needs of its model; `fedkseed.Binding` has it."""

    pool: SeedPool

    def rebuild(self, coefficients: NDArray[np.float32]) -> None:
        """Set the weights to base plus coefficients."""
        ...


class Client:
    """One participant.

    Args:
        name: its stable name.
        model: the model, shared with others or not: every answer starts with a rebuild.
        base: identity of the model's base weights.
        task: its records and their loss.
    """

    def __init__(self, name: str, model: Model, base: BaseIdentity, task: Task) -> None:
        self.name, self.model, self.task = name, model, task
        self._base = bytes.fromhex(base.fingerprint)

    def answer(self, data: bytes, on_step: Callable[[int, float], None] | None = None) -> bytes:
        """Train as a request says and give the reply's bytes; `on_step` hears each probe's step and loss.

        Raises:
            ProtocolError: not a request, or one for another client, base model or pool.
        """
        request = TrainRequest.decode(data)
        check_addressee(request, self.name, self._base)
        if request.pool != self.model.pool:
            raise ProtocolError(f"request is for {request.pool}; this client's model is bound to {self.model.pool}")
        draw = generator(int.from_bytes(request.run_id, "little"), request.server_round, request.attempt, self.name, "batches")
        batch = by_step(batches(self.task.num_examples, request.batch_size, draw))

        def loss(step: int) -> float:
            value = self.task.loss(batch(step))
            if on_step is not None:
                on_step(step, value)
            return value

        precision = request.coefficients.precision
        settings = StepSettings(request.lr, request.eps, request.max_grad, request.loss_clip, precision, request.directions)
        self.model.rebuild(request.coefficients.unpack())
        steps = local_steps(self.model, request.indices, loss, settings)
        kept = np.delete(steps.losses, steps.dropped)
        reply = TrainReply(
            **request.head(),
            num_examples=self.task.num_examples,
            projected_grads=pack(steps.projected_grads, precision, GRAD_EXPONENT),
            dropped=steps.dropped,
            loss=float(kept.mean()) if kept.size else None,
        )
        return reply.encode()
