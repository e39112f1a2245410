"""Frozen names in a ledger's file: none is lost or made up, in few bytes, and the digest does not know how they are written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

import fedkseed as fk
from fedkseed.errors import LedgerError
from fedkseed.kseed.folded_names import folded, unfolded
from fedkseed.models.identity import BaseIdentity

PARTS = st.sampled_from(["layers", "weight", "0", "1", "2", "3", "10", "00", "07", "-1", "a0", "0a", "", "norm", "é"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), unique=True, max_size=40).map(sorted)


@given(NAMES)
def test_what_was_folded_comes_back(names: list[str]) -> None:
    patterns = folded(names)
    assert patterns is not None
    assert unfolded(json.loads(json.dumps(patterns)), len(names)) == names


def test_by_hand() -> None:
    layers = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 2, 4, 10)]
    names = sorted([*layers, "lm_head.weight", "h.0.1.w", "h.0.2.w", "h.01.w", "3.bias"])
    assert folded(names) == {
        "model.layers.#.mlp.up_proj.weight": "0-2,4,10",
        "lm_head.weight": "",
        "h.#.1.w": "0",
        "h.#.2.w": "0",
        "h.01.w": "",
        "#.bias": "3",
    }


@pytest.mark.parametrize("names", [["a.#.b"], ["b", "a"], ["a", "a"]])
def test_what_would_not_come_back_is_not_folded(names: list[str]) -> None:
    assert folded(names) is None


@pytest.mark.parametrize(
    "patterns",
    [
        [], None, {"a": 1}, {1: ""}, {"a": "0"}, {"a.#": ""}, {"#.#": "0-1"}, {"a.#": "1-0"}, {"a.#": "01"}, {"a.#": "0-1,"},
        {"a.#": "0,1"}, {"a.#": "0-2,1"}, {"a.#": "-1"}, {"a.#": "٣"}, {"a#": "1"}, {"a.3": ""}, {"a.0.#": "1"}, {"a.#": "0-4"},
        {"a.#": "0-999999999"}, {"a.#": "0-9999999999"}, {"b": "", "a.#": "0-3"},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_else_is_unfolded(patterns: Any) -> None:
    """No second way to write names, and none that would fill the memory."""
    with pytest.raises(ValueError, match="fold"):
        unfolded(patterns, 4)


def ledger(num_layers: int) -> fk.Ledger:
    names = [f"model.layers.{i}.{kind}.weight" for i in range(num_layers) for kind in ("norm", "up_proj", "down_proj")]
    base = BaseIdentity.of({name: bytes(32) for name in [*names, "v"]}, names)
    pool = fk.SeedPool(1, 128)
    return fk.Ledger(pool, base, "float32", 3, np.arange(128, dtype=np.float32), None)


def test_a_ledgers_file_is_small_and_its_digest_the_old_one(tmp_path: Path) -> None:
    """Files of few names are as before; of many the file differs, but no digest does."""
    few, many = ledger(1), ledger(30)
    for one, number in ((few, 1), (many, 4)):
        one.save(tmp_path / "l")
        with safetensors.safe_open(tmp_path / "l", "np") as file:
            metadata = json.loads(file.metadata()["fedkseed"])
        assert metadata["format"] == number
        back = fk.Ledger.load(tmp_path / "l")
        assert (back.base.frozen, back.digest(), back.encode()) == (one.base.frozen, one.digest(), one.encode())
        assert dataclasses.replace(back, round=4).digest() != one.digest()
    assert metadata["of"] == 1
    assert len(json.dumps(metadata)) < 600
    assert len(json.dumps(many.base.frozen)) > 2900
    old = metadata | {"format": 1, "base": metadata["base"] | {"frozen": list(many.base.frozen)}}
    del old["of"]
    (tmp_path / "old").write_bytes(rewritten(tmp_path / "l", old))
    assert fk.Ledger.load(tmp_path / "old").digest() == many.digest()


def rewritten(path: Path, metadata: Any) -> bytes:
    data: bytes = save(load_file(path), metadata={"fedkseed": json.dumps(metadata)})
    return data


@pytest.mark.parametrize(
    "change", [{"of": 4}, {"of": "1"}, {"of": True}, {"of": None}, {"of": 2}, {"frozen": {"a.#": "0-999"}}]
)
def test_damage_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    ledger(30).save(tmp_path / "l")
    with safetensors.safe_open(tmp_path / "l", "np") as file:
        metadata = json.loads(file.metadata()["fedkseed"])
    metadata |= {name: value for name, value in change.items() if name == "of"}
    metadata["base"] |= {name: value for name, value in change.items() if name == "frozen"}
    (tmp_path / "l").write_bytes(rewritten(tmp_path / "l", metadata))
    with pytest.raises(LedgerError, match="damaged") as caught:
        fk.Ledger.load(tmp_path / "l")
    assert "\n" not in str(caught.value)
