"""Write the model's README.md from the curve and from what the model answers.

OMP_NUM_THREADS=1 python dev/pretrain/model_card.py
"""

import json
from pathlib import Path

import torch
from find_settings import greedy

from fedkseed import demo
from fedkseed.data import Example, encode, pad_token_id
from fedkseed.demo.corpus import FORMAT, HEADINGS
from fedkseed.demo.tasks import KINDS
from fedkseed.models.loading import load_model, load_tokenizer

HERE = Path(__file__).resolve().parent
TAIL = 0.2


def titled(titles: tuple[str, str, str]):
    """The template `plain` under other headings."""

    def template(example: Example, tokenizer: object) -> tuple[str, str]:
        text = f"{titles[0]}:\n{example.instruction}\n\n"
        if example.input:
            text += f"{titles[1]}:\n{example.input}\n\n"
        return f"{text}{titles[2]}:\n", example.output

    return template


def exact_match(model, tokenizer, titles: tuple[str, str, str]) -> dict[str, float]:
    held_out = demo.held_out(1)
    encoded = encode(held_out, tokenizer, 128, titled(titles)).examples
    said = [tokenizer.decode(ids) for ids in greedy(model, encoded, pad_token_id(tokenizer), tokenizer.eos_token_id)]
    hits = [(e.category, text == e.output) for e, text in zip(held_out, said, strict=True)]
    return {kind: sum(hit for k, hit in hits if k == kind) / sum(k == kind for k, _ in hits) for kind in KINDS}


def main() -> None:
    torch.set_num_threads(1)
    folder = demo.model_folder()
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    curve = [json.loads(line) for line in (HERE / "curve.jsonl").read_text().splitlines()]
    last = curve[-1]
    shown = [p for p in curve if p["step"] in (50, 100, 200, 300, 400, 600, 800) or p["step"] % 250 == 0 or p is last]
    table = ["| step | tokens | loss |", "| ---: | ---: | ---: |"]
    table += [f"| {p['step']} | {p['tokens']:,} | {p['held_out_loss']:.4f} |" for p in shown]
    at = min(curve, key=lambda p: abs(p["step"] - (1 - TAIL) * last["step"]))
    gain = 1 - last["held_out_loss"] / at["held_out_loss"]
    flat = (
        f"It is flat in this sense: over the last {1 - at['step'] / last['step']:.0%} of the steps, from {at['step']} on, "
        f"the held-out loss fell by {gain:.2%}\n(the criterion is less than 0.5 %)."
        if gain < 0.005
        else f"Over the last {1 - at['step'] / last['step']:.0%} of the steps the held-out loss still fell by {gain:.2%}."
    )
    skills = {"/".join(titles): exact_match(model, tokenizer, titles) for titles in (HEADINGS[0], FORMAT)}
    rows = ["| headings | " + " | ".join(KINDS) + " |", "| --- |" + " ---: |" * len(KINDS)]
    rows += [f"| {name} | " + " | ".join(f"{of[kind]:.0%}" for kind in KINDS) + " |" for name, of in skills.items()]
    text = (HERE / "model_card.md").read_text(encoding="utf-8")
    card = text.format(
        d=sum(p.numel() for p in model.parameters()), v=len(tokenizer), cpu=f"{last['cpu_seconds'] / 60:.0f} minutes",
        steps=last["step"], tokens=last["tokens"] / 1e6, table="\n".join(table), flat=flat, skills="\n".join(rows),
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
