"""Tuning in K numbers by an ordinary loop: `model, optimizer = fk.prepare(model, pool, lr)` (docs/adapter.md).

The K numbers are a leaf tensor, the parameter of a child module of the model, and an optimiser of torch steps on them. Hooks do
the rest: each weight's gradient is folded as soon as backward has made it, and freed; after a step the weights are rebuilt from
the numbers *as their ledger holds them*. So at any time the model is the one that the ledger's file gives.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from fedkseed.errors import BindingError, InvalidValueError, LedgerError
from fedkseed.federation.optimizer import DECAY, SQUARE_DECAY, TINY
from fedkseed.kseed.coding import BITS, LARGEST, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Basis, Page
from fedkseed.models.binding import Binding, bind
from fedkseed.models.closed_page import Movement
from fedkseed.models.parameters import NUMBERS, TUNED, is_plain_float
from fedkseed.models.projection import Projection
from fedkseed.noise.families import block_size
from fedkseed.noise.pool import SeedPool
from fedkseed.text import one_line

Factory = Callable[..., torch.optim.Optimizer]
"""Makes an optimiser as torch's classes do: `factory([tensor], lr=lr)`."""
ADAM: Factory = partial(torch.optim.Adam, betas=(DECAY, SQUARE_DECAY), eps=TINY)
"""The clients' Adam (docs/gradients.md), as torch has it."""
UNFIT = (torch.optim.LBFGS, torch.optim.SparseAdam)
"""Optimisers of torch that need more than a dense gradient a step."""
MOVED = (
    "the numbers were moved by another optimizer than the one that fk.prepare gave, so the weights have not followed; prepare "
    "the base model anew and use that one (a Trainer takes it as optimizers=(optimizer, None))"
)


