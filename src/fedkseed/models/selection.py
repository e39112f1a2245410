"""Which tensors are tuned: shell patterns on the names of parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch

from fedkseed.errors import ConfigError
from fedkseed.models.adapter_folder import MATRICES, has_adapter
from fedkseed.models.parameters import NamedParameter, named_parameters


def frozen_names(
    model: torch.nn.Module, train: Sequence[str] = (), freeze: Sequence[str] = (), idle: Collection[str] = ()
) -> tuple[str, ...]:
    """Canonical names of the parameters that stay as they are, sorted.

    Args:
        model: a bare module.
        train: patterns of what is tuned; none stands for all. Of a model with an adapter they choose among the adapter's
            matrices: what is saved of it would lack all else. A tied tensor is meant by any of its names.
        freeze: patterns of what of this is not.
        idle: names of tensors that are left alone in any case.

    Raises:
        ConfigError: a pattern matches nothing that could be tuned (the message has the nearest names), or nothing is left.
    """
    entries = [entry for entry in named_parameters(model) if entry.name not in idle]
    what = "that a loss depends on"
    if has_adapter(model):
        entries, what = [entry for entry in entries if _matches(entry, MATRICES)], "of the adapter"
        if not entries:
            raise ConfigError(
                f"the model has an adapter without LoRA's matrices ({', '.join(MATRICES)}); give one that has them"
            )
    for flag, patterns in (("--train", train), ("--freeze", freeze)):
        for pattern in patterns:
            if not any(_matches(entry, [pattern]) for entry in entries):
                raise ConfigError(f"{flag} {pattern!r} matches no tensor {what}; {_near(pattern, entries)}")
    tuned = {e.name for e in entries if (not train or _matches(e, train)) and not _matches(e, freeze)}
    if not tuned:
        raise ConfigError("--train and --freeze leave no tensor to tune; take one of the --freeze patterns away")
    return tuple(entry.name for entry in named_parameters(model) if entry.name not in tuned)


def _matches(entry: NamedParameter, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in entry.aliases for pattern in patterns)


def _near(pattern: str, entries: Sequence[NamedParameter]) -> str:
    names = [name for entry in entries for name in entry.aliases]
    inside = [name for name in names if pattern.strip("*") in name]
    near = inside[:3] or get_close_matches(pattern.strip("*"), names, 3, cutoff=0.3) or names[:3]
    return f"it must fit whole names, such as {', '.join(near)}" + (f"; try '*{pattern.strip('*')}*'" if inside else "")
