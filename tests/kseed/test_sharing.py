"""A ledger as a folder and on a hub: what was written is found again, and nothing else is taken for it."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from tests.support import hub as hubs

import fedkseed as fk
from fedkseed.errors import FedKSeedError, InvalidValueError, LedgerError, ModelError
from fedkseed.kseed.server import start
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.runs.settings import build

POOL = fk.SeedPool(0x0123456789ABCDEF, 256)
PROMPT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def ledger(tiny: Path) -> fk.Ledger:
    """Of the tiny model, trained for a step."""
    model, optimizer = fk.prepare(load_model(tiny / "model", "float32"), POOL, lr=1e-2)
    ids = load_tokenizer(tiny / "model")("name the dog red blue", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return fk.release(model)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.running(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def tuned(tiny: Path, ledger: fk.Ledger, dtype: Any = "float32") -> str:
    """Digest of the tiny model with a ledger."""
    model = load_model(tiny / "model", dtype)
    fk.apply(model, ledger)
    return digest(model)


def digest(model: torch.nn.Module) -> str:
    return fk.bind(model, POOL).digest()


def refused(call: Callable[[], Any], text: str, kind: type[FedKSeedError] = LedgerError) -> None:
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- A folder ---


def test_a_folder_is_the_published_ledger_and_a_card(ledger: fk.Ledger, tiny: Path, tmp_path: Path) -> None:
    folder = ledger.save_pretrained(tmp_path / "a" / "folder", prompt=PROMPT, about={"training data": "a | line"})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "ledger.safetensors"]
    assert (folder / "ledger.safetensors").read_bytes() == ledger.encode()
    card = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == "model"  # a folder's last part: no path of this machine
    assert data["base_model_relation"] == "adapter"
    assert data["tags"] == ["fedkseed", "adapter"]
    assert data["library_name"] == "fedkseed"
    assert PROMPT in card
    for text in (ledger.digest(), ledger.base.fingerprint, "K = 256, hadamard noise", "| training data | a \\| line |"):
        assert text in card
    assert str(tiny) not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_folder_a_file_and_the_ledger_are_the_same_model(ledger: fk.Ledger, tiny: Path, tmp_path: Path) -> None:
    folder = ledger.save_pretrained(tmp_path / "folder", "owner/base")
    expected = tuned(tiny, ledger)
    for source in (folder, str(folder), folder / "ledger.safetensors", str(folder / "ledger.safetensors")):
        model = load_model(tiny / "model", "float32")
        assert fk.apply(model, source).digest() == ledger.digest()
        assert digest(model) == expected
        assert digest(fk.load(source, base=tiny / "model", dtype="float32")) == expected
        assert fk.Ledger.from_pretrained(source).base_model == "owner/base"
    (folder / "README.md").unlink()
    assert fk.Ledger.from_pretrained(folder).base_model is None


def test_saving_again_replaces_a_ledger_but_never_a_runs(ledger: fk.Ledger, tmp_path: Path) -> None:
    other = dataclasses.replace(ledger, round=5)
    ledger.save_pretrained(tmp_path / "folder")
    other.save_pretrained(tmp_path / "folder")
    assert fk.Ledger.from_pretrained(tmp_path / "folder").round == 5
    config = build({"model": "m", "data": __file__, "lr": 1.0, "eps": 1.0, "num_seeds": 16})
    (tmp_path / "run").mkdir()
    checkpoint = start(config, ledger.base)
    checkpoint.save(tmp_path / "run" / "ledger.safetensors")
    refused(lambda: ledger.save_pretrained(tmp_path / "run"), "run holds the checkpoint of a run, which this would replace")
    assert (tmp_path / "run" / "ledger.safetensors").read_bytes() == checkpoint.encode()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ledger.safetensors"]


def test_a_card_of_something_else_says_nothing_of_a_ledger_beside_it(ledger: fk.Ledger, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\nbase_model: owner/other\n---\n# My model\n")
    bare = dataclasses.replace(ledger, base_model=None)
    bare.save(tmp_path / "tuned.safetensors")
    assert fk.Ledger.from_pretrained(tmp_path / "tuned.safetensors").base_model is None
    ledger.save_pretrained(tmp_path / "ours", "owner/base")
    bare.save(tmp_path / "ours" / "tuned.safetensors")
    assert fk.Ledger.from_pretrained(tmp_path / "ours" / "tuned.safetensors").base_model == "owner/base"


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("/home/me/secret/model", "model"),
        ("~/secret/model/", "model"),
        ("../secret/of/model", "model"),
        (Path("secret/model"), "model"),
        ("owner/base", "owner/base"),
        ("owner/base@v1", "owner/base@v1"),
        ("base", "base"),
    ],
    ids=str,
)
def test_a_card_never_names_a_folder_of_this_machine(ledger: fk.Ledger, tmp_path: Path, base: Any, named: str) -> None:
    """Whether it is there now or not."""
    card = (ledger.save_pretrained(tmp_path / "folder", base) / "README.md").read_text()
    assert ModelCard(card).data.to_dict()["base_model"] == named
    assert "secret" not in card


def test_the_home_folder_is_meant_by_its_sign(ledger: fk.Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ledger.save_pretrained("~/folder", "owner/base") == tmp_path / "folder"
    assert fk.Ledger.from_pretrained("~/folder").digest() == ledger.digest()
    refused(lambda: fk.Ledger.from_pretrained("~nobody-of-that-name/folder"), "^~nobody-of-that-name/folder: cannot read")


def test_somebody_s_own_readme_is_left_alone(ledger: fk.Ledger, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    refused(lambda: ledger.save_pretrained(tmp_path), "holds a README.md of something else, which this would replace")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("README.md", "mine")]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"base_model": 5}, "^base_model is 5; expected a hub id or a folder"),
        ({"prompt": 5}, "^prompt is 5; expected the text"),
        ({"about": ["a"]}, r"^about is \['a'\]; expected a dict of rows"),
    ],
    ids=["base", "prompt", "about"],
)
def test_what_no_card_can_say(ledger: fk.Ledger, tmp_path: Path, given: Any, text: str) -> None:
    refused(lambda: ledger.save_pretrained(tmp_path / "folder", **given), text, InvalidValueError)
    assert not (tmp_path / "folder").exists()


def test_a_card_says_how_to_load_what_it_is_of(ledger: fk.Ledger, tmp_path: Path) -> None:
    """All weights or some of them; a base that has an address, or one that lies in a folder."""
    some = dataclasses.replace(ledger, base=dataclasses.replace(ledger.base, frozen=("model.norm.weight",)))
    for one, base, how, load in (
        (ledger, "owner/base", "all of whose weights are tuned", "model = fk.load(folder)  #"),
        (some, "base", "of whose weights some are tuned", 'model = fk.load(folder, base="BASE")  #'),
    ):
        folder = one.save_pretrained(tmp_path / base, base, about={"a|b": "c|d"})
        card = (folder / "README.md").read_text()
        assert how in card
        assert load in card
        assert "| a\\|b | c\\|d |" in card


def test_a_folder_that_is_missing_is_said(ledger: fk.Ledger, tmp_path: Path) -> None:
    refused(lambda: ledger.save(tmp_path / "no" / "l"), "cannot save a ledger there: .*/no is no folder; make it first")
    for name in ("", " ", "a\0b"):
        refused(lambda name=name: fk.Ledger.from_pretrained(name), "^a ledger's name is '.*'; give its file")
    refused(lambda: fk.load(ledger), "^source is a Ledger; expected", InvalidValueError)  # type: ignore[arg-type]


def test_what_cannot_be_written_leaves_nothing(ledger: fk.Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    refused(
        lambda: ledger.save_pretrained(tmp_path / "file" / "in"), "cannot write there .*; make room or choose another place"
    )
    unnamed = dataclasses.replace(ledger, base_model=None)
    refused(lambda: unnamed.save_pretrained(tmp_path / "a"), "^base_model is not known; give the hub id", InvalidValueError)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedkseed.kseed.sharing.write_atomically", full)
    refused(lambda: ledger.save_pretrained(tmp_path / "a"), "a: cannot write there .No space left on device.; make room")
    assert not (tmp_path / "a").exists()


# --- Loading over a base ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_in_any_type_is_read_from_its_files_and_rounded_last(
    ledger: fk.Ledger, tiny: Path, tmp_path: Path, dtype: Any
) -> None:
    folder = ledger.save_pretrained(tmp_path / "folder")
    whole = fk.load(folder, base=tiny / "model", dtype="float32")
    half = fk.load(folder, base=tiny / "model", dtype=dtype)
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(one.to(other.dtype), other)


def test_a_half_precision_base_without_its_files_is_told_which_checkpoint_and_type_fit(
    ledger: fk.Ledger, tiny: Path, tmp_path: Path
) -> None:
    folder = ledger.save_pretrained(tmp_path / "folder", "owner/base")
    cast = load_model(tiny / "model", "bfloat16")
    cast.name_or_path = ""
    before = digest(cast)
    refused(lambda: fk.apply(cast, folder), "^this model is not the ledger's base: .* load owner/base, in float32$")
    assert digest(cast) == before


def test_another_base_is_refused(ledger: fk.Ledger, other_model: Path, tmp_path: Path) -> None:
    folder = ledger.save_pretrained(tmp_path / "folder", "owner/base")
    refused(
        lambda: fk.load(folder, base=other_model), "^this model is not the ledger's base: lm_head.weight .* load owner/base$"
    )


def test_a_base_that_nobody_names(ledger: fk.Ledger, tmp_path: Path) -> None:
    ledger.save(tmp_path / "bare.safetensors")
    refused(
        lambda: fk.load(tmp_path / "bare.safetensors"), "bare.safetensors: no card says which base model it is over; give base="
    )
    folder = ledger.save_pretrained(tmp_path / "folder")
    refused(lambda: fk.load(folder), "its card names the base model 'model', which is no hub id; give base=, where it is")


@pytest.mark.parametrize("card", ["", "---\nbase_model: [a, b]\n---\n", "---\n{{\n---\n", "\xff"])
def test_a_card_that_says_nothing_is_no_card(ledger: fk.Ledger, tmp_path: Path, card: str) -> None:
    folder = ledger.save_pretrained(tmp_path / "folder")
    (folder / "README.md").write_bytes(card.encode("latin-1"))
    assert fk.Ledger.from_pretrained(folder).base_model is None


# --- A hub ---


def test_what_was_pushed_is_applied_and_loaded_by_its_name(
    hub: hubs.Hub,
    ledger: fk.Ledger,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over HTTP, with the base by the name on the card; again without the hub."""
    assert ledger.push_to_hub("owner/tuned", "somebody/base").endswith("/owner/tuned")
    first = hub.commits["owner/tuned"][-1][0]
    assert set(hub.commits["owner/tuned"][-1][1]) == {"README.md", "ledger.safetensors"}
    dataclasses.replace(ledger, round=9).push_to_hub("owner/tuned", "somebody/base")
    assert fk.Ledger.from_pretrained("owner/tuned").round == 9
    assert fk.Ledger.from_pretrained(f"owner/tuned@{first}").round == ledger.round

    model = load_model(tiny / "model", "float32")
    fk.apply(model, f"owner/tuned@{first}")
    assert digest(model) == tuned(tiny, ledger)
    hub.commits["somebody/base"] = []
    hub.commit("somebody/base", {path.name: path.read_bytes() for path in (tiny / "model").iterdir()})
    assert digest(fk.load("owner/tuned")) == tuned(tiny, ledger)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert digest(fk.load("owner/tuned")) == tuned(tiny, ledger)
    assert len(hub.asked) == asked


