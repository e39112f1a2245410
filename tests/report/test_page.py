"""The report of a run, from run folders that the tests write: what it says, that it stands alone, and bad input."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.support.report import Maker, Outline, closed, evaluation

from fedkseed.errors import ConfigError, LedgerError, RunError, RunFolderError
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.server import Server
from fedkseed.report import drawing, reading, report, report_several
from fedkseed.report.charts import charts
from fedkseed.report.page import page
from fedkseed.report.picture import render
from fedkseed.report.summary import change
from fedkseed.report.units import amount, duration, loss, percent, power_of_ten, size
from fedkseed.runs.folder import RunFolder

CHARTS = {
    "held_out_loss", "training_loss", "loss_by_bytes", "loss_by_time", "sent", "distance", "bytes", "lost", "participation",
    "seed_use", "seed_probabilities", "coefficients", "time",
}  # fmt: skip
DRAWN = CHARTS - {"lost"}
"""Of a run that has lost nothing."""
OF_LOSSES = ("held_out_loss", "training_loss")
NASTY = "<script>alert(\"1\")</script> & $x_ 'quoted'"


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def read(run: Path) -> Outline:
    return Outline(report(run).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Complete:
    """A finished run and its page, for tests that only look."""

    run: Path
    before: dict[str, tuple[bytes, int]]
    html: str
    outline: Outline


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Complete:
    run = Maker(tmp_path_factory.mktemp("complete")).complete()
    before = snapshot(run)
    html = report(run).read_text(encoding="utf-8")
    return Complete(run, before, html, Outline(html))


def sketch(run: Path, *drawn: str) -> Outline:
    """The page with these of its charts alone, without the time that the others take."""
    record = reading.read(run)
    shown = charts(record)
    pictures = {c.name: render(c.name, c.title, c.draw).svg for c in shown if c.name in drawn and c.draw is not None}
    assert pictures.keys() == set(drawn)
    return Outline(page(run, record, shown, pictures))


def words(run: Path) -> str:
    return sketch(run).text


def snapshot(run: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir() if p.is_file()}


def test_the_page_and_its_pictures_are_written_and_nothing_else(complete: Complete) -> None:
    path = complete.run / "report" / "index.html"
    assert {p.name for p in path.parent.iterdir()} == {"index.html", *(f"{name}.png" for name in DRAWN)}
    for name in DRAWN:
        image = Image.open(BytesIO((path.parent / f"{name}.png").read_bytes()))
        image.load()
        assert image.format == "PNG"
        assert image.width > 800
        assert len(set(image.convert("L").tobytes())) > 20, f"{name} is blank"
    assert snapshot(complete.run) == complete.before


def test_numbers_are_the_metrics(complete: Complete) -> None:
    run, text = complete.run, complete.outline.text
    assert "3.9631 \N{RIGHTWARDS ARROW} 3.8725" in text
    assert "\N{MINUS SIGN}2.3 % after round 6, on 30 records" in text
    assert "6 of 6" in text
    assert "in 15.5 s" in text  # 6 x 2.0 + 7 x 0.5
    assert "818 B" in text
    assert "682 B down, 136 B up" in text
    assert "22 times less than the paper's 17,988 B" in text
    # 24 exchanges: 24 x 682 down, 24 x 135.5 up, 24 x 817.5 both ways
    assert "16,368 B down, 3,252 B up" in text
    assert "19.6 kB" in text
    assert "bytes this run the paper float weights (float32)" in text
    assert "down 682 B 1.04 MB up 136 B 1.04 MB" in text
    assert "both ways 818 B 17,988 B 2.08 MB in total 19,620 B 431,712 B 49.9 MB" in text
    assert "2,545 times less than sending the float weights" in text
    for n in range(1, 7):
        own = [4.1 - 0.01 * n, 3.8, 4.4, 3.3125]
        losses = f"{3.9631 - 0.0151 * n:.4f} {sum(own) / 4:.4f} {min(own):.2f} to {max(own):.2f}"
        assert f"{n} {losses} 682 / 136 2.5 s" in text
    ledger = Ledger.load(run / "ledger.safetensors")
    assert ledger.digest() in text
    assert ledger.base.fingerprint in text
    assert "Every client that was asked sent a reply, and every reply was accepted." in text
    assert "Finished: all 6 rounds are done." in text


def test_totals_count_only_what_was_sent(make: Maker) -> None:
    event = closed(1, refused={"client-18": "too many scalars"}, missing=["client-19"], bytes_down=100.0, bytes_up=10.0)
    text = words(make([evaluation(0, 4.0), event], 1))
    assert "600 B down, 50 B up" in text  # six were asked, five answered
    assert "4 of 6 replies" in text


def test_every_setting_is_shown(make: Maker) -> None:
    run = make.complete(noise="gaussian", loss_clip=None)
    config = RunFolder.open(run).config
    text = words(run)
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if config.facts.takes(name):
            assert f"{name} {field.description} {'not set' if value is None else value}" in text


def label_of_probabilities(outline: Outline) -> str:
    return next(str(a["aria-label"]) for a in outline.all("svg") if str(a["aria-label"]).startswith("Probabilities"))


def said_of(share: NDArray[np.float64]) -> str:
    ratios = share * share.size
    return f"from {ratios.max():.2f} to {ratios.min():.2f} times the uniform probability of {1 / share.size:.3g}"


def servers_probabilities(run: Path) -> NDArray[np.float64]:
    """Those that a server draws the next round's seeds with: it is asked, the formula isn't repeated."""
    return Server(RunFolder.open(run).config, Ledger.load(run / "ledger.safetensors"), ["somebody"]).probabilities()


def test_seed_probabilities_are_those_of_the_next_round(complete: Complete) -> None:
    assert said_of(servers_probabilities(complete.run)) in label_of_probabilities(complete.outline)
    history = Ledger.load(complete.run / "ledger.safetensors").history
    assert history is not None
    counts = history.grad_counts
    assert f"240 steps over 256 seeds, each used {counts.min()} to {counts.max()} times" in complete.html


def test_seed_probabilities_know_where_histories_start(
    make: Maker, complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chart's curve too, number by number."""
    events = [evaluation(0, 4.0), closed(1), evaluation(1, 3.9)]
    drawn: list[NDArray[np.float64]] = []
    monkeypatch.setattr(drawing, "seed_probabilities", drawn.append)
    texts = set()
    for first in (0.0, 40.0):
        run = make(events, 3, name=f"start {first}", importance_start=first)
        record = reading.read(run)
        (chart,) = [chart for chart in charts(record) if chart.name == "seed_probabilities"]
        assert said_of(servers_probabilities(run)) in chart.alt
        assert drawn.pop().tolist() == servers_probabilities(run).tolist()
        texts.add(chart.alt)
    assert len(texts) == 2  # so that the wrong formula, which leaves the start out, must fail


