"""The page: one HTML file with its style and pictures inside, and no script. Everything that a run says is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from fedkseed.report import units
from fedkseed.report.chart import Chart
from fedkseed.report.markup import ON_DISK, Html, Text, card, details, document, figures, quiet, table, tag
from fedkseed.report.reading import Round, RunRecord, is_finite
from fedkseed.report.summary import PAPER_BYTES, Traffic, before_and_after, change, participation, promise, refusals, traffic
from fedkseed.runs.checkpoints import TENSORS
from fedkseed.runs.settings import RunConfig
from fedkseed.text import counted

ANSWERS_SHOWN = 5
LONGEST_ANSWER = 600
"""Characters of a text of an answer; the rest is cut."""
MAX_ROWS = 200
"""Rows of a table of clients or reasons; the rest is counted."""

NAMES_SHOWN = 5


def page(path: Path, record: RunRecord, charts: Sequence[Chart], pictures: Mapping[str, str], foot: Html = ON_DISK) -> str:
    """The whole page; `pictures` are the charts' SVG by name."""
    name = path.resolve().name
    body = [
        tag("header", [tag("h1", f"Federated run {name}"), *_status(record), tag("dl", _cards(record), class_="cards")]),
        tag(
            "main",
            [
                *figures(charts, pictures),
                *_answers(record),
                *_tables(record),
                *_ledger(record),
                *_settings(record.config),
            ],
        ),
    ]
    return document(name, body, foot)


def _status(record: RunRecord) -> list[Html]:
    config = record.config
    seeds = f"K = {config.num_seeds:,} {config.noise} seeds, " if config.facts.has_ledger else ""
    about = (
        f"{config.algorithm} on {config.model}: {_clients_of(record)}, "
        f"{seeds}{counted(config.local_steps, 'step')} per client and round."
    )
    lines = [tag("p", about, class_="quiet")]
    if record.finished:
        done = f"all {config.num_rounds} rounds are" if config.num_rounds > 1 else "the only round is"
        lines.append(tag("p", f"Finished: {done} done.", class_="status"))
    else:
        text = f"Round {record.rounds_done} of {config.num_rounds}, still going or stopped: this is what is there so far."
        lines.append(tag("p", text, class_="status open"))
    if record.rounds and (absent := _absent(record.rounds[-1])):
        lines.append(tag("p", absent, class_="status bad"))
    if record.diverged_at is not None:
        text = f"Diverged: a loss is not a finite number, first in round {record.diverged_at}. Start anew with a lower"
        lines.append(tag("p", [tag("span", [text, " ", tag("code", "--lr"), "."])], class_="status bad"))
    if record.damage is not None:
        lines.append(tag("p", f"{record.damage}; it is left out.", class_="status bad"))
    return lines


def _absent(last: Round) -> str:
    """Whose replies the last round went without; empty if nobody's."""
    parts = [f"{what} {_some(names)}" for what, names in (("no reply of", last.missing), ("refused:", last.refused)) if names]
    return f"Round {last.server_round}: {'; '.join(parts)}." if parts else ""


