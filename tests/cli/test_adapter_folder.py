"""A LoRA adapter's folder as --model: K numbers over its matrices, from the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tests.support import hub as hubs
from tests.support import laws
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.runs import read_metrics
from tests.support.tiny import tiny_settings

import fedkseed as fk
from fedkseed.baselines import fresh_lora
from fedkseed.errors import LedgerError, ModelError
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.models.selection import frozen_names

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose factors come from a key, as docs/adapter.md makes it; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("adapter") / "start"
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(tiny / "model", "float32"), config)
    fk.seed_lora(model, key=7)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def changed(adapter: Path, to: Path, **changes: Any) -> Path:
    """A copy with another configuration."""
    copy = Path(shutil.copytree(adapter, to))
    config = copy / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return copy


def test_the_command_makes_the_adapter_that_the_key_gives(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        made = fedkseed("lora", tiny / "model", folder, "--rank", 4, "--key", 7)
        assert made.code == 0, made.stderr
    assert "fedkseed simulate --model" in made.stdout
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(tiny / "model", "float32"), config)
    fk.seed_lora(model, key=7)
    expected = {name: tensor for name, tensor in peft.get_peft_model_state_dict(model).items() if "lora_" in name}
    for folder in (one, other):
        found = load_file(folder / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    base, adapted = load_model(tiny / "model"), load_model(one)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(base(input_ids=ids).logits, adapted(input_ids=ids).logits)  # it changes nothing yet
    again = fedkseed("simulate", *flags(tiny_settings(tiny, model=str(one), algorithm="fedkseed-grad", num_seeds=128, lr=0.02)))
    assert again.code == 0, again.stderr


def test_what_no_adapter_can_be_made_of_is_one_line(fedkseed: CommandLine, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(fedkseed("lora", adapter, out), 2, "is an adapter already")
    assert_one_line(fedkseed("lora", tmp_path / "none", out), 2, "no such model folder")
    assert_one_line(fedkseed("lora", tiny / "model", tmp_path), 2, "exists; give an output that does not")
    assert_one_line(fedkseed("lora", tiny / "model", out, "--key", 2**64), 2, "key is 18446744073709551616")
    assert_one_line(fedkseed("lora", tiny / "model", out, "--rank", 100000), 2, "--rank is 100000 and no matrix of", "above")
    assert not out.exists()


def test_a_model_that_peft_cannot_wrap_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"^odd: peft can put no adapter over all its linear layers \(.+\); give another model$"
    ):
        fresh_lora(torch.nn.Linear(2, 2), 4, "odd")


def test_a_run_moves_its_matrices_alone_and_the_export_is_an_adapter_of_peft(
    fedkseed: CommandLine, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    settings = tiny_settings(
        tiny, model=str(adapter), algorithm="fedkseed-grad", local_optimizer="adam", num_seeds=128, lr=0.02
    )
    result = fedkseed("simulate", *flags(settings), "--run", run)
    assert result.code == 0, result.stderr
    losses = [event["eval_loss"] for event in read_metrics(run) if event["event"] == "evaluation"]
    assert losses[-1] < losses[0]
    ledger = fk.Ledger.load(run / "ledger.safetensors")
    base = load_model(tiny / "model", "float32")
    names = {name.replace("q_proj.weight", "q_proj.base_layer.weight") for name, _ in base.named_parameters()}
    assert set(ledger.base.frozen) == {name.replace("up_proj.weight", "up_proj.base_layer.weight") for name in names}

    evaluated = fedkseed("evaluate", run, "--output", tmp_path / "scores.json")
    assert evaluated.code == 0, evaluated.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["tuned"]["overall"]["loss"] == pytest.approx(losses[-1])

    exported = fedkseed("export", run, out)
    assert (exported.code, "an adapter for" in exported.stdout) == (0, True), exported.stderr
    assert not (out / "config.json").exists()
    tuned, ids = fk.load(run, base=adapter), torch.arange(4, 20)[None]
    again = peft.PeftModel.from_pretrained(base, out)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, tuned(input_ids=ids).logits)
    assert fedkseed("evaluate", run, "--model", out).code == 1  # it is another base than the one that the ledger is of


def test_a_published_ledger_says_which_adapter_it_is_over(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    """Whoever has the folder alone can make the same adapter, and the tuned model."""
    start, run, out = tmp_path / "start", tmp_path / "run", tmp_path / "out"
    assert fedkseed("lora", tiny / "model", start, "--rank", 4, "--key", 7).code == 0
    settings = tiny_settings(tiny, model=str(start), algorithm="fedkseed-grad", num_seeds=128, lr=0.02)
    assert fedkseed("simulate", *flags(settings), "--run", run).code == 0
    exported = fedkseed("export", run, out, "--ledger-only")
    assert exported.code == 0, exported.stderr
    card = (out / "README.md").read_text()
    for text in (
        'base_model: "model"',
        "`fedkseed lora model start --rank 4 --key 7`",
        "with a LoRA adapter that is tuned",
        "fingerprint with the adapter `",
        'fk.load(folder, base="START")',
    ):
        assert text in card
    again = tmp_path / "again"
    assert fedkseed("lora", tiny / "model", again, "--rank", 4, "--key", 7).code == 0
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(fk.load(out, base=again)(input_ids=ids).logits, fk.load(run, base=start)(input_ids=ids).logits)
    with pytest.raises(LedgerError, match=r"^the ledger moves the matrices of a LoRA adapter, which this model has not; make"):
        fk.load(out, base=tiny / "model")


def test_it_is_its_base_model_with_the_adapter_in_place(tiny: Path, adapter: Path) -> None:
    model = load_model(adapter, "float32")
    assert model.name_or_path == str(adapter)
    frozen = frozen_names(model)
    tuned = [name for name, _ in model.named_parameters() if name not in frozen]
    assert len(tuned) == 4
    assert all(".lora_" in name for name in tuned)
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(tiny / "model").get_vocab()
    assert frozen_names(model, ["*.q_proj.*"]) != frozen  # the control: what is asked for counts


def test_what_cannot_be_loaded_is_named(fedkseed: CommandLine, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    cases = [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"peft_type": "IA3"}, "an adapter of the kind 'IA3'; K numbers move LoRA's matrices"),
        ({"base_model_name_or_path": "nobody/nothing"}, "its base model 'nobody/nothing' is no folder here"),
        ({"base_model_name_or_path": "/no/where"}, "its base model '/no/where' is no folder here"),
    ]
    for number, (changes, text) in enumerate(cases):
        with pytest.raises(ModelError, match=text):
            load_model(changed(adapter, tmp_path / str(number), **changes))
    bare = changed(adapter, tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"an adapter without adapter_model\.safetensors"):
        load_model(bare)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, bare / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its weights lack"):  # else they would be random
        load_model(bare)
    settings = tiny_settings(tiny, model=str(adapter), algorithm="fedit", lr=0.01)
    for name in ("eps", "num_seeds"):
        del settings[name]
    refused = fedkseed("simulate", *flags(settings), "--run", tmp_path / "run")
    assert_one_line(refused, 2, "--algorithm fedit attaches something of its own, and the model has an adapter")


def test_a_hub_s_adapter_is_one_too(tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP the first time, from the cache without a hub afterwards; a model of a hub is still a model."""
    with hubs.running(tmp_path / "cache", monkeypatch) as hub:
        for name, folder in (("owner/lora", adapter), ("owner/model", tiny / "model")):
            hub.commits[name] = []
            hub.commit(name, {path.name: path.read_bytes() for path in folder.iterdir()})
        first = load_model("owner/lora", "float32")
        assert first.name_or_path == "owner/lora"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        asked = len(hub.asked)
        again = load_model("owner/lora", "float32")
        assert load_tokenizer("owner/lora").get_vocab() == load_tokenizer(tiny / "model").get_vocab()
        assert len(hub.asked) == asked
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert not frozen_names(load_model("owner/model", "float32"))
    here = load_model(adapter, "float32")
    assert frozen_names(first) == frozen_names(here) != ()
    assert laws.all_bits(first) == laws.all_bits(again) == laws.all_bits(here)