def test_uniform_drawing_has_no_probabilities(make: Maker) -> None:
    run = make([evaluation(0, 4.0)], 0, algorithm="fedkseed")
    (run / "report").mkdir()
    (run / "report" / "seed_probabilities.png").write_bytes(b"an older report's")
    outline = read(run)
    assert "seed-probabilities" not in [a.get("id") for a in outline.all("figure")]
    assert len(outline.all("figure")) == len(CHARTS) - 1
    assert not (run / "report" / "seed_probabilities.png").exists()


def test_page_stands_alone(complete: Complete) -> None:
    html = complete.html
    assert not re.search(r"https?:|//[a-z]|@import|javascript:", html)
    for tag, attributes in complete.outline.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert str(attributes.get("href", "#")).startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", html))


def test_page_is_accessible(complete: Complete) -> None:
    html, outline = complete.html, complete.outline
    assert outline.all("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" for a in outline.all("meta"))
    assert len(outline.all("title")) == len(outline.all("h1")) == len(outline.all("main")) == 1
    svgs = outline.all("svg")
    assert len(svgs) == len(DRAWN)
    assert all(a["role"] == "img" and len(str(a["aria-label"])) > 40 for a in svgs)
    assert len(outline.all("figcaption")) == len(svgs)
    assert len(outline.all("figure")) == len(CHARTS)
    assert all(a["scope"] in {"col", "row"} for a in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table"))
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert references <= set(ids)


def test_pictures_take_their_colours_from_the_page(complete: Complete) -> None:
    html = complete.html
    style, body = html.split("</style>")
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"(fill|stroke): #|font-family", body)
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert used <= set(re.findall(r"--(\w+):", style))


