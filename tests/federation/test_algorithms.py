"""The contract table of the algorithms: a row says all there is to know, and nothing else asks for a name."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.baselines import ROWS, row_settings
from tests.support.runs import Watcher
from tests.support.tiny import tiny_settings

import fedkseed
from fedkseed.errors import ConfigError
from fedkseed.federation import algorithms
from fedkseed.federation.algorithms import ALGORITHMS, Algorithm
from fedkseed.federation.config import FederationConfig
from fedkseed.flower.config import read_config
from fedkseed.models.loading import load_model
from fedkseed.runs.algorithms import KINDS, Federation, kind_of
from fedkseed.runs.checkpoints import file_of, load_checkpoint
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import SimulationConfig, build
from fedkseed.runs.task import Stopwatch

every = pytest.mark.parametrize("row", ALGORITHMS.values(), ids=ALGORITHMS)
SOURCES = Path(fedkseed.__file__).parent
"""For settings that are no numbers: another value than the default."""


# --- Every row federates ---


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    if name in ROWS:
        return row_settings(folder, name)
    return tiny_settings(folder, algorithm=name, **({"num_seeds": 128} if ALGORITHMS[name].has_pages else {}))


def federated(tiny: Path, name: str) -> Federation:
    config = build(settings_of(tiny, name))
    records = prepare(config, Watcher())
    model = load_model(config.model, config.dtype, config.device)
    return kind_of(config.facts).federate(config, model, None, records, Stopwatch())


@every
def test_every_row_has_a_builder_that_federates_it(tiny: Path, tmp_path: Path, row: Algorithm) -> None:
    """One round from the requests' bytes to the checkpoint's file and back, with what the row promises of it."""
    assert KINDS.keys() >= {row.sends}
    federation = federated(tiny, row.name)
    requests = federation.server.plan()
    heard: dict[str, int] = {}

    def answered(request: Any) -> bytes:
        heard[request.client] = 0

        def on_step(step: int, loss: float) -> None:
            heard[request.client] += 1

        return federation.clients[request.client].answer(request.encode(), on_step)

    outcome = federation.server.absorb([(request.client, answered(request)) for request in requests])
    assert (outcome.status, outcome.refusals) == ("closed", ())
    federation.restore()
    # how it measures: two losses a step, or one
    probes = {"two-point": 2, "gradient": 1}[row.measures]
    assert heard == {request.client: probes * request.num_steps for request in requests}
    # how seeds are drawn: by the server, which then names them, or by the client, once
    assert hasattr(requests[0], "indices") == (row.draws in ("uniform", "importance"))
    # what it sends, and what the checkpoint is
    checkpoint = federation.server.checkpoint
    assert checkpoint.round == 1
    file = tmp_path / file_of(row)
    checkpoint.save(file)
    assert load_checkpoint(file).digest() == checkpoint.digest()
    assert (file.name == "ledger.safetensors") == row.has_ledger
    # what it attaches to the model
    attached = [name for name, _ in federation.model.named_parameters() if "lora_" in name or "prompt_encoder" in name]
    assert bool(attached) == row.needs_peft


@every
def test_a_rows_fields_agree(row: Algorithm) -> None:
    assert ALGORITHMS[row.name] is row
    assert row.has_ledger == (row.sends in ("scalars", "changes"))
    assert row.measures == "two-point" or row.sends != "scalars"  # a scalar is what two points differ by
    # directions are what two points are told apart along, and what a ledger's numbers and coordinates are of
    assert row.needs_noise == (row.measures == "two-point" or row.has_ledger or row.projects)
    assert not (row.draws in ("uniform", "importance") and row.sends == "tensors")  # only a ledger knows what a seed did
    assert row.passes_per_step == {"two-point": 2, "gradient": 3}[row.measures]
    assert row.has_soft_prompt <= row.needs_peft <= (row.sends == "tensors")
    assert row.needs_noise == row.takes("noise")
    assert row.takes("eps") == (row.needs_noise and not row.projects)
    assert row.has_ledger == row.takes("wire")
    assert (row.has_ledger or row.projects) == row.takes("num_seeds")
    assert row.projects <= (row.sends == "tensors" and not row.needs_peft)
    assert row.on_flower <= row.has_ledger
    assert len(set(row.settings)) == len(row.settings)
    assert set(row.settings) <= SimulationConfig.model_fields.keys()
    assert row.title
    assert row.about
    assert row.about in str(FederationConfig.model_fields["algorithm"].description)


@every
def test_the_row_says_whether_it_runs_on_flower(tiny: Path, tmp_path: Path, row: Algorithm) -> None:
    config = {"algorithm": row.name, "lr": 0.1, "model": str(tiny / "model"), "run": str(tmp_path / "run")}
    if row.on_flower:
        assert read_config(config).facts is row
        return
    with pytest.raises(
        ConfigError, match=rf"^run-config algorithm is '{row.name}': on Flower only fedkseed, fedkseed-pro, fedkseed-grad"
    ):
        read_config(config)


def test_the_negative_control_a_row_that_lies_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that says it measures by gradients, though its clients probe at two points."""
    lying = replace(ALGORITHMS["fedkseed"], measures="gradient")
    monkeypatch.setitem(algorithms.ALGORITHMS, "fedkseed", lying)
    with pytest.raises(AssertionError):
        test_a_rows_fields_agree(lying)
    with pytest.raises(AssertionError):
        test_every_row_has_a_builder_that_federates_it(tiny, tmp_path, lying)


# --- Nothing else compares a name ---


def compared_names(source: str) -> Iterator[tuple[int, str]]:
    """Names of algorithms that stand in a comparison, and where; a `match` compares too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            for constant in ast.walk(node):
                if isinstance(constant, ast.Constant) and constant.value in ALGORITHMS:
                    yield constant.lineno, constant.value


def test_nothing_compares_the_name_of_an_algorithm() -> None:
    files = sorted(SOURCES.rglob("*.py"))
    assert len(files) > 80
    found = {
        f"{file.relative_to(SOURCES)}:{line}: {name}"
        for file in files
        if file != Path(algorithms.__file__)
        for line, name in compared_names(file.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "x = config.algorithm == 'fedavg'",
        "x = 'fedkseed-pro' != name",
        "x = name in ('fedit', 'fedit-sgd')",
        "if name not in {'fedzo'}: pass",
        "match name:\n    case 'fedavg' | 'fedzo': pass",
    ],
)
def test_the_negative_control_a_comparison_is_found(code: str) -> None:
    assert list(compared_names(code))
    assert not list(compared_names("ALGORITHM = 'fedavg'; x = {'fedavg': 1}['fedavg']; y = name == 'else'"))
