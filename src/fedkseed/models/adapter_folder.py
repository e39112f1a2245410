"""A folder with a LoRA adapter as a model: its base model with the adapter in place, whose matrices are what is tuned.

So everything that takes a model's folder moves an adapter in K numbers where it is given an adapter's (docs/adapter.md).
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedkseed.errors import ModelError, installing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MATRICES = ("*.lora_*",)
"""What an adapter's tensors are called in a model that has it."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter without its base model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def has_adapter(model: Any) -> bool:
    """Whether transformers has put an adapter into a model that it loaded."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


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
