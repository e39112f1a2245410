"""Loading models: what comes back, what is refused and in which words, where base weights are re-read from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedkseed as fk
from fedkseed.errors import FedKSeedError, InvalidValueError, ModelError
from fedkseed.models.loading import base_path, give_stored_dtypes, load_model, load_tokenizer, save_model

MODEL = "model.safetensors"


@pytest.fixture
def copy(stories260k: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(stories260k, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.model_info", refuse)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes ten seconds until it is out of reach."""
    asked = []

    def refuse(hub_id: str, **_: object) -> None:
        asked.append(hub_id)
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.model_info", refuse)
    with pytest.raises(ModelError, match=r"the hub does not give it \(TimeoutError\)"):
        load_model("nobody/nothing-here")
    assert asked == ["nobody/nothing-here"]


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / MODEL)
    save_file(change(tensors), folder / MODEL, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_loads_in_the_precision_asked_for(stories260k: Path, dtype: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(str(stories260k), dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32 if dtype == "auto" else getattr(torch, dtype)}
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert load_tokenizer(stories260k).eos_token == "</s>"
    assert capfd.readouterr() == ("", "")  # no bars, no advice


def test_transformers_settings_are_put_back(stories260k: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(stories260k)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_importing_the_module_does_not_import_transformers() -> None:
    code = "import sys, fedkseed.models.loading, fedkseed.data, fedkseed.evaluation; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/where", r"/no/where: no such model folder; check the path, or give a hub id such as 'owner/name'"),
        ("./nowhere", r"\./nowhere: no such model folder"),
        ("a/b/c", r"a/b/c: no such model folder"),
        (Path("nowhere"), r"nowhere: no such model folder"),
        ("", r"the model's name is empty; give a model folder"),
        (__file__, r"test_loading\.py: not a folder; give the folder that holds config\.json and the weights"),
        ("white space/x", r"'white space/x': neither a folder nor a hub id \(.*\); give one of the two"),
        (
            "nobody/nothing-here",
            r"nobody/nothing-here: no such folder here, nothing whole of that id in the local cache, and the hub does not give "
            r"it \(no route to the hub\); download the model and give its folder, or check the id and the network",
        ),
    ],
)
def test_an_unknown_source_is_named(monkeypatch: pytest.MonkeyPatch, load: Any, source: str | Path, message: str) -> None:
    offline(monkeypatch)
    with pytest.raises(ModelError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_a_folder_with_something_missing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"copy: no tokenizer \(tokenizer\.json\) in this folder; give a whole"):
        load_tokenizer(copy)
    (copy / MODEL).unlink()
    with pytest.raises(ModelError, match=r"copy: no weights \(model\.safetensors\) in this folder; give a whole"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"copy: no config\.json in this folder; give a whole Hugging Face model folder"):
        load_model(copy)


@pytest.mark.parametrize(
    ("file", "content", "load"),
    [
        (MODEL, b"\0" * 40, load_model),
        ("config.json", b'{"model_type": "nons', load_model),
        ("config.json", b'{"model_type": "nonsuch"}', load_model),
        ("config.json", b'{"model_type": "t5"}', load_model),
        ("tokenizer.json", b'{"version": ', load_tokenizer),
    ],
)
def test_a_damaged_file_is_one_line(copy: Path, file: str, content: bytes, load: Any) -> None:
    (copy / file).write_bytes(content)
    with pytest.raises(ModelError, match=r"copy: no .* could be loaded \(.+\); check that the folder or hub id is whole") as e:
        load(copy)
    assert "\n" not in str(e.value)
    assert isinstance(e.value, FedKSeedError)


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(copy, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ModelError, match=rf"its weights lack '{name}'\)"):
        load_model(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 170}))
    with pytest.raises(ModelError, match=r"could be loaded"):
        load_model(copy)


def test_an_adapter_is_never_loaded_without_a_word(copy: Path) -> None:
    """It would be all that is saved again."""
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"copy: an adapter \(adapter_config\.json\) lies beside the model, .*move .* or give the adapter"
    ):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"copy: its adapter_config\.json names no base model"):
        load_model(copy)


def test_an_adapter_that_came_along_is_seen(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hub id may have one."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_hf_peft_config_loaded", True)
    with pytest.raises(ModelError, match=r"an adapter \(adapter_config\.json\) lies beside the model"):
        load_model(copy)


def test_ctrl_c_leaves_no_part_of_a_model(tmp_path: Path) -> None:
    class Model:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "model.safetensors").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_model(Model(), None, tmp_path / "out", "card")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_stored_types_come_back_tensor_by_tensor(copy: Path) -> None:
    names = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    change_tensors(copy, lambda tensors: {name: x.bfloat16() if name in names else x for name, x in tensors.items()})
    model = load_model(copy, "float32")
    give_stored_dtypes(model, copy)
    assert {name for name, x in model.named_parameters() if x.dtype == torch.bfloat16} == names
    assert {x.dtype for name, x in model.named_parameters() if name not in names} == {torch.float32}
    # of files of another kind the configuration says it
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    (copy / MODEL).unlink()
    give_stored_dtypes(model, copy)
    assert {x.dtype for x in model.parameters()} == {torch.float16}


def test_an_unknown_dtype_or_device_is_named(stories260k: Path) -> None:
    bad: Any = "float8"
    with pytest.raises(InvalidValueError, match=r"dtype 'float8' is unknown; expected one of auto, float32, float16, bfloat16"):
        load_model(stories260k, bad)
    with pytest.raises(InvalidValueError, match=r"device 'toaster' cannot be used here \(.*\); try 'cpu'"):
        load_model(stories260k, device="toaster")


def test_base_path_is_what_bind_re_reads(stories260k: Path) -> None:
    model = load_model(stories260k)
    path = base_path(str(stories260k), model)
    assert path == stories260k
    pool = fk.SeedPool(key=1, size=8, family="hadamard")
    bound = fk.bind(model, pool, base=path)
    before = bound.digest()
    bound.perturb(3, 0.1)
    assert bound.digest() != before
    bound.rebuild(torch.zeros(8).numpy())
    assert bound.digest() == before


def test_base_path_only_where_the_loaded_precision_loses_nothing(stories260k: Path, copy: Path) -> None:
    assert base_path(stories260k, load_model(stories260k, "bfloat16")) is None
    assert base_path(stories260k, load_model(stories260k, "float16")) is None
    change_tensors(copy, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert base_path(copy, load_model(copy, "bfloat16")) == copy
    assert base_path(copy, load_model(copy, "float32")) == copy
    assert base_path(copy, load_model(copy, "float16")) is None


def test_base_path_needs_the_models_own_values(stories260k: Path, copy: Path) -> None:
    model = load_model(stories260k)
    assert base_path("nobody/nothing-here", model) is None
    change_tensors(copy, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    assert base_path(copy, model) is None
    change_tensors(copy, lambda tensors: {f"prefix.{name}": tensor for name, tensor in tensors.items()})
    assert base_path(copy, model) is None
    (copy / MODEL).unlink()
    assert base_path(copy, model) is None
