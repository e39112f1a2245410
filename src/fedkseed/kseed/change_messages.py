"""What a server and clients say to each other where replies are changes of K numbers: pages down, a change or scalars up.

The rules are those of `fedkseed.kseed.messages`: positional fields, raw arrays, and whatever a stranger sends raises nothing
but `ProtocolError`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np

from fedkseed.errors import InvalidValueError, ProtocolError
from fedkseed.federation.envelope import (
    ANYBODY,
    MAX_STEPS,
    Reply,
    Request,
    check_choice,
    check_eps,
    check_integer,
    check_number,
    check_positive,
    pack_fields,
    read_array,
    shown,
    unpack_fields,
)
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.kseed.coding import BITS, Coded, coded_bytes
from fedkseed.kseed.messages import MAX_FLOAT16
from fedkseed.kseed.pages import Basis, Page, check_basis, check_total
from fedkseed.models.closed_page import Movement
from fedkseed.noise.families import BY_CODE
from fedkseed.noise.pool import MAX_SIZE, SeedPool
from fedkseed.randomness import generator

REQUEST, REPLY = "c?", "c!"
MAX_BYTES, MAX_REPLY_BYTES = 1 << 27, 1 << 20
"""Of a request, which may hold all pages, and of a reply: 65,536 numbers of four bytes and what is said of them."""
MAX_PAGES, MAX_PARTS = 65535, 65535
WIRES, BASES, MOVEMENTS = tuple(BITS), get_args(Basis), get_args(Movement)
"""Messages hold places in these: what is new comes last."""
OPTIMIZER_BY_CODE = {optimizer.code: optimizer for optimizer in OPTIMIZERS.values()}
KEY: np.dtype[Any] = np.dtype("<u8")
COUNT: np.dtype[Any] = np.dtype("<u2")
STEP: np.dtype[Any] = np.dtype("<f4")
CHANGE, SCALARS = 0, 1


@dataclass(frozen=True)
class Patch:
    """What a client lacks of one page: the parts from `first` on."""

    key: int
    first: int
    parts: tuple[Coded, ...]


@dataclass(frozen=True)
class ChangeRequest(Request):
    """Server to client: be at these pages, take these steps, send back how the open page's numbers changed.

    Attributes:
        run_id, server_round, attempt, client, base, lr, batch_size: see `Request`.
        digest: see `Request`; of all pages, as `pages_digest` has it.
        size, family, basis, movement, wire: what all pages have in common; a wire of float numbers has one part a page.
        have: how many pages the client is taken to have whole; `patches` are of those that follow.
        patches: what it lacks, page by page; the last is of the open page.
        steps: local steps.
        measure: `gradient`, or `two-point` of a client that cannot backpropagate.
        optimizer: of the local steps.
        eps, max_grad, loss_clip: of two-point steps; see `fedkseed.kseed.steps.StepSettings`.
    """

    size: int
    family: str
    basis: Basis
    movement: Movement
    wire: str
    have: int
    patches: tuple[Patch, ...]
    steps: int
    measure: str
    optimizer: str
    eps: float
    max_grad: float
    loss_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("pool size", self.size, 1, MAX_SIZE)
        check_integer("number of steps", self.steps, 1, MAX_STEPS)
        check_integer("pages that the client has", self.have, 0, MAX_PAGES)
        check_integer("number of pages", len(self.patches), 1, MAX_PAGES)
        check_integer("number of parts", sum(len(patch.parts) for patch in self.patches), 0, MAX_PARTS)
        try:
            check_basis(self.size, self.family, self.basis)
            check_total([self.size] * (self.have + len(self.patches)))
        except InvalidValueError as error:
            raise ProtocolError(str(error)) from error
        for patch in self.patches:
            check_integer("first part", patch.first, 0, MAX_PARTS)
            for part in patch.parts:
                part.check("a page's part", self.size)
        check_eps(self.eps)
        check_positive("max_grad", self.max_grad)
        if self.max_grad > MAX_FLOAT16:
            raise ProtocolError(f"max_grad is {self.max_grad}; expected at most {MAX_FLOAT16}, which scalars can hold")
        if self.loss_clip is not None:
            check_positive("loss_clip", self.loss_clip)

    @property
    def num_steps(self) -> int:
        """How many local steps are asked for."""
        return self.steps

    @property
    def is_whole(self) -> bool:
        """Whether it holds all pages, so that it builds on nothing that the client has."""
        return self.have == 0 and self.patches[0].first == 0

    def page(self, key: int, parts: tuple[Coded, ...]) -> Page:
        """A page of this run."""
        return Page(SeedPool(key, self.size, self.family), self.basis, self.movement, parts)

    def encode(self) -> bytes:
        """The message's bytes."""
        patches = self.patches
        parts = [part for patch in patches for part in patch.parts]
        return pack_fields(
            REQUEST,
            [
                *(self.run_id, self.server_round, self.attempt, self.client, self.base, self.digest),
                *(float(self.lr), self.batch_size, self.size, SeedPool(0, 1, self.family).facts.code),
                *(BASES.index(self.basis), MOVEMENTS.index(self.movement), WIRES.index(self.wire), self.have),
                np.array([patch.key for patch in patches], KEY).tobytes(),
                np.array([[patch.first, len(patch.parts)] for patch in patches], COUNT).tobytes(),
                np.array([part.step for part in parts], STEP).tobytes(),
                b"".join(part.numbers for part in parts),
                *(self.steps, int(self.measure == "two-point"), OPTIMIZERS[self.optimizer].code),
                *(float(self.eps), float(self.max_grad), self.loss_clip),
            ],
        )

    @classmethod
    def decode(cls, data: bytes) -> ChangeRequest:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a request of this version, or a field is out of its range.
        """
        fields = unpack_fields(data, REQUEST, "request", 24, MAX_BYTES)
        run_id, server_round, attempt, client, base, digest, lr, batch_size, size, family, basis, movement, wire, have = fields[
            :14
        ]
        keys, counts, steps_of, numbers, steps, two_point, optimizer, eps, max_grad, loss_clip = fields[14:]
        check_integer("pool size", size, 1, MAX_SIZE)
        for name, value, known in (
            ("basis", basis, BASES),
            ("movement", movement, MOVEMENTS),
            ("wire", wire, WIRES),
            ("measure", two_point, (0, 1)),
        ):
            check_integer(name, value, 0, len(known) - 1)
        check_choice("family", family, BY_CODE)
        check_choice("optimizer", optimizer, OPTIMIZER_BY_CODE)
        patches = _patches(keys, counts, steps_of, numbers, WIRES[wire], size)
        head = (run_id, server_round, attempt, client, base, digest, lr, batch_size)
        about = (size, BY_CODE[family].name, BASES[basis], MOVEMENTS[movement], WIRES[wire], have, patches)
        measure, chosen = "two-point" if two_point else "gradient", OPTIMIZER_BY_CODE[optimizer].name
        return cls(*head, *about, steps, measure, chosen, eps, max_grad, loss_clip)


def _patches(keys: Any, counts: Any, steps: Any, numbers: Any, wire: str, size: int) -> tuple[Patch, ...]:
    each = coded_bytes(size, wire)
    pools, spans = read_array("page keys", keys, KEY), read_array("parts of pages", counts, COUNT)
    scales, total = read_array("steps of parts", steps, STEP), int(spans[1::2].sum())
    check_integer("number of pages", len(pools), 1, MAX_PAGES)  # before as many objects are made
    check_integer("number of parts", total, 0, MAX_PARTS)
    if len(spans) != 2 * len(pools) or len(scales) != total or not isinstance(numbers, bytes) or len(numbers) != each * total:
        raise ProtocolError(
            f"{len(pools)} pages came with {shown(len(scales))} parts; expected numbers for as many as they say"
        )
    parts = [Coded(wire, scale, numbers[i * each : (i + 1) * each]) for i, scale in enumerate(scales.astype(float).tolist())]
    patches, at = [], 0
    for key, first, count in zip(pools.tolist(), spans[::2].tolist(), spans[1::2].tolist(), strict=True):
        patches.append(Patch(key, first, tuple(parts[at : at + count])))
        at += count
    return tuple(patches)


def terms(request: bytes) -> bytes:
    """SHA-256 of what a request says but for its client, and for which part of the pages this one has already."""
    asked = ChangeRequest.decode(request)
    return hashlib.sha256(replace(asked, client=ANYBODY, have=0, patches=(Patch(0, 0, ()),)).encode()).digest()


@dataclass(frozen=True)
class ChangeReply(Reply):
    """Client to server: how the open page's numbers changed, or a scalar for each two-point step.

    Attributes:
        run_id, server_round, attempt, client, base, digest, num_examples, loss: see `Reply`.
        kind: `CHANGE` or `SCALARS`.
        steps: how many local steps it is of, dropped ones included.
        numbers: the change, K numbers; or the projected gradients, one a step, 0 where dropped.
        dropped: positions of dropped steps, ascending.
    """

    kind: int
    steps: int
    numbers: Coded
    dropped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("kind", self.kind, CHANGE, SCALARS)
        check_integer("number of steps", self.steps, 1, MAX_STEPS)
        if self.numbers.wire not in WIRES:
            raise ProtocolError(f"wire is {shown(self.numbers.wire)}; expected one of {', '.join(WIRES)}")
        check_number("step of the numbers", self.numbers.step)
        if self.kind == SCALARS:
            self.numbers.check("projected gradients", self.steps)
        for position, following in pairwise((*self.dropped, self.steps)):
            check_integer("dropped step", position, 0, self.steps - 1)
            if not position < following:
                raise ProtocolError(f"dropped step {position} is followed by {following}; expected ascending positions")

    @property
    def num_dropped(self) -> int:
        """How many steps were dropped."""
        return len(self.dropped)

    def encode(self) -> bytes:
        """The message's bytes."""
        return pack_fields(
            REPLY,
            [
                *(self.run_id, self.server_round, self.attempt, self.client, self.base, self.digest),
                *(self.num_examples, self.loss, self.kind, self.steps),
                *(WIRES.index(self.numbers.wire), float(self.numbers.step), self.numbers.numbers),
                np.array(self.dropped, COUNT).tobytes(),
            ],
        )

    @classmethod
    def decode(cls, data: bytes) -> ChangeReply:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a reply of this version, or a field is out of its range.
        """
        fields = unpack_fields(data, REPLY, "reply", 14, MAX_REPLY_BYTES)
        run_id, server_round, attempt, client, base, digest, num_examples, loss = fields[:8]
        kind, steps, wire, step, numbers, dropped = fields[8:]
        check_integer("wire", wire, 0, len(WIRES) - 1)
        positions = tuple(read_array("dropped", dropped, COUNT).tolist())
        if not isinstance(numbers, bytes):
            raise ProtocolError(f"numbers are {shown(numbers)}; expected bytes")
        head = (run_id, server_round, attempt, client, base, digest)
        return cls(*head, num_examples, loss, kind, steps, Coded(WIRES[wire], step, numbers), positions)


def seeds_of(request: ChangeRequest) -> list[int]:
    """The seeds of a request's two-point steps: both sides draw them from its head, so that none of them chooses."""
    drawn: list[int] = generator(*request.place, "seeds").choice(request.size, request.steps).tolist()
    return drawn
