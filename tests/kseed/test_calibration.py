"""Calibration against losses whose slope and curvature are known, and on a real model; walks that must be cut short."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.tiny import tiny_settings

import fedkseed as fk
from fedkseed.errors import InvalidValueError
from fedkseed.kseed.calibration import EPS_GRID, EPS_VALUES, Calibration, _agreements, _Counted, calibrate
from fedkseed.runs.resolution import eps_warning, unmoved

SIZE, NUM_SEEDS = 2048, 256


class Quadratic:
    """L_b(w) = 10 + sum_i h w_i^2 / 2 + s n_b w: along signs z its curvature is h SIZE, at any weights and for any batch."""

    def __init__(self, h: float, noise: float = 0.0) -> None:
        self.module = torch.nn.Linear(SIZE, 1, bias=False)
        with torch.no_grad():
            self.module.weight.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=(1, SIZE))).to(torch.float32))
        self.h, self.noise = h, noise
        self.bound = fk.bind(self.module, fk.SeedPool(1, NUM_SEEDS))

    def loss(self, batch: int) -> float:
        w = self.module.weight.detach().double().flatten().numpy()
        tilt = self.noise * np.random.default_rng(batch).normal(size=SIZE)
        return float(10 + self.h * (w @ w) / 2 + tilt @ w)


def calibrated(problem: Quadratic, loss: Callable[[int], float] | None = None) -> Calibration:
    return calibrate(problem.bound, loss or problem.loss, np.random.default_rng(3))


@pytest.mark.parametrize("h", [0.01, 1.0])
def test_a_quadratic_gives_its_own_curvature_and_rate(h: float) -> None:
    problem = Quadratic(h)
    before = problem.bound.digest()
    found = calibrated(problem)
    assert found.curvature == pytest.approx(h * SIZE, rel=0.02)
    assert found.shared == pytest.approx(1, abs=0.02)  # every batch has the same loss
    assert found.slope == pytest.approx(h * np.sqrt(SIZE), rel=0.5)  # z.w of a standard normal w, over 24 directions
    assert found.best_first_step == pytest.approx(1 / (h * SIZE), rel=0.05)
    assert found.lr == pytest.approx(found.best_first_step / 4, rel=0.05)
    assert found.trials[-1].after < found.trials[-1].before
    assert problem.bound.digest() == before


def test_what_batches_do_not_share_lowers_the_rate() -> None:
    """With tilts of the slope's own size only half of a batch's squared slope is shared."""
    clean, noisy = calibrated(Quadratic(1.0)), calibrated(Quadratic(1.0, noise=1.0))
    assert 0.1 < noisy.shared < 0.9 < clean.shared
    assert noisy.lr < clean.lr


def test_where_clients_steps_are_averaged_the_rate_is_so_many_times_larger() -> None:
    """An average of n clients' steps has the slope of one and an nth of its curvature; more than four are taken for four."""
    problem = Quadratic(1.0, noise=2.0)
    one, four, many = (calibrate(problem.bound, problem.loss, np.random.default_rng(3), n) for n in (1, 4, 100))
    assert 0.1 < one.shared < 0.25
    assert four.best_first_step == pytest.approx(4 * one.best_first_step)
    assert many == four
    same = Quadratic(1.0)
    alike = calibrate(same.bound, same.loss, np.random.default_rng(3), 4)  # a client's own steps bound it
    assert alike.best_first_step <= 1 / alike.curvature


@pytest.mark.parametrize(("clients", "directions"), [(1, 1), (4, 1), (1, 12), (4, 5)])
def test_a_trial_averages_the_steps_of_its_clients(clients: int, directions: int) -> None:
    """60 directions of n clients move a parameter by 60 (lr g / n)^2 in the mean square; added up they would by 60 (lr g)^2.

    However many directions a step takes at once.
    """
    problem, away = Quadratic(1.0, noise=2.0), list[float]()
    start = problem.module.weight.detach().clone()

    def watched(batch: int) -> float:
        away.append(float((problem.module.weight.detach() - start).square().mean()))
        return problem.loss(batch)

    found = calibrate(problem.bound, watched, np.random.default_rng(3), clients, directions)
    assert away[-1] == pytest.approx(60 * (found.lr * found.slope / clients) ** 2, rel=0.6)


def test_a_walk_that_raises_the_loss_halves_the_rate() -> None:
    """Beyond a wall around the base the loss is high: the first rate walks into it, a lower one does not.

    60 steps move a parameter by 60 (lr g)^2 in the mean square; the wall is at a fifteenth of that.
    """
    problem = Quadratic(1.0)
    start = problem.module.weight.detach().clone()
    free = calibrated(problem)
    wall = 4 * (free.lr * free.slope) ** 2

    def walled(batch: int) -> float:
        away = float((problem.module.weight.detach() - start).square().mean())
        return problem.loss(batch) + (1e4 if away > wall else 0.0)

    found = calibrated(problem, walled)
    assert len(found.trials) > 1
    rates = [trial.lr for trial in found.trials]
    assert rates == [rates[0] / 2**i for i in range(len(rates))]
    assert found.lr == rates[-1]
    assert found.trials[0].after > found.trials[0].before
    assert found.trials[-1].after < found.trials[-1].before


