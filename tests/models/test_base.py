"""Base weights from memory and from safetensors files: the same bits wherever they lie; files that do not fit are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.support import laws
from tests.support.rows import families, kinds

import fedkseed as fk
from fedkseed.errors import BindingError
from fedkseed.models import base
from fedkseed.models.parameters import named_parameters
from fedkseed.noise import QUANTUM

KEY = 0x0123456789ABCDEF
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHAPES = {"embed.weight": (67, 33), "block.0.w": (130, 5), "block.0.scale": (), "big": (2 * QUANTUM + 131,), "none": (0, 4)}


def tensors_of(kind: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: laws.some_weights(shape, kind, i) for i, (name, shape) in enumerate(SHAPES.items())}


def pool_of(family: str) -> fk.SeedPool:
    return fk.SeedPool(KEY, 3, family)


COEFFICIENTS = np.array([0.25, -0.001, 3e-5], np.float32)


def write(path: Path, tensors: dict[str, torch.Tensor], shift: int = 0) -> Path:
    """A safetensors file by hand; the data begin `shift` bytes past a multiple of 8, where no writer would put them."""
    header, data = {}, b""
    for name, x in tensors.items():
        raw = laws.bits(x).tobytes()
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * ((shift - len(text)) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with two shards and the index that Hugging Face writes."""
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def exercised(bound: fk.Binding) -> list[dict[str, bytes]]:
    """The weights after each of some operations."""
    seen = []
    for operation in (
        lambda: bound.rebuild(COEFFICIENTS),
        lambda: bound.move([0, 2], [0.125, -0.5]),
        lambda: bound.perturb(1, 0.01),
        lambda: bound.rebuild(np.zeros(3, np.float32)),
        lambda: bound.rebuild(COEFFICIENTS),
    ):
        operation()
        seen.append(laws.all_bits(bound.model))
    return seen


def expected(tensors, kind, family):
    """The bits of all weights after `exercised`'s first step."""
    result = {}
    for name, x in tensors.items():
        weight = laws.Weight(name, x, kind, family, KEY, 3)
        weight.rebuild(COEFFICIENTS)
        result[name] = weight.now.tobytes()
    return {name: raw for name, raw in result.items() if raw}


# --- the same bits wherever the base lies ---


@families
@kinds
def test_a_file_and_a_copy_in_memory_give_the_same_bits(family, kind, tmp_path):
    tensors = tensors_of(kind)
    path = tmp_path / "base.safetensors"
    save_file(tensors, path)
    kept = path.read_bytes()
    from_memory = exercised(fk.bind(laws.module_of(tensors), pool_of(family)))
    assert exercised(fk.bind(laws.module_of(tensors), pool_of(family), base=path)) == from_memory
    assert exercised(fk.bind(laws.module_of(tensors), pool_of(family), base=str(path))) == from_memory
    assert from_memory[0] == expected(tensors, kind, family)
    assert path.read_bytes() == kept


@families
@kinds
def test_small_batches_give_the_same_bits(family, kind, tmp_path, monkeypatch):
    """A tensor larger than a batch comes in several stretches."""
    tensors = tensors_of(kind)
    path = tmp_path / "base.safetensors"
    save_file(tensors, path)
    from_memory = exercised(fk.bind(laws.module_of(tensors), pool_of(family)))
    for quanta in (1, 2):
        monkeypatch.setattr(base, "BATCH_ELEMENTS", quanta * QUANTUM)
        assert exercised(fk.bind(laws.module_of(tensors), pool_of(family), base=path)) == from_memory


