"""`fedkseed export`: the tuned model, its card, the published ledger; nothing is overwritten."""

import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tests.support.baselines import row_settings
from tests.support.command_line import CommandLine, Result, assert_one_line, flags, shell
from tests.support.runs import read_metrics
from tests.support.tiny import CHAT, tiny_settings

import fedkseed as fk
from fedkseed.baselines import TunedTensors, restore
from fedkseed.data import encode, read_examples
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.runs.folder import RunFolder


def test_an_exported_folder_loads_in_a_fresh_process_with_the_tuned_weights(
    fedkseed: CommandLine, tiny: Path, finished: Path, tmp_path: Path
) -> None:
    result = fedkseed("export", finished, tmp_path / "tuned")
    assert result.code == 0, result.stderr
    assert str(tmp_path / "tuned") in result.stdout
    assert "after 3 rounds" in result.stdout
    code = (
        "import sys, transformers as t\n"
        "m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); k = t.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = k('name the animal', return_tensors='pt')\n"
        "assert m(input_ids=ids['input_ids']).logits.isfinite().all()\n"
        "from safetensors.torch import save_file\n"
        "save_file({n: p.detach().clone() for n, p in m.named_parameters()}, sys.argv[2])\n"
    )
    assert shell(sys.executable, "-c", code, tmp_path / "tuned", tmp_path / "seen").code == 0
    model = load_model(tiny / "model", "float32")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    fk.apply(model, finished / "ledger.safetensors")
    seen = load_file(tmp_path / "seen")
    assert set(seen) == set(base)
    for name, parameter in model.named_parameters():
        assert torch.equal(seen[name], parameter.detach())
    assert any(not torch.equal(seen[name], base[name]) for name in base)


def test_an_exported_folder_has_a_card_of_its_run(fedkseed: CommandLine, tiny: Path, copied: Path, tmp_path: Path) -> None:
    assert fedkseed("export", copied, tmp_path / "tuned").code == 0
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    ledger = fk.Ledger.load(copied / "ledger.safetensors")
    losses = [event["eval_loss"] for event in read_metrics(copied) if event["event"] == "evaluation"]
    assert len(losses) == 4
    assert f"{losses[0]:.4f} before, {losses[-1]:.4f} after" in card
    assert "6 local steps of 2 records" in card
    for digest in (ledger.digest(), ledger.published().digest(), ledger.base.fingerprint):
        assert digest in card
    assert 'base_model: "model"\n' in card
    for folder in (tiny, copied, tmp_path):
        assert str(folder) not in card
    # the settings alone are enough: the records may lie elsewhere by now
    config = copied / "config.toml"
    config.write_text(config.read_text().replace("records.jsonl", "gone.jsonl"))
    assert fedkseed("export", copied, tmp_path / "again").code == 0
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == card.replace("records.jsonl", "gone.jsonl")


def test_a_card_tells_of_a_run_only_what_is_known_of_this_ledger(
    fedkseed: CommandLine, tiny: Path, copied: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "model.ledger"
    assert fedkseed("export", copied, ledger, "--ledger-only").code == 0

    def card(*args: object) -> str:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        result = fedkseed("export", args[0], out, *args[1:])
        assert result.code == 0, result.stderr
        return (out / "README.md").read_text(encoding="utf-8")

    (tmp_path / "config.toml").write_text("of = 'something else'\n")
    whole, bare = card(copied), card(ledger, "--model", tiny / "model")
    for text in ("local steps of", "learning rate", "held-out loss", "the run's ledger"):
        assert text in whole
        assert text not in bare
    assert fk.Ledger.load(ledger).digest() in bare
    assert fk.Ledger.load(ledger).digest() in whole
    # another ledger beside a run's settings
    run = fk.Ledger.load(copied / "ledger.safetensors")
    dataclasses.replace(run.published(), coefficients=np.zeros_like(run.coefficients)).save(copied / "other.ledger")
    assert "local steps of" not in card(copied / "other.ledger")
    # a run that measured the base model's loss no more
    metrics = copied / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if '"server_round": 0,' not in line))
    whole = card(copied)
    assert "local steps of" in whole
    assert "held-out loss" not in whole


