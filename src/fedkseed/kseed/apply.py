"""From a base model to the tuned one: add a ledger's coefficients to the weights, once, in place."""

from __future__ import annotations

from pathlib import Path

import torch

from fedkseed.errors import LedgerError
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.base import MemoryBase
from fedkseed.models.binding import check_apart, check_tunable
from fedkseed.models.identity import BaseIdentity
from fedkseed.models.pages import ClosedPage, add_pages, runs_of
from fedkseed.models.parameters import named_parameters, value_digests
from fedkseed.models.sweeps import backends_for


def apply(model: torch.nn.Module, ledger: Ledger | str | Path, backend: str = "auto") -> Ledger:
    """Turn a base model into the tuned model, in place and without a copy of its weights.

    Args:
        model: the base model, as it was loaded; any precision whose values are the base's.
        ledger: a ledger or its file, a run's checkpoint or the published form.
        backend: `auto`, or the name of a noise backend.

    Returns:
        The ledger.

    Raises:
        LedgerError: the ledger cannot be read, or the model is not its base (the first tensor that differs is named).
        BindingError: the model cannot be tuned; see `fedkseed.bind`.
        BackendError: no backend works on the parameters' devices, or the named one cannot run here or there.
    """
    if not isinstance(ledger, Ledger):
        ledger = Ledger.load(ledger)
    entries = named_parameters(model)
    tuned = [entry for entry in entries if entry.name not in ledger.base.frozen]
    check_tunable(tuned)
    check_apart(entries)
    backends = backends_for(tuned, backend)
    digests = value_digests(entries)
    found = BaseIdentity.of(digests, ledger.base.frozen)
    difference = ledger.base.difference(found, list(digests))
    if difference:
        raise LedgerError(f"this model is not the ledger's base: {difference}; load the base model that the run started from")
    parameters = {entry.name: entry.parameter.detach() for entry in tuned}
    pages = [page.closed() for page in ledger.pages] or [ClosedPage(ledger.pool, ledger.coefficients)]
    if len(runs_of(pages)) == 1:
        add_pages(backends, MemoryBase(parameters), parameters, pages)
        return ledger
    for name, parameter in parameters.items():  # one by one, since what is in between is float32
        values = {name: torch.empty_like(parameter, dtype=torch.float32)}
        add_pages(backends, MemoryBase({name: parameter}), values, pages)
        parameter.copy_(values[name])
    return ledger