@pytest.mark.parametrize("scheme", ["LIGHT", "DARK"])
def test_colours_keep_the_contrast_of_wcag(scheme: str) -> None:
    from fedkseed.report import picture

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    palette = getattr(picture, scheme)
    # WCAG AA: 4.5 for text, 3 for what a chart is read from
    for role, least in {"ink": 7, "muted": 4.5, "blue": 3, "orange": 3, "green": 3, "purple": 3, "grey": 3}.items():
        low, high = sorted((luminance(getattr(palette, role)), luminance(palette.surface)))
        assert (high + 0.05) / (low + 0.05) >= least, role


def test_what_a_run_says_is_escaped(make: Maker) -> None:
    event = closed(
        1,
        clients={NASTY: {"weight": 1.0, "loss": 4.0}, "a" * 300: {"weight": 1.0, "loss": 4.0}},
        refused={NASTY + "2": NASTY},
        missing=["<b>bold</b>"],
    )
    run = make([evaluation(0, 4.0), event], 1, name="<i>run & $x$", model='"><img src=x onerror=alert(1)>')
    html = report(run).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    text = Outline(html).text
    assert text.count(NASTY) == 5  # a client, the start of another's name in two tables and the last round, a reason
    assert "<b>bold</b>" in text
    assert "<i>run & $x$" in text


def test_refusals_are_counted_by_reason_and_client(make: Maker) -> None:
    events = [evaluation(0, 4.0)]
    for n in (1, 2):
        events.append(closed(n, refused={"client-18": "more scalars than steps"}, missing=["client-19", "client-17"]))
    text = words(make(events, 2))
    assert "no reply came client-17, client-19 4" in text
    assert "more scalars than steps client-18 2" in text
    assert "client-18 0 2 0" in text
    assert "client-19 0 0 2" in text


def test_a_run_without_the_size_of_its_weights_says_so(make: Maker) -> None:
    text = words(make([evaluation(0, 4.0), closed(1), evaluation(1, 3.9)], 1))
    assert "did not note the size of its weights" in text
    assert "times less than sending" not in text


def test_a_run_still_going_is_shown_up_to_its_ledger(make: Maker) -> None:
    events = [evaluation(0, 4.0), closed(1), evaluation(1, 3.9), closed(2), evaluation(2, 3.8), closed(3)]
    run = make(events, 2)  # the third round's ledger is not written yet
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "evaluation", "server')
    text = words(run)
    assert "Round 2 of 6, still going or stopped" in text
    assert "4.0000 \N{RIGHTWARDS ARROW} 3.8000" in text
    assert "5,456 B down" in text  # of two rounds


@pytest.mark.parametrize(
    ("events", "num_ledger_rounds", "num_pictures", "drawn", "says"),
    [
        ([], 0, 0, None, "Round 0 of 6, still going or stopped"),
        ([evaluation(0, 4.0)], 0, 2, None, "base model; no round has been evaluated since"),
        ([evaluation(0, 4.0), closed(1), evaluation(1, 3.9)], 1, 12, ["held_out_loss"], "4.0000 \N{RIGHTWARDS ARROW} 3.9000"),
        # the other pictures are those of the last run
        ([closed(1)], 1, 9, ["training_loss"], "not evaluated yet"),
        ([closed(1), evaluation(1, 3.9)], 1, 10, ["held_out_loss", "training_loss"], "the base model was not evaluated"),
    ],
    ids=["nothing", "round 0", "a single round", "no evaluation", "no first evaluation"],
)
def test_a_run_that_has_hardly_begun_shows_what_there_is(
    make: Maker,
    events: list[dict[str, Any]],
    num_ledger_rounds: int,
    num_pictures: int,
    drawn: list[str] | None,
    says: str,
) -> None:
    run = make(events, num_ledger_rounds)
    outline = read(run) if drawn is None else sketch(run, *drawn)
    assert says in outline.text
    assert len([chart for chart in charts(reading.read(run)) if chart.draw is not None]) == num_pictures
    if drawn is None:
        assert len(outline.all("svg")) == num_pictures == len(list((run / "report").glob("*.png")))
    assert len(outline.all("figure")) == len(CHARTS)
    assert not re.search(r"\bnan\b|\bNone\b", outline.text)


def test_single_round_run_is_finished(make: Maker) -> None:
    assert "Finished: the only round is done." in words(make([evaluation(0, 4.0), closed(1)], 1, num_rounds=1))


