"""Tuning in K numbers by an ordinary loop: what `fk.prepare` gives is an optimiser of torch, and the model is its ledger's."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import laws
from tests.support.rows import backends, kinds, quick_backends
from torch.utils.checkpoint import checkpoint

import fedkseed as fk
from fedkseed.demo import model_folder
from fedkseed.errors import BindingError, FedKSeedError, InvalidValueError, LedgerError
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.kseed.coding import BITS
from fedkseed.kseed.gradient_steps import folded_gradient, gradient_steps
from fedkseed.kseed.thinning import thinned
from fedkseed.models.loading import load_model
from fedkseed.noise.families import transform

POOL = fk.SeedPool(0x0123456789ABCDEF, 128)
SGD = torch.optim.SGD


class Net(torch.nn.Module):
    """A next-token model of 700 parameters whose embedding is its head."""

    def __init__(self, kind: torch.dtype = torch.float32, reentrant: bool | None = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.embed, self.head = torch.nn.Embedding(16, 12), torch.nn.Linear(12, 16, bias=False)
        self.layer, self.norm = torch.nn.Linear(12, 12), torch.nn.LayerNorm(12)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw).mul_(0.3).to(kind)
        self.head.weight = self.embed.weight
        self.reentrant = reentrant

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.head(x)  # type: ignore[no-any-return]

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.tanh(self.layer(x)))  # type: ignore[no-any-return]


def some_ids(seed: int, count: int = 8) -> torch.Tensor:
    return torch.randint(16, (count, 6), generator=torch.Generator().manual_seed(seed))


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(4)) -> None:
    for step in steps:
        loss_of(model, some_ids(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def numbers_of(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    return optimizer.param_groups[0]["params"][0]  # type: ignore[no-any-return]


def digest(model: torch.nn.Module) -> str:
    return fk.bind(model, POOL).digest()


# --- The promise: at any time the model is the one that its ledger gives ---


@backends
@pytest.mark.parametrize("wire", ["float16", "int4"])
def test_the_ledger_rebuilds_the_trained_model_to_the_bit(backend: str, wire: str, tmp_path: Path) -> None:
    """After every step, from its file, on every backend."""
    model, optimizer = fk.prepare(Net(), POOL, lr=3e-2, wire=wire)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        fk.ledger_of(model).save(tmp_path / "l.safetensors")
        fresh = Net().to(laws.device_of(backend))
        fk.apply(fresh, tmp_path / "l.safetensors", backend)
        assert laws.all_bits(fresh) == laws.all_bits(Net_of(model))
    ledger = fk.release(model)
    assert digest(model) == digest(fresh.cpu())
    assert ledger.round == 3
    assert not ledger.is_checkpoint


def Net_of(model: torch.nn.Module) -> torch.nn.Module:  # noqa: N802
    """A plain model with the weights of a prepared one."""
    plain = Net(next(model.parameters()).dtype)
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.parametrize("wire", BITS)
def test_so_it_is_on_every_wire(wire: str) -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=3e-2, wire=wire)
    train(model, optimizer)
    fresh = Net()
    fk.apply(fresh, fk.Ledger.decode(fk.ledger_of(model).encode()))
    assert laws.all_bits(fresh) == laws.all_bits(Net_of(model)) != laws.all_bits(Net())


@quick_backends
@pytest.mark.parametrize("threads", [1, 2])
def test_an_adapter_that_was_trained_elsewhere_is_the_model_that_it_was_there(
    backend: str, threads: int, torch_threads: None
) -> None:
    """On whichever machine this runs: three steps over the demo's model, int8, as of 2026-11-27."""
    torch.set_num_threads(threads)
    model = load_model(model_folder(), "float32").to(laws.device_of(backend))
    ledger = fk.apply(model, Path(__file__).parents[1] / "vectors" / "adapter.safetensors", backend)
    assert ledger.digest() == "94a6c105acce8a7f6ed20ee4594aa1f4736f1ccee35f953f779cd781719c94a3"
    assert digest(model.cpu()) == "1923b0e73c3a083b682069e0bac03c88b11d58b5e80633dda97ef424372c2bb4"


