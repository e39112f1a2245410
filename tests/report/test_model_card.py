"""The model card: hubs can read it, it tells what is known and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from fedkseed.kseed.card import Prompt, licence_of
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.server import start
from fedkseed.models.identity import BaseIdentity
from fedkseed.noise.pool import SeedPool
from fedkseed.report.model_card import About, model_card
from fedkseed.runs.settings import SimulationConfig, build

BASE = BaseIdentity.of({"w": bytes(range(32))})


@pytest.fixture
def config() -> SimulationConfig:
    settings: dict[str, Any] = {"lr": 3e-4, "eps": 2e-3, "local_steps": 25, "batch_size": 8, "num_seeds": 1024}
    return build(settings | {"model": "/home/somebody/base", "data": __file__, "algorithm": "fedkseed-pro"})


@pytest.fixture
def ledger(config: SimulationConfig) -> Ledger:
    first = start(config, BASE)
    assert first.history is not None
    return first.advance(first.history)


def rows(card: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and "---" not in line]
    return dict(line for line in lines if len(line) == 2)


def test_the_card_of_a_run_says_how_it_was_made(config: SimulationConfig, ledger: Ledger) -> None:
    card = model_card("somebody/base", ledger, About(config, (1.5, 1.25)))
    said = rows(card)
    assert said["base model"] == f"`somebody/base`, fingerprint `{BASE.fingerprint}`"
    assert said["method"].startswith("FedKSeed-Pro ([Qin et al., ICML 2024](https://")
    assert said["candidate seeds"] == f"K = 1,024, hadamard noise, key {ledger.pool.key:#018x}"
    assert said["rounds"] == "1"
    assert said["a client's round"] == "25 local steps of 8 records"
    assert said["learning rate"] == "0.0003, constant"
    assert said["eps"] == "0.002"
    assert said["prompt template"] == "plain"
    assert said["held-out loss"] == "1.5000 before, 1.2500 after, in nats per response token"
    assert said["digest of the run's ledger"] == f"`{ledger.digest()}`"
    published = ledger.published()
    assert said["digest of the published ledger"] == f"`{published.digest()}`, {len(published.encode()):,} bytes"
    assert "/home" not in card
    assert __file__ not in card


def test_the_card_of_a_bare_ledger_is_shorter(ledger: Ledger) -> None:
    said = rows(model_card("base", ledger.published()))
    assert set(said) == {"base model", "method", "candidate seeds", "rounds", "licence", "digest of the published ledger"}
    assert said["digest of the published ledger"].startswith(f"`{ledger.published().digest()}`")


def test_the_card_of_a_sum_does_not_say_how_it_was_found(ledger: Ledger) -> None:
    other = Ledger(SeedPool(5, 64), ledger.base, "float32", 1, np.ones(64, np.float32), None)
    one = Ledger(SeedPool(4, 128), ledger.base, "float32", 1, np.ones(128, np.float32), None)
    card = model_card("base", one + other)
    said = " ".join(card.split())
    assert (
        "How they were found is not known here. These weights are the base model's plus K such directions on each of 2 pages"
        in said
    )
    assert "federated" not in said
    assert rows(card)["candidate seeds"].count("K = ") == 2
    assert "federated-learning" not in ModelCard(card).data.tags


@pytest.mark.parametrize("base", ["owner/name", "base", "a: b", '"quoted" # 1', "1e3", "null", "modèle 模型 🌱"])
def test_hubs_read_the_names_as_they_are(ledger: Ledger, base: str) -> None:
    data = ModelCard(model_card(base, ledger)).data
    assert data.base_model == base
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert "fedkseed" in data.tags
    assert data.license == "unknown"


def test_the_python_on_the_card_is_python(ledger: Ledger) -> None:
    about = About(prompt=Prompt("plain", "...", "jinja"))
    loading, asking = (part.split("```")[0] for part in model_card("base", ledger, about).split("```python\n")[1:])
    compile(loading, "card", "exec")
    compile(asking, "card", "exec")


CARD = "---\nlicense: other\nlicense_name: smol\nlicense_link: LICENSE\nauthors: [a]\n---\n# A model\n"


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (CARD, {"license": "other", "license_name": "smol", "license_link": "LICENSE"}),
        (CARD.replace("\n", "\r\n"), {"license": "other", "license_name": "smol", "license_link": "LICENSE"}),
        ("---\nlicense: [mit]\n---\n", {}),
        *((text, {}) for text in ("", "# no fields", "---\n- a\n---\n", "---\n{{\n---\n", "---\nlicense: mit\n", "---\n---\n")),
    ],
    ids=range(9),
)
def test_the_licence_is_what_the_base_models_own_card_says(
    ledger: Ledger, tmp_path: Path, text: str, fields: dict[str, str]
) -> None:
    assert licence_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_bytes(text.encode())
    assert licence_of(str(tmp_path)) == fields
    card = model_card("base", ledger, About(licence=fields))
    data = ModelCard(card).data.to_dict()
    assert {name: data.get(name) for name in fields} == fields
    assert data["license"] == fields.get("license", "unknown")
    assert rows(card)["licence"] == ("the base model's, `other`" if fields else "the base model's")


@pytest.mark.parametrize(
    ("data", "said", "ids"),
    [
        ("/home/somebody/a.jsonl", "`a.jsonl`", None),
        ("owner/name:train,/home/somebody/b.csv", "`owner/name:train`, `b.csv`", ["owner/name"]),
        ("in memory: 3 records, 0123", "3 records, 0123", None),
    ],
)
def test_the_data_are_named_without_their_paths(
    config: SimulationConfig, ledger: Ledger, data: str, said: str, ids: list[str] | None
) -> None:
    card = model_card("base", ledger, About(config.model_copy(update={"data": data, "responses": "shuffled"})))
    assert rows(card)["training data"] == f"{said}, dealt out to simulated clients, responses shuffled among the prompts"
    assert ModelCard(card).data.datasets == ids
    assert "/home" not in card


def test_the_text_of_a_template_stands_in_a_fence_of_its_own(ledger: Ledger) -> None:
    text = "Say\n```\n{{ x }}\n````\n"
    assert f"The prompt template `own.toml`:\n\n`````toml\n{text}`````\n" in model_card(
        "base", ledger, About(prompt=Prompt("own.toml", text, "toml"))
    )
