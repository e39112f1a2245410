"""Pictures: what a legend names is in the picture."""

import io
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from fedkseed.report import drawing, picture
from fedkseed.report.drawing import Curve, curves

NAMES = ["FedKSeed", "FedIT", "a method with a name, half of its clients by two points", "another with a long name", "FedAvg"]


def outside(names: list[str]) -> list[str]:
    """The entries of a legend that leave the picture, of curves by those names."""
    with matplotlib.rc_context(picture.STYLE):
        figure: Any = Figure(figsize=(picture.WIDTH, picture.HEIGHT), layout="constrained")
        curves([Curve(name, [1, 2], [2, 1]) for name in names], "bytes", False)(figure, picture.LIGHT)
        figure.savefig(io.BytesIO(), format="png")
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == names
        return [t.get_text() for t in legend.get_texts() if t.get_window_extent().x1 > figure.bbox.x1]


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[:4], NAMES])
def test_a_legend_stays_within_the_picture(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert outside(names) == []
    if len(names) > 2:  # the negative control: three columns whatever the names are
        monkeypatch.setattr(drawing, "_legend", lambda figure, n: figure.legend(loc="outside upper left", ncols=n))
        assert outside(names) != []
