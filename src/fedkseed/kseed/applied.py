"""Tuned models in turn over one base in memory: kilobytes each, a pass over the weights to change them (docs/ledgers.md)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from fedkseed.errors import InvalidValueError
from fedkseed.kseed.apply import base_reader, one_ledger, parameters_of, write_tuned
from fedkseed.kseed.arithmetic import check_same_base
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.parameters import NamedParameter, check_module
from fedkseed.models.sweeps import Backends, Tensors, backends_for

Source = Ledger | str | Path | Sequence[Ledger | str | Path]
"""What `fedkseed.apply` takes as a ledger."""


@dataclass
class _Tuned:
    """A model inside `applied`.

    Attributes:
        parameters: the tuned ones, by canonical name.
        base: their base weights, in the type of the run where that is another.
        backends: see `backends_for`.
        ledger: whose weights they hold; None while they are written, and after a write that did not end.
    """

    parameters: Tensors
    base: Tensors
    backends: Backends
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        self._kinds = {name: (x.dtype, x.device) for name, x in self.parameters.items()}

    def write(self, ledger: Ledger) -> None:
        """Set the parameters to a ledger's, as `fedkseed.apply` does.

        Raises:
            InvalidValueError: one has another type, device or layout by now.
        """
        now = {name: x.detach() for name, x in self.parameters.items()}  # their memory may have been replaced
        for name, x in now.items():
            if (x.dtype, x.device) != self._kinds[name] or not x.is_contiguous():
                layout, was = "" if x.is_contiguous() else ", not contiguous,", "{} on {}".format(*self._kinds[name])
                raise InvalidValueError(
                    f"{name} is {x.dtype} on {x.device}{layout} now and was {was} when the block was entered; leave it, and "
                    "enter it with the model as it shall be"
                )
        self.ledger = None
        alike = {name: x for name, x in now.items() if x.dtype == self.base[name].dtype}
        if alike:
            write_tuned(ledger, self.backends, self.base, alike)
        for name in now.keys() - alike.keys():  # rounded to the run's type first
            values = {name: torch.empty_like(self.base[name])}
            write_tuned(ledger, self.backends, self.base, values)
            now[name].copy_(values[name])
        self.ledger = ledger


_TUNED: WeakKeyDictionary[torch.nn.Module, _Tuned | None] = WeakKeyDictionary()
"""Models that are inside `applied` now; None while what they were is being kept."""
_ENTERING = threading.Lock()


@contextmanager
def applied(model: torch.nn.Module, ledger: Source, backend: str = "auto") -> Iterator[Ledger]:
    """The tuned model while the block lasts; afterwards, also after an exception, the weights from before, bit for bit.

    A copy of the tuned parameters is kept meanwhile, and serves `swap`. It is the parameters' values that are put back,
    whatever has been done to them in between.

    Args:
        model, ledger, backend: see `fedkseed.apply`. Where the base weights are read from the model's files, they are kept too.

    Yields:
        The ledger.

    Raises:
        InvalidValueError: the model is inside `applied` already.
        FedKSeedError: see `fedkseed.apply`. Nothing has changed in any of these cases.
    """
    check_module(model)
    ledger = one_ledger(ledger)
    with _ENTERING:  # two threads would each keep what the other had written
        if model in _TUNED:
            raise InvalidValueError(
                f"this {type(model).__name__} is inside `fedkseed.applied` already; use `fedkseed.swap` there"
            )
        _TUNED[model] = None
    changed: list[NamedParameter] = []
    try:
        entries, tuned = parameters_of(model, ledger)
        backends = backends_for(tuned, backend)
        read = base_reader(model, entries, ledger)
        before = {entry.name: entry.parameter.detach().clone() for entry in (tuned if read is None else entries)}
        base = before if read is None else {entry.name: read(entry) for entry in tuned}
        changed = tuned if read is None else entries
        for entry in changed:
            if read is not None and entry.name in ledger.base.frozen:  # rounded as the run had it
                entry.parameter.detach().copy_(read(entry))
        kept = _TUNED[model] = _Tuned({entry.name: entry.parameter for entry in tuned}, base, backends)
        kept.write(ledger)
        yield ledger
    finally:
        for entry in changed:
            entry.parameter.detach().copy_(before[entry.name])
        _TUNED.pop(model, None)


def swap(model: torch.nn.Module, ledger: Source, other: Source) -> Ledger:
    """Replace one ledger's tuning by another's in one pass over the weights, to the bits of `fedkseed.apply` on the base.

    Args:
        model: inside `with fedkseed.applied(model, ...)`, which keeps the base weights.
        ledger: the one that the model holds.
        other: one over the same base that tunes the same parameters.

    Returns:
        The other ledger.

    Raises:
        InvalidValueError: the model is not inside `applied`, or holds another ledger, or has other parameters, or another type,
            device or layout, by now.
        BindingError: it is no model.
        LedgerError: a ledger cannot be read, or the other one is of another base model.
            Nothing has changed in any of these cases.
    """
    check_module(model)
    tuned = _TUNED.get(model)
    if tuned is None:
        raise InvalidValueError(
            f"this {type(model).__name__} is not inside `with fedkseed.applied(model, ledger)`, which keeps the base weights; "
            "swap there"
        )
    now = dict(model.named_parameters(remove_duplicate=False))
    if (name := next((name for name, x in tuned.parameters.items() if now.get(name) is not x), None)) is not None:
        raise InvalidValueError(f"{name} is another parameter than when the block was entered; leave it, and enter it anew")
    ledger, other = one_ledger(ledger), one_ledger(other)
    if tuned.ledger is not None and ledger.published().digest() != tuned.ledger.published().digest():
        held, given = (f"{one!r} (digest {one.published().digest()[:16]})" for one in (tuned.ledger, ledger))
        raise InvalidValueError(f"the model holds {held}, not {given}; give the ledger that it holds first")
    check_same_base(ledger, other, "the first ledger", "the second")
    tuned.write(other)
    return other
