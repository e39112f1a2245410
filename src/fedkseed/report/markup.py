"""The pieces of a page: text that is escaped on its way into HTML, tables, cards, pictures, and the whole without a script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from fedkseed.report.chart import Chart
from fedkseed.report.picture import DARK, LIGHT, css_variables
from fedkseed.text import visible


@dataclass(frozen=True)
class Html:
    """Text that is HTML already; everything else is escaped on its way into the page."""

    text: str


Text = str | Html


def html(text: Text) -> str:
    """The text as HTML."""
    return text.text if isinstance(text, Html) else escape(visible(text))


def tag(name: str, content: Text | Iterable[Text], **attributes: str) -> Html:
    """An element; `class_` and the like are attributes whose names Python has taken."""
    parts = [content] if isinstance(content, (str, Html)) else content
    opening = "".join(f' {key.strip("_").replace("_", "-")}="{escape(visible(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{opening}>{''.join(map(html, parts))}</{name}>")


def quiet(text: str) -> Html:
    """Text that is read last."""
    return tag("span", text, class_="quiet")


def _style() -> str:
    light = f":root {{ --page: #f4f6f9; {css_variables(LIGHT)} }}\n"
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ --page: #0e1218; {css_variables(DARK)} }} }}\n"
    return light + dark + files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def card(name: str, figure: str, *details: str) -> Html:
    """A figure with what it is and what belongs to it."""
    lines = [tag("dd", detail, class_="quiet") for detail in details if detail]
    return tag("div", [tag("dt", name), tag("dd", figure, class_="figure"), *lines], class_="card")


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Text]], numeric: int, kind: str = "") -> Html:
    """A table whose first column names the row; columns from `numeric` on are numbers."""
    head = [tag("th", text, scope="col", **({"class_": "num"} if i >= numeric else {})) for i, text in enumerate(header)]
    lines = []
    for first, *rest in rows:
        cells = [tag("td", cell, **({"class_": "num"} if i >= numeric else {})) for i, cell in enumerate(rest, start=1)]
        lines.append(tag("tr", [tag("th", first, scope="row"), *cells]))
    parts = [tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", lines)]
    return tag("table", parts, **({"class_": kind} if kind else {}))


def details(summary: str, content: Html) -> Html:
    """What is unfolded on request."""
    return tag("details", [tag("summary", summary), content], class_="panel long")


def figures(charts: Sequence[Chart], pictures: Mapping[str, str]) -> list[Html]:
    """The charts; `pictures` are their SVG by name."""
    shown = []
    for chart in charts:
        if chart.name in pictures:
            label = f'<svg role="img" aria-label="{escape(visible(chart.alt))}"'
            content = [Html(pictures[chart.name].replace("<svg", label, 1)), tag("figcaption", chart.caption)]
        else:
            content = [tag("p", chart.caption, class_="empty")]
        shown.append(tag("figure", [tag("h3", chart.title), *content], id=chart.name.replace("_", "-")))
    return [tag("h2", "Charts"), tag("div", shown, class_="charts")]


TITLE = "<title>fedkseed report: "
"""How the titles of all pages begin, by which one is known to be ours."""
ON_DISK = tag("p", "Made by fedkseed report. The charts lie beside this page as PNG files.")
"""The foot of a page that is a file."""


def document(name: str, body: Sequence[Html], foot: Html = ON_DISK) -> str:
    """A whole page; `name` is that of what it reports."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{TITLE}{escape(visible(name))}</title><style>\n{_style()}</style>"
    )
    content = "\n".join(map(html, [*body, tag("footer", foot)]))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{content}\n</body></html>\n'