@kinds
@pytest.mark.parametrize("movement", ["absolute", "proportional"])
@pytest.mark.parametrize(
    "pool", [POOL, fk.SeedPool(1, 100), fk.SeedPool(1, 5, "gaussian")], ids=["table", "no table", "gaussian"]
)
def test_so_it_is_in_every_type_and_space(kind: torch.dtype, movement: Any, pool: fk.SeedPool) -> None:
    model, optimizer = fk.prepare(Net(kind), pool, lr=3e-2, movement=movement)
    before = loss_of(model, some_ids(0)).item()
    train(model, optimizer)
    fresh = Net(kind)
    fk.apply(fresh, fk.ledger_of(model))
    assert laws.all_bits(fresh) == laws.all_bits(Net_of(model)) != laws.all_bits(Net(kind))
    assert np.isfinite(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_so_it_is_on_any_number_of_threads(threads: int, torch_threads: None) -> None:
    model, optimizer = fk.prepare(torch.nn.Linear(300, 300), POOL, lr=1e-2)
    base = copy.deepcopy(model.state_dict())
    model(torch.ones(1, 300)).square().mean().backward()
    optimizer.step()
    ledger = fk.release(model)
    torch.set_num_threads(threads)
    fresh = torch.nn.Linear(300, 300)
    fresh.load_state_dict(base)
    fk.apply(fresh, ledger)
    assert digest(fresh) == digest(model)


def test_a_ledger_of_other_numbers_is_another_model() -> None:
    """The negative control: the promise is not kept by weights that hardly move."""
    model, optimizer = fk.prepare(Net(), POOL, lr=3e-2)
    train(model, optimizer)
    fresh = Net()
    fk.apply(fresh, thinned(fk.release(model), 8))
    assert digest(fresh) != digest(model)


# --- An optimiser like any other ---


def test_steps_are_those_of_a_gradient_client() -> None:
    """The same gradients, the same Adam: numbers lie together within float32, and not where the pool is another."""
    changes = []
    for pool in (POOL, fk.SeedPool(5, 128)):
        bound = fk.bind(Net(), pool)

        def measure(t: int, bound: fk.Binding = bound) -> tuple[np.ndarray, float]:
            return folded_gradient(bound, "table", lambda: loss_of(bound.model, some_ids(t)))

        changes.append(gradient_steps(bound, np.zeros(128), "table", 4, measure, OPTIMIZERS["adam"], 1e-2).change)
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2, wire="float32")
    train(model, optimizer)
    numbers = numbers_of(optimizer).detach().double().numpy()
    assert np.abs(numbers - changes[0]).max() < 1e-4 * np.abs(numbers).max()
    assert np.abs(numbers - changes[1]).max() > 0.5 * np.abs(numbers).max()


@pytest.mark.parametrize(
    "factory",
    [partial(torch.optim.SGD, momentum=0.99), torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad],
    ids=["momentum", "adamw", "rmsprop", "adagrad"],
)
def test_any_optimiser_of_torch_learns(factory: Any) -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2, optimizer=factory)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = loss_of(model, some_ids(0)).item()
    for _ in range(8):
        train(model, optimizer, range(1))
    assert loss_of(model, some_ids(0)).item() < 0.99 * before


def test_a_gradient_is_the_projection_and_weights_keep_none() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2, optimizer=SGD, wire="float32")
    plain = Net()
    loss_of(plain, some_ids(0)).backward()
    gradients = {name: x.grad for name, x in plain.named_parameters() if x.grad is not None}
    u = fk.bind(Net(), POOL).project(gradients)
    loss_of(model, some_ids(0)).backward()
    table = numbers_of(optimizer).grad
    assert table is not None
    np.testing.assert_allclose(transform(table.double().numpy()), u, rtol=1e-4, atol=1e-4 * np.abs(u).max())
    assert [name for name, x in model.named_parameters() if x.grad is not None] == ["fedkseed.numbers"]


