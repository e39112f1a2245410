"""Runs of fedkseed-grad on the tiny model, end to end; its settings, and what is refused of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.runs import held_out, read_metrics, simulation
from tests.support.tiny import tiny_settings
from transformers import OPTConfig, OPTForCausalLM

import fedkseed as fk
from fedkseed.errors import ConfigError, LedgerError, ModelError
from fedkseed.federation.algorithms import ALGORITHMS, CHANGES, SOME_TAKE
from fedkseed.federation.config import FederationConfig
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model
from fedkseed.runs.settings import SimulationConfig, build
from fedkseed.runs.simulation import Simulation
from fedkseed.runs.task import checkpoint_activations

ROW = ALGORITHMS["fedkseed-grad"]


def settings_of(tiny: Path, **changes: Any) -> dict[str, Any]:
    settings = {"algorithm": "fedkseed-grad", "num_seeds": 128, "lr": 0.003, "local_steps": 4, "wire": "float32"}
    return tiny_settings(tiny, **settings | changes)


def train(path: Path, settings: dict[str, Any]) -> tuple[Ledger, Simulation]:
    run, _ = simulation(path, settings)
    ledger = run.train()
    assert isinstance(ledger, Ledger)
    return ledger, run


# --- Runs ---

KINDS: list[dict[str, Any]] = [
    {},
    {"basis": "coefficients", "lr": 0.003 / 128, "wire": "float16"},
    {"basis": "coefficients", "lr": 2e-5, "num_seeds": 100, "noise": "gaussian", "wire": "int8"},
    {"wire": "sign", "rounds_per_page": 2, "local_optimizer": "adam", "lr": 0.003, "server_optimizer": "sgd"},
    {"wire": "int2", "server_optimizer": "sign", "server_lr": 0.004, "movement": "proportional", "lr": 0.01},
    {"dtype": "bfloat16", "rounds_per_page": 1, "wire": "int4"},
    {"two_point_clients": 0.5, "rounds_per_page": 3, "eps": 0.01},
    {"local_unit": "epochs", "local_steps": 1, "server_optimizer": "adam", "server_lr": 0.003},
]


@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: "-".join(map(str, changes.values())) or "plain")
def test_the_held_out_loss_falls_and_the_ledger_is_the_model(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """As evaluated, as restored, as applied to the base model from the published file."""
    settings = settings_of(tiny, num_rounds=6, eval_every=6, fraction_train=0.75, **changes)
    ledger, run = train(tmp_path / "run", settings)
    before, after = held_out(read_metrics(tmp_path / "run"))
    assert after < before - 0.02
    run.restore()
    base = load_model(str(tiny / "model"), settings.get("dtype", "float32"))
    ledger.published().save(tmp_path / "published.safetensors")
    fk.apply(base, tmp_path / "published.safetensors")
    for (name, x), (other, y) in zip(base.named_parameters(), run.model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(x, y), name


@pytest.mark.parametrize("movement", ["absolute", "proportional"])
def test_checkpointing_changes_no_bit(tiny: Path, tmp_path: Path, movement: str) -> None:
    """float32 on a CPU: what is recomputed is what it was. Its negative control is another seed."""
    digests = {}
    for name, changes in (("off", {}), ("on", {"checkpointing": "on"}), ("other", {"seed": 8})):
        ledger, run = train(tmp_path / name, settings_of(tiny, num_rounds=2, movement=movement, rounds_per_page=1, **changes))
        digests[name] = ledger.digest()
        assert passes_of_a_layer(run.model) == (2 if name == "on" else 1)
        assert not any(module.training for module in run.model.modules())
    assert digests["off"] == digests["on"] != digests["other"]


def passes_of_a_layer(model: torch.nn.Module) -> int:
    """How often a forward and a backward pass run what is inside the first layer."""
    passes: list[int] = []
    inside = model.get_submodule("model.layers.0.mlp")
    hook = inside.register_forward_pre_hook(lambda *args: passes.append(1))
    model(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=False).logits.sum().backward()
    model.zero_grad()
    hook.remove()
    return len(passes)


def test_recomputing_drops_nothing_out_at_random() -> None:
    """Layers that drop activations out by their own flag, as OPT's do; the control is transformers' way, in training mode."""
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        dropout=0.5,
    )
    model = OPTForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    plain = model(input_ids=ids, use_cache=False).logits
    checkpoint_activations(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    model.model.decoder.layers[0].training = True
    assert not torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


def test_a_model_that_cannot_recompute_is_refused() -> None:
    with pytest.raises(ModelError, match="--checkpointing on: Linear does not support it"):
        checkpoint_activations(torch.nn.Linear(2, 2))


def test_the_global_generators_are_neither_read_nor_moved(tiny: Path, tmp_path: Path) -> None:
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        ledger, _ = train(tmp_path / str(seed), settings_of(tiny, num_rounds=1, two_point_clients=0.5))
        assert torch.equal(torch.get_rng_state(), before)
        digests.append(ledger.digest())
    assert digests[0] == digests[1]


def test_bytes_are_what_was_encoded(tiny: Path, tmp_path: Path) -> None:
    """One bit a number: 16 bytes of 128 numbers both ways, and headers."""
    train(tmp_path / "run", settings_of(tiny, wire="sign", num_rounds=4, fraction_train=1.0))
    events = [event for event in read_metrics(tmp_path / "run") if event["event"] == "round"]
    assert all(16 < event["bytes_up"] < 16 + 250 for event in events)
    assert all(event["bytes_down"] < 16 + 300 for event in events)
    assert events[1]["bytes_down"] - events[0]["bytes_down"] < 16 + 12
    assert abs(events[3]["bytes_down"] - events[1]["bytes_down"]) < 4  # those who were there are sent one part


def test_a_ledger_of_scalars_or_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny, num_rounds=2)
    run, _ = simulation(tmp_path / "grad", settings)
    scalars, _ = train(tmp_path / "scalars", settings | {"algorithm": "fedkseed", "num_rounds": 1})
    scalars.save(run.run.checkpoint_path)
    with pytest.raises(LedgerError, match="or one of scalars"):
        simulation_again(run)
    ledger, _ = train(tmp_path / "other", settings)
    from dataclasses import replace

    strange = replace(ledger, base=replace(ledger.base, fingerprint="0" * 64, digests=ledger.base.digests + 1))
    strange.save(run.run.checkpoint_path)
    with pytest.raises(LedgerError, match="is of another base model"):
        simulation_again(run)


def simulation_again(run: Simulation) -> Simulation:
    return Simulation(run.run, run._records, run.observer)


# --- Settings ---


def test_the_row_and_the_settings_agree() -> None:
    """Every setting of the row is one, and every new one is of this row alone; the row says what the code does."""
    fields = SimulationConfig.model_fields
    assert set(ROW.settings) <= set(fields)
    for name in CHANGES:
        assert [row.name for row in ALGORITHMS.values() if row.takes(name)] == ["fedkseed-grad"]
        assert name in SOME_TAKE
        assert (fields[name].description or "").startswith("Of fedkseed-grad: ") or name == "checkpointing"
    assert (ROW.sends, ROW.measures, ROW.draws) == ("changes", "gradient", None)
    assert (ROW.has_ledger, ROW.needs_noise, ROW.needs_peft, ROW.passes_per_step) == (True, True, False, 3)


def grad(**changes: Any) -> FederationConfig:
    return FederationConfig(**{"algorithm": "fedkseed-grad", "lr": 0.1} | changes)


def test_the_defaults_fit_each_other() -> None:
    found = grad()
    assert (found.basis, found.movement, found.wire, found.rounds_per_page) == ("table", "absolute", "float16", 0)
    assert (found.local_optimizer, found.server_optimizer, found.server_lr) == ("sgd", "sgd", 1.0)
    assert (found.two_point_clients, found.checkpointing) == (0.0, "off")


@pytest.fixture
def needed(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "data.jsonl").write_text("{}\n")
    return {"model": "a/b", "data": str(tmp_path / "data.jsonl"), "lr": 1e-4}


TABLE = "--basis table needs --noise hadamard and --num-seeds a power of two from 128 on, they are "
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"noise": "gaussian"}, TABLE + "gaussian and 4096; change them, or take --basis coefficients"),
    *[({"num_seeds": size}, f"{TABLE}hadamard and {size}") for size in (1, 64, 100, 127, 129, 4095, 65535)],
    (
        {"two_point_clients": 0.5, "local_optimizer": "adam"},
        "--two-point-clients is 0.5 and --local-optimizer adam; scalars can be weighed against changes of sgd only",
    ),
    ({"two_point_clients": 0.01, "local_optimizer": "sign"}, "--two-point-clients is 0.01 and --local-optimizer sign"),
    ({"two_point_clients": 1.0, "local_optimizer": "momentum"}, "--two-point-clients is 1.0 and --local-optimizer momentum"),
    ({"rounds_per_page": -1}, "--rounds-per-page is '-1'"),
    ({"rounds_per_page": 1.5}, "--rounds-per-page is '1.5'"),
    ({"rounds_per_page": True}, "--rounds-per-page is 'True'"),
    ({"basis": "rows"}, "--basis is 'rows'"),
    ({"movement": "sideways"}, "--movement is 'sideways'"),
    ({"local_optimizer": "adamw"}, "--local-optimizer is 'adamw'"),
    ({"server_optimizer": ""}, "--server-optimizer is ''"),
    *[({"server_lr": value}, f"--server-lr is '{value}'") for value in (0.0, -1.0, math.nan, math.inf, 1e38, 1e-38)],
    *[({"two_point_clients": value}, f"--two-point-clients is '{value}'") for value in (-0.1, 1.1, math.nan)],
    ({"checkpointing": "maybe"}, "--checkpointing is 'maybe'"),
    ({"checkpointing": True}, "--checkpointing is 'True'"),
    ({"wire": "int3"}, "--wire is 'int3'"),
    ({"importance_clip": 5.0}, "--importance-clip is 5.0 and --algorithm fedkseed-grad does not take it"),
    ({"lora_rank": 4}, "--lora-rank is 4 and --algorithm fedkseed-grad does not take it"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[f"{i}-{reason[:30]}" for i, (_, reason) in enumerate(REFUSED)])
def test_settings_that_are_refused(needed: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    import re

    build({**needed, "algorithm": "fedkseed-grad"})  # the control
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        build({**needed, "algorithm": "fedkseed-grad", **changes})
    assert "\n" not in str(caught.value)


OTHER_VALUES: dict[str, Any] = {
    "rounds_per_page": 2,
    "basis": "coefficients",
    "movement": "proportional",
    "local_optimizer": "adam",
    "server_optimizer": "momentum",
    "server_lr": 0.5,
    "two_point_clients": 0.5,
    "checkpointing": "on",
}


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "fedkseed-grad"])
def test_other_algorithms_take_none_of_them(needed: dict[str, Any], algorithm: str) -> None:
    assert OTHER_VALUES.keys() == set(CHANGES)
    for name, value in OTHER_VALUES.items():
        reason = f"--{name.replace('_', '-')} is {value!r} and --algorithm {algorithm} does not take it; .*fedkseed-grad"
        with pytest.raises(ConfigError, match=reason):
            build({**needed, "algorithm": algorithm, name: value})
        build({**needed, "algorithm": "fedkseed-grad", name: value})
    if ALGORITHMS[algorithm].takes("wire"):
        for wire in ("int8", "int4", "int2", "sign"):
            with pytest.raises(ConfigError, match=f"--wire is '{wire}' and --algorithm {algorithm} sends float16 or float32"):
                build({**needed, "algorithm": algorithm, "wire": wire})
    else:
        with pytest.raises(ConfigError, match=r"leave it out, or choose one of fedkseed-grad$"):
            build({**needed, "algorithm": algorithm, "wire": "int4"})


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_a_bounded_optimizer_on_the_server_wants_its_rate(needed: dict[str, Any], optimizer: str) -> None:
    """1, which sgd and momentum have, moves every number so far that any model is lost."""
    grad = {**needed, "algorithm": "fedkseed-grad", "server_optimizer": optimizer}
    with pytest.raises(ConfigError, match=f"--server-optimizer is {optimizer} and --server-lr is missing; it is how far"):
        build(grad)
    assert build({**grad, "server_lr": 1.0}).server_lr == 1.0


def test_more_pages_than_a_ledger_holds(needed: dict[str, Any]) -> None:
    pages = {**needed, "algorithm": "fedkseed-grad", "num_seeds": 65536, "rounds_per_page": 2}
    assert build({**pages, "num_rounds": 512}).num_rounds == 512
    with pytest.raises(
        ConfigError, match="--rounds-per-page 2 in --num-rounds 513 are 257 pages of 65,536 numbers; a ledger has"
    ):
        build({**pages, "num_rounds": 513})


@pytest.mark.parametrize("size", [128, 256, 4096, 65536])
def test_settings_that_are_taken(size: int) -> None:
    assert grad(num_seeds=size).basis == "table"
    for changes in ({"num_seeds": size - 1}, {"noise": "gaussian"}, {"num_seeds": 1}):
        assert grad(**{"num_seeds": size, "basis": "coefficients"} | changes).basis == "coefficients"
    assert grad(two_point_clients=0.5, server_optimizer="adam", server_lr=1e-3).two_point_clients == 0.5
