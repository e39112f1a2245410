"""Ferret's rule on vectors: what is sent, what comes back of it on average and how far off, how many coordinates each has."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support import laws
from tests.support.baselines import coordinates_by_hand

from fedkseed.baselines.projected import COORDINATES, Projected, shares
from fedkseed.errors import BindingError, ProtocolError

F64 = NDArray[np.float64]
SHAPES = {"first": (20, 30), "norm": (7,), "second": (1100,)}
KEY, SIZE = 0x0123456789ABCDEF, 300


def a_model(seed: int = 1) -> torch.nn.Module:
    draw = torch.Generator().manual_seed(seed)
    return laws.module_of(
        {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}, backend="cpu"
    )


def flat(model: torch.nn.Module) -> F64:
    return np.concatenate([x.detach().double().reshape(-1).numpy() for _, x in sorted(model.named_parameters())])


def moved(model: torch.nn.Module, by: float, seed: int = 2) -> F64:
    """The model's weights moved at random; how far."""
    before, draw = flat(model), torch.Generator().manual_seed(seed)
    for _, x in sorted(model.named_parameters()):
        x.detach().add_(by * torch.randn(x.shape, generator=draw))
    return flat(model) - before


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def test_what_is_sent_is_the_formulas() -> None:
    """From coordinates that came before, in two readings; a scale of 1 / sqrt(K_l), or of all K, is another rule."""
    model = a_model()
    projected = Projected(model, KEY, SIZE, "hadamard")
    counts = shares([x.numel() for _, x in sorted(model.named_parameters())], SIZE)
    start = torch.from_numpy(np.random.default_rng(3).standard_normal(SIZE) * 0.01).float()
    projected.write({COORDINATES: start})
    before = tensors_of(model)
    assert torch.equal(projected.read()[COORDINATES], start)
    moved(model, 0.05)
    found = projected.read()[COORDINATES] - start
    expected = coordinates_by_hand(before, tensors_of(model), KEY, counts)[COORDINATES]
    assert (found - expected).abs().max() < 1e-6
    for wrong in (
        coordinates_by_hand(before, tensors_of(model), KEY + 1, counts),
        coordinates_by_hand(before, tensors_of(model), KEY, counts, scale=counts[0] / SIZE),
        coordinates_by_hand(before, tensors_of(model), KEY, counts, scale=math.sqrt(counts[0])),
    ):
        assert (found - wrong[COORDINATES]).abs().max() > 1e-3


def test_what_is_written_is_the_base_plus_the_sum_of_each_tensors_seeds() -> None:
    model = a_model()
    base, projected = tensors_of(model), Projected(model, KEY, SIZE, "hadamard")
    counts = shares([x.numel() for x in (base[name] for name in sorted(base))], SIZE)
    c = np.random.default_rng(5).standard_normal(SIZE).astype(np.float32)
    moved(model, 1.0)
    projected.write({COORDINATES: torch.from_numpy(c)})
    at = 0
    for name, count in zip(sorted(base), counts, strict=True):
        noise = laws.hadamard_sum(KEY, count, name, base[name].numel(), c[at : at + count])
        expected = base[name].numpy().reshape(-1) + noise
        assert dict(model.named_parameters())[name].detach().numpy().reshape(-1).tobytes() == expected.tobytes()
        at += count
    assert at == SIZE
    for wrong, message in (
        ({}, "tensor 'coordinates' is missing"),
        ({COORDINATES: torch.zeros(SIZE - 1)}, r"coordinates is torch.float32\[299\]; expected float32\[300\]"),
        ({COORDINATES: torch.full((SIZE,), math.inf)}, "coordinates holds a number that is not finite"),
    ):
        before = flat(model)
        with pytest.raises(ProtocolError, match=message):
            projected.write(wrong)
        assert np.array_equal(flat(model), before)


def rebuilt(key: int, family: str, scale: Callable[[int], float]) -> tuple[F64, F64]:
    """A change, and what is put together again from its coordinates times a scale of each tensor's K_l."""
    model = a_model()
    projected, base = Projected(model, key, SIZE, family), flat(model)
    change = moved(model, 0.1)
    c = projected.read()[COORDINATES]
    counts = shares([x.numel() for _, x in sorted(model.named_parameters())], SIZE)
    c = c * torch.tensor([scale(count) for count in counts for _ in range(count)])
    projected.write({COORDINATES: c})
    return change, flat(model) - base


@pytest.mark.parametrize("family", laws.FAMILIES)
def test_over_pools_a_change_comes_back_on_average_and_as_far_off_as_the_dimension_says(family: str) -> None:
    """The rule is unbiased, and scaled by any other factor it is not."""
    trials = 100 if family == "hadamard" else 5

    def over_pools(scale: Callable[[int], float]) -> tuple[float, float]:
        """How much of the change comes back, and the square of the error by that of the change."""
        along, off = [], []
        for key in range(trials):
            change, found = rebuilt(key, family, scale)
            along.append(found @ change / (change @ change))
            off.append(((found - change) ** 2).sum() / (change**2).sum())
        return float(np.mean(along)), float(np.mean(off))

    along, off = over_pools(lambda count: 1.0)
    assert along == pytest.approx(1, abs=0.05)
    sizes = [math.prod(SHAPES[name]) for name in sorted(SHAPES)]
    counts = shares(sizes, SIZE)
    expected = sum(n * (n + 1) / count for n, count in zip(sizes, counts, strict=True)) / sum(sizes)  # all weights move alike
    low = 0.95 if family == "gaussian" else 0.8  # seeds of one block are orthogonal but for those that K_l leaves out
    assert low * expected < off < 1.05 * expected
    for wrong in (lambda count: count / SIZE, lambda count: count**-0.5):  # of one K for all tensors; of a norm kept
        assert family == "gaussian" or abs(over_pools(wrong)[0] - 1) > 0.2  # it takes long


def test_shares_go_as_the_roots_of_the_sizes_and_add_up() -> None:
    assert shares([100, 400, 900], 63) == [11, 21, 31]
    assert shares([1, 0, 10**6], 3) == [1, 1, 1]
    for total in (5, 6, 100, 4097):
        counts = shares([3, 500, 0, 70, 2**20], total)
        assert sum(counts) == total
        assert min(counts) >= 1
    with pytest.raises(BindingError, match="2 coordinates are too few for 3 tensors; raise --num-seeds to 3 at least"):
        shares([5, 6, 7], 2)


def test_clients_that_have_not_moved_change_nothing_and_the_mean_of_readings_is_the_reading_of_the_mean() -> None:
    model: Any = a_model()
    projected = Projected(model, KEY, SIZE, "hadamard")
    start = {COORDINATES: torch.from_numpy(np.random.default_rng(3).standard_normal(SIZE) * 0.01).float()}
    readings, changes = [], []
    for seed in (1, 2):
        projected.write(start)
        changes.append(moved(model, 0.05, seed))
        readings.append(projected.read()[COORDINATES])
    projected.write(start)
    mean = torch.from_numpy((changes[0] + changes[1]) / 2)
    at = 0
    for _, x in sorted(model.named_parameters()):
        x.detach().add_(mean[at : at + x.numel()].float().reshape(x.shape))
        at += x.numel()
    assert (projected.read()[COORDINATES] - (readings[0] + readings[1]) / 2).abs().max() < 1e-6
