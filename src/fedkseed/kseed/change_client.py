"""A client whose replies are changes of K numbers: it keeps the pages that it has seen, and is sent what it lacks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.errors import ModelError, NoBackwardError, ProtocolError, is_want_of_memory
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.federation.task import DifferentiableTask, check_addressee, examples_of, local_batches
from fedkseed.kseed.change_messages import CHANGE, SCALARS, ChangeReply, ChangeRequest, seeds_of
from fedkseed.kseed.coding import Coded, encode
from fedkseed.kseed.gradient_steps import Foldable, folded_gradient, gradient_steps
from fedkseed.kseed.pages import Page, pages_digest
from fedkseed.kseed.private_steps import poisson_batches, private_gradient, private_steps, wire_scalars
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.steps import GRAD_EXPONENT, LocalSteps, StepSettings, local_steps
from fedkseed.models.identity import BaseIdentity
from fedkseed.privacy import WITHHELD, Mechanism, Privacy
from fedkseed.text import one_line

log = logging.getLogger(__name__)
F64 = NDArray[np.float64]
Heard = Callable[[int, float], None]
Measure = Callable[[int], tuple[F64, float]]
"""The gradient of a step, and its loss."""


class ChangeClient:
    """One participant.

    Args:
        name: its stable name.
        model: the model, shared with others or not: every answer starts with a rebuild.
        base: identity of the model's base weights.
        task: its records and their loss.
        privacy: what the client hides of them by itself, whatever a request says; None: nothing.

    Attributes:
        pages: those that it has seen; lost ones are sent again.
    """

    def __init__(
        self, name: str, model: Foldable, base: BaseIdentity, task: DifferentiableTask, privacy: Privacy | None = None
    ) -> None:
        self.name, self.model, self.task, self.privacy = name, model, task, privacy
        self._base = bytes.fromhex(base.fingerprint)
        self.pages: tuple[Page, ...] = ()

    def answer(self, data: bytes, on_step: Heard | None = None) -> bytes:
        """Train as a request says and give the reply's bytes; `on_step` hears each step and its loss.

        Raises:
            ProtocolError: not a request, or one for another client or base model, or about pages that it lacks.
            InvalidValueError: the task has no records, or their number is no integer.
            BindingError: see `Binding.rebuild`.
            ModelError: there is no memory for a gradient.
        """
        request = ChangeRequest.decode(data)
        check_addressee(request, self.name, self._base)
        examples_of(self.task)  # which says what it cannot be, before any work
        self.pages = patched(self.pages, request)
        *closed, page = self.pages
        self.model.open_page(page.pool, [one.closed() for one in closed], page.movement)
        heard = on_step or (lambda step, loss: None)
        reply = None
        if request.measure == "gradient":
            try:
                reply = self._by_gradient(request, page, heard)
            except NoBackwardError as error:
                log.warning("%s cannot backpropagate (%s); it answers with two-point steps", self.name, one_line(error))
            except (RuntimeError, MemoryError) as error:
                if not is_want_of_memory(error):
                    raise
                raise ModelError(
                    f"{self.name}: no memory for a gradient ({one_line(error, 80)}); --checkpointing on needs "
                    "less, so does a smaller --batch-size or --max-length"
                ) from error
        return (reply or self._by_two_points(request, page, heard)).encode()

    def _by_gradient(self, request: ChangeRequest, page: Page, heard: Heard) -> ChangeReply:
        measure = self._private_gradients if self._hides_records else self._gradients
        optimizer, start = OPTIMIZERS[request.optimizer], page.numbers()
        steps = gradient_steps(
            self.model, start, page.basis, request.steps, measure(request, page, heard), optimizer, request.lr
        )
        change = self._released(steps.change) if self._hides_client else steps.change
        return self._reply(request, CHANGE, encode(change, request.wire), steps.dropped, steps.losses)

    def _gradients(self, request: ChangeRequest, page: Page, heard: Heard) -> Measure:
        batch = local_batches(self.task, request.batch_size, request.place)

        def loss(step: int) -> torch.Tensor:
            value = self.task.differentiable_loss(batch(step))
            heard(step, value.item())
            return value

        return lambda step: folded_gradient(self.model, page.basis, partial(loss, step))

    def _private_gradients(self, request: ChangeRequest, page: Page, heard: Heard) -> Measure:
        mechanism = self._mechanism
        batches = poisson_batches(examples_of(self.task), request.batch_size, mechanism.source)

        def loss(step: int, record: int) -> torch.Tensor:
            value = self.task.differentiable_loss(np.array([record]))
            heard(step, value.item())
            return value

        def measure(step: int) -> tuple[F64, float]:
            of_record = partial(loss, step)
            return private_gradient(self.model, page.basis, next(batches), of_record, mechanism, request.batch_size)

        return measure

    def _by_two_points(self, request: ChangeRequest, page: Page, heard: Heard) -> ChangeReply:
        self.model.rebuild(page.coefficients())  # and stay there: the scalars say how the loss slopes where the round begins
        settings = StepSettings(0.0, request.eps, request.max_grad, request.loss_clip, "float16")
        if self._hides_records:
            steps = self._private_steps(request, settings, heard)
        else:
            batch = local_batches(self.task, request.batch_size, request.place)

            def loss(step: int) -> float:
                value = self.task.loss(batch(step))
                heard(step, value)
                return value

            steps = local_steps(self.model, seeds_of(request), loss, settings)
        grads = steps.projected_grads
        if self._hides_client:
            grads = wire_scalars(self._released(grads.astype(np.float64)), request.max_grad, "float16")
        packed = pack(grads, "float16", GRAD_EXPONENT)
        return self._reply(request, SCALARS, Coded("float16", 1.0, packed.numbers), steps.dropped, steps.losses)

    def _private_steps(self, request: ChangeRequest, settings: StepSettings, heard: Heard) -> LocalSteps:
        mechanism = self._mechanism
        batches = poisson_batches(examples_of(self.task), request.batch_size, mechanism.source)

        def loss(step: int, record: int) -> float:
            value = self.task.loss(np.array([record]))
            heard(step, value)
            return value

        return private_steps(self.model, seeds_of(request), batches, loss, settings, mechanism, request.batch_size)

    @property
    def _hides_records(self) -> bool:
        return self.privacy is not None and self.privacy.unit == "record"

    @property
    def _hides_client(self) -> bool:
        return self.privacy is not None and self.privacy.unit == "client"

    @property
    def _mechanism(self) -> Mechanism:
        assert self.privacy is not None  # asked only where it hides something
        return self.privacy.mechanism

    def _released(self, vector: F64) -> F64:
        """The one vector that a client sends, clipped and noised as a whole."""
        return self._mechanism.release([vector], len(vector), 1.0)

    def _reply(
        self, request: ChangeRequest, kind: int, numbers: Coded, dropped: tuple[int, ...], losses: np.ndarray
    ) -> ChangeReply:
        kept, private = np.delete(losses, dropped), self.privacy is not None
        return ChangeReply(
            **request.head(),
            num_examples=WITHHELD if private else examples_of(self.task),
            loss=None if private or not kept.size or not math.isfinite(kept.mean()) else float(kept.mean()),
            kind=kind,
            steps=request.steps,
            numbers=numbers,
            dropped=() if private else dropped,
        )


def patched(pages: tuple[Page, ...], request: ChangeRequest) -> tuple[Page, ...]:
    """Pages after a request's patches.

    Raises:
        ProtocolError: the patches do not follow from these pages, or lead to others than the request's.
    """
    if len(pages) < request.have:
        raise ProtocolError(
            f"{request.client!r} has {len(pages)} pages, the request builds on {request.have}; send all of them"
        )
    whole = list(pages[: request.have])
    for patch, known in zip(request.patches, [*pages[request.have :], *[None] * len(request.patches)], strict=False):
        kept = known.parts if known is not None and known.pool.key == patch.key else ()
        if patch.first > len(kept):
            raise ProtocolError(
                f"{request.client!r} has {len(kept)} parts of page {len(whole) + 1}, the request builds on {patch.first}; "
                "send all of them"
            )
        whole.append(request.page(patch.key, (*kept[: patch.first], *patch.parts)))
    if pages_digest(whole) != request.digest:
        raise ProtocolError(f"{request.client!r} has other pages than the request builds on; send all of them")
    return tuple(whole)
