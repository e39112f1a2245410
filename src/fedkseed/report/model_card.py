"""The model card of an export: the README.md that a Hugging Face folder comes with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedkseed.baselines import TunedTensors
from fedkseed.data import is_hub_id, public_names
from fedkseed.federation.algorithms import Algorithm
from fedkseed.kseed.card import PAPER, Prompt, fenced, head_of, pool_text, prompt_text, published_text, table_of
from fedkseed.kseed.ledger import Ledger
from fedkseed.report.summary import noted_promise
from fedkseed.runs.settings import IN_MEMORY, RunConfig, SimulationConfig
from fedkseed.text import visible

BY_SCALARS = """A causal language model, tuned by federated learning without backpropagation: for each local step a client sends
a number, how the loss of its records changes along a random direction that a seed stands for."""
BY_CHANGES = """A causal language model, tuned by federated learning with gradients in K numbers: a client sends how far each of
K random directions, which seeds stand for, took its records' loss down."""
BY_NUMBERS = """A causal language model, tuned as K numbers over its base: they say how far its weights go along random
directions, which seeds stand for. How they were found is not known here."""
BY_TENSORS = "tuned by federated learning: clients train it on their own records and send it back, the server averages."
ATTACHED = {None: "A causal language model", "lora": "A LoRA adapter of a causal language model"}
"""By `Algorithm.attaches`; all else is a soft prompt."""
LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
LOADING_AN_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, base = ".", {base}  # where this file lies, and the base model
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
ASKING = """\
turns = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
"""


@dataclass(frozen=True)
class About:
    """What a card says beside what the tuned model itself says.

    Attributes:
        config: settings of the run, where they are known; its paths are not told.
        losses: held-out loss before and after, where the run measured them.
        licence: see `fedkseed.kseed.card.licence_of`; nothing where the base's is not known.
        prompt: how it was asked; None where that is not known.
    """

    config: RunConfig | None = None
    losses: tuple[float, float] | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    prompt: Prompt | None = None


def model_card(base: str, tuning: Ledger | TunedTensors, about: About | None = None) -> str:
    """The card's text: Markdown below the YAML that hubs read.

    Args:
        base: name of the base model, a folder's or a hub id; no path, which would tell of somebody's machine.
        tuning: what was added to the base.
        about: what else is known.
    """
    base, known = visible(base), about or About()
    facts = known.config.facts if known.config else None
    attached = facts.attaches if facts else None
    rows = {"base model": f"`{base}`, fingerprint `{_fingerprint(tuning)}`", **rows_of(tuning, known)}
    loading = LOADING_AN_ADAPTER.format(base=json.dumps(base, ensure_ascii=False)) if attached else LOADING
    again = "`fedkseed.apply(base_model, ledger)` gives these weights again. " if isinstance(tuning, Ledger) else ""
    return f"""\
---
{_metadata(base, tuning, known, "peft" if attached else "transformers")}
---

# {base}, tuned with fedkseed

{_how(tuning, facts)}

{table_of(rows)}

{again}To load it:

{fenced(loading, "python")}
{_asking(known.prompt)}"""


def _metadata(base: str, tuning: Ledger | TunedTensors, about: About, library: str) -> str:
    known = about.config is not None
    scalars = isinstance(tuning, Ledger) and not tuning.pages and known
    datasets = [name.split(":")[0] for name in _data_names(about.config) if is_hub_id(name)]
    fields = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "base_model": base,
        **(about.licence or {"license": "unknown"}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["fedkseed", *(["federated-learning"] if known else []), *(["zeroth-order-optimisation"] if scalars else [])],
    }
    return head_of(fields)


def _fingerprint(tuning: Ledger | TunedTensors) -> str:
    return tuning.base.fingerprint if isinstance(tuning, Ledger) else tuning.base


def _how(tuning: Ledger | TunedTensors, facts: Algorithm | None) -> str:
    if isinstance(tuning, TunedTensors):
        return f"{ATTACHED.get(facts.attaches if facts else None, 'A soft prompt of a causal language model')}, {BY_TENSORS}"
    several = f" on each of {len(tuning.pages)} pages" if len(tuning.pages) > 1 else ""
    how = BY_NUMBERS if facts is None else BY_CHANGES if tuning.pages else BY_SCALARS
    return f"{how} These weights are the base model's plus\nK such directions{several}, by the ledger's coefficients."


def rows_of(tuning: Ledger | TunedTensors, about: About) -> dict[str, str]:
    """What a card's table says of a tuned model, but for its base."""
    config, rows = about.config, dict[str, str]()
    if isinstance(tuning, Ledger):
        rows["method"] = f"{config.facts.title if config else 'numbers over seeds'} ({PAPER})"
        rows["candidate seeds"] = pool_text(tuning)
    elif config is not None:
        rows["method"] = f"{config.facts.title}: {config.facts.about}"
    rows["rounds"] = f"{tuning.round}"
    if config is not None:
        step = "of" if config.local_unit == "steps" else "in steps of"
        rows |= {
            "a client's round": f"{config.local_steps} local {config.local_unit} {step} {config.batch_size} records",
            "learning rate": f"{config.lr:g}, {config.schedule}",
            **({} if config.facts.measures == "gradient" else {"eps": f"{config.eps:g}"}),
            "training data": _data(config),
            "prompt template": Path(config.template).name,
        }
    if (promised := noted_promise(tuning.made_with)) is not None:
        rows["differential privacy"] = promised
    if about.losses is not None:
        rows["held-out loss"] = f"{about.losses[0]:.4f} before, {about.losses[1]:.4f} after, in nats per response token"
    rows["licence"] = f"the base model's, `{about.licence['license']}`" if "license" in about.licence else "the base model's"
    if isinstance(tuning, TunedTensors):
        return rows | {"digest of the run's tensors": f"`{tuning.digest()}`"}
    if tuning.is_checkpoint:
        rows["digest of the run's ledger"] = f"`{tuning.digest()}`"
    return rows | {"digest of the published ledger": published_text(tuning)}


def _data_names(config: RunConfig | None) -> list[str]:
    source = config.data if isinstance(config, SimulationConfig) else None
    return [] if source is None or source.startswith(IN_MEMORY) else public_names(source)


def _data(config: RunConfig) -> str:
    if not isinstance(config, SimulationConfig):
        return "the clients' own records"
    names = ", ".join(f"`{name}`" for name in _data_names(config)) or str(config.data).removeprefix(IN_MEMORY)
    shuffled = ", responses shuffled among the prompts" if config.responses == "shuffled" else ""
    return f"{names}, dealt out to simulated clients{shuffled}"


def _asking(prompt: Prompt | None) -> str:
    if prompt is None:
        return ""
    given = "; an input goes in as `input=...`" if prompt.language == "toml" else ""
    return f"""
## How it is asked

Its tokenizer's chat template writes prompts as the records of the run had them{given}:

{fenced(ASKING, "python")}

{prompt_text(prompt)}
"""