def test_it_takes_a_few_hundred_forward_passes() -> None:
    problem, calls = Quadratic(1.0), []

    def counted(batch: int) -> float:
        calls.append(batch)
        return problem.loss(batch)

    found = calibrated(problem, counted)
    assert found.num_forward_passes == len(calls) < 400


@pytest.mark.parametrize("directions", [1, 8, 100])
def test_what_it_will_take_is_known_before_the_trials(directions: int) -> None:
    """Of n one-sided slopes n + 1 passes; a step of more directions than a trial has is one step."""
    problem, told = Quadratic(1.0), list[tuple[int, int]]()
    found = calibrate(problem.bound, problem.loss, np.random.default_rng(3), 1, directions, lambda *of: told.append(of))
    assert told[-1] == (found.num_forward_passes, found.num_forward_passes)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda batch: float("nan"), r"the loss of a batch is nan; expected a finite number"),
        (lambda batch: 3.0, r"a slope of 0 and a curvature of 0; expected both above 0, so give more records"),
    ],
)
def test_a_loss_that_tells_nothing_is_named(loss: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        calibrated(Quadratic(1.0), loss)


def test_tune_shows_what_it_tried_and_simulate_takes_it(
    fedkseed: CommandLine, tiny: Path, stories260k: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny, model=stories260k, num_rounds=1)
    without = {name: value for name, value in settings.items() if name not in ("lr", "eps")}
    shown = fedkseed("tune", *flags(without))
    assert shown.code == 0, shown
    last = shown.stdout.splitlines()[-1].split()
    assert last[:2] == ["take:", "--lr"]
    assert "after a short round" in shown.stdout
    run = fedkseed("simulate", *flags(without), "--lr", "auto", "--run", tmp_path / "run")
    assert run.code == 0, run
    config = (tmp_path / "run" / "config.toml").read_text()
    assert f"lr = {float(last[2])!r}" in config
    assert f"eps = {float(last[4])!r}" in config


def test_a_bad_setting_is_named_before_anything_is_calibrated(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny) | {"lr": "auto", "num_rounds": 0}
    assert_one_line(fedkseed("simulate", *flags(settings), "--run", tmp_path / "run"), 2, "--num-rounds", "'0'")
    assert_one_line(fedkseed("tune", *flags({"model": tiny / "model", "data": "nowhere.jsonl"})), 2, "--data", "nowhere.jsonl")


class Line:
    """A model of one number, whose loss has slope 1 but for an error that depends on how far it is probed."""

    def __init__(self, error: Callable[[float], float]) -> None:
        self.at, self.error = 0.0, error

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        self.at += sum(amounts)

    def loss(self, batch: int) -> float:
        return self.at * (1 + self.error(abs(self.at)))


@pytest.mark.parametrize(
    ("error", "least", "most"),
    [
        (lambda eps: (eps / 1e-4) ** 2, EPS_VALUES[1], 1e-5),  # curvature: only the smallest are right
        (lambda eps: 3e-2 / eps, 1e-2, EPS_VALUES[-2]),  # rounding: only the largest are
        (lambda eps: (eps / 5e-3) ** 2 + 1e-4 / eps, 3e-4, 3e-3),  # the grid as it is
    ],
    ids=["below", "above", "inside"],
)
def test_an_eps_at_the_end_of_the_grid_makes_it_longer(error: Callable[[float], float], least: float, most: float) -> None:
    line, heard = Line(error), list[tuple[int, int]]()
    counted = _Counted(line.loss, lambda done, total: heard.append((done, total)))
    found = _agreements(cast(Any, line), range(3), counted)
    best = min(found, key=lambda one: one.disagreement)
    assert least <= best.eps <= most
    tried = [one.eps for one in found]
    assert tried == sorted(tried)
    assert set(EPS_VALUES[EPS_GRID][1:-1]) <= set(tried)
    assert (len(tried) > 3) == (most < 3e-4 or least > 3e-3)
    assert [done for done, _ in heard] == list(range(1, 6 * (len(tried) + 2) + 1))
    assert all(done <= total for done, total in heard)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_eps_that_half_precision_does_not_resolve_is_a_warning(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(64, 64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.25)
    module.to(dtype)
    spacing = torch.finfo(dtype).eps
    assert unmoved(module, spacing) == 0
    assert unmoved(module, spacing / 4) == 1
    assert eps_warning(module, spacing) is None
    warning = eps_warning(module, spacing / 4)
    assert warning is not None
    assert warning.startswith("warning: --eps")
    assert "100 % of the weights" in warning
    assert "--dtype float32" in warning
    assert eps_warning(module.to(torch.float32), spacing / 4) is None
