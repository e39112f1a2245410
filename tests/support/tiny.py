"""A tiny random model with its own tokenizer, records for it, and settings of a run that takes a second."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkseed.data import Example

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"

TEXT = "name the animal colour fruit red blue dog cat apple pear a big small and or of Instruction Input Response :"
WORDS = TEXT.split()


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of 4,000 parameters with a word tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_records(path: Path, examples: list[Example]) -> Path:
    lines = (
        json.dumps({"instruction": e.instruction, "context": e.input, "response": e.output, "category": e.category})
        for e in examples
    )
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_records(path: Path, count: int = 60) -> Path:
    """Records in the tiny model's words: three categories, each with its own answers."""
    answers = {"animal": ("dog", "cat"), "colour": ("red", "blue"), "fruit": ("apple", "pear")}
    draw = np.random.default_rng(6)
    examples = []
    for i in range(count):
        category = list(answers)[i % 3]
        words = " ".join(draw.choice(["a", "big", "small", "and", "or"], 3))
        examples.append(Example(f"name the {category}", words, str(draw.choice(answers[category])), category))
    return write_records(path, examples)


def tiny_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that takes a second; the model and the records are made where they are missing."""
    if not (folder / "model").exists():
        tiny_model(folder / "model")
        tiny_records(folder / "records.jsonl")
    settings = {
        "model": str(folder / "model"),
        "data": str(folder / "records.jsonl"),
        "num_clients": 4,
        "fraction_train": 0.5,
        "num_rounds": 3,
        "local_steps": 6,
        "batch_size": 2,
        "lr": 0.01,
        "eps": 0.01,
        "num_seeds": 64,
        "max_length": 48,
        "seed": 7,
    }
    return settings | changes
