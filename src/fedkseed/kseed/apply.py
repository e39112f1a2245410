"""From a base model to the tuned one: add a ledger's coefficients to the weights, once, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedkseed.errors import LedgerError
from fedkseed.kseed.arithmetic import listed, merge
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.base import MemoryBase
from fedkseed.models.binding import check_apart, check_tunable
from fedkseed.models.closed_page import ClosedPage
from fedkseed.models.identity import BaseIdentity
from fedkseed.models.loading import read_files
from fedkseed.models.pages import add_pages, runs_of
from fedkseed.models.parameters import NamedParameter, is_plain_float, named_parameters, whole_digest
from fedkseed.models.sweeps import Backends, Tensors, backends_for

Reader = Callable[[NamedParameter], torch.Tensor]
"""The base values of a parameter."""


def apply(model: torch.nn.Module, ledger: Ledger | str | Path | Sequence[Ledger | str | Path], backend: str = "auto") -> Ledger:
    """Turn a base model into the tuned model, in place and without a copy of its weights.

    Args:
        model: the base model, as it was loaded, in any precision. Where its values are not the base's but those of the files
            that it was loaded from are, these are read; the tuned weights are rounded to its precision last.
        ledger: a ledger, a run's checkpoint or the published form; its file, its folder, or its name on a hub, `owner/name` or
            `owner/name@revision`; or several, whose tunings add up.
        backend: `auto`, or the name of a noise backend.

    Returns:
        The ledger; of several their sum.

    Raises:
        InvalidValueError: an empty list of ledgers.
        LedgerError: the ledger cannot be read, or several do not add up (see `fedkseed.merge`), or the model is not its base
            (the first tensor that differs is named).
        BindingError: the model cannot be tuned; see `fedkseed.bind`.
        BackendError: no backend works on the parameters' devices, or the named one cannot run here or there.
    """
    ledger = one_ledger(ledger)
    entries, tuned = parameters_of(model, ledger)
    backends = backends_for(tuned, backend)
    read = base_reader(model, entries, ledger)
    if read is None:
        weights = {entry.name: entry.parameter.detach() for entry in tuned}
        write_tuned(ledger, backends, weights, weights)
        return ledger
    for entry in entries:
        values = read(entry)
        if entry.name not in ledger.base.frozen:
            write_tuned(ledger, backends, {entry.name: values}, {entry.name: values})
        entry.parameter.detach().copy_(values)
    return ledger


def one_ledger(ledger: Ledger | str | Path | Sequence[Ledger | str | Path]) -> Ledger:
    """A ledger, that of a file, folder or hub, or the sum of several; see `apply`."""
    if isinstance(ledger, (str, Path)):
        return Ledger.from_pretrained(ledger)
    if isinstance(ledger, Ledger):
        return ledger
    several = listed(ledger)
    return merge(several, [1.0] * len(several))


def parameters_of(model: torch.nn.Module, ledger: Ledger) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """A model's parameters, and those of them that a ledger tunes.

    Raises:
        BindingError: they cannot be tuned; see `fedkseed.bind`.
    """
    entries = named_parameters(model)
    tuned = [entry for entry in entries if entry.name not in ledger.base.frozen]
    check_tunable(tuned)
    check_apart(entries)
    return entries, tuned


def base_reader(model: torch.nn.Module, entries: Sequence[NamedParameter], ledger: Ledger) -> Reader | None:
    """How to read the ledger's base weights where they are not the model's own; None where they are.

    Raises:
        LedgerError: the model is not the ledger's base, nor are the files that it was loaded from.
    """
    difference = _difference(ledger, entries, _loaded)
    if difference is None:
        return None
    if (read := _read_elsewhere(model, entries, ledger)) is not None:
        return read
    if ledger.base.has_adapter and not any("base_layer" in entry.name.split(".") for entry in entries):
        raise LedgerError(
            "the ledger moves the matrices of a LoRA adapter, which this model has not; make the adapter first, as its "
            "card says (fedkseed lora, or peft and fk.seed_lora), and give that model, or its folder as base"
        )
    in_float32 = "" if all(e.parameter.dtype == torch.float32 for e in entries) else ", in float32"
    base = ledger.base_model or "the base model that the run started from"
    raise LedgerError(f"this model is not the ledger's base: {difference}; load {base}{in_float32}")


def write_tuned(ledger: Ledger, backends: Backends, base: Tensors, outputs: Tensors) -> None:
    """`outputs <- base plus the ledger's pages`, between tensors of the same names and types, or in place."""
    pages = [page.closed() for page in ledger.pages] or [ClosedPage(ledger.pool, ledger.coefficients)]
    if len(runs_of(pages)) == 1:
        add_pages(backends, MemoryBase(base), outputs, pages)
        return
    for name, out in outputs.items():  # one by one, since what is in between is float32
        values = {name: torch.empty_like(out, dtype=torch.float32)}
        add_pages(backends, MemoryBase({name: base[name]}), values, pages)
        out.copy_(values[name])


def _read_elsewhere(model: torch.nn.Module, entries: Sequence[NamedParameter], ledger: Ledger) -> Reader | None:
    """How to read the ledger's base where the model was loaded in another type than the run's; None if it is not the base.

    The run may have rounded what the files hold to its own type, or whoever loaded this model has: then the files that it was
    loaded from have the values, as long as it is still what they give.
    """
    readers: list[Reader] = [_loaded]
    if (in_files := read_files(model, entries)) is not None:
        readers.append(in_files)
    for read in readers:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):

            def typed(entry: NamedParameter, read: Any = read, dtype: torch.dtype = dtype) -> torch.Tensor:
                x: torch.Tensor = read(entry)
                return x.to(entry.parameter.device, dtype, copy=True) if is_plain_float(x) else x

            if _difference(ledger, entries, typed) is None:
                return typed
    return None


def _loaded(entry: NamedParameter) -> torch.Tensor:
    return entry.parameter.detach()


def _difference(ledger: Ledger, entries: Sequence[NamedParameter], read: Reader) -> str | None:
    """How the ledger's base differs from one with these values, which are read a tensor at a time; None if it does not."""
    digests = {}
    for entry in entries:
        digests[entry.name] = whole_digest(entry.name, read(entry))
    return ledger.base.difference(BaseIdentity.of(digests, ledger.base.frozen), list(digests))
