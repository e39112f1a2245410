"""The card of a tuned model: a README.md that hubs can read and people too, of a ledger's folder or of an export."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedkseed.files import placed
from fedkseed.kseed.ledger import Ledger
from fedkseed.noise.pool import SeedPool
from fedkseed.text import visible

PAPER = "[Qin et al., ICML 2024](https://proceedings.mlr.press/v235/qin24a.html)"
CARD = "README.md"
ADAPTER_FIELD = "made_by"
"""What the card of an adapter to start from (`fedkseed lora`) says of the command that makes the same one."""
LIBRARY = "fedkseed"
"""What the card of a ledger says that it is of; others say something else."""
LICENCE_FIELDS = ("license", "license_name", "license_link")
HOW = """K numbers over a base model. Together they are a causal language model {tuned}: each number
says how far they go along a random direction that a seed stands for."""
ALL, SOME, ADAPTER = "all of whose weights are tuned", "of whose weights some are tuned", "with a LoRA adapter that is tuned"
LOADING = """\
import fedkseed as fk

folder = "."  # where this file lies, or its name on a hub
model = {load}
"""
NAMED = "fk.load(folder)  # the base model that is named above, and these numbers"
BY_FOLDER = 'fk.load(folder, base="BASE")  # where the base model that is named above lies, and these numbers'
OVER_ADAPTER = """\
fk.load(folder, base="START")  # a folder with the adapter that these numbers move, as it was before; see the table"""
OVER_WRAPPED = """\
adapted()  # what get_peft_model gave and fk.seed_lora drew before it was tuned: base, rank, places and key of its maker
fk.apply(model, folder)"""


@dataclass(frozen=True)
class Prompt:
    """How a model was asked while it was tuned.

    Attributes:
        name: of the template.
        text: of the template.
        language: that this is in: `toml`, a file that `--template` takes, or `jinja`, a chat template.
    """

    name: str
    text: str
    language: str


def fields_of(card: str) -> dict[str, Any]:
    """What the YAML at the head of a card says; nothing where there is none that can be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        fields = yaml.safe_load(found[1]) if found else {}
    except (ValueError, yaml.YAMLError, RecursionError):  # somebody else's file
        return {}
    return fields if isinstance(fields, dict) else {}


def fields_in(folder: Path) -> dict[str, Any]:
    """The fields of a folder's card; none where it has no card."""
    try:
        return fields_of((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def licence_of(model: str) -> dict[str, str]:
    """The licence fields of a base model's own card, where its folder has one; nothing is looked up elsewhere."""
    known = fields_in(placed(model))
    return {name: known[name] for name in LICENCE_FIELDS if isinstance(known.get(name), str)}


def head_of(fields: Mapping[str, Any]) -> str:
    """The YAML at the head of a card."""
    # JSON is YAML too, whatever characters a folder's name has
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())


def pools_of(ledger: Ledger) -> list[SeedPool]:
    """The pools that a ledger's numbers are of: one, or each page's."""
    return [page.pool for page in ledger.pages] or [ledger.pool]


def pool_text(ledger: Ledger) -> str:
    """A ledger's pools in words; of pages of one size and family how many, and the last one's."""
    pools = pools_of(ledger)
    alike = len({(pool.size, pool.family) for pool in pools}) == 1
    said = "; ".join(
        f"K = {pool.size:,}, {pool.family} noise, key {pool.key:#018x}" for pool in (pools[-1:] if alike else pools)
    )
    return f"{len(pools)} pages, the last of {said}" if alike and len(pools) > 1 else said


def published_text(ledger: Ledger) -> str:
    """The digest and the size of a ledger's published form."""
    published = ledger.published()
    return f"`{published.digest()}`, {len(published.encode()):,} bytes"


def table_of(rows: Mapping[str, str]) -> str:
    """A table of two columns without a heading."""
    lines = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return f"| | |\n| --- | --- |\n{lines}"


def _cell(text: str) -> str:
    return visible(text).replace("|", "\\|")


def fenced(text: str, language: str) -> str:
    """A code block, by a fence that the text does not have."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def prompt_text(prompt: Prompt) -> str:
    """A prompt's template, for a card."""
    return f"The prompt template `{prompt.name}`:\n\n{fenced(prompt.text, prompt.language)}"


def ledger_card(
    base: str, ledger: Ledger, licence: Mapping[str, str], prompt: Prompt | None = None, about: Mapping[str, str] | None = None
) -> str:
    """The card of a ledger's folder.

    Args:
        base: name of the base model, a folder's or a hub id; no path, which would tell of somebody's machine.
        ledger: in its published form.
        licence: see `licence_of`.
        prompt: how the model was asked; None where that is not known.
        about: further rows of its table.
    """
    base = visible(base)
    fields = {
        "library_name": LIBRARY,
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": "adapter",
        **(licence or {"license": "unknown"}),
        "tags": ["fedkseed", "adapter"],
    }
    of = " with the adapter" if ledger.base.has_adapter else ""
    rows = {
        "base model": f"`{base}`, fingerprint{of} `{ledger.base.fingerprint}`",
        "candidate seeds": pool_text(ledger),
        "rounds": f"{ledger.round}",
        **(about or {}),
        "digest of the published ledger": published_text(ledger),
    }
    how = HOW.format(tuned=ADAPTER if ledger.base.has_adapter else SOME if ledger.base.frozen else ALL)
    load = NAMED if "/" in base else BY_FOLDER
    if ledger.base.has_adapter:  # peft's own wrapping has other names than a model that transformers loads with an adapter
        load = OVER_WRAPPED if all(name.startswith("base_model.model.") for name in ledger.base.frozen) else OVER_ADAPTER
    asked = "" if prompt is None else f"\n## How it is asked\n\n{prompt_text(prompt)}\n"
    return f"""\
---
{head_of(fields)}
---

# {base}, tuned with fedkseed: {sum(pool.size for pool in pools_of(ledger)):,} numbers

{how}

{table_of(rows)}

To load it:

{fenced(LOADING.format(load=load), "python")}
{asked}"""
