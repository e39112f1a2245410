"""The optimisers: pure functions, and plain FedKSeed's is SGD to the last bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedkseed.kseed import optimizer
from fedkseed.kseed.optimizer import SGD, Optimizer

OPTIMIZERS = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
every = pytest.mark.parametrize("row", OPTIMIZERS, ids=lambda row: row.name)
GRADIENTS = arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e6, 1e6))
RATES = st.floats(1e-12, 1e3)


def copied(state: Any) -> dict[str, NDArray[np.float64]]:
    return {name: column.copy() for name, column in state.items()}


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert found[name].tobytes() == column.tobytes()


def test_there_is_one_of_each_name() -> None:
    assert SGD in OPTIMIZERS
    assert len({row.name for row in OPTIMIZERS}) == len(OPTIMIZERS)


@every
@given(GRADIENTS, RATES)
def test_a_step_is_pure(row: Optimizer, gradient: NDArray[np.float64], lr: float) -> None:
    """The same inputs give the same outputs, whatever happened between, and are as they were."""
    _, state = row.step(gradient, lr, row.start(len(gradient)))  # a state that has seen something
    before = gradient.copy(), copied(state)
    change, after = row.step(gradient, lr, state)
    row.step(-3 * gradient, 2 * lr, after)
    again, after_again = row.step(gradient, lr, state)
    assert again.tobytes() == change.tobytes()
    assert_same(after_again, after)
    assert gradient.tobytes() == before[0].tobytes()
    assert_same(state, before[1])
    assert not np.shares_memory(change, gradient)


@every
@given(st.integers(1, 50))
def test_state_is_columns_of_k_numbers(row: Optimizer, size: int) -> None:
    state = row.start(size)
    change, after = row.step(np.ones(size), 0.5, state)
    assert (change.dtype, change.shape) == (np.float64, (size,))
    assert after.keys() == state.keys()
    for columns in (state, after):
        assert all((column.dtype, column.shape) == (np.float64, (size,)) for column in columns.values())


@given(GRADIENTS, RATES)
def test_sgd_is_minus_lr_times_the_gradient_bit_for_bit(gradient: NDArray[np.float64], lr: float) -> None:
    change, state = SGD.step(gradient, lr, SGD.start(len(gradient)))
    assert change.tobytes() == np.array([-lr * number for number in gradient.tolist()]).tobytes()
    assert state == {}