def test_the_card_of_the_built_in_model_has_its_name(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    from fedkseed.demo import model_folder

    settings = tiny_settings(tiny, model=str(model_folder()), num_rounds=1, local_steps=1)
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run").code == 0
    assert fedkseed("export", tmp_path / "run", tmp_path / "out").code == 0
    assert 'base_model: "fedkseed-demo"\n' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_an_export_of_damaged_metrics_says_so_in_a_line(fedkseed: CommandLine, copied: Path, tmp_path: Path) -> None:
    (copied / "metrics.jsonl").write_text("junk\n")
    result = fedkseed("export", copied, tmp_path / "out")
    assert_one_line(Result(1, "", result.stderr), 1, "metrics.jsonl cannot be read", "the card is without it")
    assert result.code == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "local steps of" in card
    assert "held-out loss" not in card


def test_an_export_in_half_precision_is_the_float32_one_cast_once(
    fedkseed: CommandLine, tiny: Path, finished: Path, tmp_path: Path
) -> None:
    assert fedkseed("export", finished, tmp_path / "tuned", "--dtype", "bfloat16").code == 0
    model = load_model(tiny / "model", "float32")
    fk.apply(model, finished / "ledger.safetensors")
    found = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(found[name], p.detach().bfloat16()) for name, p in model.named_parameters())


def test_the_published_ledger_is_small_and_enough(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fedkseed("simulate", *flags(tiny_settings(tiny, num_seeds=4096, num_rounds=1)), "--run", run).code == 0
    result = fedkseed("export", run, tmp_path / "model.ledger", "--ledger-only")
    assert (result.code, result.stderr) == (0, "")
    size = (tmp_path / "model.ledger").stat().st_size
    assert 8192 < size < 9500
    assert f"{size:,} bytes, 1 round, K = 4096" in result.stdout
    digests = []
    for path in (run / "ledger.safetensors", tmp_path / "model.ledger"):
        model = load_model(tiny / "model", "float32")
        digests.append(fk.bind(model, fk.apply(model, path).pool).digest())
    assert digests[0] == digests[1]
    shown = fedkseed("inspect", tmp_path / "model.ledger")
    assert "published" in shown.stdout
    assert "taken" not in shown.stdout
    # a published ledger lies in a folder without config.toml
    assert_one_line(fedkseed("export", tmp_path / "model.ledger", tmp_path / "out"), 2, "--model is missing", "give --model")
    assert fedkseed("export", tmp_path / "model.ledger", tmp_path / "out", "--model", tiny / "model").code == 0
    # and a run cannot go on from it
    shutil.copyfile(tmp_path / "model.ledger", run / "ledger.safetensors")
    assert_one_line(fedkseed("simulate", "--resume", run, "--num-rounds", 2), 1, "published ledger has no accumulators")


def test_a_published_ledger_in_a_folder_has_the_card_of_its_run(
    fedkseed: CommandLine, tiny: Path, finished: Path, tmp_path: Path
) -> None:
    """What `fk.load` takes; of the run's records and of this machine it tells no more than the card of a model does."""
    assert fedkseed("export", finished, tmp_path / "out", "--ledger-only").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "ledger.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert fedkseed("export", finished, tmp_path / "model").code == 0
    whole = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for text in ('base_model: "model"', "6 local steps of 2 records", "held-out loss", "digest of the published ledger"):
        assert text in card
        assert text in whole
    template = whole[whole.index("The prompt template") :]
    assert template in card
    assert str(tiny) not in card
    tuned = fk.load(tmp_path / "out", base=tiny / "model")
    again = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(again[name], parameter.detach()) for name, parameter in tuned.named_parameters())


