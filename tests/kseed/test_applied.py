"""Tuned models in turn over one base: the bits of `apply`, the base back to the bit, and nothing else held or changed."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.kseed.test_apply import FROZEN, SHAPES, TYPES, model, stored
from tests.support import laws
from tests.support.rows import families, kinds
from transformers import AutoModelForCausalLM

import fedkseed as fk
from fedkseed.errors import BindingError, FedKSeedError, InvalidValueError, LedgerError
from fedkseed.kseed import applied as module
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model


@pytest.fixture(autouse=True)
def _nothing_is_held() -> Iterator[None]:
    yield
    assert len(module._TUNED) == 0


def ledger(seed: int, kind: torch.dtype = torch.float32, family: str = "hadamard", frozen: tuple[str, ...] = ()) -> Ledger:
    bound = fk.bind(model(kind, frozen), fk.SeedPool(seed, 5, family))
    return Ledger.of(bound, (0.01 * np.random.default_rng(seed).standard_normal(5)).astype(np.float32))


def bits_of(*ledgers: Ledger, kind: torch.dtype = torch.float32) -> dict[str, bytes]:
    fresh = model(kind)
    fk.apply(fresh, list(ledgers))
    return laws.all_bits(fresh)


@families
@kinds
def test_inside_it_is_the_tuned_model_and_outside_the_base(family: str, kind: torch.dtype) -> None:
    a, b, subject = ledger(1, kind, family), ledger(2, kind, family), model(kind)
    base = laws.all_bits(subject)  # zeros of both signs and subnormals among them
    with fk.applied(subject, a) as on:
        assert on is a
        assert laws.all_bits(subject) == bits_of(a, kind=kind) != base
        assert fk.swap(subject, a, b) is b
        assert laws.all_bits(subject) == bits_of(b, kind=kind)
        fk.swap(subject, b, [a, 0.5 * b])
        assert laws.all_bits(subject) == bits_of(a, 0.5 * b, kind=kind)
        fk.swap(subject, a + 0.5 * b, a)
        assert laws.all_bits(subject) == bits_of(a, kind=kind)
    assert laws.all_bits(subject) == base


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_base_is_back_after_an_exception(error: type[BaseException]) -> None:
    subject = model()
    base = laws.all_bits(subject)

    def use() -> None:
        with fk.applied(subject, ledger(1)):
            subject.get_parameter("block.w").data.fill_(7)  # whatever was done inside
            raise error

    with pytest.raises(error):
        use()
    assert laws.all_bits(subject) == base


def test_the_base_is_back_where_writing_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, subject = ledger(1), ledger(2), model()
    base, write = laws.all_bits(subject), module.write_tuned

    def interrupted(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with fk.applied(subject, a):
        monkeypatch.setattr(module, "write_tuned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fk.swap(subject, a, b)
        monkeypatch.undo()
        fk.swap(subject, a, b)  # nobody knows what it held; it holds b now
        assert laws.all_bits(subject) == bits_of(b)
    assert laws.all_bits(subject) == base
    monkeypatch.setattr(module, "write_tuned", interrupted)
    with pytest.raises(KeyboardInterrupt), fk.applied(subject, a):
        pass
    assert laws.all_bits(subject) == base


def test_frozen_parameters_are_neither_copied_nor_moved() -> None:
    a, b, subject = ledger(1, frozen=FROZEN), ledger(2, frozen=FROZEN), model(frozen=FROZEN)
    norm = subject.get_parameter("block.norm")
    with fk.applied(subject, a):
        fk.swap(subject, a, b)
        assert laws.all_bits(subject) == bits_of(b)
        norm.data.fill_(3)
    assert (norm == 3).all()


@pytest.mark.parametrize("run", TYPES)
@pytest.mark.parametrize("loaded", TYPES)
def test_a_model_that_was_loaded_in_another_type(tmp_path: Path, run: str, loaded: str) -> None:
    """Its base is in its files; what it was before is what it is afterwards."""
    folder = stored(tmp_path / "model")
    pool = fk.SeedPool(3, 64)
    a = Ledger.of(fk.bind(load_model(folder, run), pool), np.linspace(-0.02, 0.03, 64).astype(np.float16))  # type: ignore[arg-type]
    b = replace(a, coefficients=-a.coefficients)

    def load() -> torch.nn.Module:
        fresh: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, loaded))
        return fresh

    def tuned(one: Ledger) -> dict[str, bytes]:
        fresh = load()
        fk.apply(fresh, one)
        return laws.all_bits(fresh)

    subject = load()
    before = laws.all_bits(subject)
    with fk.applied(subject, a):
        assert laws.all_bits(subject) == tuned(a) != before
        fk.swap(subject, a, b)
        assert laws.all_bits(subject) == tuned(b)
    assert laws.all_bits(subject) == before


def refused(subject: torch.nn.Module, kind: type[FedKSeedError], says: str, *swapped: Ledger) -> None:
    """In one line, with nothing changed."""
    before = laws.all_bits(subject)

    def use() -> None:
        if len(swapped) == 2:
            fk.swap(subject, *swapped)
            return
        with fk.applied(subject, *swapped):
            raise AssertionError

    with pytest.raises(kind, match=says) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert laws.all_bits(subject) == before


def test_mistakes_are_one_line_and_change_nothing(tmp_path: Path) -> None:
    a, b, subject = ledger(1), ledger(2), model()
    other = replace(b, base=replace(b.base, fingerprint="ab" * 32))
    refused(subject, InvalidValueError, r"is not inside `with fedkseed\.applied\(model, ledger\)`, which keeps the base", a, b)
    refused(subject, LedgerError, "is not the ledger's base", other)
    refused(subject, BindingError, "no parameter", replace(a, base=replace(a.base, frozen=tuple(sorted(SHAPES)))))
    with fk.applied(subject, a):
        refused(
            subject,
            InvalidValueError,
            r"the model holds <.*> \(digest \w{16}\), not <.*> \(digest \w{16}\); give",
            b,
            a,
        )
        refused(subject, LedgerError, "the second is over the base model abab", a, other)
        refused(subject, LedgerError, "'block.norm'", a, ledger(1, frozen=FROZEN))
        refused(subject, InvalidValueError, r"inside `fedkseed\.applied` already; use `fedkseed\.swap` there", a)
        refused(subject, InvalidValueError, "inside `fedkseed.applied` already", a - a)
        with pytest.raises(LedgerError, match="none: cannot read the ledger"):
            fk.swap(subject, a, tmp_path / "none")
        fk.swap(subject, a, b)  # the control
    refused(subject, InvalidValueError, "is not inside", b, a)


def test_a_swap_follows_memory_that_was_replaced() -> None:
    a, b, subject = ledger(1), ledger(2), model()
    base = laws.all_bits(subject)
    with fk.applied(subject, a):
        for x in subject.parameters():
            x.data = x.data.clone()
        fk.swap(subject, a, b)
        assert laws.all_bits(subject) == bits_of(b)
    assert laws.all_bits(subject) == base


@pytest.mark.parametrize("there", [{"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}], ids=["type", "layout"])
def test_a_swap_refuses_another_type_or_layout(there: dict[str, Any]) -> None:
    subject = torch.nn.Conv2d(3, 4, 3)
    a = Ledger.of(fk.bind(subject, fk.SeedPool(1, 5)), np.full(5, 0.01, np.float32))
    base = subject.weight.detach().clone()
    with fk.applied(subject, a):
        subject.to(**there)
        says = r"^(bias|weight) is .* now and was torch\.float32 on cpu when the block was entered; leave it, and enter"
        refused(subject, InvalidValueError, says, a, 2.0 * a)
        subject.to(torch.float32, memory_format=torch.contiguous_format)
        fk.swap(subject, a, 2.0 * a)  # nothing has changed: it still holds the first
    assert torch.equal(subject.weight, base)


def test_a_swap_refuses_other_parameters() -> None:
    subject = torch.nn.Linear(3, 4)
    a = Ledger.of(fk.bind(subject, fk.SeedPool(1, 5)), np.full(5, 0.01, np.float32))
    held = subject.weight
    with fk.applied(subject, a):
        subject.weight = torch.nn.Parameter(held.detach().clone())
        refused(subject, InvalidValueError, r"^weight is another parameter than when the block was entered", a, 2.0 * a)
        subject.weight = held
        fk.swap(subject, a, 2.0 * a)  # the control


@pytest.mark.parametrize("thing", [None, "MODEL"])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    a, says = ledger(1), r"^model is a (NoneType|str); expected a torch\.nn\.Module$"
    for call in (
        lambda: fk.swap(thing, a, a),
        lambda: fk.applied(thing, a).__enter__(),
        lambda: fk.apply(thing, a),
    ):
        with pytest.raises(BindingError, match=says):
            call()


def test_threads_that_enter_at_once_leave_the_base() -> None:
    """One of them enters, the others are told so: two would each keep what the other had written."""
    subject, a = model(), ledger(1)
    base, entered = laws.all_bits(subject), []

    def enter() -> None:
        start.wait()
        with contextlib.suppress(InvalidValueError), fk.applied(subject, a):
            entered.append(laws.all_bits(subject))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            start = threading.Barrier(3)
            threads = [threading.Thread(target=enter) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert laws.all_bits(subject) == base
    finally:
        sys.setswitchinterval(before)
    assert len(entered) >= 50
    assert set(map(str, entered)) == {str(bits_of(a))}


def test_a_checkpoint_and_its_published_form_are_one_ledger() -> None:
    bound = fk.bind(model(), fk.SeedPool(1, 5))
    run = Ledger.start(bound.pool, bound.identity(), "float16")
    subject = model()
    with fk.applied(subject, run):
        fk.swap(subject, run.published(), ledger(2))
