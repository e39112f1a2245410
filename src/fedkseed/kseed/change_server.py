"""The server of runs whose clients send changes of K numbers: pages, an optimiser, and what each client lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import LedgerError, ProtocolError
from fedkseed.federation.aggregators import AGGREGATORS, Aggregator, clip_shares
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.envelope import Reply
from fedkseed.federation.rounds import CHANGE_NORM, COUNTED, Outcome, Refusal, Rounds, Summed
from fedkseed.federation.schedule import learning_rate
from fedkseed.kseed.change_messages import CHANGE, ChangeReply, ChangeRequest, Patch, seeds_of
from fedkseed.kseed.coding import encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.optimizer import OPTIMIZERS
from fedkseed.kseed.pages import Basis, Page, gradient_to_basis, is_replaced, pages_digest, to_coefficients
from fedkseed.kseed.server import scalars_size, seed_pool
from fedkseed.kseed.steps import largest_grad
from fedkseed.models.identity import BaseIdentity
from fedkseed.randomness import derive

F64 = NDArray[np.float64]
NUMBERS = "numbers"
"""The column of the state that holds the open page's numbers before they are coded; the others are the optimiser's."""


class ChangeServer(Rounds[ChangeRequest, ChangeReply]):
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
        return frozenset(ranked[: round(self.config.two_point_clients * len(ranked))])

    def whole(self, client: str) -> ChangeRequest | None:
        """See `Rounds.whole`."""
        request = self._pending[client]
        if request.is_whole:
            return None
        return replace(request, have=0, patches=tuple(Patch(page.pool.key, 0, page.parts) for page in self.ledger.pages))

    def absorb(self, replies: object) -> Outcome:
        """See `Rounds.absorb`."""
        return self._seeing(lambda: super(ChangeServer, self).absorb(replies))  # type: ignore[arg-type]

    def absorb_sum(self, summed: Summed | None, refusals: Sequence[Refusal], missing: Sequence[str]) -> Outcome:
        """See `Rounds.absorb_sum`."""
        return self._seeing(lambda: super(ChangeServer, self).absorb_sum(summed, refusals, missing))

    def _seeing(self, absorb: Callable[[], Outcome]) -> Outcome:
        """Take what came of a round, and remember what each client has seen by now."""
        asked = {name: self._where() for name in self._pending}
        outcome = absorb()
        accepted = {contribution.client for contribution in outcome.contributions}
        for name, where in asked.items():
            if name in accepted:
                self._seen[name] = where
            else:  # it may have lost what it had: it is sent all
                self._seen.pop(name, None)
        return outcome

    def _where(self) -> tuple[int, int]:
        """What a client has that has answered now: how many pages before the open one, and how many parts of that."""
        return len(self.ledger.pages) - 1, len(self.ledger.pages[-1].parts)

    def _requests(self, server_round: int, attempt: int, cohort: Sequence[str], lr: float) -> dict[str, ChangeRequest]:
        config, pages = self.config, self.ledger.pages
        digest, two_point = pages_digest(pages), self.two_point_clients()
        return {
            client: ChangeRequest(
                run_id=self.run_id,
                server_round=server_round,
                attempt=attempt,
                client=client,
                base=bytes.fromhex(self.ledger.base.fingerprint),
                digest=digest,
                lr=lr,
                batch_size=config.batch_size,
                size=config.num_seeds,
                family=config.noise,
                basis=config.basis,
                movement=config.movement,
                wire=config.wire,
                have=self._seen.get(client, (0, 0))[0],
                patches=self._lacking(client),
                steps=self.steps[client],
                measure="two-point" if client in two_point else "gradient",
                optimizer=config.local_optimizer,
                eps=config.eps,
                max_grad=self.config.max_grad,
                loss_clip=config.loss_clip,
            )
            for client in cohort
        }

    def _lacking(self, client: str) -> tuple[Patch, ...]:
        have, parts = self._seen.get(client, (0, 0))
        if is_replaced(self.config.wire):
            parts = 0
        first, *others = self.ledger.pages[have:]
        return (
            Patch(first.pool.key, parts, first.parts[parts:]),
            *(Patch(page.pool.key, 0, page.parts) for page in others),
        )

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
            largest, limit = float(np.abs(reply.numbers.decode(request.size)).max()), self.config.max_value
        elif request.optimizer != "sgd":
            raise ProtocolError(
                f"scalars came, which --local-optimizer {request.optimizer} cannot weigh against changes; take sgd, "
                "or leave out clients that cannot backpropagate"
            )
        elif reply.numbers.wire != "float16":
            raise ProtocolError(f"the scalars are on wire {reply.numbers.wire}; expected float16")
        else:
            scalars = reply.numbers.decode(reply.steps)
            largest, limit = float(np.abs(scalars).max()), largest_grad(self.config)
            if np.any(scalars[list(reply.dropped)] != 0):
                raise ProtocolError("a dropped step has a projected gradient; expected 0")
        if largest > limit:
            raise ProtocolError(f"it holds {largest:g}; at most {limit:g} is accepted")

    def _sizes(self, request: ChangeRequest, reply: ChangeReply) -> dict[str, float]:
        if reply.kind != CHANGE:
            return scalars_size(reply.numbers.decode(reply.steps).astype(np.float32), reply.dropped)
        change = to_coefficients(reply.numbers.decode(request.size), request.basis).astype(np.float64)
        return {CHANGE_NORM: float(np.linalg.norm(change))}

    def _close(self, replies: Mapping[str, ChangeReply], weights: Mapping[str, float]) -> Mapping[str, Mapping[str, float]]:
        """Combine the replies, take the optimiser's step, code what the page lacks, and turn it where its rounds are over."""
        if self.mechanism is not None:
            ones = ({name: reply} for name, reply in replies.items())
            each = (combined(self._pending, one, dict.fromkeys(one, 1.0), self.config.basis)[0] for one in ones)
            self._close_mean(self._released(each, self.config.num_seeds))
            return {}
        rule = self.config.rule
        change, counted = combined(self._pending, replies, weights, self.config.basis, rule)
        self._close_mean(change)
        return {name: {COUNTED: share} for name, share in counted.items()} if rule.needs_each_reply else {}

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
        lacking = numbers - Page(page.pool, page.basis, page.movement, kept).numbers()
        page = Page(page.pool, page.basis, page.movement, (*kept, encode(lacking, config.wire)))
        state = {NUMBERS: numbers, **following}
        self.ledger = self._turned(Ledger.of_pages(ledger.base, ledger.round + 1, [*closed, page], config.wire, state))

    def _turned(self, ledger: Ledger) -> Ledger:
        """The ledger with a fresh page where the rounds of its open one are over and others follow."""
        config = self.config
        each, done = config.rounds_per_page, ledger.round
        if not each or not done or done % each or done >= config.num_rounds or len(ledger.pages) > done // each:
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


