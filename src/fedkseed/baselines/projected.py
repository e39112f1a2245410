"""Ferret's coordinates (Shu et al., 2025): what local steps have changed, seen along seeded directions of each tensor.

A tensor of n numbers has K_l seeds of its own. Its change D is sent as `c = Z'D / K_l`, K_l numbers, and put together again as
`Z c`. Over pools that is D on average, since `E[z z'] = 1`, and off by about `sqrt(n / K_l) |D|`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedkseed.baselines.parameters import Parameters, Tensors, check_tensors
from fedkseed.errors import BindingError
from fedkseed.federation import FederationConfig
from fedkseed.models.base import MemoryBase
from fedkseed.models.parameters import named_parameters
from fedkseed.models.projection import Projection
from fedkseed.models.sweeps import backends_for, from_base
from fedkseed.noise.pool import SeedPool
from fedkseed.randomness import derive

COORDINATES = "coordinates"
"""The one tensor that is sent: all tensors' coordinates in the order of their names."""


def parameters_of(model: torch.nn.Module, config: FederationConfig) -> Parameters:
    """The parameters of a model at its base weights as an algorithm sends them: as they are, or as coordinates.

    Raises:
        BindingError: see `Parameters` and `Projected`.
    """
    if config.facts.projects:
        return Projected(model, derive(config.seed, "pool"), config.num_seeds, config.noise)
    return Parameters(model)


class Projected(Parameters):
    """Parameters by the coordinates of their distance from where they are when this is made.

    Reading adds to the coordinates that were written last those of what has changed since then, so that the mean of several
    readings is the coordinates plus the mean change.

    Args:
        model: the model, at its base weights; 4 bytes a parameter are kept beside it.
        key: of the seeds.
        size: how many coordinates there are in all.
        family: the noise family.

    Raises:
        BindingError: there are fewer coordinates than tensors, or see `Parameters`.
    """

    def __init__(self, model: torch.nn.Module, key: int, size: int, family: str) -> None:
        super().__init__(model)
        counts = shares([parameter.numel() for parameter in self._parameters.values()], size)
        self._pools = {name: SeedPool(key, count, family) for name, count in zip(self._parameters, counts, strict=True)}
        self._backends = backends_for([entry for entry in named_parameters(model) if entry.parameter.requires_grad], "auto")
        self._base = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._coordinates = np.zeros(size, np.float32)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """That of the coordinates."""
        return {COORDINATES: torch.Size([len(self._coordinates)])}

    def read(self) -> dict[str, torch.Tensor]:
        """The coordinates of where the parameters are, float32[size]."""
        changes = []
        for (name, parameter), coordinates in zip(self._parameters.items(), self._split(), strict=True):
            projection = Projection(self._pools[name], self._backends)
            projection.add(name, parameter.detach() - self._rebuilt(name, coordinates))
            changes.append(projection.numbers() / len(coordinates))
        with np.errstate(over="ignore"):  # what is not finite is for the server to refuse
            return {COORDINATES: torch.from_numpy((self._coordinates + np.concatenate(changes)).astype(np.float32))}

    def write(self, tensors: Tensors) -> None:
        """Set the parameters to the base plus what the coordinates say.

        Raises:
            ProtocolError: see `Parameters.write`.
        """
        check_tensors(tensors, self.shapes)
        self._coordinates = tensors[COORDINATES].numpy().copy()
        for (name, parameter), coordinates in zip(self._parameters.items(), self._split(), strict=True):
            parameter.detach().copy_(self._rebuilt(name, coordinates))

    def _split(self) -> list[np.ndarray]:
        ends = np.cumsum([pool.size for pool in self._pools.values()])
        return np.split(self._coordinates, ends[:-1])

    def _rebuilt(self, name: str, coordinates: np.ndarray) -> torch.Tensor:
        """Base plus `sum_k c_k z_k`, of one tensor."""
        out = torch.empty_like(self._base[name])
        sweep = from_base(self._backends, MemoryBase({name: self._base[name]}), {name: out})
        sweep(self._pools[name].mixture_of(coordinates))
        return out


def shares(sizes: Sequence[int], total: int) -> list[int]:
    """How many coordinates each tensor has: in proportion to the root of its size, at least one.

    The square of the error is `sum_l n_l |D_l|^2 / K_l`, least where K_l goes as `sqrt(n_l) |D_l|`. The published code takes
    |D_l|, for each client anew. Shares by the sizes alone are the same for all clients, so that their coordinates can be
    added up, and measured no worse (docs/baselines.md).

    Raises:
        BindingError: there are more tensors than coordinates.
    """
    if total < len(sizes):
        raise BindingError(
            f"{total} coordinates are too few for {len(sizes)} tensors; raise --num-seeds to {len(sizes)} at least"
        )
    sums = np.cumsum([0.0, *(math.sqrt(max(1, size)) for size in sizes)])
    return [1 + int(count) for count in np.diff(np.rint(sums / sums[-1] * (total - len(sizes))))]