def test_gradients_are_gone_while_backward_runs() -> None:
    """When a weight's gradient is made, no other weight has one."""
    model, _ = fk.prepare(Net(), POOL, lr=1e-2)
    weights = [x for name, x in model.named_parameters() if not name.startswith("fedkseed")]
    alive: list[int] = []
    for weight in weights:  # runs before the hook that folds it
        weight.register_hook(lambda g: alive.append(sum(x.grad is not None for x in weights)))  # type: ignore[no-untyped-call]
    loss_of(model, some_ids(0)).backward()
    assert len(alive) == len(weights)
    assert max(alive) == 0


def test_accumulation_is_one_larger_batch_and_zero_grad_forgets() -> None:
    whole, parts = (fk.prepare(Net(), POOL, lr=1e-2) for _ in range(2))
    loss_of(whole[0], some_ids(0, 8)).backward()
    loss_of(parts[0], some_ids(7)).backward()
    parts[1].zero_grad()
    for half in some_ids(0, 8).split(4):
        (loss_of(parts[0], half) / 2).backward()
    one, other = numbers_of(whole[1]).grad, numbers_of(parts[1]).grad
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(reentrant: bool) -> None:
    plain, kept = fk.prepare(Net(), POOL, lr=1e-2), fk.prepare(Net(reentrant=reentrant), POOL, lr=1e-2)
    for model, _ in (plain, kept):
        loss_of(model, some_ids(0)).backward()
    torch.testing.assert_close(numbers_of(plain[1]).grad, numbers_of(kept[1]).grad, rtol=1e-4, atol=1e-6)


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    (model, optimizer), (other, other_optimizer) = (fk.prepare(Net(), POOL, lr=1e-2) for _ in range(2))

    def fail(gradient: torch.Tensor) -> None:
        raise MemoryError("no room")

    handle = model.get_parameter("layer.weight").register_hook(fail)  # type: ignore[no-untyped-call]
    with pytest.raises(MemoryError, match="no room"):
        loss_of(model, some_ids(5)).backward()
    handle.remove()
    model.zero_grad()
    train(model, optimizer, range(2))
    train(other, other_optimizer, range(2))
    assert digest(Net_of(model)) == digest(Net_of(other))


def test_clipping_and_schedules_work_on_the_numbers() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1.0, optimizer=SGD, wire="float32")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        before = numbers_of(optimizer).detach().clone()
        loss_of(model, some_ids(step)).backward()
        gradient = numbers_of(optimizer).grad
        assert gradient is not None
        norm = gradient.norm()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3) == pytest.approx(norm.item())
        optimizer.step()
        schedule.step()
        assert (numbers_of(optimizer) - before).norm().item() == pytest.approx(1e-3 * 0.5**step, rel=1e-3)
        optimizer.zero_grad()


def test_the_numbers_gradient_is_as_long_as_the_weights() -> None:
    """In the mean over pools, so that a clip norm means what it does for all weights."""
    plain = Net()
    loss_of(plain, some_ids(0)).backward()
    expected = sum(x.grad.double().square().sum().item() for x in plain.parameters() if x.grad is not None)
    squares = []
    for key in range(60):
        model, optimizer = fk.prepare(Net(), fk.SeedPool(key, 128), lr=1e-2)
        loss_of(model, some_ids(0)).backward()
        gradient = numbers_of(optimizer).grad
        assert gradient is not None
        squares.append(gradient.double().square().sum().item())
    assert np.mean(squares) == pytest.approx(expected, rel=0.15)


