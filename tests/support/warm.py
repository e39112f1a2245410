"""Importing this imports, loads and compiles what takes seconds, so that a process forked afterwards begins at once."""
# ruff: noqa: F401

import contextlib
import gc
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import fedkseed.cli.app
import fedkseed.cli.display
import fedkseed.cli.doctor
import fedkseed.cli.evaluate
import fedkseed.comparison
import fedkseed.kseed.apply
import fedkseed.noise.cpu
import fedkseed.report
from tests.support.runs import simulation
from tests.support.tiny import tiny_settings

with contextlib.suppress(ImportError):
    import peft

with tempfile.TemporaryDirectory() as name:
    for noise in ("hadamard", "gaussian"):
        simulation(Path(name) / noise, tiny_settings(Path(name), noise=noise, num_rounds=1))[0].train()

gc.collect()
gc.freeze()  # else a collection in the forked process walks, and so copies, all that was imported
