"""From a base model to the tuned one: add a ledger's coefficients to the weights, once, in place."""

from __future__ import annotations

from pathlib import Path

import torch

from fedkseed.errors import LedgerError
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.base import MemoryBase
from fedkseed.models.binding import check_apart, check_tunable
from fedkseed.models.identity import BaseIdentity
from fedkseed.models.parameters import named_parameters, value_digests
from fedkseed.models.sweeps import backends_for, in_place, scaled


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
    parameters = {entry.name: entry.parameter for entry in tuned}
    if not ledger.pages:
        in_place(backends, parameters)(ledger.pool.mixture_of(ledger.coefficients))
        return ledger
    for name, parameter in parameters.items():  # one by one: pages add up in float32, and are rounded to the weight's type once
        values = {name: parameter.detach().to(torch.float32, copy=True)}
        for page in ledger.pages:
            turn = in_place(backends, values) if page.movement == "absolute" else scaled(backends, MemoryBase(values), values)
            turn(page.pool.mixture_of(page.coefficients()))
        parameter.detach().copy_(values[name])
    return ledger
