"""A drawing as a picture.

Each is drawn twice by the same function. The SVG goes into the page: its colours are CSS variables, so that the page's
light and dark styles hold for it. The PNG lies beside the page, in the light colours and with its title.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

WIDTH, HEIGHT, TITLE_HEIGHT = 5.1, 3.2, 0.3  # inches of 72 units: a phone of 390 px shows text of 11 units at 10 px
PNG_DPI = 200
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
}


@dataclass(frozen=True)
class Palette:
    """Colours by role."""

    ink: str
    muted: str
    grid: str
    surface: str
    blue: str
    orange: str
    green: str
    purple: str
    grey: str


LIGHT = Palette(
    ink="#1b2330",
    muted="#566070",
    grid="#d9dee6",
    surface="#ffffff",
    blue="#2463c9",
    orange="#c2570c",
    green="#15803d",
    purple="#8a3fb5",
    grey="#737d8c",
)
DARK = Palette(
    ink="#e8ecf2",
    muted="#a3adbb",
    grid="#333c4a",
    surface="#171c24",
    blue="#74a9ff",
    orange="#ffa057",
    green="#54cb8c",
    purple="#cf9bf2",
    grey="#8792a3",
)
# colours that stand for the names of CSS variables until the SVG is written
_STAND_INS = Palette(**{field.name: f"#0dc5{i:02x}" for i, field in enumerate(fields(Palette))})

Draw = Callable[[FigureBase, Palette], None]


@dataclass(frozen=True)
class Picture:
    """An `<svg>` element without its accessible name, and a PNG file's bytes."""

    svg: str
    png: bytes


def css_variables(palette: Palette) -> str:
    """The declarations that give a page's pictures their colours."""
    return " ".join(f"--{field.name}: {getattr(palette, field.name)};" for field in fields(palette))


def render(name: str, title: str, draw: Draw) -> Picture:
    """Draw a picture as SVG and as PNG; the same input gives the same bytes, wherever matplotlib is the same."""
    with _style(name):
        return Picture(_svg(draw), _png(title, draw))


def render_svg(name: str, draw: Draw) -> str:
    """The SVG of `render` alone, in less than half of the time."""
    with _style(name):
        return _svg(draw)


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Matplotlib's settings as the pictures want them, whatever they are outside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        yield


def _figure(palette: Palette) -> Figure:
    for role in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"):
        matplotlib.rcParams[role] = palette.ink if role == "text.color" else palette.muted
    matplotlib.rcParams.update({"grid.color": palette.grid, "axes.facecolor": "none"})
    return Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")


def _png(title: str, draw: Draw) -> bytes:
    figure = _figure(LIGHT)
    figure.set_figheight(HEIGHT + TITLE_HEIGHT)
    # a part of its own: matplotlib would put title and legend one upon the other
    parts: Any = figure.subfigures(2, 1, height_ratios=[TITLE_HEIGHT, HEIGHT])
    above, below = parts
    above.text(0.02, 0.4, title, va="center", fontsize=12.5, fontweight="bold")
    draw(below, LIGHT)
    data = io.BytesIO()
    FigureCanvasAgg(figure)  # whatever matplotlib's global backend is
    figure.savefig(data, format="png", dpi=PNG_DPI, facecolor=LIGHT.surface, metadata={"Software": None})
    return data.getvalue()


def _svg(draw: Draw) -> str:
    figure = _figure(_STAND_INS)
    draw(figure, _STAND_INS)
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="none", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for field in fields(Palette):
        svg = svg.replace(getattr(_STAND_INS, field.name), f"var(--{field.name})")
    return svg.strip()
