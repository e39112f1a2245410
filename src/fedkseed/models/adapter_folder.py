"""A LoRA adapter as a model, a folder's or a hub's: its base model with it in place, whose matrices are what is tuned.

So everything that takes a model moves an adapter in K numbers where it is given an adapter's name (docs/adapter.md).
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedkseed.errors import ModelError, installing
from fedkseed.models.hub import files_on_hub, has_cached, in_cache
from fedkseed.text import one_line

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENIZER = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt")
"""What else an adapter's folder may have that is read."""
MATRICES = ("*.lora_*",)
"""What an adapter's tensors are called in a model that has it."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter without its base model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def on_hub(hub_id: str) -> Path | None:
    """The folder of a hub's adapter in the local cache, where it is put if it is not there.

    Returns:
        None if it is a model's name, or a tokenizer's.

    Raises:
        ModelError: it is no hub id, or nothing of it is in the cache and the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    if has_cached(hub_id):
        return None
    found = in_cache(hub_id, CONFIG)
    if found and (found.parent / WEIGHTS).is_file():
        return found.parent
    files = files_on_hub(hub_id)
    if CONFIG not in files or "config.json" in files:
        return None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG, WEIGHTS, *TOKENIZER]))
    except Exception as error:
        raise ModelError(f"{hub_id}: the hub does not give its adapter ({one_line(error)}); check the network") from error


def has_adapter(model: Any) -> bool:
    """Whether a model has an adapter, which transformers has put into it as it was loaded, or peft has wrapped it in."""
    return bool(getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None))


def base_of(folder: Path) -> str:
    """What an adapter says its base model is: a folder or a hub id.

    Raises:
        ModelError: it names none, is no LoRA adapter, lacks its weights, or peft is not installed.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError):
        kind, base = None, None
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder}: its {CONFIG} names no base model; give what a LoRA adapter of peft saves")
    if kind != "LORA":
        raise ModelError(
            f"{folder}: an adapter of the kind {kind!r:.40}; K numbers move LoRA's matrices, so give a LoRA adapter, or merge "
            "this one into its base model (peft: merge_and_unload, save_pretrained)"
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: an adapter without {WEIGHTS}; give what save_pretrained of peft writes")
    if find_spec("peft") is None:
        raise ModelError(f"{folder}: an adapter needs an extra; install it with: {installing('baselines')}")
    return base
