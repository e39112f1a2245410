"""The server of FedKSeed and FedKSeed-Pro: which seeds each client steps along, and one sum of scalars for each seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ConfigError, InvalidValueError, LedgerError, ProtocolError
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.divided import DividedRounds
from fedkseed.federation.envelope import Reply
from fedkseed.federation.exact_sum import LIMBS, ExactSum, OrderedSum, check_limbs, nearly
from fedkseed.federation.optimizer import SGD
from fedkseed.federation.outcome import CLIPPED_SCALARS, COUNTED, PROJECTED_GRAD_RMS
from fedkseed.federation.parts import ROUNDING, Closing, Lengths, Question, Treated, answered, check_sum
from fedkseed.federation.streams import Requests
from fedkseed.kseed.distance import pulled_back
from fedkseed.kseed.importance import seed_probabilities
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.ledger_format import MAX_SCALES, History
from fedkseed.kseed.messages import TrainReply, TrainRequest, coefficients_digest
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.scalars import ScalarsPart, kept_scalars
from fedkseed.kseed.scale import followed, largest
from fedkseed.kseed.steps import GRAD_EXPONENT, largest_grad
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
from fedkseed.randomness import derive, generator

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Totals = tuple[F64, F64, I64]
"""The gradients' weighted sum at each seed, and what the ledger remembers of their magnitudes' sums and numbers."""


def seed_pool(config: FederationConfig) -> SeedPool:
    """The pool of a run: its key is drawn from the run's seed."""
    return SeedPool(derive(config.seed, "pool"), config.num_seeds, config.noise)


def start(config: FederationConfig, base: BaseIdentity) -> Ledger:
    """The ledger before the first round."""
    return Ledger.start(seed_pool(config), base, config.wire)


