"""What a model is asked before its data are tokenised: a few passes over a few tokens, in place of lists of architectures.

How long a text may be, which ids exist, whether later tokens are seen, whether padding changes a loss, whether the loss is a
number, and on which tensors it depends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedkseed.errors import ModelError
from fedkseed.models.parameters import inner_tensors, is_plain_float, named_parameters
from fedkseed.text import one_line

CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length", "max_seq_length", "seq_length",
    "context_length", "max_target_positions",
)  # fmt: skip
"""What configurations call the context length; the first that is there counts."""
TOKENS = 8
"""As many tokens are asked with."""
LENGTH_MARGIN = 8
"""A learnt table of positions is at most so much shorter than the configuration says."""
LATER, PADDED = 1e-4, 1e-3
"""As a share of the largest logit: what rounding makes of equal logits in float32, in passes of equal shapes and of others."""
HALF_LATER, HALF_PADDED = 2, 16
"""The same for half precision, in units of its rounding."""
PRODUCTS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}
"""What `torch.set_float32_matmul_precision` leaves of float32's products: TF32 has as many digits as float16."""
PART = 1 << 20
"""Elements that are added up at once."""


@dataclass(frozen=True)
class Traits:
    """What a model answered.

    Attributes:
        context: how many tokens it takes; None if that was neither named nor met.
        rows: ids from this one on do not exist.
        pads: whether padding on the right, masked, leaves the losses as they are.
        idle: names of the tensors on which no loss on text depends, sorted.
    """

    context: int | None
    rows: int
    pads: bool
    idle: tuple[str, ...]


def probe(model: Any, ids: Sequence[int], longest: int) -> Traits:
    """Ask a model; its weights, modes and gradients are afterwards as they were.

    Args:
        model: a Hugging Face causal LM, as it was loaded.
        ids: of ordinary tokens, different ones, to ask with; those that do not exist are passed over.
        longest: texts of so many tokens are of interest.

    Raises:
        ModelError: a pass fails; the model sees later tokens; its loss is not finite (the message names the tensors that hold
            a NaN or an infinity); or a pass changes its weights.
    """
    with _as_loaded(model):
        before = _sums(model)
        chosen = _exist(model, ids)
        context = _context(model, chosen, longest)
        count = min(TOKENS, context or TOKENS)
        asked = torch.tensor([[chosen[i % len(chosen)] for i in range(count)]], device=next(model.parameters()).device)
        logits, used = _loss(model, asked, before)
        _refuse_seeing_later(model, asked, chosen, logits)
        pads = _pads(model, asked, logits)
        _refuse_changing(model, before)
    return Traits(context, min(num_rows(model), logits.shape[-1]), pads, _idle(model, used))


def context_of(config: Any) -> int | None:
    """How many tokens a model of that configuration takes, if it says; of a model of several kinds of data the text's part."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (text, config):
        for name in CONTEXT_NAMES:
            length = getattr(part, name, None)
            if isinstance(length, int) and length > 0:
                return length
    return None


def masks_padding(model: Any, ids: Sequence[int], generate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
    """Whether padding on the left, masked, leaves what is generated behind it as it is.

    Args:
        model: a Hugging Face causal LM in eval mode.
        ids: of tokens, at least two.
        generate: from ids and mask, int64[b, t], to the logits of what follows, [b, vocabulary].
    """
    x = torch.tensor([list(ids)], device=next(model.parameters()).device)
    half = x.shape[1] // 2
    padded, mask = x.repeat(2, 1), torch.ones_like(x).repeat(2, 1)
    padded[0, :half], mask[0, :half] = padded[0, half], 0
    alone = generate(x[:, half:], mask[1:, half:])
    return _alike(generate(padded, mask)[:1], alone, PADDED, HALF_PADDED)


@contextmanager
def _as_loaded(model: Any) -> Iterator[None]:
    """In eval mode and with every weight asking for a gradient; both are put back, and what fails is the model's error."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(is_plain_float(parameter))
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # architectures raise anything
        raise ModelError(
            f"{type(model).__name__} gives no loss on a text ({one_line(error)}); give a causal language model"
        ) from error
    finally:
        for parameter, asks in asked:
            parameter.requires_grad_(asks)
        for module, training in modes:
            module.training = training


def _sums(model: Any) -> dict[str, float]:
    """Of each parameter's values: not finite if one of them is not, another number if they have changed."""
    parts = [part for entry in named_parameters(model) for part in inner_tensors(entry.name, entry.parameter)]
    return {name: _sum(x.detach()) for name, x in parts}


def _sum(x: torch.Tensor) -> float:
    """In parts, since torch widens all that it adds up in one go."""
    flat = x.reshape(-1)
    return sum([flat[first : first + PART].sum(dtype=torch.float64).item() for first in range(0, len(flat), PART)], 0.0)


def num_rows(model: Any) -> int:
    """How many ids a model's embedding has."""
    embedding = model.get_input_embeddings()
    return int(embedding.weight.shape[0]) if hasattr(embedding, "weight") else int(model.config.vocab_size)


def _exist(model: Any, ids: Sequence[int]) -> list[int]:
    """The ids that the embedding has; any, if it has none of them."""
    rows = num_rows(model)
    return [i for i in ids if i < rows] or list(range(min(rows, TOKENS)))


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
    return logits


class _EnoughError(Exception):
    """The pass has come as far as it has to."""