class KNumbers(torch.nn.Module):
    """K numbers that a model is tuned by, as its child module; made by `prepare`. State dicts of the model are without it.

    Attributes:
        numbers: float32[K]; `grad` is the folded gradient of the backward passes since `zero_grad`.
        num_steps: steps so far.
        page: the numbers as the ledger holds them, which the weights are rebuilt from.
    """

    def __init__(self, bound: Binding, wire: str) -> None:
        super().__init__()
        pool = bound.pool
        basis: Basis = "table" if pool.facts.has_table and block_size(pool.size) == pool.size else "coefficients"
        device = next(entry.device for entry in bound.model.parameters() if entry.requires_grad)
        self.numbers = torch.nn.Parameter(torch.zeros(pool.size, dtype=torch.float32, device=device))
        self.num_steps = 0
        self.page = Page(pool, basis, bound.movement)
        self._bound, self._wire = bound, wire
        self._loading: dict[str, Any] = {}
        self._folds: dict[int, Projection] = {}  # by backward pass

    # --- Backward: gradients of weights become one of the numbers ---

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimiser over the numbers tune the model from now on."""
        parameters = list(self._bound.model.parameters())
        self._weights = [x for x in parameters if x.requires_grad]
        self._frozen = [x for x in parameters if not x.requires_grad and is_plain_float(x)]
        self._dtypes = [x.dtype for x in self._weights]
        self._remember()
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[Any] = [
            *self._bound.fold_into(self._fold),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._add_state),
            optimizer.register_load_state_dict_pre_hook(self._check_state),
            optimizer.register_load_state_dict_post_hook(self._take_state),
        ]
        for x in self._weights:  # last, since only `detach` takes it away
            setattr(x, TUNED, True)

    def _remember(self) -> None:
        """The weights and the numbers belong together as they are now."""
        self._held = self.numbers.detach().clone()  # a fused optimiser moves them without their version's knowledge
        self._versions, self._frozen_versions = _versions(self._weights), _versions(self._frozen)

    def _fold(self) -> Projection:
        """What the running backward pass folds into; a pass within it (reentrant checkpointing) has its own."""
        task = torch._C._current_graph_task_id()
        if task not in self._folds:
            if (
                torch.distributed.is_available()
                and torch.distributed.is_initialized()
                and torch.distributed.get_world_size() > 1
            ):
                raise InvalidValueError(
                    f"{torch.distributed.get_world_size()} processes train this model together, which a prepared model cannot; "
                    "start one process (a federation of several: docs/deploy.md)"
                )
            self._check_numbers()
            self._folds[task] = self._bound.projection()
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._finish, task))
        return self._folds[task]

    def _finish(self, task: int) -> None:
        """At the end of a backward pass its gradient is added to the numbers' own."""
        fold = self._folds.pop(task)
        u = torch.from_numpy(fold.table() if self.page.basis == "table" else fold.numbers())
        u = u.to(self.numbers.device, self.numbers.dtype)
        with torch.no_grad():
            self.numbers.grad = u if self.numbers.grad is None else self.numbers.grad + u

    # --- Steps: the numbers move, the weights follow ---

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._folds.clear()  # of backward passes that failed
        self._check_whole()
        if any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise InvalidValueError("step was given a closure; call loss.backward() and then step() without one")
        gradient = self.numbers.grad
        if gradient is None:
            raise InvalidValueError(
                "step without a gradient: no backward pass of this model since the last zero_grad; call loss.backward() first"
            )
        if not torch.isfinite(gradient).all():
            raise InvalidValueError(
                f"the gradient of step {self.num_steps + 1} is not finite; call zero_grad() and take another batch, a lower "
                "rate, or a GradScaler, which leaves such steps out"
            )

    def _check_whole(self) -> None:
        """Refuse a model that is not as it was after the last step."""
        self._check_numbers()
        if (name := self._bound.replaced()) is not None:
            raise InvalidValueError(
                f"{name} is another parameter than the one that was prepared; change the model first, and prepare it then"
            )
        frozen = sum(not x.requires_grad for x in self._weights)
        if frozen:
            raise InvalidValueError(
                f"{frozen} of the tensors that are tuned require no gradient any more; call requires_grad_(True)"
            )
        for x, dtype in zip((self.numbers, *self._weights), (torch.float32, *self._dtypes), strict=True):
            if x.dtype != dtype:
                raise InvalidValueError(
                    f"the model was cast to {x.dtype} after it was prepared; load it in the type that is meant, then prepare it"
                )
            if not x.is_contiguous():
                raise InvalidValueError(
                    "a weight is not contiguous in memory any more; call model.to(memory_format=torch.contiguous_format)"
                )
        if self._versions != _versions(self._weights) or self._frozen_versions != _versions(self._frozen):
            raise InvalidValueError(
                "the weights were changed by something else since the last step; load the optimizer's state_dict of that "
                "moment too, or prepare a model anew"
            )

    def _moved_by_another(self) -> bool:
        return not torch.equal(self._held.to(self.numbers), self.numbers.detach())

    def _check_numbers(self) -> None:
        """Refuse numbers that another optimiser has moved: the weights have not followed."""
        if self._moved_by_another():
            raise InvalidValueError(MOVED)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._rebuild()
        except InvalidValueError:
            with torch.no_grad():
                self.numbers.copy_(self._held)
            raise
        self.num_steps += 1

    def _rebuild(self) -> None:
        """Set the weights to what a ledger of the numbers gives."""
        values = self.numbers.detach().cpu().double().numpy()
        page = Page(self.page.pool, self.page.basis, self.page.movement, (encode(values, self._wire),))
        self._bound.rebuild(page.coefficients())
        self.page = page
        self._remember()

    # --- State: what an optimiser's checkpoint needs beside the optimiser's own ---

    def _kind(self) -> dict[str, Any]:
        """What must be the same where a state is loaded."""
        pool = asdict(self.page.pool) | {"key": f"{self.page.pool.key:016x}"}  # of 64 bits, which not every format holds
        of_page = {"basis": self.page.basis, "movement": self.page.movement, "wire": self._wire}
        return pool | of_page | {"base": self._bound.identity().fingerprint}

    def _add_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state[NUMBERS] = self._kind() | {"numbers": self.numbers.detach().clone(), "num_steps": self.num_steps}

    def _check_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        ours = state.get(NUMBERS)
        if not isinstance(ours, dict):
            raise InvalidValueError("this state_dict is of another optimizer; expected one that fk.prepare gave")
        for name, value in self._kind().items():
            if ours.get(name) != value:
                raise InvalidValueError(
                    f"the state_dict's {name} is {ours.get(name)!r:.80}, this optimizer's {value!r:.80}; prepare the base "
                    "model as it was prepared then"
                )
        numbers, steps = ours.get("numbers"), ours.get("num_steps")
        if not isinstance(numbers, torch.Tensor) or numbers.shape != self.numbers.shape or type(steps) is not int:
            raise InvalidValueError(
                f"the state_dict has no {len(self.numbers)} numbers with their count of steps; it is damaged"
            )
        if not (numbers.abs() <= LARGEST).all():
            raise InvalidValueError("a number of the state_dict is not finite or too large; it is damaged")
        columns = [
            x for one in state.get("state", {}).values() for x in one.values() if isinstance(x, torch.Tensor) and x.dim()
        ]
        if any(x.numel() not in (1, len(self.numbers)) for x in columns):
            raise InvalidValueError(f"the state_dict's optimizer state is not of {len(self.numbers)} numbers; it is damaged")
        self._loading = ours

    def _take_state(self, optimizer: torch.optim.Optimizer) -> None:
        loaded, self._loading = self._loading, {}
        self.numbers.grad = None
        if not (self.num_steps or loaded["num_steps"] or self._versions == _versions(self._weights)):
            # accelerate loads what it has just been given, over weights of a checkpoint: the next step refuses them, unless
            # the state of that checkpoint comes too
            return
        with torch.no_grad():
            self.numbers.copy_(loaded["numbers"])
        self.num_steps = loaded["num_steps"]
        self._rebuild()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: a model's files are those of an ordinary model; the numbers are in the optimiser's."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is expected."""

    # --- As a module ---

    def forward(self, x: Any) -> Any:
        """Nothing: so that a `Sequential` that has it as its last module runs."""
        return x

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise BindingError(
            "a prepared model cannot be copied or pickled, since its hooks would not be; copy it after fk.release(model), or "
            "apply fk.ledger_of(model) to another copy of the base model"
        )

    def __reduce__(self) -> NoReturn:
        self.__deepcopy__(None)

    # --- What comes out ---

    def ledger(self) -> Ledger:
        """See `ledger_of`."""
        if (name := self._bound.replaced()) is not None:
            raise LedgerError(f"{name} is another parameter than the one that was prepared, so no ledger gives this model")
        if self._moved_by_another():
            raise LedgerError(MOVED)
        if self._frozen_versions != _versions(self._frozen):
            raise LedgerError(
                "a tensor that is not tuned was changed since the model was prepared; no ledger over its base gives this model"
            )
        changed = self._bound.moved_from(self.page.coefficients())
        if changed is not None:
            raise LedgerError(
                f"{changed} is not what the numbers give: something else has changed the model since step {self.num_steps}; "
                "load the optimizer's state_dict of the moment that is meant (Trainer: optimizer.pt of the checkpoint)"
            )
        ledger = Ledger.of_pages(self._bound.identity(), self.num_steps, [self.page], self._wire, None)
        return replace(ledger, base_model=getattr(self._bound.model, "name_or_path", None) or None)

    def detach(self) -> None:
        """Remove all hooks; a further step of the optimiser is refused."""
        for handle in self._handles:
            handle.remove()
        for x in self._weights:
            delattr(x, TUNED)
        if (optimizer := self._optimizer()) is not None:
            optimizer.register_step_pre_hook(_refuse_released)