def test_a_folder_with_one_file_gives_the_same_bits(tmp_path):
    tensors = tensors_of(torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    bound = fk.bind(laws.module_of(tensors), pool_of("hadamard"), base=tmp_path)
    assert exercised(bound)[0] == expected(tensors, torch.float32, "hadamard")


@families
def test_a_sharded_folder_gives_the_same_bits(family, tmp_path, monkeypatch):
    tensors = tensors_of(torch.bfloat16)
    write_sharded(tmp_path, tensors)
    from_memory = exercised(fk.bind(laws.module_of(tensors), pool_of(family)))
    assert exercised(fk.bind(laws.module_of(tensors), pool_of(family), base=tmp_path)) == from_memory
    monkeypatch.setattr(base, "BATCH_ELEMENTS", QUANTUM)
    assert exercised(fk.bind(laws.module_of(tensors), pool_of(family), base=tmp_path)) == from_memory


@families
@pytest.mark.parametrize("held", laws.FLOAT_TYPES, ids=lambda kind: f"file-{kind}")
@kinds
def test_a_file_may_have_another_type_than_the_model(family, held, kind, tmp_path):
    """w0 is what the file holds; one cast to the model's type follows. The model's own weights do not count."""
    tensors = tensors_of(held)
    save_file(tensors, tmp_path / "base.safetensors")
    model = laws.module_of({name: torch.full_like(x, 5, dtype=kind) for name, x in tensors.items()})
    before = laws.all_bits(model)
    bound = fk.bind(model, pool_of(family), base=tmp_path / "base.safetensors")
    assert laws.all_bits(model) == before
    assert exercised(bound)[0] == expected(tensors, kind, family)


def test_a_bfloat16_file_under_a_float32_model_equals_its_float32_load(tmp_path):
    held = tensors_of(torch.bfloat16)
    save_file(held, tmp_path / "base.safetensors")
    wide = {name: x.float() for name, x in held.items()}
    from_memory = exercised(fk.bind(laws.module_of(wide), pool_of("hadamard")))
    assert exercised(fk.bind(laws.module_of(wide), pool_of("hadamard"), base=tmp_path / "base.safetensors")) == from_memory


@pytest.mark.parametrize("shift", range(1, 8))
def test_tensors_may_lie_at_any_byte(shift, tmp_path, monkeypatch):
    tensors = {**tensors_of(torch.float32), "odd": laws.some_weights((77,), torch.bfloat16, 9)}
    tensors = dict(sorted(tensors.items(), key=lambda item: item[0] != "odd"))  # then the float32 lie 2 bytes further
    path = write(tmp_path / "base.safetensors", tensors, shift)
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == shift
    from_memory = exercised(fk.bind(laws.module_of(tensors), pool_of("hadamard")))
    for elements in (base.BATCH_ELEMENTS, QUANTUM):
        monkeypatch.setattr(base, "BATCH_ELEMENTS", elements)
        assert exercised(fk.bind(laws.module_of(tensors), pool_of("hadamard"), base=path)) == from_memory


def test_our_own_files_are_files_that_others_read(tmp_path):
    """What the test above writes (aligned, as writers do) is what the safetensors library reads."""
    tensors = tensors_of(torch.float16)
    read = load_file(write(tmp_path / "base.safetensors", tensors))
    assert {name: laws.bits(x).tobytes() for name, x in read.items()} == {
        name: laws.bits(x).tobytes() for name, x in tensors.items()
    }


@pytest.mark.parametrize("held", ["a.weight", "head.weight", "z.weight"])
def test_a_tied_tensor_may_be_in_the_file_under_any_of_its_names(held, tmp_path):
    w0 = laws.some_weights((40, 9), torch.float32, 1)
    save_file({held: w0}, tmp_path / "base.safetensors")
    tied = torch.nn.Parameter(w0.clone())
    model = laws.module_of({"z.weight": tied, "head.weight": tied, "a.weight": tied})
    bound = fk.bind(model, pool_of("hadamard"), base=tmp_path / "base.safetensors")
    bound.rebuild(COEFFICIENTS)
    weight = laws.Weight("a.weight", w0, torch.float32, "hadamard", KEY, 3)
    weight.rebuild(COEFFICIENTS)
    np.testing.assert_array_equal(laws.bits(tied), weight.now)


def test_what_is_in_the_file_besides_the_tuned_tensors_does_not_matter(tmp_path):
    """Frozen tensors need not be there; other tensors, of any type, may be; so may metadata."""
    w0 = laws.some_weights((50, 3), torch.float32, 1)
    save_file(
        {"w": w0, "ids": torch.arange(3), "double": torch.ones(3, dtype=torch.float64), "unused": torch.ones(7)},
        tmp_path / "base.safetensors",
        metadata={"format": "pt"},
    )
    frozen = laws.some_weights((9,), torch.float32, 2)
    model = laws.module_of({"w": w0, "frozen": frozen, "ids": torch.arange(5)}, frozen=("frozen",))
    fk.bind(model, pool_of("hadamard"), base=tmp_path / "base.safetensors").rebuild(COEFFICIENTS)
    assert torch.equal(model.frozen, frozen)
    assert laws.bits(model.w).tobytes() == expected({"w": w0}, torch.float32, "hadamard")["w"]


def test_the_copy_in_memory_is_of_the_weights_at_binding():
    tensors = tensors_of(torch.float32)
    model = laws.module_of(tensors)
    bound = fk.bind(model, pool_of("hadamard"))
    with torch.no_grad():
        for x in model.parameters():
            x.fill_(9)
    bound.rebuild(COEFFICIENTS)
    assert laws.all_bits(model) == expected(tensors, torch.float32, "hadamard")


@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, QUANTUM - 1, QUANTUM, QUANTUM + 1, 3 * QUANTUM + 7]), min_size=1, max_size=6),
    quanta=st.integers(1, 3),
)
def test_stretches_cover_each_tensor_once_and_start_at_multiples_of_the_quantum(sizes, quanta, tmp_path_factory):
    tensors = {f"t{i}": torch.arange(n, dtype=torch.float32) + i for i, n in enumerate(sizes)}
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(tensors, path)
    read = {name: [] for name in tensors}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BATCH_ELEMENTS", quanta * QUANTUM)
        for batch in base.FileBase(path, named_parameters(laws.module_of(tensors))).batches(list(tensors)):
            assert sum(stretch.values.numel() for stretch in batch) <= (quanta + 1) * QUANTUM  # what "batch" promises, about
            for stretch in batch:
                assert stretch.start % QUANTUM == 0
                assert stretch.start == sum(len(values) for values in read[stretch.name])
                read[stretch.name].append(stretch.values.clone())
    for name, x in tensors.items():
        assert torch.equal(torch.cat([torch.empty(0), *read[name]]), x)


