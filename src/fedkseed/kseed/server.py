"""The server of FedKSeed and FedKSeed-Pro: which seeds each client steps along, and one sum of scalars for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import LedgerError, ProtocolError
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.envelope import Reply
from fedkseed.federation.rounds import CLIPPED_SCALARS, COUNTED, PROJECTED_GRAD_RMS, Rounds
from fedkseed.kseed.distance import pulled_back
from fedkseed.kseed.importance import seed_probabilities
from fedkseed.kseed.ledger import History, Ledger
from fedkseed.kseed.messages import TrainReply, TrainRequest, coefficients_digest
from fedkseed.kseed.optimizer import SGD
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.scale import followed, largest
from fedkseed.kseed.steps import GRAD_EXPONENT, largest_grad
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
from fedkseed.randomness import derive, generator

F64 = NDArray[np.float64]


def seed_pool(config: FederationConfig) -> SeedPool:
    """The pool of a run: its key is drawn from the run's seed."""
    return SeedPool(derive(config.seed, "pool"), config.num_seeds, config.noise)


def start(config: FederationConfig, base: BaseIdentity) -> Ledger:
    """The ledger before the first round."""
    return Ledger.start(seed_pool(config), base, config.wire)


class Server(Rounds[TrainRequest, TrainReply]):
    """One federation: its settings, its clients and its ledger.

    Args:
        config: the settings.
        ledger: where to go on from; the identity of the base to start at it.
        clients, guess_loss, num_examples: see `Rounds`.

    Raises:
        LedgerError: the ledger is of another pool or precision than the settings, or is a published one.
        RunError: see `Rounds`.
    """

    def __init__(
        self,
        config: FederationConfig,
        ledger: Ledger | BaseIdentity,
        clients: Sequence[str] | None,
        guess_loss: float | None = None,
        num_examples: Mapping[str, int] | None = None,
    ) -> None:
        if isinstance(ledger, BaseIdentity):
            ledger = start(config, ledger)
        if ledger.history is None:
            raise LedgerError("a published ledger has no accumulators; go on from a run's own ledger.safetensors")
        if ledger.pool != seed_pool(config) or ledger.precision != config.wire:
            raise LedgerError(
                f"the ledger is of {ledger.pool} in {ledger.precision}, "
                f"the settings give {seed_pool(config)} in {config.wire}; "
                "go on with the settings that the run was started with"
            )
        self.ledger = ledger
        run_id = derive(config.seed, "run", f"{ledger.pool.key:016x}", ledger.base.fingerprint).to_bytes(8, "little")
        super().__init__(config, run_id, clients, guess_loss, num_examples)

    @property
    def checkpoint(self) -> Ledger:
        """The ledger."""
        return self.ledger

    def probabilities(self) -> NDArray[np.float64]:
        """How likely each seed is to be drawn for a step now, float64[K]."""
        return seed_probabilities(self.config, self._history.grad_sums, self._history.grad_counts)

    def _requests(self, server_round: int, attempt: int, cohort: Sequence[str], lr: float) -> dict[str, TrainRequest]:
        config = self.config
        likely = None if config.facts.draws == "uniform" else self.probabilities()
        coefficients, digest = pack(self._history.accumulators, config.wire), coefficients_digest(self.ledger.coefficients)
        return {
            client: TrainRequest(
                run_id=self.run_id,
                server_round=server_round,
                attempt=attempt,
                client=client,
                pool=self.ledger.pool,
                base=bytes.fromhex(self.ledger.base.fingerprint),
                coefficients=coefficients,
                digest=digest,
                indices=self._draw_seeds(server_round, attempt, client, likely),
                lr=lr,
                eps=config.eps,
                batch_size=config.batch_size,
                max_grad=self.config.max_grad,
                loss_clip=config.loss_clip,
                directions=config.directions,
                scaling=None if config.goal.smooth else config.scaling,
            )
            for client in cohort
        }

    def _decode(self, data: bytes) -> TrainReply:
        return TrainReply.decode(data)

    def _check(self, request: TrainRequest, reply: TrainReply) -> None:
        grads = reply.projected_grads.unpack()
        if len(grads) > len(request.indices):
            raise ProtocolError(f"{len(grads)} scalars came for {len(request.indices)} seeds; expected no more")
        steps, odd = divmod(len(grads), request.directions)
        if odd or (reply.dropped and reply.dropped[-1] >= steps):
            raise ProtocolError(
                f"{len(grads)} scalars came, the last dropped step is {reply.dropped[-1:]}; expected whole steps of "
                f"{request.directions} scalars"
            )
        if reply.projected_grads.precision != request.coefficients.precision:
            raise ProtocolError(f"scalars are {reply.projected_grads.precision}; expected {request.coefficients.precision}")
        largest, limit = float(np.abs(grads).max()), largest_grad(self.config)
        if largest > limit:
            raise ProtocolError(f"a projected gradient is {largest:g}; at most {limit:g} is accepted")
        if reply.projected_grads.exponent != GRAD_EXPONENT:
            raise ProtocolError(f"the scalars' exponent is {reply.projected_grads.exponent}; expected {GRAD_EXPONENT}")
        if np.any(grads[~kept_scalars(request, reply)] != 0):
            raise ProtocolError("a dropped step has a projected gradient; expected 0")

    def _sizes(self, request: TrainRequest, reply: TrainReply) -> dict[str, float]:
        dropped = np.flatnonzero(~kept_scalars(request, reply)).tolist()
        return scalars_size(reply.projected_grads.unpack(), dropped)

    @property
    def _history(self) -> History:
        assert self.ledger.history is not None  # checked in __init__, and every later ledger is an `advance`
        return self.ledger.history

    def _draw_seeds(self, server_round: int, attempt: int, client: str, likely: NDArray[np.float64] | None) -> tuple[int, ...]:
        """A client's own seeds; of shared ones as many as its steps need."""
        shared, each = self.config.same_seeds, self.config.directions
        draw = generator(self.config.seed, server_round, attempt, *(() if shared else (client,)), "seeds")
        count = max(self.steps.values()) if shared else self.steps[client]
        drawn = draw.choice(self.ledger.pool.size, count * each, p=likely)
        return tuple(drawn[: self.steps[client] * each].tolist())

    def _close(self, replies: Mapping[str, TrainReply], weights: Mapping[str, float]) -> Mapping[str, Mapping[str, float]]:
        """Make one vector of what the replies say of the K numbers, by the rule, and take the optimiser's step."""
        if self.mechanism is not None:
            self._close_hidden(replies)
            return {}
        history, rule = self._history, self.config.rule
        sent = {name: reply.projected_grads.unpack().astype(np.float64) for name, reply in replies.items()}
        grads, scales = self._bounded(sent)
        indices = {name: np.array(self._pending[name].indices[: len(values)]) for name, values in grads.items()}
        used = np.unique(np.concatenate([np.zeros(0, int), *indices.values()]))
        vectors = np.zeros((len(replies), len(used)))
        sums, counts = history.grad_sums.copy(), history.grad_counts.copy()
        for vector, (name, values) in zip(vectors, grads.items(), strict=True):
            np.add.at(vector, np.searchsorted(used, indices[name]), values)
            kept = kept_scalars(self._pending[name], replies[name])
            np.add.at(sums, indices[name][kept], np.minimum(np.abs(values[kept]), self.config.importance_clip))
            np.add.at(counts, indices[name][kept], 1)
        total, counted = np.zeros(self.ledger.pool.size), np.zeros(0)
        if replies:
            total[used], counted = rule.combine(vectors, np.array([weights[name] for name in replies]))
        self._step(total, sums, counts, scales)
        if not rule.needs_each_reply:
            return {}
        return {
            name: {CLIPPED_SCALARS: int(np.sum(sent[name] != grads[name])), COUNTED: share}
            for name, share in zip(replies, counted.tolist(), strict=True)
        }

    def _close_hidden(self, replies: Mapping[str, TrainReply]) -> None:
        """Take the noisy mean, with noise where somebody was asked to step; what single clients sent is not remembered."""
        used = np.unique([index for request in self._pending.values() for index in request.indices])
        vectors = (gradient(self._pending[name], reply)[used] for name, reply in replies.items())
        total = np.zeros(self.ledger.pool.size)
        total[used] = self._released(vectors, len(used))
        self._close_mean(total)

    def _close_mean(self, mean: F64) -> None:
        """See `Rounds`; the importances, which only Pro draws by, stay as they are."""
        self._step(mean, self._history.grad_sums, self._history.grad_counts, self._history.grad_scales)

    def _step(self, total: F64, sums: F64, counts: NDArray[np.int64], scales: F64) -> None:
        change, _ = SGD.step(total, next(iter(self._pending.values())).lr, {})
        accumulators = pulled_back(self._history.accumulators + change, self.config.max_moved)
        self.ledger = self.ledger.advance(History(accumulators, sums, counts, scales))

    def _bounded(self, grads: Mapping[str, F64]) -> tuple[Mapping[str, F64], F64]:
        """What counts of the scalars, by the running scale, and what that remembers; all, where they are bounded otherwise."""
        scales = self._history.grad_scales
        if not self.config.rule.needs_each_reply or self.config.loss_clip is not None:
            return grads, scales
        scales = followed(scales, list(grads.values()))
        limit = largest(scales)
        return {name: np.clip(values, -limit, limit) for name, values in grads.items()}, scales


