"""Which parameters are tuned, by their names."""

import pytest
import torch

import fedkseed as fk
from fedkseed.errors import BindingError
from fedkseed.models.parameters import tune_only


def tied() -> torch.nn.Module:
    """Two layers and two names for one more: `embed.weight` and `head.weight`."""
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(6, 4),
            "mid": torch.nn.Linear(4, 4),
            "norm": torch.nn.LayerNorm(4),
            "head": torch.nn.Linear(4, 6),
        }
    )
    model["head"].weight = model["embed"].weight
    return model


def tuned(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


BOTH = {"embed.weight", "head.weight"}
ALL = BOTH | {"mid.weight", "mid.bias", "norm.weight", "norm.bias", "head.bias"}


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("*", ALL),
        ("mid.*", {"mid.weight", "mid.bias"}),
        ("mid.bias, norm.*", {"mid.bias", "norm.weight", "norm.bias"}),
        ("embed.weight", BOTH),
        ("head.weight", BOTH),
        ("*.bias", {"mid.bias", "norm.bias", "head.bias"}),
        ("*,mid.bias", ALL),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_exactly_what_is_named_is_tuned_whatever_was_before(trainable: str, expected: set[str], before: bool) -> None:
    model = tied().requires_grad_(before)
    tune_only(model, trainable)
    assert tuned(model) == expected


@pytest.mark.parametrize("wrong", ["mid", "mid.", "MID.*", "", "mid.*,", "nothing", "mid.*,*.wait"])
def test_a_name_that_is_no_parameters_is_refused_and_changes_nothing(wrong: str) -> None:
    model = tied()
    tune_only(model, "mid.bias")
    pattern = wrong.rpartition(",")[2]
    with pytest.raises(
        BindingError,
        match=rf"^trainable is '.*': none of the model's 7 parameters is called '{pattern}'".replace("*.w", r"\*.w"),
    ):
        tune_only(model, wrong)
    assert tuned(model) == {"mid.bias"}


def test_what_is_not_named_keeps_its_bits_and_what_is_named_moves_as_if_all_were_tuned() -> None:
    """A tensor's perturbation depends on its own name only."""
    pool = fk.SeedPool(3, 128)
    models = [tied(), tied()]
    models[1].load_state_dict(models[0].state_dict())
    before = {name: x.clone() for name, x in models[0].state_dict().items()}
    for model, trainable in zip(models, ("*", "mid.weight,norm.*"), strict=True):
        tune_only(model, trainable)
        fk.bind(model, pool).perturb(5, 0.01)
    whole, part = models[0].state_dict(), models[1].state_dict()
    for name, x in before.items():
        named = name in ("mid.weight", "norm.weight", "norm.bias")
        assert torch.equal(part[name], whole[name] if named else x)
        assert not torch.equal(whole[name], x)