# --- identity ---


def identity_of(tensors, frozen=(), **options):
    return fk.bind(laws.module_of(tensors, frozen), pool_of("hadamard"), **options).identity()


def test_the_fingerprint_is_the_digest_of_the_float32_values(tmp_path, monkeypatch):
    """docs/noise.md, "Digests": whatever holds the base, in whatever type, moved or not."""
    held = tensors_of(torch.bfloat16)
    wide = {name: x.float() for name, x in held.items()}
    save_file(held, tmp_path / "base.safetensors")
    right = laws.model_digest(wide)
    assert identity_of(held).fingerprint == right
    assert identity_of(wide).fingerprint == right
    assert identity_of(wide, base=tmp_path / "base.safetensors").fingerprint == right
    monkeypatch.setattr(base, "BATCH_ELEMENTS", QUANTUM)
    assert identity_of(held, base=tmp_path / "base.safetensors").fingerprint == right
    bound = fk.bind(laws.module_of(wide), pool_of("hadamard"))
    bound.rebuild(COEFFICIENTS)
    bound.perturb(0, 1.0)
    assert bound.identity().fingerprint == right


def test_the_fingerprint_covers_frozen_parameters_and_tells_what_is_frozen():
    tensors = tensors_of(torch.float32)
    whole = identity_of(tensors)
    partly = identity_of(tensors, frozen=("big",))
    assert partly.fingerprint == whole.fingerprint
    assert partly.frozen == ("big",)
    assert partly != whole
    changed = identity_of({**tensors, "big": tensors["big"] + 1}, frozen=("big",))
    assert changed.fingerprint != partly.fingerprint


@pytest.mark.parametrize("change", ["name", "shape", "value", "sign of zero"])
def test_the_fingerprint_changes_with_any_name_shape_or_value(change):
    tensors = tensors_of(torch.float32)
    other = {name: x.clone() for name, x in tensors.items()}
    if change == "name":
        other["block.0.v"] = other.pop("block.0.w")
    elif change == "shape":
        other["block.0.w"] = other["block.0.w"].reshape(5, 130)
    elif change == "value":
        other["big"][-1] += 1
    else:
        other["big"][0] = -0.0
    assert identity_of(other).fingerprint != identity_of(tensors).fingerprint


