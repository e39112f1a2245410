"""A torch model seen as base weights plus coefficients: `w = cast(w0 + sum_k a_k z_k)` (docs/noise.md)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.hooks import RemovableHandle

from fedkseed.errors import BindingError, InvalidValueError
from fedkseed.models.base import Base, FileBase, MemoryBase
from fedkseed.models.closed_page import ClosedPage, Movement
from fedkseed.models.identity import BaseIdentity
from fedkseed.models.pages import ClosedPages
from fedkseed.models.parameters import (
    NUMBERS,
    TUNED,
    NamedParameter,
    check_module,
    fit_again,
    is_quantised,
    named_parameters,
    tensor_digest,
    value_digest,
    whole_digest,
)
from fedkseed.models.projection import FLOATS, Projection, check_gradient
from fedkseed.models.sweeps import KeptSweep, backends_for, between, from_base, in_place, scaled
from fedkseed.noise import Mixture, Sweep
from fedkseed.noise.pool import MAX_ELEMENTS, MAX_FLOAT32, SeedPool
from fedkseed.text import counted

LOG = logging.getLogger(__name__)
FOLDING = "_fedkseed_folding"
"""The attribute that marks a parameter whose gradients are being folded."""


class Binding:
    """A model whose tunable parameters are moved along the perturbations of a pool; made by `bind`.

    The parameters change in place. Memory beside the model, for d tunable parameters (measured in docs/memory.md):
    a copy of the base unless it is a file; for half-precision weights and gaussian noise also 4 d bytes from the
    first `move` on.

    A gaussian model is costly to rebuild, so the last rebuilt weights are kept where memory allows (d more numbers), and
    rebuilding with the same coefficients copies them.

    Attributes:
        model: the bound module.
        pool: the pool of perturbations; of the open page, if there are several.
        movement: how that page moves a weight.
    """

    def __init__(self, model: torch.nn.Module, pool: SeedPool, base: str | Path | None, backend: str) -> None:
        self.model = model
        self._entries = named_parameters(model)
        self._tunable = [entry for entry in self._entries if entry.parameter.requires_grad]
        check_tunable(self._tunable)
        check_apart(self._entries)
        self._backends = backends_for(self._tunable, backend)
        self._kinds = [(entry.parameter.dtype, entry.parameter.device) for entry in self._tunable]
        self._base: Base = MemoryBase.copy(self._tunable) if base is None else FileBase(base, self._tunable)
        self._pages = ClosedPages(self._backends, self._tunable, self._base)
        self._open(pool, "absolute")

    def _open(self, pool: SeedPool, movement: Movement) -> None:
        """See the weights as what the closed pages give plus, or times one plus, a sum over a pool."""
        self.pool, self.movement = pool, movement
        parameters = {entry.name: entry.parameter for entry in self._tunable}
        follows = movement == "absolute"  # a product cannot be moved in place
        self._full = {name: x for name, x in parameters.items() if follows and x.dtype == torch.float32}
        self._half = {name: x for name, x in parameters.items() if name not in self._full}
        self._from_base = partial(from_base if follows else scaled, self._backends, self._pages.start)
        self._rebuild_all = KeptSweep(parameters, self._from_base)
        self._rebuild_half = KeptSweep(self._half, self._from_base)
        self._add_full = KeptSweep(self._full, partial(in_place, self._backends))
        self._coefficients = np.zeros(pool.size, np.float64)  # where half-precision weights are
        self._centre: _Centre | None = None
        self._rebuilt: tuple[bytes, dict[str, torch.Tensor]] | None = None

    def open_page(self, pool: SeedPool, closed: Sequence[ClosedPage] = (), movement: Movement = "absolute") -> None:
        """See the weights as the base, closed pages on it, and an open page, which `rebuild` and `move` are then about.

        Where more pages are closed it is gone on from what is there, to the bits of one that starts from the base
        (docs/noise.md, "Pages"). What it costs in memory: `fedkseed.models.pages.ClosedPages`. The weights themselves are left
        as they are until the next `rebuild`.

        Args:
            pool: the open page's perturbations.
            closed: the pages before it, in their order.
            movement: how the open page moves a weight: `absolute`, by the sum; `proportional`, by the base's weight times it.

        Raises:
            InvalidValueError: coefficients that `rebuild` would not take, an unknown movement, or one in proportion of a tensor
                that is all zeros; nothing has changed then.
            BindingError: see `rebuild`.
        """
        self._check_memory()
        for moved in (movement, *(page.movement for page in closed)):
            if moved not in get_args(Movement):
                raise InvalidValueError(f"movement is {moved!r:.40}; expected {' or '.join(get_args(Movement))}")
        for page in closed:
            page.pool.check_coefficients(page.coefficients)
        if movement == "proportional" != self.movement:
            self._check_proportional()
        if self._pages.close(closed, pool, movement) or (pool, movement) != (self.pool, self.movement):
            self._open(pool, movement)  # else the sweeps that are made ready serve the next client too

    def _check_proportional(self) -> None:
        """Refuse a matrix of zeros, such as a fresh adapter's: in proportion it would never move, and nobody be told."""
        for entry in self._tunable:
            parts = (part.values for batch in self._base.batches([entry.name]) for part in batch)
            if entry.parameter.dim() > 1 and not any(bool(x[:1024].any() or x.any()) for x in parts):
                raise InvalidValueError(
                    f"movement is 'proportional' and {entry.name} is all zeros, which no proportion moves; take 'absolute', or "
                    "freeze it"
                )

    def _check_memory(self) -> None:
        """Refuse parameters whose memory was replaced by some that would be moved otherwise, or not at all."""
        for entry, (dtype, device) in zip(self._tunable, self._kinds, strict=True):
            x = entry.parameter
            if x.dtype != dtype or x.device != device or not x.is_contiguous():
                layout = "" if x.is_contiguous() else ", not contiguous"
                raise BindingError(
                    f"{entry.name} is {x.dtype} on {x.device}{layout}, and was {dtype} on {device} when the model was bound; "
                    "put it back, or bind the model anew"
                )

    @property
    def num_pages(self) -> int:
        """How many pages the weights are the base and: the closed ones, and the open one."""
        return 1 + self._pages.number

    def __repr__(self) -> str:
        d, size = sum(entry.parameter.numel() for entry in self._tunable), self.pool.size
        return f"<Binding of {type(self.model).__name__}: {d:,} tunable parameters, K = {size:,} {self.pool.family} seeds>"

    def rebuild(self, coefficients: ArrayLike) -> None:
        """Set the weights to `cast(w0 + sum_k a_k z_k)`, wherever they were.

        Args:
            coefficients: a, K finite numbers that float32 holds: an array, a list or a tensor.

        Raises:
            InvalidValueError: another length, or a number that is not finite or beyond float32; nothing has changed then.
            BindingError: the model has another type, layout or device by now, in which it cannot be moved.
        """
        self._check_memory()
        coefficients = self.pool.check_coefficients(coefficients)
        mixture = self.pool.mixture_of(coefficients)
        self._centre = None
        self._coefficients = coefficients.astype(np.float64)
        if self._rebuilt is not None and self._rebuilt[0] == coefficients.tobytes():
            for entry in self._tunable:
                entry.parameter.detach().copy_(self._rebuilt[1][entry.name])
            return
        self._rebuilt = None
        self._rebuild_all(*self._pages.mixtures, mixture)
        if self.pool.facts.pass_per_seed and fit_again(self._tunable):
            self._rebuilt = coefficients.tobytes(), {e.name: e.parameter.detach().clone() for e in self._tunable}

    def move(self, indices: Sequence[int] | NDArray[np.integer], amounts: Sequence[float] | NDArray[np.floating]) -> None:
        """Move the weights by `sum_i amounts[i] z_indices[i]` in one pass, with docs/noise.md's rule for each precision.

        float32 weights take the sum in place. Half-precision weights are computed anew from the base (hadamard), so
        that moves which cancel leave what `rebuild` gives, or follow a float32 copy that moves in place (gaussian).

        Args:
            indices: seeds, integers in [0, K), repeats allowed.
            amounts: as many finite numbers.

        Raises:
            InvalidValueError: an index or amount outside its range; nothing has changed then.
            BindingError: see `rebuild`.
        """
        self._check_memory()
        at, delta = self.pool.check_amounts(indices, amounts)
        moved = self._coefficients.copy()
        moved[at] += delta
        far = np.flatnonzero(np.abs(moved) > MAX_FLOAT32)
        if far.size:
            raise InvalidValueError(f"coefficient {far[0]} would be {moved[far[0]]}; it must be finite in float32")
        if self._full:
            self._add_full(self.pool.mixture(at, delta))
        if self._half and (self.pool.facts.moves_exactly or self.movement == "proportional"):
            self._rebuild_half(*self._pages.mixtures, self.pool.mixture_of(moved.astype(np.float32)))
        elif self._half:
            self._follow_centre(self.pool.mixture(at, delta))
        self._coefficients = moved

    def perturb(self, index: int, amount: float) -> None:
        """Move the weights by `amount * z_index`; see `move`."""
        self.move([index], [amount])

    def project(
        self, gradients: Mapping[str, torch.Tensor], indices: Sequence[int] | NDArray[np.integer] | None = None
    ) -> NDArray[np.float64]:
        """`u = Z'g`, the adjoint of a move: `u_k` is the gradient's product with z_k (docs/noise.md, "The adjoint").

        Args:
            gradients: gradients of tunable parameters by their canonical names, float32, float16 or bfloat16; one that is
                missing counts as zeros.
            indices: of which seeds, integers in [0, K); None for all. A gaussian seed costs a pass over the gradients.

        Returns:
            float64[K], or as many as indices, in their order. They are not finite where a gradient is not.

        Raises:
            InvalidValueError: a name that is no tunable parameter's, a gradient of another shape or type, or an index
                outside its range.
        """
        tunable = {entry.name: entry.parameter for entry in self._tunable}
        for name, gradient in gradients.items():
            if name not in tunable:
                raise InvalidValueError(f"there is no gradient of {name!r} to project: {self._why_not(name)}")
            check_gradient(name, gradient)
            if gradient.shape != tunable[name].shape:
                shapes = f"{tuple(gradient.shape)}; the parameter's is {tuple(tunable[name].shape)}"
                raise InvalidValueError(f"gradient of {name} has shape {shapes}")
        projection = Projection(self.pool, self._backends, indices)
        if self.movement == "absolute":
            projection.add_all(gradients)
        else:
            for name, gradient in gradients.items():
                self._fold(projection, name, gradient)
        return projection.numbers()

    def _fold(self, projection: Projection, name: str, gradient: torch.Tensor) -> None:
        """Add a tensor's gradient; of weights that move in proportion, times the base's weights."""
        if self.movement == "absolute":
            projection.add(name, gradient)
            return
        for stretch in (stretch for batch in self._pages.start.batches([name]) for stretch in batch):
            part = gradient.reshape(-1)[stretch.start : stretch.start + stretch.values.numel()]
            projection.add(name, part.float() * stretch.values.to(part.device, torch.float32), stretch.start)

    @contextmanager
    def folding(self, indices: Sequence[int] | NDArray[np.integer] | None = None) -> Iterator[Projection]:
        """Fold every tunable parameter's gradient as soon as backward has made it, and free it::

            with bound.folding() as fold:
                loss.backward()
            u = fold.numbers()

        So there is one gradient in memory at a time. Every backward pass inside counts; its gradients are added up in
        float64. Parameters have no `grad` afterwards. Frozen ones are none of its business. Inside, each further name of a
        tied parameter is a parameter of its own (`model.parameters()` has them all): a loss of the forward pass is the same, a
        penalty on parameters would count them twice.

        Args:
            indices: see `project`.

        Raises:
            InvalidValueError: a tunable parameter has a gradient already, or requires none any more, or its gradients are being
                folded already; or see `project`.
        """
        self._check_gradients()
        projection = Projection(self.pool, self._backends, indices)
        with self._untied() as leaves:
            hooks = self._hook(leaves, lambda: projection)
            for entry in self._tunable:
                setattr(entry.parameter, FOLDING, True)
            try:
                yield projection
            finally:
                for hook in hooks:
                    hook.remove()
                for entry in self._tunable:
                    delattr(entry.parameter, FOLDING)

    def fold_into(self, projection: Callable[[], Projection]) -> list[RemovableHandle]:
        """Fold the gradients of every backward pass from now on; see `folding`, and `projection` for what to fold into.

        Tied parameters stay tied, so autograd adds up a tied one's gradients before they are folded.

        Args:
            projection: asked once for each gradient, in a thread of autograd's.

        Returns:
            What ends it: `remove()` each.

        Raises:
            InvalidValueError: see `folding`.
        """
        self._check_gradients()
        return self._hook([(entry.name, entry.parameter) for entry in self._tunable], projection)

    def projection(self) -> Projection:
        """What gradients are folded into, along all seeds of the open page; nothing so far."""
        return Projection(self.pool, self._backends)

    def _check_gradients(self) -> None:
        for entry in self._tunable:
            if entry.parameter.grad is not None:
                raise InvalidValueError(f"{entry.name} has a gradient already; call model.zero_grad() before folding")
            if not entry.parameter.requires_grad:
                raise InvalidValueError(f"{entry.name} requires no gradient any more; call requires_grad_(True) before folding")
            if hasattr(entry.parameter, FOLDING) or hasattr(entry.parameter, TUNED):  # whose fold would take them all
                raise InvalidValueError(
                    f"gradients of {entry.name} are being folded already; leave that `with`, or call fk.release(model), first"
                )

    def _hook(self, leaves: list[tuple[str, Any]], projection: Callable[[], Projection]) -> list[RemovableHandle]:
        def fold(name: str, parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self._fold(projection(), name, gradient)

        return [leaf.register_post_accumulate_grad_hook(partial(fold, name)) for name, leaf in leaves]

    @contextmanager
    def _untied(self) -> Iterator[list[tuple[str, Any]]]:
        """Every tunable parameter, by canonical name; inside, each further name of a tied one is a leaf of its own.

        The leaves share the memory. Autograd would keep the gradient of a tied parameter's first use until the last one's is
        there, and add them up: for an embedding that is also the head, three gradients of that size. Leaves are folded one by
        one, and the fold adds them up.
        """
        leaves: list[tuple[str, Any]] = [(entry.name, entry.parameter) for entry in self._tunable]
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for entry in self._tunable:
                for alias in entry.aliases:
                    if alias == entry.name:
                        continue
                    path, _, name = alias.rpartition(".")
                    owner: dict[str, Any] = self.model.get_submodule(path)._parameters
                    replaced.append((owner, name, owner[name]))
                    owner[name] = torch.nn.Parameter(entry.parameter.detach())
                    leaves.append((entry.name, owner[name]))
            yield leaves
        finally:
            for owner, name, parameter in reversed(replaced):  # a module with several names is in it several times
                owner[name] = parameter

    def moved_from(self, coefficients: ArrayLike) -> str | None:
        """The name of the first tunable parameter that is not what `rebuild` would make it, or None; nothing is changed."""
        mixture = self.pool.mixture_of(coefficients)
        for entry in self._tunable:
            there = torch.empty_like(entry.parameter, requires_grad=False, memory_format=torch.contiguous_format)
            self._from_base({entry.name: there})(*self._pages.mixtures, mixture)
            now = entry.parameter.detach()
            if not (torch.equal(there, now) or torch.allclose(there, now, rtol=0, atol=0, equal_nan=True)):
                return entry.name
        return None

    def replaced(self) -> str | None:
        """The first name under which the model has another parameter than it had when it was bound; None if there is none."""
        now = {
            name: id(x) for name, x in self.model.named_parameters(remove_duplicate=False) if not name.startswith(f"{NUMBERS}.")
        }
        bound = {alias: id(entry.parameter) for entry in self._entries for alias in entry.aliases}
        return min((name for name in now.keys() | bound.keys() if now.get(name) != bound.get(name)), default=None)

    def digest(self) -> str:
        """SHA-256 (hex) of the model's current parameters, tunable or not: names, shapes, dtypes and bytes."""
        digest = hashlib.sha256()
        for entry in self._entries:
            digest.update(whole_digest(entry.name, entry.parameter, tensor_digest))
        return digest.hexdigest()

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, tuned or not, sorted."""
        return [entry.name for entry in self._entries]

    def identity(self) -> BaseIdentity:
        """Which base model this is: a fingerprint of all parameters' base values, and which of them are tuned."""
        tunable = {entry.name for entry in self._tunable}
        digests = {}
        for entry in self._entries:
            if entry.name in tunable:
                x = entry.parameter
                digests[entry.name] = value_digest(entry.name, x.shape, x.dtype, self._base_values(entry.name))
            else:
                digests[entry.name] = whole_digest(entry.name, entry.parameter)
        return BaseIdentity.of(digests, [name for name in digests if name not in tunable])

    def says_of_quantised(self) -> str | None:
        """A line on what of a quantised base is tuned and what is not; None of any other base."""
        left = [entry for entry in self._entries if is_quantised(entry.parameter)]
        if not left:
            return None
        return (
            f"left as they are: {counted(len(left), 'quantised tensor')}, such as {left[0].name} "
            f"({_kind_of(left[0].parameter)}); tuned: {counted(len(self._tunable), 'other')}, such as {self._tunable[0].name}"
        )

    def _why_not(self, name: str) -> str:
        """Why a parameter of that name has no gradient to project."""
        for entry in self._entries:
            if name == entry.name:
                return "it is frozen"
            if name in entry.aliases:
                return f"it is tied, under the name {entry.name!r}"
        return "no parameter has that name"

    def _base_values(self, name: str) -> Iterator[torch.Tensor]:
        for batch in self._base.batches([name]):
            yield from (stretch.values for stretch in batch)

    def _follow_centre(self, mixture: Mixture) -> None:
        if self._centre is None:
            values = {name: torch.empty_like(x, dtype=torch.float32) for name, x in self._half.items()}
            mixture_now = self.pool.mixture_of(self._coefficients.astype(np.float32))
            self._from_base(values)(*self._pages.mixtures, mixture_now)
            self._centre = _Centre(
                in_place(self._backends, values), KeptSweep(self._half, partial(between, self._backends, values))
            )
        self._centre.move(mixture)
        self._centre.cast(self.pool.mixture([], []))


@dataclass(frozen=True)
class _Centre:
    """The float32 copy that half-precision weights follow under gaussian noise: what moves it, and what casts it to them."""

    move: Sweep
    cast: Sweep


def bind(model: torch.nn.Module, pool: SeedPool, base: str | Path | None = None, backend: str = "auto") -> Binding:
    """See the tunable parameters of a model (those that require a gradient) as base weights plus coefficients.

    The weights are left as they are; they count as the base weights `w0` unless `base` is given.

    Args:
        model: a bare module (not compiled, not wrapped for data parallelism) with dense parameters in memory, on the CPU,
            on a CUDA GPU or spread over several devices.
        pool: the pool of perturbations.
        base: a safetensors file (or a folder with `model.safetensors` or its index) that holds `w0`; it is read again
            through a memory map at each rebuild. None keeps a copy of the weights on their devices.
        backend: `auto` (for each parameter the fastest of its device), or the name of a noise backend.

    Raises:
        BindingError: the model is wrapped; a parameter has no values yet, is on the meta device, sparse, not contiguous, of
            another type than float32, float16 or bfloat16, or shares memory with another; the base file does not fit the model.
        BackendError: no backend works on the parameters' device, or the named one cannot run here.
    """
    check_module(model)
    if not isinstance(pool, SeedPool):
        raise BindingError(f"pool is a {type(pool).__name__}; expected a fedkseed.SeedPool")
    bound = Binding(model, pool, base, backend)
    if told := bound.says_of_quantised():
        LOG.warning(told)
    return bound


def check_tunable(entries: Sequence[NamedParameter]) -> None:
    """Refuse parameters that perturbations cannot be applied to; see `bind`."""
    if not entries:
        raise BindingError("no parameter requires a gradient; call model.requires_grad_(True) on what is to be tuned")
    for entry in entries:
        name, x = entry.name, entry.parameter
        if is_quantised(x):
            raise BindingError(f"{name} is quantised ({_kind_of(x)}); only the float tensors beside it can be tuned: freeze it")
        if x.dtype not in FLOATS:
            raise BindingError(
                f"{name} is {x.dtype}; tunable parameters are float32, float16 or bfloat16: convert or freeze it"
            )
        if not x.is_contiguous():
            raise BindingError(f"{name} is not contiguous in memory; set its data to data.contiguous() before binding")
        if x.numel() > MAX_ELEMENTS:
            raise BindingError(f"{name} has {x.numel()} elements; at most {MAX_ELEMENTS} have a noise")


def _kind_of(x: torch.Tensor) -> str:
    """What a quantised tensor is called."""
    return str(x.dtype).removeprefix("torch.") if not x.is_floating_point() else type(x).__name__


def check_apart(entries: Sequence[NamedParameter]) -> None:
    """Refuse two parameters, one of them tunable, in the same memory: moving one would move the other."""
    plain = [(e.parameter, e.name) for e in entries if not is_quantised(e.parameter)]
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for x, name in plain)
    tunable = {entry.name for entry in entries if entry.parameter.requires_grad}
    reach, owner = 0, ""
    for begin, end, name in spans:
        if begin < reach and {name, owner} & tunable:
            raise BindingError(f"{owner} and {name} share memory but are two parameters; tie them as one nn.Parameter")
        if end > reach:
            reach, owner = end, name