def test_a_card_names_no_base_that_the_ledger_is_not_of(
    fedkseed: CommandLine, tiny: Path, finished: Path, tmp_path: Path
) -> None:
    other, out = shutil.copytree(tiny / "model", tmp_path / "other"), tmp_path / "out"
    tensors = load_file(other / "model.safetensors")
    save_file({name: x + 1 for name, x in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    assert_one_line(fedkseed("export", finished, out, "--ledger-only", "--model", other), 1, "base model")
    assert_one_line(fedkseed("export", finished, out, "--ledger-only", "--model", ""), 2, "the model's name is empty")
    assert not out.exists()
    same = shutil.copytree(tiny / "model", tmp_path / "same")
    assert fedkseed("export", finished, out, "--ledger-only", "--model", same).code == 0
    assert 'base_model: "same"\n' in (out / "README.md").read_text(encoding="utf-8")
    unknown = fedkseed("export", finished, tmp_path / "unchecked", "--ledger-only", "--model", "nobody/nothing")
    assert unknown.code == 0
    assert "that it is the ledger's base is not checked" in " ".join(unknown.stderr.split())


def test_a_published_ledger_of_fewer_bits_says_what_they_cost(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    """In a run's folder by its held-out loss, which `evaluate` finds too; of a bare ledger by the weights."""
    finished, thin, again = tmp_path / "run", tmp_path / "thin.ledger", tmp_path / "again.ledger"
    made = tiny_settings(tiny, num_seeds=1024, num_rounds=1, algorithm="fedkseed-grad", lr=0.03)
    assert fedkseed("simulate", *flags(made), "--run", finished).code == 0
    done = fedkseed("export", finished, thin, "--ledger-only", "--bits", 4)
    assert (done.code, done.stderr) == (0, "")
    whole = fk.Ledger.load(finished / "ledger.safetensors").published()
    assert f"bytes before {len(whole.encode()):,}; off by " in done.stdout
    assert thin.stat().st_size < len(whole.encode())
    losses = [fk.evaluate(finished, ledger=file).tuned.overall.loss for file in (None, thin)]
    assert losses[0] != losses[1]
    assert "held-out loss {:.4f}, with fewer bits {:.4f}".format(*losses) in done.stdout
    assert "int4" in fedkseed("inspect", thin).stdout
    assert fedkseed("export", finished, tmp_path / "folder", "--ledger-only", "--bits", 4).code == 0
    assert "held-out loss" not in (tmp_path / "folder" / "README.md").read_text()  # which is that of all bits
    model = load_model(tiny / "model", "float32")
    assert fk.apply(model, thin).digest() == fk.Ledger.load(thin).digest()

    whole.save(tmp_path / "bare.ledger")
    done = fedkseed("export", tmp_path / "bare.ledger", again, "--ledger-only", "--bits", 4)
    assert again.read_bytes() == thin.read_bytes()
    assert "off by" in done.stdout
    assert "held-out loss" not in done.stdout


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--bits", 4], "--bits is 4 and a whole model is exported; give --ledger-only too"),
        (["--ledger-only", "--bits", 3], "bits is 3; expected one of 8, 4, 2, 1"),
    ],
)
def test_bits_that_make_no_sense_are_one_line(
    fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str], reason: str
) -> None:
    assert_one_line(fedkseed("export", finished, tmp_path / "out", *extra), 2, reason)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [[], ["--ledger-only"]])
def test_export_overwrites_nothing(fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        assert_one_line(fedkseed("export", finished, tmp_path / name, *extra), 2, str(tmp_path / name), "exists")
    assert (tmp_path / "file").read_text() == "x"
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("extra", [[], ["--ledger-only"]], ids=["folder", "ledger"])
def test_an_export_that_cannot_be_written_is_one_line(
    fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str]
) -> None:
    (tmp_path / "file").write_text("x")
    result = fedkseed("export", finished, tmp_path / "file" / "out", *extra)
    assert_one_line(result, 1, str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("extra", [[], ["--ledger-only"]], ids=["folder", "ledger"])
def test_an_export_onto_a_full_disk_is_one_line(
    fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str]
) -> None:
    """A failure (1), not a usage error (2): the same call is right once there is room."""
    assert_one_line(fedkseed("export", finished, tmp_path / "out", *extra, largest_file=300), 1, "make room")
    assert not (tmp_path / "out").exists()


