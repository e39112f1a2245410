"""The identity of a base model: what it hashes, what it ignores, and how a difference is named."""

import hashlib

import numpy as np
import pytest
import torch
from tests.support import laws
from tests.support.rows import half_types, kinds

import fedkseed as fk
from fedkseed.models.identity import BaseIdentity
from fedkseed.models.parameters import value_digest

POOL = fk.SeedPool(7, 4)
SHAPES: dict[str, tuple[int, ...]] = {"b.weight": (5, 3), "a.weight": (7,), "c": ()}


def digests(**changes: bytes) -> dict[str, bytes]:
    return {"a": b"\1" * 32, "b": b"\2" * 32, "c": b"\3" * 32} | changes


def model(kind: torch.dtype = torch.float32, frozen: tuple[str, ...] = ()) -> torch.nn.Module:
    return laws.module_of({name: laws.some_weights(shape, kind, i) for i, (name, shape) in enumerate(SHAPES.items())}, frozen)


def test_the_fingerprint_is_the_digest_of_the_digests_by_name() -> None:
    found = BaseIdentity.of(digests(), ["c", "a"])
    assert found.fingerprint == hashlib.sha256(b"\1" * 32 + b"\2" * 32 + b"\3" * 32).hexdigest()
    assert found.digests.tolist() == [0x01010101, 0x02020202, 0x03030303]
    assert found.digests.dtype == np.uint32
    assert found.frozen == ("a", "c")


def test_order_of_the_names_does_not_matter() -> None:
    backwards = dict(reversed(digests().items()))
    assert BaseIdentity.of(backwards, ["b", "a"]) == BaseIdentity.of(digests(), ["a", "b"])


NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (BaseIdentity.of(digests(b=b"\4" * 32)), "b is the first of 1 "),
        (BaseIdentity.of(digests(c=b"\4" * 32, b=b"\4" * 32)), "b is the first of 2 "),
        (BaseIdentity.of(digests(d=b"\4" * 32)), "4 parameters, expected 3"),
        (BaseIdentity.of(digests(b=b"\2" * 4 + b"\4" * 28)), "a parameter is the first of 1 "),  # same first four bytes
        (BaseIdentity.of(digests(), ["b"]), "b is tuned on one side and frozen on the other"),
        (BaseIdentity.of(digests(a=bytes(32)), ["b"]), "a is the first of 1 "),
    ],
)
def test_a_difference_is_named(other: BaseIdentity, text: str) -> None:
    found = BaseIdentity.of(digests()).difference(other, NAMES)
    assert found is not None
    assert text in found
    assert BaseIdentity.of(digests()) != other


def test_equal_identities_have_no_difference() -> None:
    assert BaseIdentity.of(digests(), ["a"]).difference(BaseIdentity.of(digests(), ["a"]), NAMES) is None


# --- Of a model ---


@kinds
def test_identity_of_a_model_by_its_definition(kind: torch.dtype) -> None:
    """docs/noise.md: names, shapes and values widened to float32, of all parameters, in the order of their names."""
    bound = fk.bind(model(kind, ("c",)), POOL)
    widened = {name: torch.from_numpy(laws.widen(x).reshape(x.shape)) for name, x in bound.model.named_parameters()}
    found = bound.identity()
    assert found.fingerprint == laws.model_digest(widened)
    first = [hashlib.sha256(laws.tensor_digest(name, widened[name])).digest() for name in sorted(widened)]
    assert len(found.digests) == len(first)
    assert found.digests[0] == int.from_bytes(laws.tensor_digest("a.weight", widened["a.weight"])[:4], "little")
    assert found.frozen == ("c",)


@half_types
def test_a_widened_load_has_the_same_identity(kind: torch.dtype) -> None:
    half = model(kind)
    assert fk.bind(half.float(), POOL).identity() == fk.bind(model(kind), POOL).identity()
    # The control: narrowing loses values, so it is another base.
    assert fk.bind(model().to(kind), POOL).identity() != fk.bind(model(), POOL).identity()


def test_training_does_not_change_the_identity() -> None:
    bound = fk.bind(model(), POOL)
    before = bound.identity()
    bound.move([0, 3], [0.5, -1.0])
    assert bound.identity() == before
    bound.rebuild(np.ones(4, np.float32))
    assert bound.identity() == before


def test_one_changed_value_is_another_base() -> None:
    changed = model()
    with torch.no_grad():
        changed.get_parameter("b.weight")[4, 2] += 2**-20
    one, other = fk.bind(model(), POOL), fk.bind(changed, POOL)
    assert "b.weight is the first of 1 " in (one.identity().difference(other.identity(), one.names) or "")


def test_zeros_of_either_sign_are_different_values() -> None:
    """Bytes are hashed: -0 and +0 give different tuned weights only in their sign, yet the identity tells them apart."""
    plus, minus = torch.zeros(3), -torch.zeros(3)
    assert value_digest("a", plus.shape, plus.dtype, [plus]) != value_digest("a", minus.shape, minus.dtype, [minus])


def test_a_digest_in_stretches_is_that_of_the_whole() -> None:
    x = laws.some_weights((10,), torch.bfloat16, 1)
    whole = value_digest("a", x.shape, x.dtype, [x])
    assert value_digest("a", x.shape, x.dtype, [x[:3], x[3:4], x[4:]]) == whole
    assert value_digest("a", x.shape, x.dtype, [x[:3], x[3:9]]) != whole
    assert value_digest("b", x.shape, x.dtype, [x]) != whole
    assert value_digest("a", torch.Size([2, 5]), x.dtype, [x]) != whole
