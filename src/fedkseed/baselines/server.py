"""The server of a baseline: sends the averaged tensors, averages what comes back, weighted like FedKSeed's scalars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.baselines.checkpoint import TunedTensors
from fedkseed.baselines.messages import TensorReply, TensorRequest, pack_tensors, size_cap, tensors_digest, unpack_tensors
from fedkseed.baselines.parameters import Tensors, check_tensors
from fedkseed.errors import ProtocolError, RunError
from fedkseed.federation import FederationConfig, Rounds
from fedkseed.randomness import derive


def _flat(tensors: Tensors) -> NDArray[np.float64]:
    """All numbers in the order of the tensors' names, float64."""
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)]).numpy()


class TensorServer(Rounds[TensorRequest, TensorReply]):
    """One federation of a baseline.

    Args:
        config: the settings.
        checkpoint: where to go on from.
        clients, guess_loss, num_examples: see `Rounds`.

    Raises:
        RunError: the checkpoint is of another algorithm, or see `Rounds`.
    """

    def __init__(
        self,
        config: FederationConfig,
        checkpoint: TunedTensors,
        clients: Sequence[str] | None,
        guess_loss: float | None = None,
        num_examples: Mapping[str, int] | None = None,
    ) -> None:
        if checkpoint.algorithm != config.algorithm:
            raise RunError(
                f"the tensors are of {checkpoint.algorithm}, the settings say {config.algorithm}; "
                "go on with the settings that the run was started with"
            )
        self._checkpoint = checkpoint
        self._shapes = {name: x.shape for name, x in checkpoint.tensors.items()}
        run_id = derive(config.seed, "run", config.algorithm, checkpoint.base).to_bytes(8, "little")
        super().__init__(config, run_id, clients, guess_loss, num_examples)

    @property
    def checkpoint(self) -> TunedTensors:
        """The averaged tensors after the last closed round."""
        return self._checkpoint

    def _requests(self, server_round: int, attempt: int, cohort: Sequence[str], lr: float) -> dict[str, TensorRequest]:
        packed = pack_tensors(self._checkpoint.tensors)
        return {
            client: TensorRequest(
                run_id=self.run_id,
                server_round=server_round,
                attempt=attempt,
                client=client,
                base=bytes.fromhex(self._checkpoint.base),
                digest=tensors_digest(packed),
                lr=lr,
                batch_size=self.config.batch_size,
                algorithm=self.config.algorithm,
                steps=self.steps[client],
                tensors=packed,
            )
            for client in cohort
        }

    def _decode(self, data: bytes) -> TensorReply:
        return TensorReply.decode(data, size_cap(self._shapes))

    def _check(self, request: TensorRequest, reply: TensorReply) -> None:
        tensors = unpack_tensors(reply.tensors)
        check_tensors(tensors, self._shapes)
        for name, x in tensors.items():
            largest = x.abs().max().item() if x.numel() else 0.0
            if largest > self.config.max_value:
                raise ProtocolError(f"{name} holds {largest:g}; at most {self.config.max_value:g} is accepted")
        if reply.dropped > request.steps:
            raise ProtocolError(f"{reply.dropped} steps were dropped of {request.steps}; expected no more")

    def _close(self, replies: Mapping[str, TensorReply], weights: Mapping[str, float]) -> Mapping[str, Mapping[str, float]]:
        """x <- sum_i p_i x_i, in float64 and in the order of the clients' names."""
        before = self._checkpoint
        if self.mechanism is None:
            total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self._shapes.items()}
            for client, reply in replies.items():
                for name, x in unpack_tensors(reply.tensors).items():
                    total[name] += weights[client] * x.double()
            tensors = {name: x.float() for name, x in total.items()}
        else:
            here = _flat(before.tensors)
            changes = (_flat(unpack_tensors(reply.tensors)) - here for reply in replies.values())
            there = torch.from_numpy(here + self._released(changes, len(here))).float()
            names = sorted(self._shapes)
            parts = torch.split(there, [self._shapes[name].numel() for name in names])
            tensors = {name: part.reshape(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        self._checkpoint = TunedTensors(before.algorithm, before.base, before.round + 1, tensors)
        return {}