def test_names_that_no_hub_has(hub: hubs.Hub, ledger: fk.Ledger, tiny: Path) -> None:
    model = load_model(tiny / "model", "float32")
    before = digest(model)
    ledger.push_to_hub("owner/tuned", "somebody/base")
    hub.commits["owner/empty"] = [("0" * 40, {"README.md": b"nothing"})]
    for name, text in (
        ("owner/nothing", "^owner/nothing: no such file or folder here, and no hub gives it .*; check the name"),
        ("owner/tuned@v9", "^owner/tuned@v9: no such file or folder here, and no hub gives it"),
        ("owner/empty", "^owner/empty: it has no ledger.safetensors; expected what Ledger.push_to_hub put there"),
        ("nothing", "^nothing: cannot read the ledger .No such file or directory"),
        ("./owner/nothing", "cannot read the ledger .No such file"),
        ("owner/nothing.safetensors", "cannot read the ledger .No such file"),
        (Path("owner/nothing"), "cannot read the ledger .No such file"),
        (tiny, "tiny0: no ledger.safetensors in this folder; give one that save_pretrained wrote"),
    ):
        refused(lambda name=name: fk.apply(model, name), text)
        refused(lambda name=name: fk.load(name), text)
    assert digest(model) == before
    refused(lambda: fk.load("owner/tuned"), "^somebody/base: no such folder here", ModelError)


def test_a_hub_out_of_reach_is_one_line(hub: hubs.Hub, ledger: fk.Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tuned", "a/b/c", "owner/tuned@main", ""):
        refused(lambda name=name: ledger.push_to_hub(name, "b"), "^repo_id is .*; expected owner/name", InvalidValueError)
    assert hub.asked == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(
        lambda: ledger.push_to_hub("owner/tuned", "somebody/base"), "^owner/tuned: cannot push .*; check the name, the token"
    )
    refused(lambda: fk.Ledger.from_pretrained("owner/tuned"), "^owner/tuned: no such file or folder here, and no hub gives it")


def test_a_tampered_ledger_on_a_hub_is_damaged(hub: hubs.Hub, ledger: fk.Ledger) -> None:
    ledger.push_to_hub("owner/tuned", "somebody/base")
    data = hub.commits["owner/tuned"][-1][1]["ledger.safetensors"]
    hub.commit("owner/tuned", {"ledger.safetensors": data[:-7]})
    refused(lambda: fk.Ledger.from_pretrained("owner/tuned"), "not a ledger, or damaged")
