"""A client of a baseline: sets the tensors that it is sent, trains them on its records, sends them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedkseed.baselines.messages import TensorReply, TensorRequest, pack_tensors, size_cap, unpack_tensors
from fedkseed.baselines.parameters import Parameters
from fedkseed.errors import ProtocolError
from fedkseed.federation import FederationConfig
from fedkseed.federation.task import DifferentiableTask, check_addressee, examples_of, local_batches
from fedkseed.kseed.steps import StepSettings, local_steps
from fedkseed.models.binding import bind
from fedkseed.noise.pool import SeedPool
from fedkseed.randomness import derive

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
"""What `Algorithm.steps` may name."""
Heard = Callable[[int, float], None]


@dataclass(frozen=True)
class Trained:
    """What local steps came to: the loss of each that was kept, and how many were dropped."""

    losses: Sequence[float]
    dropped: int


class TensorClient:
    """One participant of a baseline.

    Optimisers start anew in every round, so that a client keeps nothing between rounds.

    Args:
        name: its stable name.
        config: the settings; of these, what the algorithm's steps need beside the request.
        model: the model, whose parameters that require a gradient are tuned; shared with other clients or not.
        base: fingerprint (hex) of the base model.
        task: its records and their loss.
        parameters: how the model's are sent; None for as they are.
    """

    def __init__(
        self,
        name: str,
        config: FederationConfig,
        model: torch.nn.Module,
        base: str,
        task: DifferentiableTask,
        parameters: Parameters | None = None,
    ) -> None:
        self.name, self.task = name, task
        self._config, self._model, self._base = config, model, bytes.fromhex(base)
        self._parameters = parameters or Parameters(model)

    def answer(self, data: bytes, on_step: Heard | None = None) -> bytes:
        """Train as a request says and give the reply's bytes; `on_step` hears each step's number and loss.

        Raises:
            ProtocolError: not a request, or one for another client, base model, algorithm or other tensors.
            InvalidValueError: the task has no records, or their number is no integer.
            BindingError: see `Binding.move`, of two-point steps.
        """
        request = TensorRequest.decode(data, size_cap(self._parameters.shapes))
        check_addressee(request, self.name, self._base)
        if request.algorithm != self._config.algorithm:
            raise ProtocolError(f"request is for {request.algorithm!r:.40}; this client runs {self._config.algorithm}")
        num_examples = examples_of(self.task)
        self._parameters.write(unpack_tensors(request.tensors))
        heard = on_step or (lambda step, loss: None)
        train = self._zeroth_order if self._config.facts.measures == "two-point" else self._first_order
        trained = train(request, heard)
        reply = TensorReply(
            **request.head(),
            num_examples=num_examples,
            loss=math.fsum(trained.losses) / len(trained.losses) if trained.losses else None,
            dropped=trained.dropped,
            tensors=pack_tensors(self._parameters.read()),
        )
        return reply.encode()

    def _first_order(self, request: TensorRequest, heard: Heard) -> Trained:
        """Steps of an optimiser along the gradient by backpropagation; one with a loss that is not finite is dropped."""
        optimizer = OPTIMIZERS[self._config.facts.steps](self._parameters, lr=request.lr)  # type: ignore[call-arg]
        batch, losses = local_batches(self.task, request.batch_size, request.place), []
        for step in range(request.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = self.task.differentiable_loss(batch(step))
            value = loss.item()
            heard(step, value)
            if math.isfinite(value):
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(value)
        optimizer.zero_grad(set_to_none=True)
        return Trained(losses, request.steps - len(losses))

    def _zeroth_order(self, request: TensorRequest, heard: Heard) -> Trained:
        """FedKSeed's steps along directions that are used once: every client and round has a pool of its own."""
        key = derive(*request.place, "pool")
        config, batch = self._config, local_batches(self.task, request.batch_size, request.place)
        bound = bind(self._model, SeedPool(key, request.steps, config.noise))

        def loss(step: int) -> float:
            value = self.task.loss(batch(step))
            heard(step, value)
            return value

        settings = StepSettings(request.lr, config.eps, config.max_grad, config.loss_clip, "float32")
        steps = local_steps(bound, range(request.steps), loss, settings)
        return Trained(np.delete(steps.losses, steps.dropped).tolist(), len(steps.dropped))
