"""From base to tuned model: the same bits as a rebuild, and no other base."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import laws
from tests.support.rows import backends, families, kinds
from tests.support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import fedkseed as fk
from fedkseed.errors import BindingError, LedgerError
from fedkseed.kseed.ledger_format import History
from fedkseed.kseed.rounding import Precision
from fedkseed.models.loading import load_model

forms = pytest.mark.parametrize("published", [False, True], ids=["checkpoint", "published"])
SHAPES: dict[str, tuple[int, ...]] = {"embed.weight": (67, 33), "block.w": (130, 5), "block.norm": (40,), "scale": ()}
FROZEN = ("block.norm",)


def model(kind: torch.dtype = torch.float32, frozen: tuple[str, ...] = ()) -> torch.nn.Module:
    tensors = {name: laws.some_weights(shape, kind, i) for i, (name, shape) in enumerate(SHAPES.items())}
    return laws.module_of(tensors, frozen)


def ledger_of(bound: fk.Binding, precision: Precision = "float16") -> fk.Ledger:
    """A ledger after a round, over the base of a bound model."""
    size = bound.pool.size
    accumulators = 1e-2 * np.random.default_rng(1).standard_normal(size)
    history = History(accumulators, np.zeros(size), np.zeros(size, np.int64))
    return fk.Ledger.start(bound.pool, bound.identity(), precision).advance(history)


def bind(family: str = "hadamard", kind: torch.dtype = torch.float32, frozen: tuple[str, ...] = ()) -> fk.Binding:
    return fk.bind(model(kind, frozen), fk.SeedPool(0x0123456789ABCDEF, 5, family))


@families
@kinds
@forms
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_apply_gives_the_bits_of_a_rebuild(
    tmp_path: Path, family: str, kind: torch.dtype, published: bool, precision: Precision
) -> None:
    bound = bind(family, kind)
    ledger = ledger_of(bound, precision)
    (ledger.published() if published else ledger).save(tmp_path / "ledger.safetensors")
    before = laws.all_bits(bound.model)
    bound.rebuild(ledger.coefficients)
    fresh = model(kind)
    returned = fk.apply(fresh, tmp_path / "ledger.safetensors")
    assert laws.all_bits(fresh) == laws.all_bits(bound.model)
    assert all(laws.all_bits(fresh)[name] != before[name] for name in SHAPES)  # every tensor has moved
    assert returned.digest() == (ledger.published() if published else ledger).digest()


@families
@backends
def test_every_backend_gives_the_same_bits(family: str, backend: str) -> None:
    bound = bind(family, torch.bfloat16)
    ledger = ledger_of(bound)
    bound.rebuild(ledger.coefficients)
    fresh = model(torch.bfloat16)
    fk.apply(fresh, ledger, backend=backend)
    assert laws.all_bits(fresh) == laws.all_bits(bound.model)


def test_a_ledger_and_its_path_give_the_same_model(tmp_path: Path) -> None:
    ledger = ledger_of(bind())
    ledger.save(tmp_path / "l")
    tuned = [model() for _ in range(3)]
    for fresh, source in zip(tuned, (ledger, tmp_path / "l", str(tmp_path / "l")), strict=True):
        fk.apply(fresh, source)
    assert laws.all_bits(tuned[0]) == laws.all_bits(tuned[1]) == laws.all_bits(tuned[2])


@families
@kinds
def test_frozen_parameters_stay_as_they_are(family: str, kind: torch.dtype) -> None:
    """The ledger says what is tuned, not the flags of the model that happens to be there."""
    bound = bind(family, kind, FROZEN)
    ledger = ledger_of(bound)
    bound.rebuild(ledger.coefficients)
    for fresh in (model(kind), model(kind, FROZEN), model(kind, ("scale",)), model(kind, tuple(SHAPES))):
        before = laws.all_bits(fresh)
        fk.apply(fresh, ledger)
        assert laws.all_bits(fresh) == laws.all_bits(bound.model)
        assert laws.all_bits(fresh)["block.norm"] == before["block.norm"]
        assert laws.all_bits(fresh)["scale"] != before["scale"]


# --- Another base ---


def refused(fresh: torch.nn.Module, ledger: fk.Ledger) -> str:
    """The reason, after a check that nothing has changed."""
    before = laws.all_bits(fresh)
    with pytest.raises(LedgerError) as caught:
        fk.apply(fresh, ledger)
    assert laws.all_bits(fresh) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@kinds
@forms
@pytest.mark.parametrize("name", SHAPES)
def test_one_changed_value_is_refused_by_name(kind: torch.dtype, name: str, published: bool) -> None:
    ledger = ledger_of(bind(kind=kind))
    fresh = model(kind)
    pattern = fresh.get_parameter(name).detach().reshape(-1).view(torch.int32 if kind == torch.float32 else torch.int16)
    pattern[-1] ^= 1  # the last bit of the last value
    reason = refused(fresh, ledger.published() if published else ledger)
    assert f"{name} is the first of 1 parameters" in reason
    pattern[-1] ^= 1
    fk.apply(fresh, ledger)  # the control


def test_the_first_of_several_is_named() -> None:
    fresh = model()
    with torch.no_grad():
        fresh.get_parameter("embed.weight")[3, 3] += 1
        fresh.get_parameter("block.w")[100, 3] += 1
    assert "block.w is the first of 2 parameters" in refused(fresh, ledger_of(bind()))


def test_a_changed_frozen_parameter_is_refused() -> None:
    fresh = model()
    with torch.no_grad():
        fresh.get_parameter("block.norm")[20] += 1
    assert "block.norm is the first of 1 " in refused(fresh, ledger_of(bind(frozen=FROZEN)))


def test_other_names_shapes_and_numbers_of_parameters() -> None:
    ledger = ledger_of(bind())
    tensors = {name: laws.some_weights(shape, torch.float32, i) for i, (name, shape) in enumerate(SHAPES.items())}
    renamed = {("block.x" if name == "block.w" else name): x for name, x in tensors.items()}
    assert "block.x is the first" in refused(laws.module_of(renamed), ledger)
    reshaped = tensors | {"block.w": tensors["block.w"].reshape(5, 130)}
    assert "block.w is the first" in refused(laws.module_of(reshaped), ledger)
    assert "5 parameters, expected 4" in refused(laws.module_of(tensors | {"zz": torch.zeros(2)}), ledger)
    assert "3 parameters, expected 4" in refused(laws.module_of({k: v for k, v in tensors.items() if k != "scale"}), ledger)


def test_narrowed_base_is_refused() -> None:
    """float32 values that bfloat16 does not hold: the tuned weights would be others."""
    refused(model().to(torch.bfloat16), ledger_of(bind()))


def test_applying_twice_is_refused() -> None:
    ledger, fresh = ledger_of(bind()), model()
    fk.apply(fresh, ledger)
    assert "not the ledger's base" in refused(fresh, ledger)


def test_a_ledger_that_tunes_nothing_is_refused() -> None:
    ledger = ledger_of(bind())
    fresh = model()
    before = laws.all_bits(fresh)
    with pytest.raises(BindingError):
        fk.apply(fresh, replace(ledger, base=replace(ledger.base, frozen=tuple(sorted(SHAPES)))))
    assert laws.all_bits(fresh) == before


def test_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    fresh = model()
    before = laws.all_bits(fresh)
    (tmp_path / "text").write_text("not a ledger, certainly")
    for path in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(LedgerError, match=path.name):
            fk.apply(fresh, path)
    assert laws.all_bits(fresh) == before


# --- A bfloat16 checkpoint in two precisions, a real model ---


@pytest.fixture(scope="module")
def checkpoint(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k (tied weights and all), saved in bfloat16."""
    import transformers

    folder = tmp_path_factory.mktemp("bfloat16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.bfloat16)
    loaded.save_pretrained(folder)
    return folder


def load(folder: Path, kind: torch.dtype) -> torch.nn.Module:
    import transformers

    module: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    assert {x.dtype for x in module.parameters()} == {kind}
    return module


@families
def test_two_precisions_of_one_checkpoint(checkpoint: Path, family: str) -> None:
    pool = fk.SeedPool(3, 6, family)
    half, full = load(checkpoint, torch.bfloat16), load(checkpoint, torch.float32)
    bounds = [fk.bind(x, pool) for x in (half, full)]
    assert bounds[0].identity() == bounds[1].identity()
    ledger = ledger_of(bounds[0])
    for bound, kind in zip(bounds, (torch.bfloat16, torch.float32), strict=True):
        fresh = load(checkpoint, kind)
        fk.apply(fresh, ledger)
        bound.rebuild(ledger.coefficients)
        assert laws.all_bits(fresh) == laws.all_bits(bound.model)
    rounded = {name: x.to(torch.bfloat16) for name, x in full.named_parameters()}
    assert all(torch.equal(rounded[name], x) for name, x in half.named_parameters())  # one model in two precisions


# --- A base that was loaded in another type than the run's ---


def stored(folder: Path, kind: torch.dtype | None = None, half: tuple[str, ...] = ()) -> Path:
    """The tiny model, its tensors of these names in bfloat16, and its configuration naming a type of its own."""
    tiny_model(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: x.bfloat16() if name in half else x for name, x in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(kind or torch.float32).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MIXED = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight")
TYPES = ("float32", "float16", "bfloat16")


def run_on(folder: Path, kind: str) -> tuple[fk.Ledger, dict[str, torch.Tensor]]:
    """A ledger of a run in a type, and the run's tuned weights."""
    bound = fk.bind(load_model(folder, kind), fk.SeedPool(3, 64))
    coefficients = np.linspace(-0.02, 0.03, 64).astype(np.float16).astype(np.float32)
    bound.rebuild(coefficients)
    return fk.Ledger.of(bound, coefficients), {name: x.detach().clone() for name, x in bound.model.named_parameters()}


@pytest.mark.parametrize("half", [(), MIXED], ids=["float32", "mixed"])
@pytest.mark.parametrize("run", TYPES)
@pytest.mark.parametrize("loaded", [*TYPES, None])
def test_any_load_of_the_files_becomes_the_runs_model(
    tmp_path: Path, half: tuple[str, ...], run: str, loaded: str | None
) -> None:
    """None is a plain load, in the type that the configuration names; the tuned weights are rounded to it last."""
    folder = stored(tmp_path / "model", torch.float16, half)
    ledger, tuned = run_on(folder, run)
    model = AutoModelForCausalLM.from_pretrained(folder, **({} if loaded is None else {"dtype": getattr(torch, loaded)}))
    kind = getattr(torch, loaded or "float16")
    fk.apply(model, ledger)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == kind
        assert torch.equal(parameter, tuned[name].to(kind)), name


def test_a_model_that_is_no_longer_what_its_files_give_is_refused(tmp_path: Path) -> None:
    """Of one that was tuned already, the files would make a base again."""
    folder = stored(tmp_path / "model")
    ledger, _ = run_on(folder, "float32")
    model = load_model(folder, "bfloat16")
    model.lm_head.weight.data[0, 0] += 1
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(LedgerError, match=r"this model is not the ledger's base: .* that the run started from, in float32$"):
        fk.apply(model, ledger)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_frozen_tensors_are_the_runs_too(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model")
    model = load_model(folder, "bfloat16")
    model.lm_head.requires_grad_(False)
    bound = fk.bind(model, fk.SeedPool(3, 64))
    ledger = fk.Ledger.of(bound, [0.25] * 64)
    bound.rebuild(ledger.coefficients)
    again = load_model(folder, "float32")
    fk.apply(again, ledger)
    assert all(torch.equal(x, model.get_parameter(name).float()) for name, x in again.named_parameters())
