"""The server of runs whose clients send changes of K numbers: pages, an optimiser, and what each client lacks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import LedgerError, ProtocolError
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.divided import DividedRounds
from fedkseed.federation.envelope import MAX_NUMBERS, Reply
from fedkseed.federation.exact_sum import ExactSum
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.federation.outcome import CHANGE_NORM, COUNTED, Outcome, Refusal, Summed
from fedkseed.federation.parts import Closing, Question, Treated, check_sum
from fedkseed.federation.rounds import Heard
from fedkseed.federation.schedule import learning_rate
from fedkseed.federation.streams import Requests
from fedkseed.kseed.change_messages import CHANGE, ChangeReply, ChangeRequest, Patch
from fedkseed.kseed.changes import ChangesPart, combined
from fedkseed.kseed.coding import encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page, is_replaced, pages_digest, to_coefficients
from fedkseed.kseed.server import scalars_size, seed_pool
from fedkseed.kseed.steps import largest_grad
from fedkseed.models.identity import BaseIdentity
from fedkseed.randomness import derive

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
NUMBERS = "numbers"
"""The column of the state that holds the open page's numbers before they are coded; the others are the optimiser's."""


class ChangeServer(DividedRounds[ChangeRequest, ChangeReply]):
    """One federation of changes (docs/gradients.md).

    What a client lacks is known from the last reply of it that was accepted; whoever is new, or was lost or refused, is sent
    all.

    Args:
        config: the settings.
        ledger: where to go on from; the identity of the base to start at it.
        clients, guess_loss, num_examples: see `Rounds`.

    Raises:
        LedgerError: the ledger is of other settings, or a published one.
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
        self.config, self._optimizer = config, OPTIMIZERS[config.server_optimizer]
        if isinstance(ledger, BaseIdentity):
            page = new_page(config, 0)
            ledger = Ledger.of_pages(ledger, 0, [page], config.wire, self._fresh(page.pool.size))
        if ledger.state is None:
            raise LedgerError(
                "a published ledger, or one of scalars, has no optimiser's state; go on from the run's own ledger.safetensors"
            )
        for i, page in enumerate(ledger.pages):
            wanted = new_page(config, i)
            if (page.pool, page.basis, page.movement) != (wanted.pool, wanted.basis, wanted.movement):
                raise LedgerError(
                    f"page {i + 1} of the ledger is of {page.pool}, {page.basis}, {page.movement}; the settings give "
                    f"{wanted.pool}, {wanted.basis}, {wanted.movement}: go on with the settings that the run was started with"
                )
        columns = {name: column.shape for name, column in self._fresh(config.num_seeds).items()}
        if {name: column.shape for name, column in ledger.state.items()} != columns:
            raise LedgerError(
                f"the ledger's state has {', '.join(sorted(ledger.state))}; --server-optimizer {config.server_optimizer} has "
                f"{', '.join(sorted(columns))}: go on with the settings that the run was started with"
            )
        if ledger.precision != config.wire:
            raise LedgerError(f"the ledger's wire is {ledger.precision}, the settings' {config.wire}; go on with the run's own")
        self.ledger = self._turned(ledger)  # of a run that goes on beyond what was its last round
        self._seen: dict[str, tuple[int, int]] = {}
        run_id = derive(config.seed, "run", f"{ledger.pages[0].pool.key:016x}", ledger.base.fingerprint).to_bytes(8, "little")
        super().__init__(config, run_id, clients, guess_loss, num_examples)

    @property
    def checkpoint(self) -> Ledger:
        """The ledger."""
        return self.ledger

    def two_point_clients(self) -> frozenset[str]:
        """Those that are asked for scalars: who says so, or else a share that the settings say, drawn by the run's seed."""
        if self.forward_only is not None:
            return self.forward_only
        ranked = sorted(self.clients, key=lambda name: derive(self.config.seed, "two-point", name))
        share = self.config.two_point_clients
        return frozenset(ranked[: max(1, round(share * len(ranked))) if share else 0])

    def whole(self, client: str) -> ChangeRequest | None:
        """See `Rounds.whole`."""
        request = self._pending[client]
        if request.is_whole:
            return None
        return replace(request, have=0, patches=tuple(Patch(page.pool.key, 0, page.parts) for page in self.ledger.pages))

    def hear(self, replies: Iterable[tuple[str, bytes]]) -> Heard[ChangeReply]:
        """See `Rounds`."""
        heard = super().hear(replies)
        self._have_seen(heard.num_examples.keys())
        return heard

    def absorb_sum(self, summed: Summed | None, refusals: Sequence[Refusal], missing: Sequence[str]) -> Outcome:
        """See `Rounds.absorb_sum`."""
        accepted = set() if summed is None else set(summed.weights)
        self._have_seen(accepted)
        return super().absorb_sum(summed, refusals, missing)

    def _have_seen(self, accepted: Collection[str]) -> None:
        """Remember what those have by now whose replies were accepted; of who was asked else it is not known."""
        where = self._where()
        for name in self._pending:
            if name in accepted:
                self._seen[name] = where
            else:  # it may have lost what it had: it is sent all
                self._seen.pop(name, None)

    def _where(self) -> tuple[int, int]:
        """What a client has that has answered now: how many pages before the open one, and how many parts of that."""
        return len(self.ledger.pages) - 1, len(self.ledger.pages[-1].parts)

    def _requests(self, server_round: int, attempt: int, cohort: Sequence[str], lr: float) -> Requests[ChangeRequest]:
        config, pages = self.config, self.ledger.pages
        digest, two_point = pages_digest(pages), self.two_point_clients()
        steps, seen, base = self.steps, dict(self._seen), bytes.fromhex(self.ledger.base.fingerprint)

        def make(client: str) -> ChangeRequest:
            have, parts = seen.get(client, (0, 0))
            return ChangeRequest(
                run_id=self.run_id,
                server_round=server_round,
                attempt=attempt,
                client=client,
                base=base,
                digest=digest,
                lr=lr,
                batch_size=config.batch_size,
                size=config.num_seeds,
                family=config.noise,
                basis=config.basis,
                movement=config.movement,
                wire=config.wire,
                have=have,
                patches=lacking(pages[have:], 0 if is_replaced(config.wire) else parts),
                steps=steps[client],
                measure="two-point" if client in two_point else "gradient",
                optimizer=config.local_optimizer,
                eps=config.eps,
                max_grad=config.max_grad,
                loss_clip=config.loss_clip,
            )

        return Requests(cohort, make)

    def _decode(self, data: bytes) -> ChangeReply:
        return ChangeReply.decode(data)

    def _check(self, request: ChangeRequest, reply: ChangeReply) -> None:
        if reply.steps != request.steps:
            raise ProtocolError(f"it is of {reply.steps} steps; {request.steps} were asked for")
        if reply.kind == CHANGE:
            if request.measure != "gradient":
                raise ProtocolError("a change came of a client that was asked for scalars")
            if reply.numbers.wire != request.wire:
                raise ProtocolError(f"the change is on wire {reply.numbers.wire}; expected {request.wire}")
            reply.numbers.check("the change", request.size)
            if reply.num_dropped == reply.steps:
                raise ProtocolError(
                    "all of its steps were dropped, since no loss or gradient was finite; a lower --lr may help"
                )
            largest, limit, of = float(np.abs(reply.numbers.decode(request.size)).max()), self.config.max_value, "--max-value"
        elif request.optimizer != "sgd":
            raise ProtocolError(
                f"scalars came of a client that cannot backpropagate; --local-optimizer {request.optimizer} cannot weigh them "
                "against changes, so take sgd, or leave out such clients"
            )
        elif reply.numbers.wire != "float16":
            raise ProtocolError(f"the scalars are on wire {reply.numbers.wire}; expected float16")
        else:
            scalars = reply.numbers.decode(reply.steps)
            largest, limit, of = float(np.abs(scalars).max()), largest_grad(self.config), "--max-grad, --loss-clip"
            if np.any(scalars[list(reply.dropped)] != 0):
                raise ProtocolError("a dropped step has a projected gradient; expected 0")
        if largest > limit:
            raise ProtocolError(f"it holds {largest:g}; at most {limit:g} is accepted ({of}), so lower --lr, or raise that")

    def _sizes(self, request: ChangeRequest, reply: ChangeReply) -> dict[str, float]:
        if reply.kind != CHANGE:
            return scalars_size(reply.numbers.decode(reply.steps).astype(np.float32), reply.dropped)
        change = to_coefficients(reply.numbers.decode(request.size), request.basis).astype(np.float64)
        return {CHANGE_NORM: float(np.linalg.norm(change))}

    def _close(self, replies: Mapping[str, ChangeReply], weights: Mapping[str, float]) -> Treated:
        """Combine the replies, take the optimiser's step, code what the page lacks, and turn it where its rounds are over."""
        if self.mechanism is not None:
            ones = ({name: reply} for name, reply in replies.items())
            each = (combined(self._pending, one, dict.fromkeys(one, 1.0), self.config.basis)[0] for one in ones)
            self._close_mean(self._released(each, self.config.num_seeds))
            return {}
        rule = self.config.rule
        change, counted = combined(self._pending, replies, weights, self.config.basis, rule, self.config.summation)
        self._close_mean(change)
        return {name: {COUNTED: share} for name, share in counted.items()} if rule.needs_each_reply else {}

    size_name = CHANGE_NORM

    @property
    def rows_shape(self) -> tuple[int, int]:
        """See `DividedRounds`."""
        return ChangesPart.ROWS, self.config.num_seeds

    def state(self) -> bytes:
        """See `DividedRounds`."""
        return self.ledger.stamped(None).encode()

    def go_to(self, state: bytes) -> None:
        """See `DividedRounds`."""
        ledger = Ledger.decode(state)
        if (ledger.base.fingerprint, ledger.precision) != (self.ledger.base.fingerprint, self.ledger.precision):
            raise LedgerError("the checkpoint is of another base or wire; expected the run's own")
        if ledger.state is None:
            raise LedgerError("the checkpoint is a published ledger, or one of scalars; expected the run's own")
        if not goes_on(ledger.pages, self.ledger.pages, is_replaced(self.config.wire)):
            self._seen = {}  # a server that has begun again: nobody has what it sends
        self.ledger = ledger

    def longest(self, num_steps: I64) -> F64:
        """See `DividedRounds`."""
        return np.full(len(num_steps), self.config.max_value * math.sqrt(self.config.num_seeds))

    def check_rows(self, rows: I64, weights: F64, lengths: F64 | None, num_steps: I64) -> None:
        """See `DividedRounds`."""
        check_sum(rows, weights, lengths, np.full(len(weights), self.config.max_value))

    def part(self, replies: Mapping[str, ChangeReply]) -> ChangesPart:
        """See `DividedRounds`."""
        return ChangesPart(replies, self.config.num_seeds)

    def closing(self, weights: Mapping[str, float], words: F64) -> Closing:
        """See `DividedRounds`; of replies that are changes, all of them."""
        rule, kept = self.config.rule, np.array([*weights.values()])
        shares = np.ones(len(kept))
        if rule.needs_each_reply and rule.weigh is not None:
            told = yield Question(np.inf)
            kept, shares = rule.weigh(kept, told.lengths)
        rows = yield Question(np.inf, kept)
        self._close_mean(ExactSum(rows).value)
        if not rule.needs_each_reply:
            return {}
        return {name: {COUNTED: share} for name, share in zip(weights, shares.tolist(), strict=True)}

    def _close_mean(self, mean: F64) -> None:
        """See `Rounds`."""
        config, ledger = self.config, self.ledger
        state = dict(ledger.state or {})
        numbers = state.pop(NUMBERS)
        lr = config.server_lr
        if self._optimizer.bounded:  # the others shrink with the clients' changes, whose rate the schedule lowers
            lr = learning_rate(config.schedule, lr, ledger.round, config.num_rounds)
        moved, following = self._optimizer.step(-mean, lr, state)
        numbers = numbers + moved
        *closed, page = ledger.pages
        kept = () if is_replaced(config.wire) else page.parts
        residual = numbers - Page(page.pool, page.basis, page.movement, kept).numbers()
        page = Page(page.pool, page.basis, page.movement, (*kept, encode(residual, config.wire)))
        state = {NUMBERS: numbers, **following}
        self.ledger = self._turned(Ledger.of_pages(ledger.base, ledger.round + 1, [*closed, page], config.wire, state))

    def _turned(self, ledger: Ledger) -> Ledger:
        """The ledger with a fresh page where the rounds of its open one are over and others follow."""
        config = self.config
        each, done = config.rounds_per_page, ledger.round
        if not each or done % each or done >= config.num_rounds or not ledger.pages[-1].parts:
            return ledger
        if (len(ledger.pages) + 1) * config.num_seeds > MAX_NUMBERS:  # of a run whose pages were shorter at first
            return ledger
        pages = [*ledger.pages, new_page(config, len(ledger.pages))]
        return Ledger.of_pages(ledger.base, done, pages, config.wire, self._fresh(config.num_seeds))

    def _fresh(self, size: int) -> dict[str, F64]:
        return {NUMBERS: np.zeros(size), **self._optimizer.start(size)}


