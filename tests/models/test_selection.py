"""Which tensors are tuned: patterns on their names."""

import pytest
import torch

from fedkseed.errors import ConfigError
from fedkseed.models.selection import frozen_names


class Tiny(torch.nn.Module):
    """Two layers, a norm, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(3, 2)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
        self.norm = torch.nn.LayerNorm(2)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


LAYERS = ("layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight")


@pytest.mark.parametrize(
    ("train", "freeze", "frozen"),
    [
        ((), (), ()),
        (("layers.*",), (), ("embed.weight", "norm.bias", "norm.weight")),
        ((), ("*.bias", "norm*"), ("layers.0.bias", "layers.1.bias", "norm.bias", "norm.weight")),
        (("layers.*", "norm.*"), ("*.bias",), ("embed.weight", "layers.0.bias", "layers.1.bias", "norm.bias")),
        ((), ("head.*",), ("embed.weight",)),  # by any of its names
        (("layers.[1].?ias",), (), ("embed.weight", *LAYERS[:2], LAYERS[3], "norm.bias", "norm.weight")),
    ],
)
def test_patterns(train: tuple[str, ...], freeze: tuple[str, ...], frozen: tuple[str, ...]) -> None:
    assert frozen_names(Tiny(), train, freeze) == frozen


def test_what_is_idle_is_frozen_too_and_cannot_be_trained() -> None:
    assert frozen_names(Tiny(), idle=["norm.bias"]) == ("norm.bias",)
    with pytest.raises(ConfigError, match=r"^--train 'norm\.bias' matches no tensor that a loss depends on"):
        frozen_names(Tiny(), ["norm.bias"], idle=["norm.bias"])


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer", r"such as layers\.0\.bias, layers\.0\.weight, layers\.1\.bias; try '\*layer\*'"),
        ("layers.0.wieght", r"such as layers\.0\.weight"),
        ("LAYERS.*", r"it must fit whole names, such as"),
    ],
)
def test_a_pattern_that_matches_nothing_shows_near_names(pattern: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--freeze '.*' matches no tensor that a loss depends on; .*{hint}") as caught:
        frozen_names(Tiny(), ["*"], [pattern])
    assert "\n" not in str(caught.value)


def test_something_must_be_left_to_tune() -> None:
    with pytest.raises(
        ConfigError, match=r"^--train and --freeze leave no tensor to tune; take one of the --freeze patterns away"
    ):
        frozen_names(Tiny(), ["norm.*"], ["*"])
