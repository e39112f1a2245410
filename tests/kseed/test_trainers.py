"""Loops that other people wrote over what `fk.prepare` gives: transformers' Trainer, accelerate, TRL's trainers.

Each tunes the demo's model, so that these run from a fresh clone.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkseed as fk
from fedkseed.data import Example
from fedkseed.demo import clients, model_folder
from fedkseed.errors import InvalidValueError, LedgerError
from fedkseed.models.loading import load_model, load_tokenizer

POOL = fk.SeedPool(key=7, size=1024)
STEPS = 4


def examples(count: int = 32) -> list[Example]:
    return [example for own in clients(seed=1).values() for example in own][:count]


def prompt_of(example: Example) -> str:
    return f"Instruction: {example.instruction}\nInput: {example.input}\nResponse:"


def rows() -> list[dict[str, list[int]]]:
    """Token ids of one length."""
    tokenizer = load_tokenizer(model_folder())
    ids = [tokenizer(prompt_of(e) + " " + e.output)["input_ids"][:24] for e in examples()]
    padded = [[*one, *[0] * (24 - len(one))] for one in ids]
    return [{"input_ids": one, "labels": one} for one in padded]


def prepared(**settings: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    """The base model made ready, its optimiser, and a schedule."""
    model, optimizer = fk.prepare(load_model(model_folder(), "float32"), POOL, lr=2e-3, **settings)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def assert_rebuilds(model: Any, ledger: fk.Ledger) -> None:
    """The ledger makes of the base model the one that was trained, and that is another than the base."""
    fresh = load_model(model_folder(), "float32")
    base = fk.bind(fresh, POOL).digest()
    fk.apply(fresh, ledger)
    tuned = load_model(model_folder(), "float32")
    tuned.load_state_dict(model.state_dict())
    assert fk.bind(fresh, POOL).digest() == fk.bind(tuned, POOL).digest() != base


# --- transformers ---


def train(folder: Path, resume: Path | None = None, **options: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    from transformers import Trainer, TrainingArguments

    model, optimizer, schedule = prepared()
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=2,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **options
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows()[:4], optimizers=(optimizer, schedule))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and transformers about each other
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, optimizer, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A training's folder, model and trainer."""
    folder = tmp_path_factory.mktemp("trainer")
    model, _, trainer = train(folder)
    return folder, model, trainer


def test_trainer_tunes_and_its_checkpoint_is_an_ordinary_model(trained: tuple[Path, Any, Any]) -> None:
    folder, model, trainer = trained
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    norms = [event["grad_norm"] for event in trainer.state.log_history if "grad_norm" in event]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert min(norms) > 0  # clipped, and shown, as if all weights had gradients
    ledger = fk.ledger_of(model)
    assert ledger.round == STEPS
    assert_rebuilds(model, ledger)
    written = load_model(folder / f"checkpoint-{STEPS}", "float32")
    assert_rebuilds(written, ledger)


def test_a_resumed_trainer_ends_with_the_bits_of_an_uninterrupted_one(trained: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Also where activations are recomputed: they are the same activations."""
    folder, model, _ = trained
    again, _, _ = train(tmp_path / "again", folder / "checkpoint-2", activation_checkpointing=True)
    assert fk.ledger_of(again).digest() == fk.ledger_of(model).digest()


def test_a_checkpoint_is_not_resumed_over_another_base(trained: tuple[Path, Any, Any]) -> None:
    """Such as the checkpoint's own tuned weights, which a careless script would load."""
    folder, _, _ = trained
    tuned, optimizer = fk.prepare(load_model(folder / "checkpoint-2", "float32"), POOL, lr=2e-3)
    state = torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)
    with pytest.raises(InvalidValueError, match=r"^the state_dict's base is '.*'; prepare the base model as it was prepared"):
        optimizer.load_state_dict(state)
    assert fk.ledger_of(tuned).round == 0


def test_the_best_model_at_the_end_is_said_not_to_be_the_last_and_how_to_have_its_ledger(tmp_path: Path) -> None:
    model, optimizer, trainer = train(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    with pytest.raises(
        LedgerError, match=r"something else has changed the model since step 4; .* optimizer.pt of the checkpoint"
    ):
        fk.ledger_of(model)
    optimizer.load_state_dict(torch.load(best / "optimizer.pt", weights_only=True))
    ledger = fk.release(model)
    assert ledger.round == 2
    assert_rebuilds(model, ledger)


# --- accelerate ---


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_accelerate_accumulates_clips_saves_and_goes_on(precision: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one process may have one precision only
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    plain, its_optimizer, its_schedule = prepared()
    loader = torch.utils.data.DataLoader([{name: torch.tensor(ids) for name, ids in row.items()} for row in rows()], 8)
    model, optimizer, loader, schedule = accelerator.prepare(plain, its_optimizer, loader, its_schedule)

    def epoch() -> str:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    assert accelerator.clip_grad_norm_(model.parameters(), 1.0) > 0
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return fk.ledger_of(accelerator.unwrap_model(model)).digest()

    epoch()
    assert fk.ledger_of(plain).round == 2
    accelerator.save_state(str(tmp_path / "state"))
    first = epoch()
    accelerator.load_state(str(tmp_path / "state"))
    assert fk.ledger_of(plain).round == 2
    assert epoch() == first
    assert_rebuilds(plain, fk.ledger_of(plain))


# --- TRL ---


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_tunes(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, optimizer, schedule = prepared()
    data = Dataset.from_list([{"prompt": prompt_of(e), "completion": " " + e.output} for e in examples()])
    args = SFTConfig(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=8, max_length=64, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = load_tokenizer(model_folder())
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, schedule))
    trainer.train()
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    assert losses[-1] < losses[0]
    assert_rebuilds(model, fk.release(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_grpo_trainer_tunes_by_a_reward(tmp_path: Path) -> None:
    """With a rate that is large enough to be seen: the reward, for the letter e, rises."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def letters(completions: list[str], **_: Any) -> list[float]:
        return [text.count("e") / 8 for text in completions]

    model, optimizer, _ = prepared()
    data = Dataset.from_list([{"prompt": prompt_of(e)} for e in examples()])
    args = GRPOConfig(
        str(tmp_path), max_steps=20, per_device_train_batch_size=16, num_generations=8, max_completion_length=8,
        logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = GRPOTrainer(
        model,
        reward_funcs=letters,
        args=args,
        train_dataset=data,
        processing_class=load_tokenizer(model_folder()),
        optimizers=(optimizer, constant),
    )
    trainer.train()
    rewards = [event["reward"] for event in trainer.state.log_history if "reward" in event]
    assert sum(rewards[-5:]) > 1.2 * sum(rewards[:5])
    ledger = fk.release(model)
    assert ledger.round == 20
    assert_rebuilds(model, ledger)