# --- files that do not fit ---


def refused(path: Path, message: str, tensors=None) -> None:
    """Binding to that base raises, names the path and leaves the model as it was."""
    model = laws.module_of(tensors or {"w": torch.ones(4, 3), "b": torch.ones(5)})
    before = laws.all_bits(model)
    with pytest.raises(BindingError, match=message) as error:
        fk.bind(model, pool_of("hadamard"), base=path)
    assert str(path) in str(error.value)
    assert laws.all_bits(model) == before


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "nothing.safetensors", "no such base file; expected a safetensors file or a folder")


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path, "no such base file; expected a safetensors file or a folder")


def test_a_missing_tensor_is_refused(tmp_path):
    save_file({"w": torch.ones(4, 3)}, tmp_path / "base.safetensors")
    refused(tmp_path / "base.safetensors", "no float32, float16 or bfloat16 tensor 'b', which the model has")


@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 3, 1), (4, 4), (2, 3)], ids=str)
def test_a_tensor_of_another_shape_is_refused(shape, tmp_path):
    save_file({"w": torch.ones(shape), "b": torch.ones(5)}, tmp_path / "base.safetensors")
    has, wants = (str(list(x)).replace("[", r"\[").replace("]", r"\]") for x in (shape, (4, 3)))
    refused(tmp_path / "base.safetensors", rf"w has shape {has}, the model's has {wants}")


@pytest.mark.parametrize("kind", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_a_tensor_of_an_unknown_type_is_refused(kind, tmp_path):
    save_file({"w": torch.ones(4, 3).to(kind), "b": torch.ones(5)}, tmp_path / "base.safetensors")
    refused(tmp_path / "base.safetensors", "no float32, float16 or bfloat16 tensor 'w'")


def whole_file() -> bytes:
    header = json.dumps(
        {
            "w": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]},
            "b": {"dtype": "F32", "shape": [5], "data_offsets": [48, 68]},
        }
    ).encode()
    return len(header).to_bytes(8, "little") + header + bytes(68)


def edited(old: str, new: str) -> bytes:
    """The whole file with an edited header of the right length."""
    whole = whole_file()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].replace(old.encode(), new.encode())
    assert header != whole[8 : 8 + size]
    return len(header).to_bytes(8, "little") + header + whole[8 + size :]


MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header cut off": whole_file()[:40],
    "data cut off": whole_file()[:-1],
    "header too long": (2**40).to_bytes(8, "little") + whole_file()[8:],
    "not JSON": (9).to_bytes(8, "little") + b"not JSON!" + bytes(68),
    "not UTF-8": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc" + bytes(68),
    "a list": (2).to_bytes(8, "little") + b"[]" + bytes(68),
    "a pickle": b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01K\x01s.",
    "entry without offsets": edited('"data_offsets": [0, 48]', '"other": 0'),
    "entry without dtype": edited('"dtype": "F32", "shape": [4', '"shape": [4'),
    "offsets too short": edited("[0, 48]", "[0, 40]"),
    "offsets before the data": edited("[0, 48]", "[-48, 0]"),
    "shape is a word": edited("[4, 3]", '"4, 3"'),
    "negative shape": edited("[4, 3]", "[-4, -3]"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused(case, tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(MALFORMED[case])
    refused(path, "not a whole safetensors file|has shape" if case == "negative shape" else "not a whole safetensors file")


def test_the_files_above_are_malformed_by_their_edits_only(tmp_path):
    """Control: the unedited file is taken."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(whole_file())
    model = laws.module_of({"w": torch.ones(4, 3), "b": torch.ones(5)})
    fk.bind(model, pool_of("gaussian"), base=path).rebuild(np.zeros(3, np.float32))
    assert all((x == 0).all() for x in model.parameters())


def test_a_missing_shard_is_refused(tmp_path):
    tensors = {"w": torch.ones(4, 3), "b": torch.ones(5)}
    write_sharded(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", tensors)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"w": 3}}'])
def test_a_malformed_index_is_refused(text, tmp_path):
    save_file({"w": torch.ones(4, 3), "b": torch.ones(5)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json")
