"""A quantised base: its float tensors are tuned, a line says so, and one other integer is another base."""

import hashlib
import logging
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import laws

import fedkseed as fk
from fedkseed.errors import BindingError, LedgerError
from fedkseed.runs.resolution import unmoved
from fedkseed.runs.task import tune_all_but


class Wrapped(torch.Tensor):
    """A float tensor to look at, made of integers and a scale, as torchao's are; views of it are not to be had."""

    q: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, q: torch.Tensor, scale: torch.Tensor) -> "Wrapped":
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.q, made.scale = q, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["scale", "q"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].scale)
        raise NotImplementedError(func)


class Quantised(torch.nn.Module):
    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        q = torch.randint(-128, 128, (8, 40), dtype=torch.int8, generator=draw)
        scale = torch.rand(8, 1, generator=draw)
        self.weight = torch.nn.Parameter(Wrapped(q, scale) if wrapped else q, requires_grad=False)
        self.norm = torch.nn.Parameter(torch.randn(40, generator=draw))
        self.scale = torch.nn.Parameter(scale.clone())


wrapping = pytest.mark.parametrize("wrapped", [False, True], ids=["integers", "wrapper"])
POOL = fk.SeedPool(1, 16)


def integers(model: Quantised) -> torch.Tensor:
    found: torch.Tensor = getattr(model.weight, "q", model.weight)
    return found


@wrapping
def test_float_tensors_are_tuned_and_a_line_says_so(wrapped: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Quantised(wrapped)
    kept, before = integers(model).clone(), {name: x.clone() for name, x in (("norm", model.norm), ("scale", model.scale))}
    bound = fk.bind(model, POOL)
    kind = "Wrapped" if wrapped else "int8"
    said = f"left as they are: 1 quantised tensor, such as weight ({kind}); tuned: 2 others, such as norm"
    assert caplog.messages == [said]
    a = np.linspace(-1, 1, 16).astype(np.float32)
    bound.rebuild(a)
    assert torch.equal(integers(model), kept)
    assert all(not torch.equal(model.get_parameter(name), x) for name, x in before.items())
    fresh, ledger = Quantised(wrapped), fk.Ledger.of(bound, a)
    assert ledger.base.frozen == ("weight",)
    fk.apply(fresh, ledger)
    assert fk.bind(fresh, POOL).digest() == bound.digest()
    with fk.applied(Quantised(wrapped), ledger):
        pass


@wrapping
def test_a_loop_tunes_them_and_says_so_too(wrapped: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = fk.prepare(Quantised(wrapped), POOL, lr=1e-2)
    assert [line.split(",")[0] for line in caplog.messages] == ["left as they are: 1 quantised tensor"]
    (model.norm.square().sum() + model.scale.sum()).backward()
    optimizer.step()
    ledger, fresh = fk.release(model), Quantised(wrapped)
    fk.apply(fresh, ledger)
    assert fk.bind(fresh, POOL).digest() == fk.bind(model, POOL).digest()
    assert not torch.equal(fresh.norm, Quantised(wrapped).norm)


@wrapping
def test_another_integer_or_scale_is_another_base(wrapped: bool) -> None:
    model = Quantised(wrapped)
    ledger = fk.Ledger.of(fk.bind(model, POOL), np.zeros(16, np.float32))
    assert fk.bind(Quantised(wrapped), POOL).identity() == ledger.base
    inner = [integers] + ([lambda model: model.weight.scale] if wrapped else [])
    for tensor in inner:
        other = Quantised(wrapped)
        tensor(other).view(torch.uint8)[0, 0] ^= 1  # type: ignore[no-untyped-call]
        with pytest.raises(LedgerError, match="weight is the first of 1 parameters"):
            fk.apply(other, ledger)


def test_the_digest_of_a_tensor_that_is_made_of_others_by_hand() -> None:
    model = Quantised(wrapped=True)
    parts = [laws.tensor_digest("weight.q", model.weight.q), laws.tensor_digest("weight.scale", model.weight.scale)]
    others = [laws.tensor_digest(name, model.get_parameter(name).detach()) for name in ("norm", "scale")]
    wanted = hashlib.sha256(b"".join([*others, hashlib.sha256(b"".join(parts)).digest()])).hexdigest()
    bound = fk.bind(model, POOL)
    assert bound.digest() == bound.identity().fingerprint == wanted


def test_a_quantised_tensor_that_is_to_be_tuned_is_refused() -> None:
    model = Quantised(wrapped=True)
    model.weight.requires_grad_(True)
    with pytest.raises(
        BindingError, match=r"weight is quantised \(Wrapped\); only the float tensors beside it can be tuned: freeze it"
    ):
        fk.bind(model, POOL)


@wrapping
def test_a_run_tunes_the_others(wrapped: bool) -> None:
    model = Quantised(wrapped)
    tune_all_but(model, ["scale"])
    assert [name for name, x in model.named_parameters() if x.requires_grad] == ["norm"]
    assert unmoved(model, 1e-3) == 0
    assert unmoved(model, 1e-30) > 0.9


def test_of_any_other_model_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fedkseed"):
        fk.bind(torch.nn.Linear(3, 4), POOL)
    assert caplog.messages == []
