"""The model card of an exported model: the README.md that a Hugging Face folder comes with."""

from __future__ import annotations

import json
from pathlib import Path

from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.settings import RunConfig

PAPER = "[Qin et al., ICML 2024](https://proceedings.mlr.press/v235/qin24a.html)"
HOW = {
    False: """A causal language model, tuned by federated learning without backpropagation: for each local step a client sends a
number, how the loss of its records changes along a random direction that a seed stands for.""",
    True: """A causal language model, tuned by federated learning with gradients in K numbers: a client sends how far each of K
random directions, which seeds stand for, took its records' loss down.""",
}
LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""


def model_card(base: str, ledger: Ledger, config: RunConfig | None = None, losses: tuple[float, float] | None = None) -> str:
    """The card's text: Markdown below the YAML that hubs read. It names no licence, which is the base model's to give.

    Args:
        base: name of the base model, a folder's or a hub id; no path, which would tell of somebody's machine.
        ledger: what was added to the base.
        config: settings of the ledger's run, where they are known; its paths are not told.
        losses: held-out loss before and after, where the run measured them.
    """
    method = config.facts.title if config else "FedKSeed"
    published = ledger.published()
    by_gradients = bool(ledger.pages)
    several = f" on each of {len(ledger.pages)} pages" if len(ledger.pages) > 1 else ""
    rows = {
        "base model": f"`{base}`, fingerprint `{ledger.base.fingerprint}`",
        "method": f"{method} ({PAPER})",
        "candidate seeds": f"K = {ledger.pool.size:,}, {ledger.pool.family} noise, key {ledger.pool.key:#018x}",
        "rounds": f"{ledger.round}",
    }
    if config is not None:
        step = "of" if config.local_unit == "steps" else "in steps of"
        rows |= {
            "a client's round": f"{config.local_steps} local {config.local_unit} {step} {config.batch_size} records",
            "learning rate": f"{config.lr:g}, {config.schedule}",
            **({} if config.facts.measures == "gradient" else {"eps": f"{config.eps:g}"}),
            "prompt template": Path(config.template).name,
        }
    if losses is not None:
        rows["held-out loss"] = f"{losses[0]:.4f} before, {losses[1]:.4f} after, in nats per response token"
    if ledger.is_checkpoint:
        rows["digest of the run's ledger"] = f"`{ledger.digest()}`"
    rows["digest of the published ledger"] = f"`{published.digest()}`, {len(published.encode()):,} bytes"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    # JSON's text is YAML's too, whatever characters a folder's name has
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {json.dumps(base, ensure_ascii=False)}
tags:
- fedkseed
- federated-learning{"" if by_gradients else chr(10) + "- zeroth-order-optimisation"}
---

# {base}, tuned with fedkseed

{HOW[by_gradients]} These weights are the base model's plus
K such directions{several}, by the ledger's coefficients.

| | |
| --- | --- |
{table}

`fedkseed.apply(base_model, ledger)` gives these weights again. To load them:

{LOADING}
"""
