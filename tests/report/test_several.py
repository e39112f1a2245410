"""What the report shows of a run's course, and several runs over one another."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.command_line import CommandLine, assert_one_line
from tests.support.report import Maker, Outline, closed, evaluation

from fedkseed.errors import ConfigError
from fedkseed.kseed.ledger import Ledger
from fedkseed.report import drawing, report_several, several
from fedkseed.report.chart import Chart
from fedkseed.report.charts import charts
from fedkseed.report.drawing import Curve
from fedkseed.report.page import page
from fedkseed.report.picture import render
from fedkseed.report.reading import read
from fedkseed.report.summary import lost_shares, spent
from fedkseed.runs.answers import Answer, keep_answers


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def chart(run: Path, name: str) -> Chart:
    (found,) = (one for one in charts(read(run)) if one.name == name)
    return found


# --- One run ---


def test_a_loss_is_set_against_the_bytes_and_the_time_of_all_rounds_before_it(make: Maker) -> None:
    """Of clients that were asked the bytes down, of those that answered the bytes up; evaluations cost nothing here."""
    late = closed(2, missing=["client-99"], seconds=5.0)
    run = make([evaluation(0, 4.0), closed(1), late, evaluation(2, 3.5), closed(3), evaluation(3, math.nan)], 3)
    points = [(p.server_round, p.loss, p.num_bytes, p.seconds) for p in spent(read(run))]
    assert points == [(0, 4.0, 0.0, 0.0), (2, 3.5, 9 * 682.0 + 8 * 135.5, 7.0)]
    assert "4.0000 before anything was sent, 3.5000 after 7.22 kB" in chart(run, "loss_by_bytes").alt
    assert "3.5000 after 7.0 s" in chart(run, "loss_by_time").alt
    assert chart(make([evaluation(0, 4.0), closed(1)], 1, "short"), "loss_by_bytes").draw is None


def scored(n: int, reward: float) -> list[dict[str, Any]]:
    """A round of a run on scores, which has no losses of training, and the evaluation behind it."""
    clients = {"client-01": {"weight": 1.0, "loss": None, "reward": 0.5 + reward}}
    told = closed(n, train_loss=None, train_reward=0.5 + reward, clients=clients)
    return [told, evaluation(n, 4.0 - 0.1 * n, eval_reward=reward)]


def test_a_run_on_scores_shows_its_reward_and_no_training_loss(make: Maker) -> None:
    events = [evaluation(0, 4.0, eval_reward=-0.125), *scored(1, math.nan), *scored(2, 0.25)]
    run = make(events, 2, algorithm="fedkseed", objective="exact-match")
    shown = chart(run, "reward")
    assert shown.alt.endswith(
        "held-out records: -0.125 at round 0, 0.25 at round 2; training: 0.75 at round 2, 0.75 at round 2."
    )
    assert "training_loss" not in {one.name for one in charts(read(run))}
    record = read(run)
    text = Outline(page(run, record, charts(record), {})).text
    assert "Reward on held-out records -0.125 \N{RIGHTWARDS ARROW} 0.250 exact-match, after round 2" in text
    assert "round reward held-out training bytes time 0 -0.125 4.0000" in text
    assert "2 0.250 training 0.750 3.8000" in text
    assert shown.draw is not None
    unscored = make([closed(1, train_loss=None)], 1, "unscored", algorithm="fedkseed", objective="exact-match")
    assert chart(unscored, "reward").draw is None


def test_a_run_on_the_loss_has_no_reward(make: Maker) -> None:
    """The control: the same numbers of a run that is tuned on the loss."""
    run = make([evaluation(0, 4.0), closed(1), evaluation(1, 3.9)], 1)
    assert {one.name for one in charts(read(run))} >= {"training_loss", "held_out_loss"}
    assert "reward" not in {one.name for one in charts(read(run))}
    assert "eward" not in Outline(page(run, read(run), charts(read(run)), {})).text.partition("Settings")[0]


def test_preferences_have_a_training_loss_and_a_reward(make: Maker) -> None:
    events = [evaluation(0, 4.0, eval_reward=0.5), closed(1), evaluation(1, 3.9, eval_reward=0.75)]
    run = make(events, 1, algorithm="fedkseed", objective="dpo")
    assert chart(run, "reward").alt.endswith("held-out records: 0.5 at round 0, 0.75 at round 1.")
    assert chart(run, "training_loss").draw is not None


def test_rewards_of_several_runs_are_over_one_another_where_there_are_any(make: Maker) -> None:
    losses = make([evaluation(0, 4.0), closed(1), evaluation(1, 3.9)], 1, "on-losses", algorithm="fedkseed")
    settings = {"algorithm": "fedkseed", "objective": "rouge-l"}
    one, two = (
        make([evaluation(0, 4.0, eval_reward=0.1), *scored(1, value)], 1, name, **settings)
        for name, value in (("one", 0.5), ("two", 0.3))
    )
    shown = {c.name: c for c in several.charts_of({run.name: read(run) for run in (losses, one, two)})}
    assert shown["compared_reward"].alt.endswith("at the end of each one: 0.5 at round 1; two: 0.3 at round 1.")
    content = several.page({run.name: read(run) for run in (losses, one)}, [], {})
    assert "held-out reward (rouge-l) 0.500 from 0.100" in Outline(content).text
    assert "compared_reward" not in {c.name for c in several.charts_of({"a": read(losses), "b": read(losses)})}


@pytest.mark.parametrize(
    ("algorithm", "key", "says"),
    [("fedkseed", "projected_grad_rms", "projected gradients"), ("fedkseed-grad", "change_norm", "length of a change")],
)
def test_the_size_of_what_is_sent_is_that_of_the_algorithms_replies(make: Maker, algorithm: str, key: str, says: str) -> None:
    events = [closed(n) | {key: 2.5 * n} for n in (1, 2)]
    run = make(events, 0, algorithm=algorithm)
    assert f"{says}" in chart(run, "sent").alt
    assert "2.5 in round 1, 5 in round 2" in chart(run, "sent").alt


def test_the_distance_from_the_base_is_that_of_the_last_round(make: Maker) -> None:
    assert "after round 6 a weight has moved by 0.012" in chart(make.complete(), "distance").alt


def test_a_run_of_an_older_version_has_noted_neither(make: Maker) -> None:
    event = closed(1)
    del event["projected_grad_rms"], event["moved_rms"]
    run = make([event], 1)
    for name in ("sent", "distance"):
        assert chart(run, name).draw is None
        assert "older versions" in chart(run, name).caption


def test_a_baseline_has_neither(make: Maker) -> None:
    names = {one.name for one in charts(read(make([closed(1)], 0, algorithm="fedavg", num_seeds=4096)))}
    assert not names & {"sent", "distance"}


def test_what_was_lost_is_in_percent_of_what_was_asked(make: Maker) -> None:
    """5 clients were asked and 20 steps of the accepted ones: one reply refused, one missing, five steps dropped."""
    event = closed(1, refused={"client-90": "because"}, missing=["client-91"], dropped_steps=5)
    run = make([event, closed(2)], 2)
    assert lost_shares(read(run).rounds[0]) == {
        "replies refused": pytest.approx(100 / 6), "no reply": pytest.approx(100 / 6), "steps dropped": 25.0,
    }  # fmt: skip
    assert "replies refused 8.3 %, no reply 8.3 %, steps dropped 12.5 %" in chart(run, "lost").alt
    assert chart(make([closed(1)], 1, "whole"), "lost").draw is None


NASTY = "<b>&\n\nhis\ttwo lines</b> $x_ "


def test_answers_of_this_ledger_are_shown_and_of_no_other(make: Maker) -> None:
    run = make.complete()
    ledger = Ledger.load(run / "ledger.safetensors")
    answers = [Answer(f"{NASTY}{i}", f"wanted {i}", "", "x" * 700) for i in range(30)]
    keep_answers(run, ledger, answers)
    record = read(run)
    assert len(record.answers) == 20
    outline = Outline(page(run, record, charts(record), {}))
    assert "Answers before and after The first 5 held-out records" in outline.text
    assert "<b>& his" in outline.text
    assert "wanted 4" in outline.text
    assert "wanted 5" not in outline.text
    assert "before nothing after" in outline.text
    assert "x" * 601 not in outline.text
    for damaged in (
        '{"of": 3}',
        "[]",
        "no JSON",
        '{"of": "another", "answers": []}',
        json.dumps({"of": ledger.digest(), "answers": [1]}),
    ):
        (run / "answers.json").write_text(damaged)
        assert read(run).answers == ()


# --- Several ---


@pytest.fixture
def three(make: Maker) -> list[Path]:
    """Runs of unlike costs; one has hardly begun."""
    one = make.complete()
    (one.parent / "other").mkdir()
    cheap = [evaluation(0, 3.9631), closed(1, bytes_down=6.0, bytes_up=1.0), evaluation(1, 3.2), evaluation(2, 3.3)]
    other = make(cheap, 2, "other/run", lr=2e-4, algorithm="fedkseed", num_rounds=2)
    begun = make([evaluation(0, 4.0)], 0, "begun", algorithm="fedavg", num_seeds=4096)
    return [one, other, begun]


def test_several_runs_are_one_page_that_stands_alone(three: list[Path], tmp_path: Path) -> None:
    path = report_several(three, tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert path == tmp_path / "out" / "compared.html"
    drawn = {"loss", "loss_by_bytes", "loss_by_time", "gradients", "distance"}
    assert {file.name for file in path.parent.iterdir()} == {path.name, *(f"compared_{name}.png" for name in drawn)}
    assert len(outline.all("svg")) == len(outline.all("figure")) == len(drawn)
    assert not outline.all("script")
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "3 runs over one another" in outline.text
    for name in several.names_of(three):
        assert name in outline.text
    assert several.names_of(three) != [run.name for run in three]
    assert "held-out loss after round 2 from 3.9631, \N{MINUS SIGN}16.7 % best: 3.2000 after round 1" in outline.text
    assert "lr 0.0001 0.0002 0.0001" in outline.text
    assert "seed 42" not in outline.text  # the same in all
    assert not (three[0] / "report").exists()


def test_runs_of_unlike_costs_are_on_a_logarithmic_axis_and_say_what_is_not_on_it(three: list[Path]) -> None:
    found = {one.name: one.caption for one in several.charts_of({str(run): read(run) for run in three})}
    assert "logarithmic" in found["compared_loss_by_bytes"]
    assert "logarithmic" not in found["compared_loss_by_time"]
    alike = {name: read(three[0]) for name in "ab"}
    assert all("logarithmic" not in one.caption for one in several.charts_of(alike))


@pytest.mark.parametrize("name", ["_hidden", "$x_y$", "a\nb\x1b[31m", "_", "x" * 99])
def test_a_legend_shows_any_name_as_one_line(name: str) -> None:
    curves = drawing.curves([Curve(several._short(n), [0, 1], [1.0, 2.0]) for n in (name, "b")], "x", False)
    svg = render("name", "title", curves).svg
    assert "\x1b" not in svg
    assert svg.count("text") >= 2
    assert len(several._short(name).splitlines()) == 1


def test_names_are_the_ends_of_paths_that_tell_runs_apart() -> None:
    assert several.names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert several.names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert several.names_of([Path("/a/b/run"), Path("/b/run")]) == ["a/b/run", "/b/run"]


def test_the_command_takes_several_and_says_what_is_wrong(fedkseed: CommandLine, make: Maker, tmp_path: Path) -> None:
    one, other = make([evaluation(0, 4.0)], 0, "one"), make([evaluation(0, 4.0)], 0, "other")
    result = fedkseed("report", one, other)
    assert (result.code, result.stdout.splitlines()[-1]) == (0, f"report: {one / 'report' / 'compared.html'}")
    assert "None of the runs has two evaluations yet." in (one / "report" / "compared.html").read_text()
    assert_one_line(fedkseed("report", one, other, one), 2, "a run is named twice")
    assert_one_line(fedkseed("report", one, tmp_path / "none"), 2, "holds no run")
    many = [make([], 0, f"many-{i}") for i in range(16)]
    with pytest.raises(ConfigError, match="the lines of more than 15 cannot be told apart"):
        report_several(many)