def new_page(config: FederationConfig, number: int) -> Page:
    """The page of that number, from 0, before its first round; its pool's key is drawn from the run's seed."""
    pool = seed_pool(config)
    if number:
        pool = replace(pool, key=derive(config.seed, "pool", number))
    return Page(pool, config.basis, config.movement)


def goes_on(pages: Sequence[Page], before: Sequence[Page], replaced: bool) -> bool:
    """Whether pages are those before and what came after; with `replaced` an open page's parts are new each time."""
    *closed, last = before
    if len(pages) < len(before) or any(
        (one.pool, one.parts) != (other.pool, other.parts) for one, other in zip(pages, closed, strict=False)
    ):
        return False
    same = pages[len(closed)]
    return same.pool == last.pool and (replaced or same.parts[: len(last.parts)] == last.parts)


def lacking(pages: Sequence[Page], parts: int) -> tuple[Patch, ...]:
    """What a client lacks that has so many parts of the first of these pages, and nothing of the others."""
    first, *others = pages
    return (
        Patch(first.pool.key, parts, first.parts[parts:]),
        *(Patch(page.pool.key, 0, page.parts) for page in others),
    )


def vector(request: bytes, reply: bytes) -> tuple[F64, Reply]:
    """What a reply adds to a sum, float64[K], and the reply.

    Raises:
        ProtocolError: it is one of scalars, which nobody can weigh against changes in a sum.
    """
    asked, answer = ChangeRequest.decode(request), ChangeReply.decode(reply)
    if answer.kind != CHANGE:
        raise ProtocolError(
            f"{answer.client!r} cannot backpropagate, and its scalars have no place in a sum of changes; leave out "
            "--secure-sums, or this client"
        )
    return answer.numbers.decode(asked.size), answer