def test_a_grad_scaler_scales_and_leaves_infinite_steps_out() -> None:
    """Also over half-precision weights, of which torch's own refuses to unscale gradients."""
    model, optimizer = fk.prepare(Net(torch.bfloat16), POOL, lr=1e-2, optimizer=SGD, wire="float32")
    plain, plain_optimizer = fk.prepare(Net(torch.bfloat16), POOL, lr=1e-2, optimizer=SGD, wire="float32")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, some_ids(0))).backward()
    scaler.step(optimizer)
    scaler.update()
    train(plain, plain_optimizer, range(1))
    assert numbers_of(optimizer).any()
    torch.testing.assert_close(numbers_of(optimizer), numbers_of(plain_optimizer), rtol=1e-2, atol=1e-6)
    optimizer.zero_grad()
    there = laws.all_bits(Net_of(model))
    scaler.scale(loss_of(model, some_ids(1)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert laws.all_bits(Net_of(model)) == there


def test_no_generator_is_read_or_moved() -> None:
    def states() -> tuple[bytes, str]:
        return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state())  # noqa: NPY002

    model = Net()
    before = states()
    train(*fk.prepare(model, POOL, lr=1e-2))
    assert states() == before


# --- State ---


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state as a checkpoint's file gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one() -> None:
    """The model's state may be loaded too or not: the numbers say where it is."""
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(2))
    state, weights = saved(optimizer), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2, 4))
    for load in (False, True):
        fresh, again = fk.prepare(Net(), POOL, lr=1e-2)
        if load:
            fresh.load_state_dict(weights)
        again.load_state_dict(copy.deepcopy(state))
        train(fresh, again, range(2, 4))
        assert fk.ledger_of(fresh).digest() == fk.ledger_of(model).digest()
        assert digest(Net_of(fresh)) == digest(Net_of(model))


def test_a_prepared_models_state_dict_is_an_ordinary_models() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer)
    assert list(model.state_dict()) == list(Net().state_dict())
    assert model.load_state_dict(Net_of(model).state_dict(), strict=True).missing_keys == []


# --- Mistakes: one line, and nothing has changed ---


@pytest.fixture
def prepared() -> Iterator[tuple[torch.nn.Module, torch.optim.Optimizer]]:
    """After a step; its weights and numbers are the same when the test is over."""
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(1))
    before = laws.all_bits(Net_of(model)), numbers_of(optimizer).detach().clone()
    yield model, optimizer
    assert laws.all_bits(Net_of(model)) == before[0]
    assert torch.equal(numbers_of(optimizer), before[1])


def refused(call: Callable[[], Any], text: str, kind: type[FedKSeedError] = InvalidValueError) -> None:
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


Prepared = tuple[torch.nn.Module, torch.optim.Optimizer]


def test_a_step_without_backward(prepared: Prepared) -> None:
    refused(prepared[1].step, "^step without a gradient: no backward pass .* call loss.backward")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(prepared: Prepared, bad: float) -> None:
    model, optimizer = prepared
    (loss_of(model, some_ids(0)) * bad).backward()
    refused(optimizer.step, "^the gradient of step 2 is not finite; call zero_grad")
    optimizer.zero_grad()


def test_a_closure(prepared: Prepared) -> None:
    loss_of(prepared[0], some_ids(0)).backward()
    refused(lambda: prepared[1].step(lambda: 0.0), "^step was given a closure; call loss.backward")
    prepared[1].zero_grad()


def test_a_rate_that_leads_beyond_all_numbers() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e37, optimizer=SGD)
    loss_of(model, some_ids(0)).backward()
    refused(optimizer.step, "a number to be sent is .* lower the rate")
    assert not numbers_of(optimizer).any()
    assert digest(Net_of(model)) == digest(Net())


def test_two_tuners_on_one_model(prepared: Prepared) -> None:
    model = prepared[0]
    for second in (
        lambda: fk.prepare(model, POOL, lr=1e-2),
        lambda: fk.bind(model, POOL),
        lambda: fk.apply(model, fk.ledger_of(model)),
    ):
        refused(second, r"^this Net, or a part of it, is being tuned \(fk.prepare\); call fk.release", BindingError)