def combined(
    requests: Mapping[str, ChangeRequest],
    replies: Mapping[str, ChangeReply],
    weights: Mapping[str, float],
    basis: Basis,
    rule: Aggregator = AGGREGATORS["mean"],
) -> tuple[F64, dict[str, float]]:
    """The change that a round's replies amount to, float64[K], and the share of each reply that went in.

    A gradient client's change of n steps averages n gradients. A two-point step along one of K seeds, times K, has a
    gradient's expectation and about K times its variance, so it is worth 1/K of a gradient step; scalars of m steps are
    m / (K n) of a change. The best linear unbiased mean weighs by these (docs/gradients.md). Scalars alone are not blown up
    to a whole step: they move the numbers by `-lr sum_t g_t` at their seeds, as FedKSeed does.

    The rule makes one of the changes. Scalars, of other seeds at each client, are added up whatever it is; unless that is the
    mean, no client's bring in more than the median of all replies, with scalars taken to be sqrt(K) times as long as they are,
    since a two-point step goes as far as 1 / sqrt(K) of a gradient step.

    Args:
        requests: by client.
        replies: by client, in the order of their names.
        weights: the clients' shares p_i, by their numbers of examples.
        basis: which numbers these are.
        rule: how changes become one.
    """
    size = next(iter(requests.values())).size
    changed = [name for name, reply in replies.items() if reply.kind == CHANGE]
    moves = {
        name: -requests[name].lr * reply.numbers.decode(reply.steps) for name, reply in replies.items() if reply.kind != CHANGE
    }
    counted, change, amount = dict.fromkeys(replies, 1.0), np.zeros(size), 0.0
    vectors = np.array([replies[name].numbers.decode(size) for name in changed])
    if changed:
        change, shares = rule.combine(vectors, np.array([weights[name] for name in changed]))
        counted |= dict(zip(changed, shares.tolist(), strict=True))
    for name in changed:
        amount += weights[name]
    if not moves:
        return change, counted
    if rule.needs_each_reply:
        longer = 1.0 if basis == "table" else np.sqrt(size)
        lengths = [weights[name] * np.linalg.norm(vector) for name, vector in zip(changed, vectors, strict=True)]
        lengths += [weights[name] * longer * np.linalg.norm(one) for name, one in moves.items()]
        counted |= dict(zip(moves, clip_shares(np.array(lengths))[len(changed) :].tolist(), strict=True))
    scalars, small = np.zeros(size), 0.0
    for name, one in moves.items():
        np.add.at(scalars, np.array(seeds_of(requests[name])), weights[name] * one * counted[name])
        small += weights[name] * (len(one) - replies[name].num_dropped) / (size * requests[name].steps)
    turned = gradient_to_basis(scalars, basis)
    return (change + turned) / (amount + small) if changed else turned, counted