class Server(DividedRounds[TrainRequest, TrainReply]):
    """One federation: its settings, its clients and its ledger.

    Args:
        config: the settings.
        ledger: where to go on from; the identity of the base to start at it.
        clients, guess_loss, num_examples: see `Rounds`.

    Raises:
        ConfigError: the clients of the settings' algorithm send something else.
        InvalidValueError: the ledger is none, nor an identity; or see `Rounds`.
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
        if config.facts.sends != "scalars":
            raise ConfigError(
                f"algorithm is {config.algorithm!r}, whose clients send {config.facts.sends}; this server adds up scalars, so "
                "take fedkseed or fedkseed-pro, or run the settings by fedkseed.simulate"
            )
        if isinstance(ledger, BaseIdentity):
            ledger = start(config, ledger)
        if not isinstance(ledger, Ledger):
            raise InvalidValueError(
                f"ledger is a {type(ledger).__name__}; expected a Ledger (Ledger.load(file)), or the base's identity "
                "(bound.identity())"
            )
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

    def _requests(self, server_round: int, attempt: int, cohort: Sequence[str], lr: float) -> Requests[TrainRequest]:
        config, pool = self.config, self.ledger.pool
        likely = None if config.facts.draws == "uniform" else self.probabilities()
        coefficients, digest = pack(self._history.accumulators, config.wire), coefficients_digest(self.ledger.coefficients)
        steps, base = self.steps, bytes.fromhex(self.ledger.base.fingerprint)

        def make(client: str) -> TrainRequest:
            return TrainRequest(
                run_id=self.run_id,
                server_round=server_round,
                attempt=attempt,
                client=client,
                pool=pool,
                base=base,
                coefficients=coefficients,
                digest=digest,
                indices=self._draw_seeds(steps, server_round, attempt, client, likely),
                lr=lr,
                eps=config.eps,
                batch_size=config.batch_size,
                max_grad=config.max_grad,
                loss_clip=config.loss_clip,
                directions=config.directions,
                scaling=None if config.goal.smooth else config.scaling,
            )

        return Requests(cohort, make)

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
        found, limit = float(np.abs(grads).max()), largest_grad(self.config)
        if found > limit:
            raise ProtocolError(f"a projected gradient is {found:g}; at most {limit:g} is accepted")
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

    def _draw_seeds(
        self, steps: Mapping[str, int], server_round: int, attempt: int, client: str, likely: NDArray[np.float64] | None
    ) -> tuple[int, ...]:
        """A client's own seeds; of shared ones as many as its steps need."""
        shared, each = self.config.same_seeds, self.config.directions
        draw = generator(self.config.seed, server_round, attempt, *(() if shared else (client,)), "seeds")
        count = max(steps.values()) if shared else steps[client]
        drawn = draw.choice(self.ledger.pool.size, count * each, p=likely)
        return tuple(drawn[: steps[client] * each].tolist())

    def _close(self, replies: Mapping[str, TrainReply], weights: Mapping[str, float]) -> Treated:
        """Make one vector of what the replies say of the K numbers, by the rule, and take the optimiser's step."""
        if self.mechanism is not None:
            self._close_hidden(replies)
            return {}
        part, rule = self.part(replies), self.config.rule
        if rule.weigh is None:
            return self._close_beside(part, weights)
        exact = self.config.summation == "exact"
        used = part.used() if rule.needs_each_reply and not exact else None

        def answer(question: Question) -> Lengths | I64 | Totals:
            if question.weights is None:
                return part.lengths(question.limit, used)
            if exact:
                return part.rows(question.limit, question.weights)
            return self._ordered(part, question.limit, question.weights)

        return answered(self.closing(weights, part.words()), answer)

    def part(self, replies: Mapping[str, TrainReply]) -> ScalarsPart:
        """See `DividedRounds`."""
        return ScalarsPart(self._pending, replies, self.ledger.pool.size, self.config.importance_clip, self.tells_words)

    def closing(self, weights: Mapping[str, float], words: F64) -> Closing:
        """See `DividedRounds`."""
        rule, history = self.config.rule, self._history
        scales, limit = self._scale(words)
        kept, told = np.array([*weights.values()]), Lengths(np.zeros(0), np.zeros(0, np.int64))
        shares = np.ones(len(kept))
        totals: Totals = np.zeros(self.ledger.pool.size), history.grad_sums, history.grad_counts
        if weights:
            if rule.needs_each_reply and rule.weigh is not None:
                told = yield Question(limit)
                kept, shares = rule.weigh(kept, told.lengths)
            answer = yield Question(limit, kept)
            totals = self._totals(answer) if isinstance(answer, np.ndarray) else answer
        self._step(*totals, scales)
        if not rule.needs_each_reply:
            return {}
        return _treated(weights, told.clipped, shares)

    size_name = PROJECTED_GRAD_RMS

    @property
    def rows_shape(self) -> tuple[int, int]:
        """See `DividedRounds`."""
        return ScalarsPart.ROWS, self.ledger.pool.size

    def state(self) -> bytes:
        """See `DividedRounds`; the scale of scalars is the server's own affair."""
        history = replace(self._history, grad_scales=np.zeros(0))
        return replace(self.ledger, history=history, made_with=None).encode()

    def go_to(self, state: bytes) -> None:
        """See `DividedRounds`."""
        ledger = Ledger.decode(state)
        known = self.ledger
        if (ledger.pool, ledger.base.fingerprint, ledger.precision) != (known.pool, known.base.fingerprint, known.precision):
            raise LedgerError("the checkpoint is of another pool, base or precision; expected the run's own")
        if ledger.history is None:
            raise LedgerError("the checkpoint is a published ledger; expected the run's own")
        self.ledger = ledger

    def longest(self, num_steps: I64) -> F64:
        """See `DividedRounds`: where all scalars are of one seed."""
        longest: F64 = num_steps * self.config.directions * np.float64(largest_grad(self.config))
        return longest

    def check_rows(self, rows: I64, weights: F64, lengths: F64 | None, num_steps: I64) -> None:
        """See `DividedRounds`."""
        scalars, counts, limit = num_steps * self.config.directions, rows[-1], largest_grad(self.config)
        check_sum(rows[:LIMBS], weights, lengths, self.longest(num_steps))
        most = int(scalars.sum())
        if counts.min() < 0 or counts.max() > most or counts.sum() > most:  # a sum alone may run over
            raise ProtocolError(f"more than {most} scalars are counted, or fewer than none; the replies have at most so many")
        check_limbs(rows[LIMBS : 2 * LIMBS], len(weights))
        magnitudes = nearly(rows[LIMBS : 2 * LIMBS])
        if (magnitudes < 0).any() or (magnitudes > counts * min(limit, self.config.importance_clip) * ROUNDING).any():
            raise ProtocolError("scalars' magnitudes are summed to less than 0, or to more than so many have")

    def _ordered(self, part: ScalarsPart, limit: float, weights: F64) -> Totals:
        """Sums in float64, in the order of the clients' names."""
        total, importances = OrderedSum(np.zeros(self.ledger.pool.size)), OrderedSum(self._history.grad_sums)
        counts = self._history.grad_counts.copy()
        part.add(limit, weights, total, importances, counts)
        return total.value, importances.value, counts

    def _totals(self, rows: I64) -> Totals:
        """The same of exact sums, as a part has them."""
        total, importances = ExactSum(rows[:LIMBS]), ExactSum(rows[LIMBS : 2 * LIMBS])
        return total.value, self._history.grad_sums + importances.value, self._history.grad_counts + rows[-1]

    def _close_beside(self, part: ScalarsPart, weights: Mapping[str, float]) -> Treated:
        """The same by a rule that must have all vectors side by side."""
        scales, limit = self._scale(part.words())
        used = part.used()
        total, importances = np.zeros(self.ledger.pool.size), OrderedSum(self._history.grad_sums)
        counts, clipped = self._history.grad_counts.copy(), []
        vectors = np.zeros((len(weights), len(used)))
        for vector, one in zip(vectors, part.each(limit), strict=True):
            vector[:] = one.vector(len(total))[used]
            part.remember(one, importances, counts)
            clipped.append(int(np.count_nonzero(one.sent != one.values)))
        shares = np.zeros(0)
        if weights:
            total[used], shares = self.config.rule.combine(vectors, np.array([*weights.values()]))
        self._step(total, importances.value, counts, scales)
        return _treated(weights, clipped, shares)

    def _close_hidden(self, replies: Mapping[str, TrainReply]) -> None:
        """Take the noisy mean, with noise where somebody was asked to step; what single clients sent is not remembered."""
        asked = np.zeros(self.ledger.pool.size, bool)
        for request in self._pending.values():
            asked[list(request.indices)] = True
        used = np.flatnonzero(asked)
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

    @property
    def tells_words(self) -> bool:
        """Whether scalars are bounded by their running scale: where the rule bounds, and nothing else does."""
        return self.config.rule.needs_each_reply and self.config.loss_clip is None

    def _scale(self, words: F64) -> tuple[F64, float]:
        """What the running scale remembers after this round, and the largest scalar that counts in it."""
        if not self.tells_words:
            return self._history.grad_scales, np.inf
        scales = followed(self._history.grad_scales, words)
        return scales[-MAX_SCALES:], largest(scales)


def _treated(names: Iterable[str], clipped: Iterable[int], shares: F64) -> Treated:
    return {
        name: {CLIPPED_SCALARS: int(number), COUNTED: share}
        for name, number, share in zip(names, clipped, shares.tolist(), strict=True)
    }


def scalars_size(grads: NDArray[np.float32], dropped: Sequence[int]) -> dict[str, float]:
    """The root mean square of a reply's projected gradients, without those of dropped steps; nothing if all were."""
    kept = np.delete(grads.astype(np.float64), list(dropped))
    return {PROJECTED_GRAD_RMS: float(np.sqrt(np.mean(kept**2)))} if kept.size else {}


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