def test_a_model_that_something_else_has_changed() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer, range(1))
    state = saved(optimizer)
    model.load_state_dict(Net().state_dict())
    loss_of(model, some_ids(0)).backward()
    there = laws.all_bits(Net_of(model))
    refused(optimizer.step, "^the weights were changed by something else since the last step; load the optimizer's state_dict")
    refused(lambda: fk.ledger_of(model), "^embed.weight is not what the numbers give: something else", LedgerError)
    refused(lambda: fk.release(model), "^embed.weight is not what the numbers give: something else", LedgerError)
    assert laws.all_bits(Net_of(model)) == there
    optimizer.load_state_dict(state)
    assert fk.ledger_of(model).round == 1


def test_nothing_to_tune_or_frozen_afterwards(prepared: Prepared) -> None:
    refused(lambda: fk.prepare(Net().requires_grad_(False), POOL, lr=1e-2), "^no parameter requires a gradient", BindingError)
    model, optimizer = prepared
    loss_of(model, some_ids(0)).backward()
    model.get_parameter("norm.weight").requires_grad_(False)
    refused(optimizer.step, "^1 of the tensors that are tuned require no gradient any more; call requires_grad_")
    optimizer.zero_grad()


def test_an_optimiser_over_something_else() -> None:
    model = Net()
    foreign = [
        (lambda numbers, lr: torch.optim.Adam(model.parameters(), lr=lr), "a Adam over 5 tensors"),
        (lambda numbers, lr: torch.optim.Adam([numbers[0].detach()], lr=lr), "a Adam over 1 tensors"),
        (lambda numbers, lr: None, "a NoneType; expected a class"),
    ]
    for factory, text in foreign:
        refused(lambda factory=factory: fk.prepare(model, POOL, lr=1e-2, optimizer=factory), f"^optimizer gave {text}")
    loss_of(model, some_ids(0)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # nothing is hooked up
    assert list(model.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"wire": "int3"}, "^wire is 'int3'; expected one of float32"),
        ({"movement": "up"}, "^movement is 'up'; expected absolute or proportional"),
    ],
    ids=["wire", "movement"],
)
def test_settings_that_there_are_not(setting: Any, text: str) -> None:
    refused(lambda: fk.prepare(Net(), POOL, lr=1e-2, **setting), text)


def test_a_state_of_something_else(prepared: Prepared) -> None:
    optimizer = prepared[1]
    other_base = Net()
    other_base.norm.bias.data += 1
    states = [
        (torch.optim.Adam([torch.zeros(128)], lr=1e-2).state_dict(), "^this state_dict is of another optimizer"),
        (
            fk.prepare(Net(), fk.SeedPool(9, 128), lr=1e-2)[1].state_dict(),
            "^the state_dict's key is '0+9', this optimizer's '01234",
        ),
        (
            fk.prepare(Net(), POOL, lr=1e-2, wire="int4")[1].state_dict(),
            "^the state_dict's wire is 'int4', this optimizer's 'float16'",
        ),
        (fk.prepare(other_base, POOL, lr=1e-2)[1].state_dict(), "^the state_dict's base is '[0-9a-f]{64}', this optimizer's "),
    ]
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["fedkseed"]["numbers"][3] = float("nan")
    for state, text in [*states, (damaged, "^a number of the state_dict is not finite or too large; it is damaged")]:
        refused(lambda state=state: optimizer.load_state_dict(state), text)


def test_a_released_model_is_an_ordinary_one() -> None:
    model, optimizer = fk.prepare(Net(), POOL, lr=1e-2)
    train(model, optimizer)
    ledger = fk.release(model)
    refused(lambda: fk.ledger_of(model), "^this Net is not being tuned; call fk.prepare first")
    refused(optimizer.step, "^the model was released; call fk.prepare for a new optimizer")
    loss_of(model, some_ids(0)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    refused(lambda: fk.apply(model, ledger), "^this model is not the ledger's base: embed.weight is the first", LedgerError)
    model.zero_grad()
    second, _ = fk.prepare(model, POOL, lr=1e-2)
    assert fk.ledger_of(second).base.fingerprint != ledger.base.fingerprint


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = fk.prepare(Net(), POOL, lr=1e-2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with warnings.catch_warnings():
        refused(lambda: loss_of(model, some_ids(0)).backward(), "^2 processes train this model together")
