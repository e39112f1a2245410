"""Optimisers on K numbers: pure, as torch has them or by hand, and bounded where they say so."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkseed.federation.optimizer import DECAY, OPTIMIZERS, SQUARE_DECAY, TINY

F64 = NDArray[np.float64]
names = pytest.mark.parametrize("name", OPTIMIZERS)
SIZE, STEPS, LR = 9, 12, 0.03


def gradients(seed: int = 0) -> F64:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((STEPS, SIZE)) * 10.0 ** rng.integers(-4, 4, SIZE)


def walk(name: str, each: F64, lr: float = LR) -> F64:
    """Where the numbers are after each step from 0, float64[steps, K]."""
    optimizer, numbers, places = OPTIMIZERS[name], np.zeros(each.shape[1]), []
    state = optimizer.start(each.shape[1])
    for gradient in each:
        change, state = optimizer.step(gradient, lr, state)
        numbers = numbers + change
        places.append(numbers)
    return np.array(places)


def in_torch(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], each: F64) -> F64:
    x = torch.zeros(each.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer, places = make([x]), []
    for gradient in each:
        x.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        places.append(x.detach().numpy().copy())
    return np.array(places)


MAKERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda x: torch.optim.SGD(x, lr=LR),
    "momentum": lambda x: torch.optim.SGD(x, lr=LR, momentum=DECAY),
    "adam": lambda x: torch.optim.Adam(x, lr=LR, betas=(DECAY, SQUARE_DECAY), eps=1e-30),
}


@pytest.mark.parametrize("name", MAKERS)
def test_steps_are_torchs(name: str) -> None:
    each = gradients()
    np.testing.assert_allclose(walk(name, each), in_torch(MAKERS[name], each), rtol=1e-10)
    for other in MAKERS.keys() - {name}:  # the negative control
        assert not np.allclose(walk(name, each), in_torch(MAKERS[other], each), rtol=1e-3)


def test_signs_of_a_momentum_by_hand() -> None:
    """Signum (Bernstein et al., 2018): -lr sign(m), m = 0.9 m + g; a zero stays where it is."""
    each = np.array([[1.0, -2.0, 0.0, 1.0], [-0.5, -1.0, 0.0, -0.9], [-0.5, 5.0, 0.0, 0.0]])
    # m: 1, -2, 0, 1; then 0.4, -2.8, 0, 0 (0.9 - 0.9); then -0.14, 2.48, 0, 0
    steps = np.array([[-1.0, 1, 0, -1], [-1, 1, 0, 0], [1, -1, 0, 0]])
    np.testing.assert_allclose(walk("sign", each, 0.25), 0.25 * np.cumsum(steps, 0))


def test_a_message_holds_a_code_that_never_changes() -> None:
    assert {name: row.code for name, row in OPTIMIZERS.items()} == {"sgd": 0, "momentum": 1, "adam": 2, "sign": 3}


@names
def test_a_step_changes_nothing_that_it_was_given(name: str) -> None:
    """Pure: the same again from the same state, whatever came between; states of other steps stay as they were."""
    optimizer, each = OPTIMIZERS[name], gradients()
    state = optimizer.start(SIZE)
    kept = []
    for gradient in each:
        before = {column: values.copy() for column, values in state.items()}
        given = gradient.copy()
        change, following = optimizer.step(gradient, LR, state)
        again, once_more = optimizer.step(gradient, LR, state)
        np.testing.assert_array_equal(change, again)
        np.testing.assert_array_equal(gradient, given)
        for column, values in before.items():
            np.testing.assert_array_equal(state[column], values)
            np.testing.assert_array_equal(following[column], once_more[column])
        kept.append((state, before))
        state = following
    for state, before in kept:
        for column, values in before.items():
            np.testing.assert_array_equal(state[column], values)


@names
def test_a_state_is_columns_that_a_ledger_can_keep(name: str) -> None:
    """float64, of K numbers or one, the same names and shapes before and after a step."""
    state = OPTIMIZERS[name].start(SIZE)
    _, following = OPTIMIZERS[name].step(gradients()[0], LR, state)
    for columns in (state, following):
        assert all(x.dtype == np.float64 and x.shape in ((SIZE,), (1,)) for x in columns.values())
    assert {column: x.shape for column, x in state.items()} == {column: x.shape for column, x in following.items()}
    assert "numbers" not in state  # a server keeps its numbers under this name beside them


@names
@given(exponent=st.floats(-30, 30), seed=st.integers(0, 99))
def test_bounded_steps_are_as_long_as_the_rate_says(name: str, exponent: float, seed: int) -> None:
    """Whatever the gradient's length, a number moves by at most the rate (Adam: by little more, and by it at first).

    But for Adam's guard against 0 / 0, which tells where a gradient is nearly as small as it is.
    """
    each = gradients(seed) * 10.0**exponent
    places = walk(name, each)
    longest = np.abs(np.diff(places, axis=0, prepend=0)).max()
    if OPTIMIZERS[name].bounded:
        # Adam: |m| / sqrt(v) <= (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2), corrected for the start
        largest = 1.0 if name == "sign" else (1 - DECAY) / np.sqrt((1 - SQUARE_DECAY) * (1 - DECAY**2 / SQUARE_DECAY))
        assert longest <= LR * max(1.0, largest) * (1 + 1e-9)
        guard = TINY if name == "adam" else 0.0
        np.testing.assert_allclose(np.abs(places[0]), LR / (1 + guard / np.abs(each[0])), rtol=1e-6)
    else:
        np.testing.assert_allclose(places, walk(name, gradients(seed)) * 10.0**exponent, rtol=1e-9)


@names
def test_no_gradient_is_no_step(name: str) -> None:
    np.testing.assert_array_equal(walk(name, np.zeros((3, SIZE))), 0)
