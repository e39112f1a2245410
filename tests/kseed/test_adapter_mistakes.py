"""A user's slips with a prepared model: each is refused in a line before it costs anything, and none gives a wrong ledger."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kseed.test_adapter import POOL, Net, digest, loss_of, numbers_of, refused, some_ids, train
from tests.kseed.test_trainers import prepared as prepared_demo
from tests.kseed.test_trainers import rows

import fedkseed as fk
from fedkseed.errors import BindingError, LedgerError

ANOTHER = "another optimizer than the one that fk.prepare gave"


@pytest.mark.parametrize("of_all", [False, True], ids=["over the numbers", "over all parameters"])
def test_another_optimizer_over_a_prepared_model(of_all: bool) -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    other = torch.optim.AdamW(model.parameters() if of_all else [numbers_of(optimizer)], lr=1e-2)
    loss_of(model, some_ids(0)).backward()
    other.step()
    refused(lambda: fk.ledger_of(model), ANOTHER, LedgerError)
    refused(lambda: loss_of(model, some_ids(1)).backward(), ANOTHER)
    refused(optimizer.step, ANOTHER)


def test_a_trainer_that_was_not_given_the_optimizer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _, _ = prepared_demo()
    args = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and transformers about each other
        refused(Trainer(model, args, train_dataset=rows()).train, r"optimizers=\(optimizer, None\)")


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def trainer(steps: int) -> tuple[Any, Any]:
        model, optimizer, schedule = prepared_demo()
        args = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            save_only_model=True,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return model, Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, schedule))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(2)[1].train()
        _, again = trainer(4)
        going_on = partial(again.train, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        refused(going_on, "^the weights were changed by something else since the last step; load the optimizer's state_dict")


def replace_the_head(model: Any) -> None:
    model.head = torch.nn.Linear(12, 16, bias=False)


def untie(model: Any) -> None:
    model.head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())


def add_a_layer(model: Any) -> None:
    model.more = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("change", [replace_the_head, untie, add_a_layer])
def test_a_model_that_has_other_parameters_now(change: Callable[[Any], None]) -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(1))
    change(model)
    loss_of(model, some_ids(1)).backward()
    refused(
        optimizer.step, "^(head.weight|more.bias) is another parameter than the one that was prepared; change the model first"
    )
    refused(lambda: fk.ledger_of(model), "^(head.weight|more.bias) is another parameter", LedgerError)


def test_a_frozen_tensor_that_is_changed() -> None:
    base = Net()
    base.norm.weight.requires_grad_(False)
    model, optimizer = fk.prepare(base, POOL, lr=1e-2)
    train(model, optimizer, range(1))
    with torch.no_grad():
        base.norm.weight.mul_(2)
    refused(lambda: fk.ledger_of(model), "^a tensor that is not tuned was changed since the model was prepared", LedgerError)
    loss_of(model, some_ids(1)).backward()
    refused(optimizer.step, "^the weights were changed by something else")


def test_a_base_that_is_another_model_s(tmp_path: Path) -> None:
    folder, other = tmp_path / "base", tmp_path / "other"
    from fedkseed.demo import model_folder
    from fedkseed.models.loading import load_model

    model = load_model(model_folder(), "float32")
    model.save_pretrained(folder)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(1)
    model.save_pretrained(other)
    base = load_model(folder)
    before = digest(base)
    refused(
        lambda: fk.prepare(base, POOL, lr=1e-2, base=other), "^model.norm.weight is not what .*other holds; give", BindingError
    )
    assert digest(base) == before
    half = load_model(folder, "bfloat16")  # the type's rounding is no difference
    fk.prepare(half, POOL, lr=1e-2, base=folder)


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_part_of_a_model_that_is_tuned(inner_first: bool) -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.more = Net(), torch.nn.Linear(2, 2)

    outer = Outer()
    first, second = (outer.net, outer) if inner_first else (outer, outer.net)
    fk.prepare(first, POOL, lr=1e-2)
    refused(lambda: fk.prepare(second, POOL, lr=1e-2), "or a part of it, is being tuned", BindingError)
    fk.release(first)
    fk.prepare(second, POOL, lr=1e-2)


def test_a_prepared_model_is_neither_copied_nor_pickled() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(1))
    text = r"^a prepared model cannot be copied or pickled, .* fk.release\(model\)"
    refused(lambda: copy.deepcopy(model), text, BindingError)
    refused(lambda: copy.deepcopy((model, optimizer)), text, BindingError)
    refused(lambda: pickle.dumps(model), text, BindingError)
    refused(lambda: torch.save(model, io.BytesIO()), text, BindingError)
    fk.release(model)
    assert digest(copy.deepcopy(model)) == digest(model)


def test_a_sequential_runs_while_it_is_tuned() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    x = torch.ones(2, 4)
    expected = plain(x)
    model, optimizer = fk.prepare(plain, POOL, lr=1e-2)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)


def test_release_leaves_nothing_of_the_base_in_memory() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(1))
    tuner: Any = weakref.ref(model.get_submodule("fedkseed"))
    fk.release(model)
    gc.collect()
    assert tuner() is None
    refused(optimizer.step, "^the model was released; call fk.prepare for a new optimizer")


@pytest.mark.parametrize("steps", [0, 1])
def test_a_cast_after_it_was_prepared(steps: int) -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(steps))
    model.to(torch.bfloat16)
    loss_of(model, some_ids(0)).backward()
    refused(optimizer.step, "^the model was cast to torch.bfloat16 after it was prepared; load it in the type that is meant")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lr": lr}, f"^lr is {lr!r}; expected a finite number above 0")
        for lr in (-1.0, 0, float("nan"), float("inf"), "x", None)
    ]
    + [
        ({"model": "MODEL"}, "^prepare was given a str and a SeedPool; expected a torch module and a fk.SeedPool"),
        ({"pool": 4096}, "^prepare was given a Net and a int; expected"),
        ({"wire": []}, r"^wire is \[\]; expected one of"),
        ({"optimizer": "adam"}, "^optimizer 'adam' made none .*; expected a class such as torch.optim.AdamW"),
        ({"optimizer": None}, "^optimizer None made none"),
        ({"optimizer": partial(torch.optim.SGD, speed=3)}, "^optimizer functools.partial.* made none .*speed"),
        ({"optimizer": torch.optim.LBFGS}, "^optimizer is LBFGS, which needs more than a gradient a step"),
        ({"optimizer": torch.optim.SparseAdam}, "^optimizer is SparseAdam, which needs more"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_cannot_be_prepared_with(given: dict[str, Any], text: str) -> None:
    model = Net()
    refused(lambda: fk.prepare(**{"model": model, "pool": POOL, "lr": 1e-2, **given}), text)
    assert list(model.state_dict()) == list(Net().state_dict())


def test_a_model_that_has_gradients_can_be_prepared_once_they_are_gone() -> None:
    model = Net()
    loss_of(model, some_ids(0)).backward()
    for _ in range(2):
        refused(lambda: fk.prepare(model, POOL, lr=1e-2), r"^embed\.weight has a gradient already; call model\.zero_grad\(\)")
    refused(lambda: fk.release(model), "^this Net is not being tuned; call fk.prepare first")
    model.zero_grad()
    model, optimizer = fk.prepare(model, POOL, lr=1e-2)
    train(model, optimizer, range(1))
    assert fk.release(model).round == 1


class NoOptimizer:
    """Has what is looked at, and neither hooks nor a place for a weak reference."""

    __slots__ = ("param_groups",)

    def __init__(self, parameters: list[Any], lr: float) -> None:
        self.param_groups = [{"params": parameters}]


@pytest.mark.parametrize("made", [NoOptimizer, lambda parameters, lr: None], ids=["look-alike", "nothing"])
def test_what_is_no_optimizer_of_torch_leaves_the_model_alone(made: Any) -> None:
    model = Net()
    refused(lambda: fk.prepare(model, POOL, lr=1e-2, optimizer=made), "^optimizer gave a No.*; expected a class such as torch")
    fk.prepare(model, POOL, lr=1e-2)


def test_two_parts_that_are_tuned_have_a_ledger_each() -> None:
    both = torch.nn.ModuleDict({"enc": Net(), "dec": Net()})
    for net in both.values():
        fk.prepare(net, POOL, lr=1e-2)
    for call in (fk.ledger_of, fk.release):
        refused(lambda call=call: call(both), "^2 parts of this ModuleDict are being tuned; call it on each: enc, dec$")
    fk.release(both["enc"])
    assert fk.release(both).round == 0  # the one that is left


def test_a_model_in_another_layout_than_it_was_prepared_in() -> None:
    model, optimizer = fk.prepare(torch.nn.Conv2d(3, 4, 3), POOL, lr=1e-2)
    model.to(memory_format=torch.channels_last)
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    before = model.weight.detach().clone()
    refused(
        optimizer.step, "^a weight is not contiguous in memory any more; call model.to.memory_format=torch.contiguous_format"
    )
    assert torch.equal(model.weight, before)
    assert fk.ledger_of(model).round == 0
    model.to(memory_format=torch.contiguous_format)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_another_default_type() -> None:
    base = torch.nn.Linear(4, 4)
    torch.set_default_dtype(torch.float64)
    try:
        model, optimizer = fk.prepare(base, POOL, lr=1e-2)
        model(torch.ones(1, 4, dtype=torch.float32)).sum().backward()
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert numbers_of(optimizer).dtype == torch.float32
    assert fk.release(model).round == 1


def test_a_weight_that_is_no_number_and_not_used() -> None:
    base = Net()
    base.embed.weight.data[15] = float("nan")

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return model.inner(model.embed(torch.arange(4))).square().sum()  # type: ignore[operator]

    model, optimizer = fk.prepare(base, POOL, lr=1e-2)
    assert fk.ledger_of(model).round == 0
    loss(model).backward()
    optimizer.step()
    assert fk.release(model).round == 1


def test_a_state_whose_columns_have_another_length() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(1))
    before = digest_of(model)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(64)
    refused(lambda: optimizer.load_state_dict(state), "^the state_dict's optimizer state is not of 128 numbers; it is damaged")
    assert digest_of(model) == before
    train(model, optimizer, range(1))


def digest_of(model: torch.nn.Module) -> str:
    return fk.ledger_of(model).digest()


def test_what_is_no_prepared_model() -> None:
    refused(lambda: fk.ledger_of(None), "^model is None; expected the module that fk.prepare gave")  # type: ignore[arg-type]
    refused(lambda: fk.release(Net()), "^this Net is not being tuned; call fk.prepare first")