def test_export_names_a_wrong_dtype(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    result = fedkseed("export", finished, tmp_path / "out", "--dtype", "int8")
    assert_one_line(result, 2, "--dtype is 'int8'", "bfloat16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (("--dtype", "bfloat16"), "--dtype is bfloat16 and --ledger-only"),
        (("--model", "/nonexistent"), "--model is /nonexistent and a bare ledger has no use for it"),
        (("--model", "/nonexistent", "--bits", "4"), "--model is /nonexistent and a bare ledger has no use for it"),
    ],
)
def test_a_bare_ledger_takes_nothing_that_it_has_no_use_for(
    fedkseed: CommandLine, finished: Path, tmp_path: Path, extra: Sequence[str], wanted: str
) -> None:
    ledger = shutil.copy(finished / "ledger.safetensors", tmp_path)  # of no run's folder, in which --bits measures losses
    assert_one_line(fedkseed("export", ledger, tmp_path / "l.safetensors", "--ledger-only", *extra), 2, wanted)
    assert not (tmp_path / "l.safetensors").exists()


def test_a_name_that_no_file_can_have_is_one_line(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    name = tmp_path / ("n" * 300)
    for command in (("merge", finished, "--to", name), ("export", finished, name), ("audit", name)):
        assert_one_line(fedkseed(*command), 2, "cannot look there (File name too long)")


def test_export_of_no_run_is_one_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    assert_one_line(fedkseed("export", tmp_path / "none", tmp_path / "out"), 2, "no such run or ledger")
    assert not (tmp_path / "out").exists()


def test_export_onto_another_model_is_refused(fedkseed: CommandLine, finished: Path, other_model: Path, tmp_path: Path) -> None:
    result = fedkseed("export", finished, tmp_path / "out", "--model", other_model)
    assert_one_line(result, 1, "this model is not the ledger's base: lm_head.weight is the first of")
    assert not (tmp_path / "out").exists()


# --- What it was taught to be asked with ---


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_an_export_asks_and_ends_as_the_run_did(fedkseed: CommandLine, tiny: Path, tmp_path: Path, template: str) -> None:
    """The run's ids and those that vLLM would ask with; an answer ends where a response did."""
    model = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    for name, key, value in (
        ("tokenizer_config.json", "chat_template", CHAT + "{% if not add_generation_prompt %}<unk>{% endif %}"),
        ("generation_config.json", "eos_token_id", [2]),
    ):
        fields = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(fields | {key: value}))
    settings = tiny_settings(tiny, model=str(model), template=template, num_rounds=1, local_steps=1)
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run").code == 0
    result = fedkseed("export", tmp_path / "run", tmp_path / "out")
    assert (result.code, result.stderr) == (0, "")
    exported = load_tokenizer(tmp_path / "out")
    record = read_examples(tiny / "records.jsonl")[0]
    config = RunFolder.open(tmp_path / "run").config
    encoded = encode([record], load_tokenizer(model), 64, config.prompts())
    (example,) = encoded.examples
    asked = f"{record.instruction}\n\n{record.input}" if template == "chat" else record.instruction
    turns = [{"role": "user", "content": asked}]
    options = {} if template == "chat" else {"input": record.input}
    ids = exported.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **options)
    assert ids == example.input_ids[: example.prompt_length].tolist()
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == ([2, 3] if template == "chat" else 2)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("```jinja\n" + CHAT in card) == (template == "chat")
    assert ('```toml\nprompt_input = """\nInstruction:\n{instruction}\n' in card) == (template == "plain")


def test_a_template_whose_file_is_gone_costs_a_line(fedkseed: CommandLine, copied: Path, tmp_path: Path) -> None:
    config = copied / "config.toml"
    config.write_text(config.read_text().replace('template = "plain"', 'template = "/no/such.toml"'))
    result = fedkseed("export", copied, tmp_path / "out")
    assert result.code == 0
    assert_one_line(Result(1, "", result.stderr), 1, "'/no/such.toml' is unknown", "without its prompt template")