def scalars_size(grads: NDArray[np.float32], dropped: Sequence[int]) -> dict[str, float]:
    """The root mean square of a reply's projected gradients, without those of dropped steps; nothing if all were."""
    kept = np.delete(grads.astype(np.float64), list(dropped))
    return {PROJECTED_GRAD_RMS: float(np.sqrt(np.mean(kept**2)))} if kept.size else {}


def kept_scalars(request: TrainRequest, reply: TrainReply) -> NDArray[np.bool_]:
    """Which of a reply's scalars are not of dropped steps."""
    kept = np.ones((reply.num_scalars // request.directions, request.directions), bool)
    kept[list(reply.dropped)] = False
    return kept.reshape(-1)


def vector(request: bytes, reply: bytes) -> tuple[NDArray[np.float64], Reply]:
    """What a reply adds to a sum, float64[K], and the reply."""
    asked, answer = TrainRequest.decode(request), TrainReply.decode(reply)
    return gradient(asked, answer), answer


def gradient(request: TrainRequest, reply: TrainReply) -> NDArray[np.float64]:
    """What a reply says of the K numbers, float64[K]: the sum of its projected gradients at each seed."""
    grads = reply.projected_grads.unpack().astype(np.float64)
    total = np.zeros(request.pool.size)
    np.add.at(total, np.array(request.indices[: len(grads)]), grads)
    return total