def _context(model: Any, ids: Sequence[int], longest: int) -> int | None:
    """How many tokens the model takes, as its configuration says and a pass of that length through its first layer confirms.

    On another device than a CPU a place beyond a table of positions would be the end of the process, so there the
    configuration is believed.
    """
    named = context_of(model.config)
    device = next(model.parameters()).device
    length = min(longest, named or longest)
    if device.type != "cpu" or _takes(model, ids, length):
        return named
    low, high = 0, length
    if _takes(model, ids, length - LENGTH_MARGIN):
        low = length - LENGTH_MARGIN
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _takes(model, ids, middle) else (low, middle)
    if low == 0:
        _forward(model, torch.tensor([list(ids[:1])], device=device))  # raises what is wrong
    return low


def _takes(model: Any, ids: Sequence[int], length: int) -> bool:
    """Whether a text of so many tokens comes through the embeddings and the first layer."""
    if length < 1:
        return False
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]

    def stop(*_: Any) -> None:
        raise _EnoughError

    layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters())) if stacks else None
    hook = layers[1].register_forward_pre_hook(stop) if layers is not None else None
    try:
        with torch.inference_mode():
            _forward(model, torch.tensor([[ids[i % len(ids)] for i in range(length)]]))
    except _EnoughError:
        return True
    except (IndexError, RuntimeError, ValueError):
        return False
    finally:
        if hook is not None:
            hook.remove()
    return True


def _loss(model: Any, ids: torch.Tensor, sums: dict[str, float]) -> tuple[torch.Tensor, set[int]]:
    """The logits of a text, and the identities of the parameters that its loss depends on, as autograd has noted them."""
    with torch.enable_grad():
        logits = _forward(model, ids)
        wide = logits[0, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(wide, ids[0, 1:] % logits.shape[-1])
        used = _leaves(loss)
    bad = [name for name, total in sums.items() if total - total != 0]
    if bad or (ids.shape[1] > 1 and not torch.isfinite(loss)):
        _refuse_not_finite(model, loss.item(), bad)
    return logits.detach(), used


def _leaves(loss: torch.Tensor) -> set[int]:
    """The identities of all tensors in the graph of a loss."""
    found: set[int] = set()
    seen, open_nodes = set(), [loss.grad_fn]
    while open_nodes:
        node: Any = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_nodes += [following for following, _ in node.next_functions]
    return found


def _idle(model: Any, used: set[int]) -> tuple[str, ...]:
    """The parameters that are not used, unless one of the same name but for its numbers is: an expert that these few tokens
    did not come to is none."""
    entries = named_parameters(model)
    kinds = {_kind(alias) for entry in entries if id(entry.parameter) in used for alias in entry.aliases}
    return tuple(e.name for e in entries if kinds.isdisjoint(map(_kind, e.aliases)))


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _refuse_not_finite(model: Any, loss: float, bad: Sequence[str]) -> None:
    dtype = str(model.dtype).removeprefix("torch.")
    if not bad:
        raise ModelError(f"the loss of the base model is {loss} in {dtype}, whose weights are finite; give --dtype float32")
    others = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    raise ModelError(
        f"the base model holds numbers that are not finite, in {bad[0]}{others} ({dtype}); its loss is {loss}: "
        + ("give --dtype float32, or " if dtype != "float32" else "")
        + "mend the checkpoint, or download it again"
    )


def _refuse_seeing_later(model: Any, ids: torch.Tensor, others: Sequence[int], logits: torch.Tensor) -> None:
    """Logits at a place must not depend on the tokens behind it."""
    kept = ids.shape[1] // 2
    changed = ids.clone()
    for place in range(kept, ids.shape[1]):
        changed[0, place] = next((i for i in others if i != int(ids[0, place])), ids[0, place])
    with torch.inference_mode():
        same = _alike(_forward(model, changed)[:, :kept], logits[:, :kept], LATER, HALF_LATER)
    if not same:
        raise ModelError(
            f"{type(model).__name__} sees later tokens: what it expects at one place depends on the tokens behind it, as of a "
            "masked language model, so a loss would mean nothing; give a causal language model"
        )


def _pads(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether a text's logits stay with padding behind it, beside a longer text."""
    half = ids.shape[1] // 2
    if half == 0:
        return True
    padded, mask = ids.repeat(2, 1), torch.ones_like(ids).repeat(2, 1)
    padded[0, half:], mask[0, half:] = ids[0, 0], 0
    with torch.inference_mode():
        both = _forward(model, padded, mask)
    pairs = (both[0, :half], logits[0, :half]), (both[1], logits[0])
    return all(_alike(padded, alone, PADDED, HALF_PADDED) for padded, alone in pairs)


def _alike(x: torch.Tensor, y: torch.Tensor, share: float, half: int) -> bool:
    """Whether logits are equal but for rounding."""
    if not x.numel():
        return True
    digits = x.dtype if x.dtype != torch.float32 else PRODUCTS[torch.get_float32_matmul_precision()]
    if digits != torch.float32:
        share = half * torch.finfo(digits).eps
    return bool((x.float() - y.float()).abs().max() <= share * y.float().abs().max())


def _refuse_changing(model: Any, before: dict[str, float]) -> None:
    """Base weights that a pass changes are not those that a ledger is of."""
    changed = [name for name, total in _sums(model).items() if total != before[name]]
    if changed:
        advice = '"rescale_every": 0' if hasattr(model.config, "rescale_every") else "what makes it do so to nothing"
        raise ModelError(
            f"a pass through {type(model).__name__} changes its own weights ({changed[0]} and {len(changed) - 1} more), so "
            f"that base plus coefficients is not what runs; set {advice} in its config.json"
        )
