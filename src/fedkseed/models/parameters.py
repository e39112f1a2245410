"""A model's parameters under their canonical names, and digests of them (docs/noise.md, "Terms").

The canonical name of a tensor is the lexicographically smallest of its names in the bare module: noise is a function of
that name, so a wrapper's prefix or another order of tied weights must not change it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedkseed.errors import BindingError

NUMBERS = "fedkseed"
"""The child module that holds a prepared model's K numbers (`fedkseed.prepare`)."""
TUNED = "_fedkseed_tuned"
"""The attribute that marks a weight of a prepared model."""
WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class NamedParameter:
    """One parameter: its canonical name, all its names (tied weights have several), and the parameter itself."""

    name: str
    aliases: tuple[str, ...]
    parameter: torch.nn.Parameter


def named_parameters(model: torch.nn.Module) -> list[NamedParameter]:
    """All parameters of a bare module, tied ones once, sorted by canonical name.

    Raises:
        BindingError: the model is none, wrapped, being tuned, has no parameters, or one has no values, is on the meta device or
            sparse.
    """
    check_module(model)
    if any(hasattr(parameter, TUNED) for parameter in model.parameters()):
        raise BindingError(
            f"this {type(model).__name__}, or a part of it, is being tuned (fk.prepare); call fk.release(model) first, or load "
            "its base model anew"
        )
    aliases: dict[int, list[str]] = {}
    parameters: dict[int, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    found = [NamedParameter(min(names), tuple(sorted(names)), parameters[key]) for key, names in aliases.items()]
    if not found:
        raise BindingError(f"{type(model).__name__} has no parameters; expected a model with weights")
    _refuse_wrapped(model, [entry.name for entry in found])
    for entry in found:
        if torch.nn.parameter.is_lazy(entry.parameter):
            raise BindingError(f"{entry.name} has no values yet; run the model once, then bind it")
        if entry.parameter.device.type == "meta":
            raise BindingError(f"{entry.name} is on the meta device; load the model's weights before binding it")
        if entry.parameter.layout != torch.strided:
            raise BindingError(f"{entry.name} is sparse ({entry.parameter.layout}); expected a dense parameter")
    return sorted(found, key=lambda entry: entry.name)


def check_module(model: object) -> None:
    """Refuse what is no model.

    Raises:
        BindingError: it is none.
    """
    if not isinstance(model, torch.nn.Module):
        raise BindingError(f"model is a {type(model).__name__}; expected a torch.nn.Module")


def _refuse_wrapped(model: torch.nn.Module, names: Iterable[str]) -> None:
    prefix = "module" if [child for child, _ in model.named_children()] == ["module"] else None
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    inside = tuple(f"{path}.module." for path, module in model.named_modules() if path and isinstance(module, parallel))
    for name in names:
        parts = name.split(".")
        wrapper = next((part for part in parts if part in WRAPPER_PARTS), None)
        if wrapper is None and (parts[0] == prefix or (inside and name.startswith(inside))):
            wrapper = "module"
        if wrapper:
            raise BindingError(
                f"{name} is a parameter of a wrapped model ({wrapper!r}), whose names would change the noise; "
                "pass the bare module that was wrapped"
            )


def tensor_digest(name: str, shape: torch.Size, dtype: torch.dtype, stretches: Iterable[torch.Tensor]) -> bytes:
    """SHA-256 of one tensor: a JSON line with its name, shape and dtype, then its little-endian bytes, row-major.

    The tensor comes in stretches, one after the other, so that it need not be in memory as a whole.
    """
    header = json.dumps([name, list(shape), str(dtype).removeprefix("torch.")])
    digest = hashlib.sha256(header.encode() + b"\n")
    for stretch in stretches:
        flat = stretch.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            data: Any = flat.view(torch.uint8).numpy()
            digest.update(data)
    return digest.digest()


def value_digest(name: str, shape: torch.Size, dtype: torch.dtype, stretches: Iterable[torch.Tensor]) -> bytes:
    """The same of the values widened to float32, so that a bfloat16 and a float32 load of one checkpoint agree."""
    if dtype.is_floating_point:
        return tensor_digest(name, shape, torch.float32, (stretch.detach().float() for stretch in stretches))
    return tensor_digest(name, shape, dtype, stretches)


def is_quantised(x: torch.Tensor) -> bool:
    """Whether a tensor holds integers, as bitsandbytes has them, or is made of other tensors, as torchao's are."""
    return not (x.is_floating_point() or x.is_complex()) or hasattr(x, "__tensor_flatten__")


def is_plain_float(x: torch.Tensor) -> bool:
    """Whether a tensor holds floating-point numbers itself."""
    return x.is_floating_point() and not is_quantised(x)


def inner_tensors(name: str, x: Any) -> list[tuple[str, torch.Tensor]]:
    """What a tensor is made of, by name, in the order of names: of an ordinary one itself."""
    if not hasattr(x, "__tensor_flatten__"):
        return [(name, x)]
    return [part for inner in sorted(x.__tensor_flatten__()[0]) for part in inner_tensors(f"{name}.{inner}", getattr(x, inner))]


def whole_digest(name: str, x: torch.Tensor, digest: Callable[..., bytes] = value_digest) -> bytes:
    """`value_digest` (or `tensor_digest`) of a whole tensor; of one made of others SHA-256 of theirs, one after the other."""
    each = [digest(part, inner.shape, inner.dtype, [inner]) for part, inner in inner_tensors(name, x)]
    return each[0] if len(each) == 1 else hashlib.sha256(b"".join(each)).digest()


def value_digests(entries: Iterable[NamedParameter]) -> dict[str, bytes]:
    """`value_digest` of the current values of each, by canonical name: what `BaseIdentity.of` takes."""
    return {entry.name: whole_digest(entry.name, entry.parameter) for entry in entries}


def fit_again(entries: Sequence[NamedParameter], dtype: torch.dtype | None = None) -> bool:
    """Whether a second set of parameters, of that type or their own, takes at most half of each device's available memory."""
    sizes: dict[torch.device, int] = {}
    for entry in entries:
        x = entry.parameter
        sizes[x.device] = sizes.get(x.device, 0) + x.numel() * (dtype or x.dtype).itemsize
    return all(
        2 * size <= torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _fits(size)
        for device, size in sizes.items()
    )


def _fits(size: int) -> bool:
    """Whether that many bytes are at most half of the memory that Linux calls available; elsewhere assumed."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return True
    available = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return 2 * size <= int(available.split()[1]) * 1024