def test_a_ledger_without_steps_is_told(make: Maker) -> None:
    event = closed(1, train_loss=None, dropped_steps=20, clients={"client-00": {"weight": 1.0, "loss": None}})
    text = words(make([evaluation(0, 4.0), event, evaluation(1, 4.0)], 1, steps=0))
    assert "The ledger holds no step" in text
    assert "All coefficients are zero" in text
    assert "every step was dropped" in text
    assert "20 steps dropped" in text


def test_published_ledger_has_no_history(make: Maker) -> None:
    run = make.complete()
    Ledger.load(run / "ledger.safetensors").published().save(run / "ledger.safetensors")
    assert "There is no ledger that remembers its steps" in words(run)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 1e308])
def test_divergence_is_said(make: Maker, value: float) -> None:
    event = closed(2, train_loss=value, clients={"client-00": {"weight": 1.0, "loss": value}})
    run = make([evaluation(0, 4.0), closed(1), evaluation(1, 5.0), event, evaluation(2, value)], 2)
    outline = sketch(run, *OF_LOSSES)
    assert "Diverged: a loss is not a finite number, first in round 2. Start anew with a lower --lr" in outline.text
    assert "it was 4.0000 before" in outline.text
    assert "first at round 2" in str(outline.all("svg")[0]["aria-label"])


def test_a_run_of_nothing_but_divergence_can_be_drawn(make: Maker) -> None:
    event = closed(1, train_loss=math.nan, clients={"client-00": {"weight": 1.0, "loss": math.nan}})
    assert "Diverged" in sketch(make([evaluation(0, math.nan), event, evaluation(1, math.nan)], 1), "held_out_loss").text


def test_what_a_rule_made_of_each_client_is_shown_where_it_tells(make: Maker) -> None:
    clients = {
        name: {"weight": 0.5, "loss": 3.0, "counted": share, "clipped_scalars": cut}
        for name, share, cut in (("honest", 1.0, 0), ("hostile", 0.125, 7))
    }
    events = [evaluation(0, 4.0), *(closed(n, clients=clients, clipped_scalars=7) for n in (1, 2))]
    text = words(make(events, 2))
    assert "what of its accepted replies went in, by the rule clipped. 14 scalars were clipped." in text
    assert "hostile 2 0 0 12 %" in text
    assert "Counted" not in words(make([events[0], closed(1)], 1, name="other"))


def test_a_long_run_of_many_clients_can_be_drawn(make: Maker) -> None:
    events = [evaluation(0, 4.0)]
    for n in range(1, 201):
        losses = {f"client-{(7 * n + i) % 900:03}": {"weight": 0.1, "loss": 3.0 + i / 10} for i in range(10)}
        events += [closed(n, clients=losses, bytes_up=0.0), evaluation(n, 4.0 - n / 300)]
    text = read(make(events, 200, num_rounds=200, num_clients=1000, num_seeds=8, steps=500)).text
    assert "The 200 most often asked are shown." in text
    assert "200 3.3333" in text


def test_a_pool_of_one_seed_can_be_drawn(make: Maker) -> None:
    run = make([evaluation(0, 4.0), closed(1)], 1, num_seeds=1)
    seen = [str(svg["aria-label"]) for svg in sketch(run, "seed_use", "seed_probabilities", "coefficients").all("svg")]
    assert any("1 seed," in label for label in seen)


def test_data_may_be_gone(make: Maker) -> None:
    run = make.complete()
    make.data.unlink()
    assert str(make.data) in words(run)


def test_the_same_run_gives_the_same_bytes(make: Maker) -> None:
    run = make([evaluation(0, 4.0)], 0)
    first = {p.name: p.read_bytes() for p in report(run).parent.iterdir()}
    matplotlib.rcParams["font.size"] = 30  # a user's own style has no say
    try:
        assert {p.name: p.read_bytes() for p in report(run).parent.iterdir()} == first
        assert matplotlib.rcParams["font.size"] == 30
    finally:
        matplotlib.rcdefaults()


