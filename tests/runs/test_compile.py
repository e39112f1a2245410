"""`--compile on`: what is compiled, what it may change, and what is said where torch cannot."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkseed as fk
from fedkseed.errors import ConfigError, ModelError
from fedkseed.models.loading import load_model
from fedkseed.runs.settings import build
from fedkseed.runs.task import compile_passes

RECORDS = [{"instruction": f"say {word}", "output": word * 3} for word in ("ab", "cd", "ef", "gh", "ij", "kl")] * 4


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model), "data": RECORDS, "num_clients": 2, "partition": "iid", "num_rounds": 1, "local_steps": 2,
        "batch_size": 2, "lr": 1e-4, "max_length": 32, **changes,
    }  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torch.compile is asked for; it gives back what it is given."""
    found = []

    def pretended(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        found.append(options)
        return function

    monkeypatch.setattr(torch, "compile", pretended)
    return found


def test_a_run_compiles_once_for_batches_of_any_length(tiny: Path, tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    plain = fk.simulate(settings(tiny / "model"), run=tmp_path / "off").ledger
    assert asked == []
    compiled = fk.simulate(settings(tiny / "model", compile="on"), run=tmp_path / "on").ledger
    assert asked == [{"dynamic": True}]
    assert compiled.digest() == plain.digest()  # since this compiler changes nothing


def test_where_torch_cannot_compile_it_is_said_and_the_model_is_as_before(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def fails(*inputs: Any, **named: Any) -> Any:
            raise RuntimeError("no C++ compiler\nfound")

        return fails

    monkeypatch.setattr(torch, "compile", failing)
    model = load_model(tiny / "model")
    with pytest.raises(
        ModelError, match=r"^--compile on: torch cannot compile \w+ here \(no C\+\+ compiler found\); leave it out$"
    ):
        compile_passes(model)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("objective", ["exact-match", "rouge-l"])
def test_answers_are_not_compiled(tiny: Path, objective: str) -> None:
    given = settings(tiny / "model", objective=objective, data=str(tiny / "records.jsonl"))
    build(given)
    with pytest.raises(ConfigError, match=f"--compile is on and --objective {objective} wants answers"):
        build({**given, "compile": "on"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
def test_a_compiled_run_learns_what_a_plain_one_does(stories260k: Path, tmp_path: Path) -> None:
    """By torch's own compiler, on a real model: losses within rounding, and weights moved beneath the compiled pass."""
    losses = {}
    for way in ("off", "on"):
        result = fk.simulate(settings(stories260k, compile=way, num_rounds=2, lr=3e-4), run=tmp_path / way)
        losses[way] = [result.history[i] for i in sorted(result.history)]
    assert len(losses["on"]) == 3
    assert losses["on"][0] != losses["on"][-1]
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(losses["off"], losses["on"], strict=True))
