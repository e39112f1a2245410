"""Sweeps over a model's tensors: from base values or in place, on whatever devices they lie, made ready once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fedkseed.errors import BackendError
from fedkseed.models.base import Base, MemoryBase, Stretch
from fedkseed.models.parameters import NamedParameter
from fedkseed.noise import Backend, Mixture, Slot, Sweep, get_backend, tensor_id

Tensors = Mapping[str, torch.Tensor]
"""Whole tensors by their canonical names."""
Backends = Mapping[str, Backend]
"""The backend for each type of device that parameters are on."""


def backends_for(entries: Sequence[NamedParameter], name: str) -> Backends:
    """Which backend sweeps which parameters.

    Args:
        entries: the tunable parameters.
        name: `auto`, or the name of a noise backend, which must then work on all of them.

    Raises:
        InvalidValueError: there is no backend of that name.
        BackendError: it cannot run here, or a parameter is on a device that it, or any, does not work on.
    """
    found: dict[str, Backend] = {}
    for entry in entries:
        device = entry.parameter.device
        if device.type not in found:
            found[device.type] = get_backend(name, device.type)
        if found[device.type].device != device.type:
            raise BackendError(
                f"{entry.name} is on {device}, where backend {name!r} does not work; "
                f"move the model to {found[device.type].device!r}, or choose backend 'auto'"
            )
    return found


def in_place(backends: Backends, tensors: Tensors) -> Sweep:
    """`x <- cast(widen(x) + sum_k a_k z_k)`; of several mixtures, added one after the other in binary32, in one pass."""
    return between(backends, tensors, tensors)


def between(backends: Backends, sources: Tensors, outputs: Tensors) -> Sweep:
    """`output <- cast(widen(source) + sum_k a_k z_k)`, between tensors of the same names."""
    return _prepare(
        backends,
        [Slot(x.detach().view(-1), sources[name].detach().reshape(-1), tensor_id(name)) for name, x in outputs.items()],
    )


def from_base(backends: Backends, base: Base, outputs: Tensors) -> Sweep:
    """`output <- cast(w0 + sum_k a_k z_k)`. A base in a file is read, and given back, batch by batch in each sweep."""

    def slot(stretch: Stretch) -> Slot:
        out = outputs[stretch.name].detach().view(-1)[stretch.start : stretch.start + stretch.values.numel()]
        return Slot(out, stretch.values.to(out.device), tensor_id(stretch.name), stretch.start)

    def sweep(*mixtures: Mixture) -> None:
        for batch in base.batches(list(outputs)):
            _prepare(backends, list(map(slot, batch)))(*mixtures)

    if isinstance(base, MemoryBase):
        return _prepare(backends, [slot(stretch) for batch in base.batches(list(outputs)) for stretch in batch])
    return sweep


def scaled(backends: Backends, base: Base, outputs: Tensors) -> Sweep:
    """`output <- cast(w0 * (1 + sum_k a_k z_k))`: one addition and one multiplication, each rounded once to binary32.

    The sum goes through a scratch tensor, so that every backend can do it (docs/noise.md, "Scales").
    """

    def sweep(*mixtures: Mixture) -> None:
        (mixture,) = mixtures  # each page in proportion needs the weights that the one before it has led to
        for batch in base.batches(list(outputs)):
            for stretch in batch:
                out = outputs[stretch.name].detach().view(-1)[stretch.start : stretch.start + stretch.values.numel()]
                factor = torch.empty(out.shape, dtype=torch.float32, device=out.device)
                _prepare(backends, [Slot(factor, None, tensor_id(stretch.name), stretch.start)])(mixture)
                out.copy_(factor.add_(1).mul_(stretch.values.to(out.device, torch.float32)))

    return sweep


def _prepare(backends: Backends, slots: Sequence[Slot]) -> Sweep:
    each = [backend.prepare([s for s in slots if s.out.device.type == device]) for device, backend in backends.items()]

    def sweep(*mixtures: Mixture) -> None:
        for one in each:
            one(*mixtures)

    return sweep


class KeptSweep:
    """A sweep that writes to parameters, made when it is first needed and again where their memory has been replaced.

    Args:
        parameters: what it writes to; `parameter.data = ...` replaces the memory.
        make: makes it, from the parameters as they are.
    """

    def __init__(self, parameters: Tensors, make: Callable[[Tensors], Sweep]) -> None:
        self._parameters, self._make = parameters, make
        self._made_for: list[int] | None = None

    def __call__(self, *mixtures: Mixture) -> None:
        """Do it."""
        addresses = [x.data_ptr() for x in self._parameters.values()]
        if addresses != self._made_for:
            self._sweep, self._made_for = self._make(self._parameters), addresses
        self._sweep(*mixtures)