def spoil(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda run: (run / "config.toml").unlink(), RunFolderError, "holds no run"),
        (spoil("config.toml", b"model = "), RunError, "is not TOML"),
        (spoil("config.toml", b"\xff\xfe"), RunError, "is not TOML"),
        (spoil("config.toml", b"lr = 1.0\nmodel = 'm'\ndata = 'd'\nspeed = 3"), ConfigError, "'speed' is unknown"),
        (spoil("config.toml", b"lr = 1.0"), ConfigError, "--model is missing"),
        (spoil("ledger.safetensors", b"nothing"), LedgerError, "not a ledger"),
        (spoil("report", b"a file in its way"), RunError, "cannot write the report"),
    ],
)
def test_bad_input_is_one_line(make: Maker, damage: Callable[[Path], object], error: type[Exception], says: str) -> None:
    run = make.complete()
    damage(run)
    with pytest.raises(error) as raised:
        report(run)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (json.dumps(closed(1, bytes_up=-1)), "round 1 of .*metrics.jsonl cannot be read \\(bytes_up is -1\\)"),
        (json.dumps(closed(1, seconds=math.nan)), "seconds is nan"),
        (json.dumps(closed(1, clients=[1])), "round 1 of"),
        (json.dumps(closed(1, peak_bytes=10**400)), "round 1 of"),
        ("not json", "1 line of .*metrics.jsonl cannot be read \\(line 2: "),
    ],
)
def test_an_event_that_cannot_be_read_is_left_out_and_said_so(make: Maker, line: str, says: str) -> None:
    """The others are shown."""
    run = make([evaluation(0, 4.0)], 1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" + json.dumps(evaluation(1, 3.5)) + "\n")
    assert re.search(says + ".*; it is left out", words(run))
    assert [e.loss for e in reading.read(run).evaluations] == [4.0, 3.5]


def test_somebodys_page_is_not_overwritten(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my own page")
    (tmp_path / "reward.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"index\.html is no report of fedkseed; give another --output"):
        report(complete.run, folder=tmp_path)
    assert (tmp_path / "index.html").read_text() == "my own page"
    assert (tmp_path / "reward.png").read_bytes() == b"mine"
    (tmp_path / "index.html").unlink()
    with pytest.raises(ConfigError, match=r"reward\.png is no report of fedkseed; give another --output"):
        report(complete.run, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["reward.png"]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "index.html").write_text('<html lang="en"><head><title>fedkseed report: an older one</title>')
    ours = report(complete.run, folder=tmp_path / "ours")
    assert report(complete.run, folder=tmp_path / "ours") == ours
    report_several([complete.run, shutil.copytree(complete.run, tmp_path / "other")], folder=tmp_path / "ours")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(RunFolderError, match="holds no run"):
            report(path)
        assert not (path / "report").exists()


def test_a_file_is_no_run(make: Maker) -> None:
    with pytest.raises(RunFolderError, match="cannot read the run's settings"):
        report(make.data)


def test_the_command_in_a_fresh_process_imports_no_pyplot(complete: Complete) -> None:
    # a process of its own: importing the command line's libraries must not decide what the other tests see
    code = (
        "import sys, pathlib; from fedkseed.cli.report import report_command; "
        "report_command([pathlib.Path(sys.argv[1])], None); print('matplotlib.pyplot' in sys.modules)"
    )
    run = complete.run
    found = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert found.stdout == f"report: {run / 'report' / 'index.html'}\nFalse\n"


def test_numbers_are_written_as_people_read_them() -> None:
    assert [amount(v) for v in (15_646.9, 682.0, 2_080_256)] == ["15,647 B", "682 B", "2.08 MB"]
    assert [size(v) for v in (100, 17_988, 999_600, 2_080_256, 5.4e9, 3e15)] == [
        "100 B", "18 kB", "1 MB", "2.08 MB", "5.4 GB", "3,000 TB",
    ]  # fmt: skip
    assert [duration(v) for v in (0.42, 12.34, 59.96, 185, 7630)] == [
        "0.42 s",
        "12.3 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert [loss(v) for v in (3.96314, math.nan, math.inf, 1e7)] == ["3.9631", "not finite", "not finite", "1e+07"]
    assert percent(-2.345) == "\N{MINUS SIGN}2.3 %"
    assert percent(12.0) == "+12.0 %"
    assert power_of_ten(-3) == "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT THREE}"
    assert change(4.0, 3.9) == pytest.approx(-2.5)
    assert change(0.0, 3.9) is None
    assert change(4.0, math.nan) is None