def test_patterns_choose_among_the_adapters_matrices(fedkseed: CommandLine, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    """What else they fit would be tuned, and be lost when the adapter is saved."""
    model = load_model(adapter, "float32")
    tuned = {name for name, _ in model.named_parameters()} - set(frozen_names(model, ["*.q_proj.*"]))
    assert tuned
    assert all("q_proj.lora_" in name for name in tuned)
    settings = tiny_settings(tiny, model=str(adapter), algorithm="fedkseed-grad", num_seeds=128, lr=0.02)
    run = fedkseed("simulate", *flags(settings), "--train", "*embed*", "--run", tmp_path / "run")
    assert_one_line(run, 2, "--train '*embed*' matches no tensor of the adapter; it must fit whole names, such as", "lora_")
    done = fedkseed("simulate", *flags(settings), "--train", "*.q_proj.*", "--run", tmp_path / "run")
    assert done.code == 0, done.stderr
    assert fedkseed("export", tmp_path / "run", tmp_path / "tuned").code == 0
    again, expected = load_model(tmp_path / "tuned", "float32"), load_model(adapter, "float32")
    fk.apply(expected, tmp_path / "run" / "ledger.safetensors")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(again(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_model_that_peft_has_wrapped_is_an_adapter_too(tiny: Path) -> None:
    """Of which the base stays as it is: `save_pretrained` would not hold it."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(tiny / "model", "float32"), config)
    fk.seed_lora(model, key=7)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = tiny_settings(tiny, algorithm="fedkseed-grad", num_seeds=128, lr=0.05)
    fk.simulate({**settings, "model": (model, load_tokenizer(tiny / "model"))})
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_fresh_adapter_cannot_be_moved_in_proportion(fedkseed: CommandLine, tiny: Path, adapter: Path) -> None:
    settings = tiny_settings(tiny, model=str(adapter), algorithm="fedkseed-grad", num_seeds=128, lr=0.02)
    done = fedkseed("simulate", *flags(settings), "--movement", "proportional")
    assert_one_line(done, done.code or 1, "lora_B", "is all zeros, which no proportion moves; take 'absolute'")
