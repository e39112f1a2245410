"""Rounds whose accepted replies may be held by others, who tell the server what it asks of them (docs/edges.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from fedkseed.federation.outcome import Contribution, Outcome, Refusal
from fedkseed.federation.parts import F64, I64, Closing, Part
from fedkseed.federation.rounds import ReplyT, RequestT, Rounds


class DividedRounds(Rounds[RequestT, ReplyT]):
    """A server that closes a round by what parts of the replies tell, whether it holds them or edges do.

    Attributes:
        size_name: what `_sizes` calls its number, where there is one.
    """

    size_name: str

    @property
    def tells_words(self) -> bool:
        """Whether a `Part` has words."""
        return False

    @property
    @abstractmethod
    def rows_shape(self) -> tuple[int, int]:
        """Of what a `Part` sums."""

    @abstractmethod
    def state(self) -> bytes:
        """The checkpoint as an edge needs it."""

    @abstractmethod
    def go_to(self, state: bytes) -> None:
        """Be where another server of the same settings and base is, by its `state`.

        Raises:
            LedgerError: it is none, or of another run.
        """

    @abstractmethod
    def part(self, replies: Mapping[str, ReplyT]) -> Part:
        """Accepted replies to the planned requests, by client in the order of the names, as what they tell of themselves."""

    @abstractmethod
    def closing(self, weights: Mapping[str, float], words: F64) -> Closing:
        """Close the round by asking who holds the accepted replies; see `fedkseed.federation.parts`.

        Args:
            weights: p_i by client, in the order of the names.
            words: as the replies' `Part` has them.
        """

    @abstractmethod
    def longest(self, num_steps: I64) -> F64:
        """No vector of replies of so many steps each is longer, float64[n]."""

    @abstractmethod
    def check_rows(self, rows: I64, weights: F64, lengths: F64 | None, num_steps: I64) -> None:
        """Refuse what no replies could sum up to.

        Args:
            rows: sums of a `Part` that somebody else holds, of the shape `rows_shape`.
            weights: what each of its replies counts.
            lengths: what that part says of their lengths, if it was asked.
            num_steps: how many steps each of its replies is of.

        Raises:
            ProtocolError: it is that.
        """

    def absorb_parts(
        self, contributions: Sequence[Contribution], closed: bool, refusals: Sequence[Refusal], missing: Sequence[str]
    ) -> Outcome:
        """Say what became of a round whose replies others hold; the checkpoint has moved on if it is closed."""
        server_round = self.checkpoint.round + (0 if closed else 1)
        accepted = {one.client for one in contributions}
        status = self._closed() if closed else self._repeat(self._pending.keys() - accepted)
        self._pending = {}
        return Outcome(server_round, status, tuple(contributions), tuple(refusals), tuple(missing))
