"""LoRA factors that are the same bits on every machine, so that K numbers over them are a whole adapter (docs/adapter.md)."""

from __future__ import annotations

import math

import torch

from fedkseed.errors import BindingError
from fedkseed.models.parameters import NamedParameter, named_parameters
from fedkseed.noise.pool import SeedPool


def seed_lora(model: torch.nn.Module, key: int) -> None:
    """Draw the random factors of a PEFT model's LoRA adapters anew, from a key; the others become zero.

    An adapter adds `B A x` to what a layer gives. PEFT draws A from torch's generator, whose numbers are not the same on all
    machines. Here A, of r rows and n columns, is the gaussian perturbation of its name in the pool `(key, 1)`, times
    `1 / sqrt(3 n)` rounded to binary32: one multiplication, and the variance that PEFT's A has. Of an embedding's adapter the
    random one is B, with the variance 1. Factors are computed in float32 and cast to their type.

    Args:
        model: what `peft.get_peft_model` gives, before it is bound and before anything is trained.
        key: an unsigned 64-bit integer; everyone who applies a ledger over this model gives the same one.

    Raises:
        InvalidValueError: the key is no such integer.
        BindingError: the model has no LoRA adapter; nothing has changed.
    """
    if not isinstance(model, torch.nn.Module):
        raise BindingError(f"model is {model!r:.80}; expected what peft.get_peft_model(model, LoraConfig(...)) returns")
    pool = SeedPool(key, 1, "gaussian")
    entries = named_parameters(model)
    random, embedded = _factors(entries, "lora_A"), _factors(entries, "lora_embedding_B")
    zero = _factors(entries, "lora_B") + _factors(entries, "lora_embedding_A")
    if not random and not embedded:
        raise BindingError(
            f"{type(model).__name__} has no LoRA factor (lora_A); give what peft.get_peft_model(model, LoraConfig(...)) returns"
        )
    for entry in random:
        x = entry.parameter
        scale = torch.tensor(1 / math.sqrt(3 * x.shape[1]), dtype=torch.float32)
        values = torch.from_numpy(pool.perturbation(entry.name, x.numel(), 0)) * scale
        x.detach().copy_(values.reshape(x.shape))
    for entry in embedded:
        x = entry.parameter
        x.detach().copy_(torch.from_numpy(pool.perturbation(entry.name, x.numel(), 0)).reshape(x.shape))
    for entry in zero:
        entry.parameter.detach().zero_()


def _factors(entries: list[NamedParameter], kind: str) -> list[NamedParameter]:
    return [entry for entry in entries if kind in entry.name.split(".") and entry.parameter.dim() > 1]
