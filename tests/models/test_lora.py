"""Numbers over LoRA's matrices: factors that are the same bits everywhere, and a ledger that is a whole adapter."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import laws

import fedkseed as fk
from fedkseed.errors import BindingError, InvalidValueError
from fedkseed.models.loading import load_model

peft = pytest.importorskip("peft")
POOL = fk.SeedPool(3, 128)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def adapted(folder: Path, torch_seed: int, key: int | None = 7) -> torch.nn.Module:
    """The tiny model with an adapter, by a process whose generator is elsewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        model: torch.nn.Module = peft.get_peft_model(load_model(folder, "float32"), config)
    if key is not None:
        fk.seed_lora(model, key)
    return model


def test_the_factors_are_the_same_bits_wherever_they_are_drawn(tiny: Path) -> None:
    folder = tiny / "model"
    state = torch.get_rng_state()
    one, other = fk.bind(adapted(folder, 1), POOL), fk.bind(adapted(folder, 2), POOL)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.digest() == other.digest()
    assert one.identity() == other.identity()
    plain = [fk.bind(adapted(folder, seed, None), POOL).digest() for seed in (1, 2)]
    assert plain[0] != plain[1]  # the control: what PEFT draws
    assert fk.bind(adapted(folder, 1, 8), POOL).digest() != one.digest()


def test_the_factors_by_their_definition(tiny: Path) -> None:
    model = adapted(tiny / "model", 1)
    found = {name: x.detach() for name, x in model.named_parameters() if "lora_A" in name}
    assert len(found) == 2
    for name, x in found.items():
        z = laws.gaussian_sum(7, name, x.numel(), np.ones(1, np.float32))
        wanted = laws.times(z, np.full(z.shape, 1 / math.sqrt(3 * x.shape[1]), np.float32))
        assert x.numpy().tobytes() == wanted.tobytes()
    assert all(not x.any() for name, x in model.named_parameters() if "lora_B" in name)
    first = found[min(found)].numpy().tobytes()
    assert hashlib.sha256(first).hexdigest().startswith("8be054d377a6a31e")


def test_a_ledger_over_them_is_the_adapter(tiny: Path, tmp_path: Path) -> None:
    """Trained here, rebuilt there; what PEFT saves of it is an ordinary adapter."""
    folder, ids = tiny / "model", torch.arange(4, 20)[None]
    model = adapted(folder, 1)
    bound = fk.bind(model, POOL)
    a, losses = np.zeros(128), []
    for _ in range(8):
        with bound.folding() as fold:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        losses.append(loss.item())
        a -= 0.02 * np.sign(fold.numbers())
        bound.rebuild(a.astype(np.float32))
    assert losses[-1] < losses[0]
    fk.Ledger.of(bound, a.astype(np.float32)).save(tmp_path / "ledger")
    assert (tmp_path / "ledger").stat().st_size < 2000

    card = (fk.Ledger.load(tmp_path / "ledger").save_pretrained(tmp_path / "folder", "owner/base") / "README.md").read_text()
    assert "model = adapted()  #" in card
    assert "fk.apply(model, folder)" in card
    assert "with a LoRA adapter that is tuned" in card
    elsewhere = adapted(folder, 2)
    fk.apply(elsewhere, tmp_path / "ledger")
    assert fk.bind(elsewhere, POOL).digest() == bound.digest()
    elsewhere.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    again = peft.PeftModel.from_pretrained(load_model(folder, "float32"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_embedding_s_factors_are_drawn_too(tiny: Path) -> None:
    """Of these B is the random one, and A zero."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    models = [peft.get_peft_model(load_model(tiny / "model", "float32"), config) for _ in range(2)]
    plain = [fk.bind(model, POOL).digest() for model in models]
    for model in models:
        fk.seed_lora(model, 7)
    assert plain[0] != plain[1]  # the control: what PEFT draws
    assert fk.bind(models[0], POOL).digest() == fk.bind(models[1], POOL).digest()
    found = {name: x.detach() for name, x in models[0].named_parameters() if "lora_embedding" in name}
    (drawn,), (zero,) = ([name for name in found if f"_{kind}." in name] for kind in "BA")
    assert found[drawn].numpy().tobytes() == laws.gaussian_sum(7, drawn, found[drawn].numel(), np.ones(1, np.float32)).tobytes()
    assert not found[zero].any()


def test_mistakes_are_one_line_and_change_nothing(tiny: Path) -> None:
    model = load_model(tiny / "model", "float32")
    before = laws.all_bits(model)
    with pytest.raises(BindingError, match=r"LlamaForCausalLM has no LoRA factor \(lora_A\); give what peft.get_peft_model"):
        fk.seed_lora(model, 7)
    with pytest.raises(BindingError, match=r"^model is None; expected what peft.get_peft_model"):
        fk.seed_lora(None, 7)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="key is -1"):
        fk.seed_lora(model, -1)
    assert laws.all_bits(model) == before
