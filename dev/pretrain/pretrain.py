"""Make the demo's tokenizer and model from the generated corpus, from nothing and on one CPU thread.

    OMP_NUM_THREADS=1 python dev/pretrain/pretrain.py [--steps 3250] [--work runs/pretrain] [--out src/fedkseed/demo/model]

A killed run goes on where its last checkpoint is. Every step's documents are drawn afresh by (seed, step), so nothing is
seen twice and the held-out documents, from a stream of their own, measure what the model is trained for. The curve goes
to --curve. The loss that is trained weighs the tokens of answers ANSWER_WEIGHT times (they are few, and
hold the skills); since that depends on the place and not on what comes, it changes no conditional probability that
the model is to learn. The held-out loss is plain: nats per token, all tokens alike.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedkseed.demo.corpus import FORMAT, HEADINGS, documents
from fedkseed.files import write_atomically
from fedkseed.randomness import generator

HERE = Path(__file__).resolve().parent
SEED = 2024
VOCABULARY = 1024
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 96, 4, 4, 256, 256
DOCUMENTS_PER_STEP, PIECES = 128, 4
PEAK_LR, WARM_UP, WEIGHT_DECAY, CLIP = 3e-3, 100, 0.05, 1.0
HOLD, FALL, FLOOR = 0.24, 0.8, 5e-5
ANSWER_WEIGHT = 4.0
TOKENIZER_DOCUMENTS, HELD_OUT_DOCUMENTS = 20_000, 512
MARKS = tuple(f"{titles[2]}:\n" for titles in (*HEADINGS, FORMAT))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over words that carry the space before them; at the start of a line or text they get one, so that a word is the
    same token everywhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(" ", "▁"),
            normalizers.Prepend("▁"),
            normalizers.Replace("\n", "\n▁"),
            normalizers.Replace("▁\n", "\n"),
            normalizers.Replace(Regex("▁$"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[.,:?!]|▁?[^\n▁.,:?!]+|▁"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("\n▁", "\n"), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=["▁", "\n", *map(chr, range(33, 127))],
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(generator(SEED, "tokenizer")), TOKENIZER_DOCUMENTS), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=POSITIONS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    pad, bos, eos, _ = range(4)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=INNER, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        initializer_range=0.06, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    return LlamaForCausalLM(config)


Encoded = tuple[list[int], int]
"""A document's ids, BOS and EOS included, and where its answer begins (its length where it has none)."""


def encode(text: str, tokenizer: Any) -> Encoded:
    """Prompt and answer are tokenised apart, as fedkseed.data does."""
    mark = next((mark for mark in MARKS if mark in text), None)
    prompt, answer = (
        (text, "") if mark is None else (text[: text.index(mark) + len(mark)], text[text.index(mark) + len(mark) :])
    )
    head = tokenizer.encode(prompt).ids
    tail = tokenizer.encode(answer, add_special_tokens=False).ids if answer else []
    return [*head, *tail, 2], len(head) if answer else len(head) + 1


def piece_loss(model: LlamaForCausalLM, piece: Sequence[Encoded], answer_weight: float) -> tuple[torch.Tensor, float]:
    """Weighted loss summed over documents, and the sum of weights."""
    longest = max(len(ids) for ids, _ in piece)
    x = np.zeros((len(piece), longest), np.int64)
    weight = np.zeros((len(piece), longest), np.float32)
    for row, (ids, answer) in enumerate(piece):
        x[row, : len(ids)] = ids
        weight[row, 1 : len(ids)] = 1
        weight[row, answer : len(ids)] = answer_weight
    inputs, weights = torch.from_numpy(x), torch.from_numpy(weight[:, 1:])
    # no mask: padding is on the right of a causal model and weighs nothing
    logits = model(input_ids=inputs[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum(), float(weights.sum())


def pieces(batch: Sequence[Encoded], number: int) -> Iterator[Sequence[Encoded]]:
    """The batch by length, so that there is little padding."""
    ordered = sorted(batch, key=lambda item: len(item[0]))
    size = math.ceil(len(ordered) / number)
    yield from (ordered[i : i + size] for i in range(0, len(ordered), size))


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, batch: Sequence[Encoded]) -> dict[str, float]:
    """Plain loss over all tokens."""
    sums = [piece_loss(model, piece, 1) for piece in pieces(batch, 16)]
    return {"held_out_loss": sum(float(s) for s, _ in sums) / sum(w for _, w in sums)}


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then the peak, from HOLD of the steps on a cosine that would be 0 at FALL, but never below FLOOR.

    So the last fifth of the steps is at one small rate: if the held-out loss is flat there, it is not so because the rate
    has vanished.
    """
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    hold, fall = round(HOLD * steps), round(FALL * steps)
    fallen = min(max(step - hold, 0) / (fall - hold), 1)
    return max(FLOOR, PEAK_LR * (1 + math.cos(math.pi * fallen)) / 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3250)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "src/fedkseed/demo/model")
    parser.add_argument("--curve", type=Path, default=HERE / "curve.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    wrapped = make_tokenizer()
    tokenizer = wrapped.backend_tokenizer
    held_out = [encode(text, tokenizer) for text in islice(documents(generator(SEED, "held out")), HELD_OUT_DOCUMENTS)]
    model = make_model(len(wrapped))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    curve: list[dict[str, float]] = []
    first, tokens, seconds = 0, 0, 0.0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, tokens, seconds, curve = state["step"], state["tokens"], state["seconds"], state["curve"]
    begin = time.process_time() - seconds
    for step in range(first, args.steps):
        texts = islice(documents(generator(SEED, "step", step)), DOCUMENTS_PER_STEP)
        batch = [encode(text, tokenizer) for text in texts]
        total = sum(len(ids) - 1 + (ANSWER_WEIGHT - 1) * max(len(ids) - answer, 0) for ids, answer in batch)
        for group in optimiser.param_groups:
            group["lr"] = rate(step, args.steps)
        optimiser.zero_grad()
        train_loss = 0.0
        for piece in pieces(batch, PIECES):
            loss, _ = piece_loss(model, piece, ANSWER_WEIGHT)
            (loss / total).backward()
            train_loss += loss.item() / total
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        tokens += sum(len(ids) for ids, _ in batch)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            point = {"step": step + 1, "tokens": tokens, "lr": rate(step, args.steps), "weighted_train_loss": train_loss}
            point |= held_out_loss(model, held_out)
            point["cpu_seconds"] = round(time.process_time() - begin, 1)
            curve.append(point)
            print(json.dumps(point), flush=True)
            state = {
                "model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1, "tokens": tokens,
                "seconds": point["cpu_seconds"], "curve": curve,
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    save_tokenizer(wrapped, args.out)
    write_atomically(args.curve, "".join(json.dumps(point) + "\n" for point in curve).encode())


if __name__ == "__main__":
    main()
