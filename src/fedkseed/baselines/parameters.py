"""The parameters that a baseline tunes, as float32 tensors on the CPU by name: what is sent, averaged and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from fedkseed.errors import BindingError, ProtocolError
from fedkseed.models.identity import BaseIdentity
from fedkseed.models.parameters import named_parameters, value_digests

Tensors = Mapping[str, torch.Tensor]


class Parameters:
    """The parameters of a model that require a gradient, by canonical name.

    Raises:
        BindingError: there are none, or one is not float32.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        entries = [entry for entry in named_parameters(model) if entry.parameter.requires_grad]
        self._parameters = {entry.name: entry.parameter for entry in entries}
        if not entries:
            raise BindingError("no parameter requires a gradient; there is nothing to tune")
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                raise BindingError(
                    f"{name} is {parameter.dtype}; baselines train in float32: load the model with --dtype float32"
                )

    def __iter__(self) -> Iterator[torch.nn.Parameter]:
        return iter(self._parameters.values())

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each, by name."""
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    def read(self) -> dict[str, torch.Tensor]:
        """Copies of them."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}

    def write(self, tensors: Tensors) -> None:
        """Set them.

        Raises:
            ProtocolError: other names, shapes or dtypes, or values that are not finite; nothing has changed then.
        """
        check_tensors(tensors, self.shapes)
        for name, parameter in self._parameters.items():
            parameter.detach().copy_(tensors[name])


def fingerprint(model: torch.nn.Module) -> str:
    """Which base model this is, hex; see `BaseIdentity`."""
    return BaseIdentity.of(value_digests(named_parameters(model))).fingerprint


def check_tensors(tensors: Tensors, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse tensors that are not finite float32 ones of exactly these names and shapes.

    Raises:
        ProtocolError: the message names the first that is not.
    """
    odd = sorted(tensors.keys() ^ shapes.keys())
    if odd:
        raise ProtocolError(f"tensor {odd[0]!r:.80} {'came unasked' if odd[0] in tensors else 'is missing'}")
    for name, shape in shapes.items():
        x = tensors[name]
        if x.dtype != torch.float32 or x.shape != shape:
            raise ProtocolError(f"{name} is {x.dtype}{list(x.shape)}; expected float32{list(shape)}")
        if not torch.isfinite(x).all():
            raise ProtocolError(f"{name} holds a number that is not finite; all must be")