def _some(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    distinct = sorted(set(names))
    more = f" and {len(distinct) - NAMES_SHOWN:,} more" if len(distinct) > NAMES_SHOWN else ""
    return ", ".join(distinct[:NAMES_SHOWN]) + more


def _clients_of(record: RunRecord) -> str:
    return counted(record.num_clients, "client") if record.num_clients else "clients that are not known"


def _cards(record: RunRecord) -> list[Html]:
    cards = [_loss_card(record)]
    before, after = before_and_after(record)
    if after and after.finite_reward is not None:
        start = f"{before.finite_reward:.3f} → " if before and before.finite_reward is not None else ""
        about = f"{record.config.objective}, after round {after.server_round}"
        cards.append(card("Reward on held-out records", f"{start}{after.finite_reward:.3f}", about))
    seconds = sum(r.seconds for r in record.rounds) + sum(e.seconds for e in record.evaluations)
    dropped = sum(r.dropped_steps for r in record.rounds)
    cards.append(
        card(
            "Rounds done",
            f"{record.rounds_done} of {record.config.num_rounds}",
            f"in {units.duration(seconds)}, evaluation included" if seconds else "",
            f"{counted(dropped, 'step')} dropped" if dropped else "",
        )
    )
    if (kept := promise(record)) is not None:
        cards.append(card("Differential privacy", kept.epsilon, kept.about, kept.budget))
    moved = traffic(record.rounds)
    if moved is None:
        return [*cards, card("Bytes per client and round", units.NONE, "nothing has been sent yet")]
    cards.append(
        card(
            "Bytes per client and round",
            f"{moved.both:,.0f} B",
            f"{moved.down:,.0f} B down, {moved.up:,.0f} B up",
            _compared(moved.both, PAPER_BYTES, f"the paper's {PAPER_BYTES:,} B"),
        )
    )
    weights = record.weight_bytes
    cards.append(
        card(
            "Bytes in total",
            units.size(moved.total),
            f"{moved.total_down:,.0f} B down, {moved.total_up:,.0f} B up, all clients and rounds",
            _compared(moved.total, 2.0 * weights * moved.exchanges, "sending the float weights") if weights else "",
        )
    )
    return cards


def _compared(value: float, reference: float, what: str) -> str:
    if value <= 0 or value == reference:
        return ""
    less = value < reference
    return f"{units.times(reference / value if less else value / reference)} times {'less' if less else 'more'} than {what}"


def _loss_card(record: RunRecord) -> Html:
    name = "Held-out loss (nats per token)"
    before, after = before_and_after(record)
    if before is None and after is None:
        return card(name, units.NONE, "not evaluated yet")
    if after is None:
        return card(name, units.loss(before.loss if before else None), "base model; no round has been evaluated since")
    if not is_finite(after.loss):
        start = f"it was {units.loss(before.loss)} before" if before else ""
        return card(name, "diverged", f"{units.loss(after.loss)} after round {after.server_round}", start)
    if before is None:
        return card(name, units.loss(after.loss), f"after round {after.server_round}; the base model was not evaluated")
    percent = change(before.loss, after.loss)
    records = f", on {counted(after.num_examples, 'record')}" if after.num_examples else ""
    moved = f"{units.percent(percent)} after" if percent is not None else "after"
    return card(name, f"{units.loss(before.loss)} → {units.loss(after.loss)}", f"{moved} round {after.server_round}{records}")


def _answers(record: RunRecord) -> list[Html]:
    """A few records with what the base model and the tuned one answer, where `fedkseed evaluate --answers` was asked."""
    shown = record.answers[:ANSWERS_SHOWN]
    if not shown:
        return []
    panels = []
    for answer in shown:
        texts = {"asked": answer.asked, "wanted": answer.wanted, "before": answer.before, "after": answer.after}
        parts = [part for name, text in texts.items() for part in (tag("dt", name), tag("dd", _told(text)))]
        panels.append(tag("dl", parts, class_="panel answer"))
    text = f"The first {counted(len(shown), 'held-out record')} of those that were answered, greedily; not the best."
    return [tag("h2", "Answers before and after"), tag("p", text, class_="quiet"), tag("div", panels, class_="answers")]


def _told(text: str) -> Html:
    """A text with its lines, each made visible."""
    cut = text.strip()[:LONGEST_ANSWER] + ("\N{HORIZONTAL ELLIPSIS}" if len(text.strip()) > LONGEST_ANSWER else "")
    lines: list[Text] = []
    for line in cut.split("\n"):
        lines += [Html("<br>")] * bool(lines) + [line]
    return tag("span", lines) if cut else quiet("nothing")


def _tables(record: RunRecord) -> list[Html]:
    if not record.rounds:
        return []
    panels = []
    moved = traffic(record.rounds)
    if moved is not None:
        panels.append(tag("div", _bytes_table(record, moved), class_="panel"))
    return [
        tag("h2", "Numbers"),
        tag("div", [*panels, _rounds(record), _clients(record), *_refusals(record)], class_="stack"),
    ]


def _bytes_table(record: RunRecord, moved: Traffic) -> Html:
    config = record.config
    ours = [moved.down, moved.up, moved.both, moved.total]
    paper = [None, None, PAPER_BYTES, PAPER_BYTES * moved.exchanges]
    header = ["bytes", "this run", "the paper"]
    columns: list[Sequence[float | None]] = [ours, paper]
    if record.weight_bytes:
        size = record.weight_bytes
        header.append(f"float weights ({config.dtype})" if config.dtype != "auto" else "float weights")
        columns.append([size, size, 2 * size, 2 * size * moved.exchanges])
    names = ["down", "up", "both ways", "in total"]
    rows: list[list[Text]] = [[name, *map(_amount, (column[i] for column in columns))] for i, name in enumerate(names)]
    caption = (
        f"Bytes per client and round as encoded, headers included, and in total for "
        f"{counted(moved.exchanges, 'request')}. The paper's number is for K = 4,096 and 200 steps; "
        f"this run has {f'K = {config.num_seeds:,} and ' if config.facts.has_ledger else ''}"
        f"{counted(config.local_steps, 'step')}."
    )
    if config.min_replies > 1:
        caption += " Attempts at a round that were repeated for want of replies are not counted."
    if not record.weight_bytes:
        caption += " The run did not note the size of its weights, so that the row for sending them is missing."
    return table(caption, header, rows, 1, "facts")


def _amount(num_bytes: float | None) -> str:
    return "" if num_bytes is None else units.amount(num_bytes)


def _rounds(record: RunRecord) -> Html:
    held_out = {e.server_round: e for e in record.evaluations}
    rounds = {r.server_round: r for r in record.rounds}
    rows: list[list[Text]] = []
    of_scores = record.config.objective != "loss"

    def reward(n: int) -> list[Text]:
        if not of_scores:
            return []
        own = held_out[n].finite_reward if n in held_out else None
        training = rounds[n].train_reward if n in rounds else None
        under = "" if training is None else quiet(f"training {training:.3f}").text
        return [Html((units.NONE if own is None else f"{own:.3f}") + under)]

    for n in sorted(held_out.keys() | rounds.keys()):
        loss = units.loss(held_out[n].loss) if n in held_out else units.NONE
        if n not in rounds:
            rows.append([str(n), *reward(n), loss, units.NONE, units.NONE, units.duration(held_out[n].seconds)])
            continue
        r, own = rounds[n], rounds[n].finite_losses()
        spread = f"{min(own):.2f} to {max(own):.2f}" if own else ""
        notes = [quiet(f"{len(r.client_losses)} of {r.num_asked} replies")] if len(r.client_losses) < r.num_asked else []
        if r.dropped_steps:
            notes.append(quiet(f"{counted(r.dropped_steps, 'step')} dropped"))
        rows.append(
            [
                str(n),
                *reward(n),
                loss,
                Html(escape(units.loss(r.train_loss)) + quiet(spread).text),
                Html(f"{r.bytes_down:,.0f} / {r.bytes_up:,.0f}" + "".join(note.text for note in notes)),
                units.duration(r.seconds + (held_out[n].seconds if n in held_out else 0)),
            ]
        )
    caption = "Losses in nats per token, with the spread over the clients; bytes down / up, mean per client."
    header = ["round", *(["reward"] if of_scores else []), "held-out", "training", "bytes", "time"]
    return details("Every round", table(caption, header, rows, 1))


def _clients(record: RunRecord) -> Html:
    seen = participation(record.rounds)
    rows: list[list[Text]] = [[p.client, str(p.accepted), str(p.refused), str(p.missing)] for p in seen[:MAX_ROWS]]
    header = ["client", "accepted", "refused", "no reply"]
    caption = f"{len(seen):,} of {_clients_of(record)} have been asked; rounds of each."
    if any(p.counted is not None for p in seen):
        header.append("counted")
        for row, p in zip(rows, seen, strict=False):
            row.append(units.NONE if p.counted is None else f"{100 * p.counted:.0f} %")
        caption += f" Counted: what of its accepted replies went in, by the rule {record.config.rule.name}."
        clipped = sum(r.clipped_scalars or 0 for r in record.rounds)
        caption += f" {counted(clipped, 'scalar')} were clipped." if clipped else ""
    if len(seen) > MAX_ROWS:
        caption += f" The {MAX_ROWS} most often asked are shown."
    return details("Every client", table(caption, header, rows, 1))


def _refusals(record: RunRecord) -> list[Html]:
    reasons = refusals(record.rounds)
    if not reasons:
        return [tag("div", tag("p", "Every client that was asked sent a reply, and every reply was accepted."), class_="panel")]
    rows: list[list[Text]] = []
    for reason, names in reasons[:MAX_ROWS]:
        rows.append([reason, _some(names), f"{len(names):,}"])
    caption = "Replies that were refused or did not come; the rounds went on without them."
    if len(reasons) > MAX_ROWS:
        caption += f" The {MAX_ROWS} most frequent of {len(reasons):,} reasons are shown."
    return [tag("div", table(caption, ["reason", "clients", "times"], rows, 2), class_="panel")]


def _ledger(record: RunRecord) -> list[Html]:
    ledger = record.ledger
    if not record.config.facts.has_ledger:
        text = f"A run of {record.config.algorithm} has no ledger: its tuned model is the tensors in {TENSORS}."
        return [tag("h2", "Tensors"), tag("div", tag("p", text), class_="panel")]
    if ledger is None:
        text = "There is no ledger yet: it is written when the first round is done."
        return [tag("h2", "Ledger"), tag("div", tag("p", text), class_="panel")]
    published = len(ledger.published().encode())
    used = int((ledger.coefficients != 0).sum())
    rows: list[list[Text]] = [
        ["digest (SHA-256)", tag("code", ledger.digest())],
        ["rounds in it", f"{ledger.round:,}"],
        ["size", f"{record.ledger_size:,} B as a checkpoint, {published:,} B to publish"],
        [
            "seed pool",
            Html(f"K = {ledger.pool.size:,}, {escape(ledger.pool.family)}, key <code>{ledger.pool.key:#018x}</code>"),
        ],
        ["coefficients", f"{used:,} of {ledger.pool.size:,} not zero, {ledger.precision}"],
        ["base model", tag("code", ledger.base.fingerprint)],
    ]
    if ledger.pages:
        rows.insert(4, ["pages", f"{len(ledger.pages)}, of {ledger.pages[-1].basis} numbers; the last one is shown"])
    if ledger.history is not None:
        rows.insert(2, ["steps in it", f"{int(ledger.history.grad_counts.sum()):,}"])
    caption = "The tuned model is these coefficients over the base model; equal digests are equal ledgers."
    return [tag("h2", "Ledger"), tag("div", table(caption, ["what", "value"], rows, 9, "facts"), class_="panel")]


def _settings(config: RunConfig) -> list[Html]:
    rows: list[list[Text]] = []
    for name, field in type(config).model_fields.items():
        if not config.facts.takes(name):
            continue
        value = getattr(config, name)
        label = Html(tag("code", name).text + quiet(field.description or "").text)
        rows.append([label, tag("code", str(value)) if value is not None else quiet("not set")])
    caption = "The resolved configuration: every setting, defaults included."
    return [
        tag("h2", "Settings"),
        tag("div", table(caption, ["setting", "value"], rows, 9, "settings"), class_="panel long"),
    ]