def test_a_template_that_has_changed_since_costs_a_line(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.toml"
    template.write_text('prompt_input = "{instruction} {input} :"\nprompt_no_input = "{instruction} :"\n')
    run = tmp_path / "run"
    assert fedkseed("simulate", *flags(tiny_settings(tiny, num_rounds=1, template=template)), "--run", run).code == 0
    assert fedkseed("export", run, tmp_path / "before").stderr == ""
    template.write_text('prompt_input = "{instruction} {input}"\nprompt_no_input = "{instruction}"\n')
    for name, words in (("out", ()), ("kept", ("--round", 1)), ("ledger", ("--ledger-only",))):
        result = fedkseed("export", run, tmp_path / name, *words)
        assert result.code == 0
        assert_one_line(Result(1, "", result.stderr), 1, "t.toml: has changed since the run; the export is without its prompt")
        assert "instruction" not in (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert "{instruction} {input} :" in (tmp_path / "before" / "README.md").read_text(encoding="utf-8")


def test_a_kept_round_is_exported_whatever_the_last_ledger_is_like(fedkseed: CommandLine, copied: Path, tmp_path: Path) -> None:
    (copied / "ledger.safetensors").write_bytes(b"damaged")
    result = fedkseed("export", copied, tmp_path / "out", "--round", 1, "--ledger-only")
    assert (result.code, (tmp_path / "out" / "ledger.safetensors").exists()) == (0, True)


# --- Baselines ---


@pytest.mark.parametrize("algorithm", ["fedit", "fedprompt", "fedptuning"])
def test_a_baselines_adapter_is_a_peft_folder_with_the_runs_logits(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, algorithm: str
) -> None:
    import peft

    settings = row_settings(tiny, algorithm, num_rounds=1, local_steps=2)
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run").code == 0
    result = fedkseed("export", tmp_path / "run", tmp_path / "out")
    assert (result.code, result.stderr) == (0, "")
    assert "an adapter for" in result.stdout
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    data = ModelCard((tmp_path / "out" / "README.md").read_text(encoding="utf-8")).data
    assert (data.library_name, data.base_model) == ("peft", "model")
    config = RunFolder.open(tmp_path / "run").config
    tuned = TunedTensors.load(tmp_path / "run" / "tensors.safetensors")
    ids = torch.tensor([[1, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        own = restore(load_model(tiny / "model", "float32"), config, tuned)(**inputs).logits
        loaded = peft.PeftModel.from_pretrained(load_model(tiny / "model", "float32"), tmp_path / "out").eval()
        assert torch.equal(loaded(**inputs).logits, own)
        base = load_model(tiny / "model", "float32")(**inputs).logits
    assert not torch.equal(own[:, -4:], base)


def test_a_baseline_of_all_parameters_is_a_whole_model(fedkseed: CommandLine, tiny: Path, tmp_path: Path) -> None:
    settings = row_settings(tiny, "fedavg", num_rounds=1, local_steps=2)
    assert fedkseed("simulate", *flags(settings), "--run", tmp_path / "run").code == 0
    assert_one_line(fedkseed("export", tmp_path / "run", tmp_path / "out", "--ledger-only"), 2, "which has no ledger")
    assert fedkseed("export", tmp_path / "run", tmp_path / "out").code == 0
    tuned = TunedTensors.load(tmp_path / "run" / "tensors.safetensors")
    for name, parameter in load_model(tmp_path / "out", "float32").named_parameters():
        assert torch.equal(parameter.detach(), tuned.tensors[name])
    assert "FedAvg: all parameters by SGD" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "run" / "config.toml").unlink()
    result = fedkseed("export", tmp_path / "run", tmp_path / "again", "--model", tiny / "model")
    assert_one_line(result, 2, "nothing without the config.toml of their run")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_in_half_precision_exports_in_the_types_of_its_base(
    fedkseed: CommandLine, tiny: Path, tmp_path: Path, dtype: str
) -> None:
    run = tmp_path / "run"
    assert fedkseed("simulate", *flags(tiny_settings(tiny, num_rounds=1, dtype=dtype)), "--run", run).code == 0
    model = load_model(tiny / "model", dtype)  # type: ignore[arg-type]
    fk.apply(model, run / "ledger.safetensors")
    assert fedkseed("export", run, tmp_path / "tuned").code == 0
    assert fedkseed("export", run, tmp_path / "ledger", "--ledger-only").code == 0
    bare = fedkseed("export", tmp_path / "ledger", tmp_path / "bare", "--model", tiny / "model", "--dtype", dtype)
    assert (bare.code, bare.stderr) == (0, "")
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "bare"))
    for name, parameter in model.named_parameters():
        assert torch.equal(whole[name], parameter.detach().float())
        assert torch.equal(half[name], parameter.detach())