def _versions(parameters: Sequence[torch.Tensor]) -> list[int]:
    """How often each was changed in place."""
    return [x._version for x in parameters]


def _refuse_released(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    raise InvalidValueError("the model was released; call fk.prepare for a new optimizer")


def prepare(
    model: torch.nn.Module,
    pool: SeedPool,
    lr: float,
    *,
    optimizer: Factory = ADAM,
    wire: str = "float16",
    movement: Movement = "absolute",
    base: str | Path | None = None,
    backend: str = "auto",
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Have a model tuned in K numbers by an ordinary training loop.

        model, optimizer = fk.prepare(model, fk.SeedPool(key=0, size=4096), lr=1e-3)

    The optimiser is one of torch over the K numbers, which are also a parameter of the model, so that `clip_grad_norm_`,
    learning-rate schedulers, GradScaler, accumulation, `accelerate` and Hugging Face trainers do what they do otherwise. After
    every step the weights are `cast(w0 + sum_k a_k z_k)` of the numbers as `wire` holds them: `ledger_of` gives these, and
    `fedkseed.apply` the same bits from them anywhere. The optimiser's `state_dict` has the numbers before that rounding.

    Args:
        model: a bare module with the base weights, on its device. The parameters that require a gradient are tuned. Buffers,
            such as the running means of a batch norm, are no part of a ledger.
        pool: the perturbations; all K cost what one costs where they are `hadamard`, and gaussian ones K times as much.
        lr: the rate, above 0. With the default optimiser on K = 2^n hadamard seeds a weight moves by about so much in a step
            (`proportional`: times the weight).
        optimizer: a class of torch's optimisers, or anything that makes one by `optimizer([numbers], lr=lr)`.
        wire: how the ledger holds a number: `float32`, `float16`, `int8`, `int4`, `int2` or `sign`.
        movement: `absolute`, or `proportional`: a weight moves by itself times the sum.
        base, backend: see `fedkseed.bind`.

    Returns:
        The same model, and the optimiser.

    Raises:
        InvalidValueError: an unknown wire or movement, no model, pool or rate, a weight that has a gradient already, or an
            optimiser that cannot be made, takes more than a gradient a step, or is over anything but the numbers it was given.
            The model is as it was then.
        BindingError: the model cannot be tuned, or it or a part of it is being tuned already, or it is not what `base` holds;
            see `fedkseed.bind`.
        BackendError: see `fedkseed.bind`.
    """
    if not isinstance(model, torch.nn.Module) or not isinstance(pool, SeedPool):
        raise InvalidValueError(
            f"prepare was given a {type(model).__name__} and a {type(pool).__name__}; expected a torch module and a fk.SeedPool"
        )
    if not isinstance(lr, Real) or not math.isfinite(lr) or lr <= 0:
        raise InvalidValueError(f"lr is {lr!r:.40}; expected a finite number above 0")
    if not isinstance(wire, str) or wire not in BITS:
        raise InvalidValueError(f"wire is {wire!r:.40}; expected one of {', '.join(BITS)}")
    bound = bind(model, pool, base, backend)
    if base is not None and (name := bound.moved_from(np.zeros(pool.size, np.float32))) is not None:
        raise BindingError(
            f"{name} is not what {base} holds; give the folder that this model was loaded from as base, or leave it out"
        )
    bound.open_page(pool, movement=movement)
    child = KNumbers(bound, wire)
    try:
        made = optimizer([child.numbers], lr=lr)
    except Exception as error:  # whatever somebody's optimiser raises
        raise InvalidValueError(
            f"optimizer {optimizer!r:.80} made none ({one_line(error, 120)}); expected a class such as "
            "torch.optim.AdamW, or functools.partial of one"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise InvalidValueError(
            f"optimizer gave a {type(made).__name__}; expected a class such as torch.optim.AdamW, or functools.partial of one"
        )
    if isinstance(made, UNFIT):
        raise InvalidValueError(
            f"optimizer is {type(made).__name__}, which needs more than a gradient a step; take torch.optim.AdamW or the like"
        )
    held = [x for group in made.param_groups for x in group["params"]]
    if len(held) != 1 or held[0] is not child.numbers:
        raise InvalidValueError(
            f"optimizer gave a {type(made).__name__} over {len(held)} tensors that are not the numbers it was given; expected "
            "a class such as torch.optim.AdamW, or functools.partial of one"
        )
    child.attach(made)
    model.add_module(NUMBERS, child)
    return model, made


def ledger_of(model: torch.nn.Module) -> Ledger:
    """The ledger of a prepared model, in its published form: what `fedkseed.apply` makes the same model of, to the bit.

    Raises:
        InvalidValueError: the model was not prepared, or several parts of it were.
        LedgerError: its weights are not those of its last step, since something else has changed them.
    """
    return _child(model).ledger()


def release(model: torch.nn.Module) -> Ledger:
    """End the tuning of a prepared model: it keeps its weights and is an ordinary model again; see `ledger_of`."""
    child = _child(model)
    ledger = child.ledger()
    child.detach()
    del child._bound.model._modules[NUMBERS]
    return ledger


def _child(model: torch.nn.Module) -> KNumbers:
    if not isinstance(model, torch.nn.Module):
        raise InvalidValueError(f"model is {model!r:.80}; expected the module that fk.prepare gave")
    found = {name: module for name, module in model.named_modules() if isinstance(module, KNumbers)}
    if not found:
        raise InvalidValueError(f"this {type(model).__name__} is not being tuned; call fk.prepare first")
    if len(found) > 1:
        parts = ", ".join(name.removesuffix(f".{NUMBERS}") for name in found)
        raise InvalidValueError(f"{len(found)} parts of this {type(model).__name__} are being tuned; call it on each: {parts}")
    return next(iter(found.values()))
