"""The client as a state machine: bytes of a request in, bytes of a reply out. It knows neither transport nor data format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.task import DrawingTask, Task, check_addressee, examples_of, local_batches
from fedkseed.kseed.messages import TrainReply, TrainRequest
from fedkseed.kseed.population import population_steps
from fedkseed.kseed.private_steps import poisson_batches, private_steps, wire_scalars
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.steps import GRAD_EXPONENT, LocalSteps, Movable, StepSettings, local_steps
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
from fedkseed.privacy import WITHHELD, Privacy
from fedkseed.randomness import derive

Heard = Callable[[int, float], None]


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
        privacy: what the client hides of them by itself, whatever a request says; None: nothing.
    """

    def __init__(self, name: str, model: Model, base: BaseIdentity, task: Task, privacy: Privacy | None = None) -> None:
        self.name, self.model, self.task, self.privacy = name, model, task, privacy
        self._base = bytes.fromhex(base.fingerprint)

    def answer(self, data: bytes, on_step: Heard | None = None) -> bytes:
        """Train as a request says and give the reply's bytes; `on_step` hears each probe's step and loss.

        Raises:
            ProtocolError: not a request, or one for another client, base model or pool; or for scores that are compared, of a
                client that hides single records.
            InvalidValueError: the task has no records, or their number is no integer.
            BindingError: see `Binding.rebuild`.
        """
        request = TrainRequest.decode(data)
        check_addressee(request, self.name, self._base)
        if request.pool != self.model.pool:
            raise ProtocolError(f"request is for {request.pool}; this client's model is bound to {self.model.pool}")
        privacy, precision = self.privacy, request.coefficients.precision
        hides_records = privacy is not None and privacy.unit == "record"
        if hides_records and request.scaling not in (None, "none"):
            raise ProtocolError(
                f"request is for scores by {request.scaling}, which compare records; this client hides single ones, so let the "
                "run take scaling none"
            )
        settings = StepSettings(
            request.lr, request.eps, request.max_grad, request.loss_clip, precision, request.directions, request.scaling
        )
        num_examples = examples_of(self.task)
        self.model.rebuild(request.coefficients.unpack())
        steps = (self._private_steps if hides_records else self._steps)(request, settings, on_step)
        if privacy is None:
            kept = np.delete(steps.losses, steps.dropped)
            loss = float(kept.mean()) if kept.size else None
            return self._reply(request, steps.projected_grads, steps.dropped, num_examples, loss)
        if hides_records:
            return self._reply(request, steps.projected_grads)
        released = privacy.mechanism.release([steps.projected_grads.astype(np.float64)], len(request.indices), 1.0)
        return self._reply(request, wire_scalars(released, request.max_grad, precision))

    def _steps(self, request: TrainRequest, settings: StepSettings, on_step: Heard | None) -> LocalSteps:
        batch = local_batches(self.task, request.batch_size, request.place)

        def loss(step: int) -> float:
            if isinstance(self.task, DrawingTask):  # all probes of a step see the same draws
                value = self.task.drawn_loss(batch(step), derive(*request.place, "answers", step))
            else:
                value = self.task.loss(batch(step))
            if on_step is not None:
                on_step(step, value)
            return value

        take = local_steps if request.scaling is None else population_steps
        return take(self.model, request.indices, loss, settings)

    def _private_steps(self, request: TrainRequest, settings: StepSettings, on_step: Heard | None) -> LocalSteps:
        assert self.privacy is not None  # asked only where it hides records
        mechanism = self.privacy.mechanism
        batches = poisson_batches(examples_of(self.task), request.batch_size, mechanism.source)

        def loss(step: int, record: int) -> float:
            value = self.task.loss(np.array([record]))
            if on_step is not None:
                on_step(step, value)
            return value

        return private_steps(self.model, request.indices, batches, loss, settings, mechanism, request.batch_size)

    def _reply(
        self,
        request: TrainRequest,
        grads: NDArray[np.float32],
        dropped: tuple[int, ...] = (),
        num_examples: int = WITHHELD,
        loss: float | None = None,
    ) -> bytes:
        """The reply's bytes; without the last three it tells nothing but the scalars."""
        return TrainReply(
            **request.head(),
            num_examples=num_examples,
            projected_grads=pack(grads, request.coefficients.precision, GRAD_EXPONENT),
            dropped=dropped,
            loss=loss,
        ).encode()
