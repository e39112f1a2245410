"""`fedkseed demo`: what it shows is what it measured, its run can be gone on with, and (slowly) it learns the tasks.

The fast tests run it with fewer and shorter rounds. The slow ones run it as users do, beside its control: the same with
the clients' responses shuffled among their prompts.
"""

import io
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.command_line import CommandLine, assert_one_line, contents

from fedkseed import apply
from fedkseed.data import Example, encode, pad_token_id, read_examples, shuffle_responses
from fedkseed.demo import SETTINGS, clients, held_out, model_folder
from fedkseed.demo.tasks import HELD_OUT_KIND, TRAINED_KINDS
from fedkseed.errors import RunError, RunFolderError
from fedkseed.evaluation import evaluate_loss
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.randomness import generator
from fedkseed.runs.folder import RunFolder

SHORT = {**SETTINGS, "num_rounds": 2, "local_steps": 2, "eval_every": 2}
SEED = 42


@dataclass(frozen=True)
class Shown:
    """A demo that has run: where, its run's folder as the demo names it, and what it printed."""

    cwd: Path
    run: Path
    text: str

    def numbers(self, line: str) -> list[float]:
        """The numbers in the line that begins so."""
        (found,) = re.findall(rf"^{re.escape(line)}(.*)$", self.text, re.MULTILINE)
        return [float(number.replace(",", "")) for number in re.findall(r"[+-]?[\d,]*\.?\d+", found)]

    def go_on(self, command: str) -> list[str]:
        """The arguments of the command to go on with."""
        (line,) = re.findall(rf"^  fedkseed {command} .*$", self.text.split("\nGo on:\n")[1], re.MULTILINE)
        return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A short demo in a folder of its own choice; tests leave its run as it is."""
    import fedkseed.cli.demo as command

    cwd, out = tmp_path_factory.mktemp("demo"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(cwd)
        patch.setattr(command, "SETTINGS", SHORT)
        command.demo(None, SEED)
    (run,) = (cwd / "runs").iterdir()
    return Shown(cwd, run.relative_to(cwd), out.getvalue())


def losses(run: Path) -> tuple[float, float]:
    """The held-out loss before and after, as the run noted it."""
    found = [event["eval_loss"] for event in RunFolder.open(run).metrics() if event["event"] == "evaluation"]
    return found[0], found[-1]


# --- What it shows ---


def test_the_table_shows_what_was_measured(shown: Shown) -> None:
    before, after = losses(shown.cwd / shown.run)
    assert shown.numbers("held-out loss  ") == pytest.approx([before, after, 100 * (after / before - 1)], abs=0.05)
    for line in ("exact answers", "of the kind that no client has"):
        shares = shown.numbers(line)
        assert len(shares) == 2
        assert all(0 <= share <= 100 for share in shares)
    assert "\x1b" not in shown.text


def test_bytes_and_ledger_are_the_runs(shown: Shown) -> None:
    run = RunFolder.open(shown.cwd / shown.run)
    traffic = [event["bytes_down"] + event["bytes_up"] for event in run.metrics() if event["event"] == "round"]
    assert len(traffic) == SHORT["num_rounds"]
    weights = sum(p.nbytes for p in load_model(model_folder(), "float32").parameters())
    mean, paper, both_ways = shown.numbers("bytes per client and round, both ways:")
    assert mean == pytest.approx(sum(traffic) / len(traffic), abs=0.5)
    assert (paper, both_ways) == (17_988, 2 * weights)
    ledger = run.load_ledger()
    assert ledger is not None
    numbers, published, *_ = shown.numbers("the tuned model is ")
    assert (numbers, published) == (ledger.pool.size, len(ledger.published().encode()))
    assert shown.text.count(f"bytes when published: {shown.run / 'ledger.safetensors'}\n") == 1
    assert "what travelled: in each of 2 rounds 4 of 20 clients got the model's 4,096 numbers so far" in shown.text


def test_the_report_lies_where_it_says(shown: Shown) -> None:
    (page,) = re.findall(r"Charts and everything else about the run: (.+)$", shown.text, re.MULTILINE)
    assert Path(page).is_relative_to(shown.run)
    html = (shown.cwd / page).read_text(encoding="utf-8")
    assert "<html" in html
    assert "Answers before and after" in html


def test_somebodys_records_are_not_written_anew(tmp_path: Path) -> None:
    from fedkseed.cli.demo import demo

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "held-out.jsonl").write_text("mine\n")
    with pytest.raises(RunFolderError, match=r"held-out\.jsonl holds other records than this demo's; choose another --run"):
        demo(tmp_path, SEED)
    assert contents(tmp_path / "data") == {"held-out.jsonl": b"mine\n"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# --- Going on from it ---


def test_evaluate_finds_the_same_losses(shown: Shown, fedkseed: CommandLine) -> None:
    result = fedkseed(*shown.go_on("evaluate"), cwd=shown.cwd)
    assert (result.code, result.stderr) == (0, "")
    before, after = losses(shown.cwd / shown.run)
    assert re.search(rf"^held-out loss +{before:.4f} +{after:.4f} *$", result.stdout, re.MULTILINE)
    assert "exact match of 20" in result.stdout


def test_export_writes_the_tuned_model(shown: Shown, fedkseed: CommandLine) -> None:
    result = fedkseed(*shown.go_on("export"), cwd=shown.cwd)
    assert (result.code, result.stderr) == (0, "")
    folder = shown.cwd / shown.go_on("export")[-1]
    measure = Measure(SEED, load_tokenizer(folder))
    assert measure.loss(load_model(folder), measure.right) == pytest.approx(losses(shown.cwd / shown.run)[1], rel=1e-4)


def test_simulate_takes_a_model_and_data_of_ones_own(shown: Shown, fedkseed: CommandLine) -> None:
    own = {"YOUR-MODEL": str(model_folder()), "YOUR.jsonl": str(shown.run / "data" / "train.jsonl")}
    args = [own.get(arg, arg) for arg in shown.go_on("simulate")]
    small = ["--num-clients", "4", "--fraction-train", "0.25", "--num-rounds", "1", "--local-steps", "1", "--eval-limit", "4"]
    result = fedkseed(*args, *small, cwd=shown.cwd)
    assert (result.code, result.stderr) == (0, "")
    assert (shown.cwd / args[-1] / "ledger.safetensors").is_file()


# --- Bad input ---


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(shown: Shown, fedkseed: CommandLine) -> None:
    from fedkseed.cli.demo import demo

    run = shown.cwd / shown.run
    before = contents(run) | contents(run / "data")
    assert_one_line(fedkseed("demo", "--run", run), 2, str(run), "holds a run already")
    with pytest.raises(RunFolderError, match="holds a run already"):
        demo(run, SEED + 1)
    assert contents(run) | contents(run / "data") == before


def test_a_run_cannot_be_under_a_file(fedkseed: CommandLine, tmp_path: Path) -> None:
    from fedkseed.cli.demo import demo

    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"cannot write the run folder \(.+\); choose another --run"):
            demo(folder, SEED)
    assert_one_line(fedkseed("demo", "--run", tmp_path / "file"), 1, "cannot write the run folder", "choose another --run")
    assert (tmp_path / "file").read_text() == "x"


def test_a_seed_below_zero_is_a_usage_error(fedkseed: CommandLine, tmp_path: Path) -> None:
    result = fedkseed("demo", "--seed", "-1", cwd=tmp_path)
    assert result.code == 2
    assert "--seed" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- Whether it learns (minutes) ---


class Measure:
    """Losses on the demo's held-out records, after the right prompts and after wrong ones.

    The wrong prompts have the same responses, so that the difference of the losses is the prompts' doing. Within a kind,
    they are prompts of the same kind, so that knowing the kind's answers in general doesn't help.
    """

    def __init__(self, seed: int, tokenizer: object) -> None:
        records = held_out(seed)
        self._tokenizer = tokenizer
        self.right = records
        self.wrong = shuffle_responses(records, generator(seed, "wrong prompts"))
        self.wrong_within_kind = [
            example
            for kind in (*TRAINED_KINDS, HELD_OUT_KIND)
            for example in shuffle_responses([e for e in records if e.category == kind], generator(seed, "wrong", kind))
        ]

    def loss(self, model: object, records: list[Example]) -> float:
        examples = encode(records, self._tokenizer, SETTINGS["max_length"]).examples
        return evaluate_loss(model, examples, 34, pad_token_id(self._tokenizer)).loss

    def margins(self, model: object) -> tuple[float, float]:
        """loss(wrong prompt) - loss(right prompt): prompts of any kind, prompts of the same kind."""
        right = self.loss(model, self.right)
        return self.loss(model, self.wrong) - right, self.loss(model, self.wrong_within_kind) - right


@dataclass(frozen=True)
class Whole:
    """A whole demo: losses and margins before and after, what it printed."""

    losses: tuple[float, float]
    margins: tuple[tuple[float, float], tuple[float, float]]
    text: str

    @property
    def fall(self) -> float:
        """By which fraction the held-out loss fell."""
        return 1 - self.losses[1] / self.losses[0]


def shuffled_clients(seed: int) -> dict[str, list[Example]]:
    """The clients' records with the responses of all of them dealt out anew among all of them."""
    records = clients(seed)
    dealt = iter(shuffle_responses([e for own in records.values() for e in own], generator(seed, "control")))
    return {name: [next(dealt) for _ in own] for name, own in records.items()}


def whole_demo(run: Path, seed: int, hold: Callable[[int], dict[str, list[Example]]]) -> Whole:
    """The demo with its own settings, whose clients hold what `hold(seed)` gives."""
    import fedkseed.cli.demo as command

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(command, "clients", hold)
        command.demo(run, seed)
    given = {name: [e for e in read_examples(run / "data" / "train.jsonl") if e.client == name] for name in clients(seed)}
    assert {name: [e.output for e in own] for name, own in given.items()} == {
        name: [e.output for e in own] for name, own in hold(seed).items()
    }
    model, measure = load_model(model_folder(), "float32"), Measure(seed, load_tokenizer(model_folder()))
    before = measure.margins(model)
    apply(model, Ledger.load(run / "ledger.safetensors"))
    return Whole(losses(run), (before, measure.margins(model)), out.getvalue())


@dataclass(frozen=True)
class Pair:
    """The demo and its control, at one seed."""

    real: Whole
    control: Whole


@pytest.fixture(scope="module", params=[SEED, 1])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("whole")
    seed = request.param
    found = Pair(whole_demo(folder / "real", seed, clients), whole_demo(folder / "control", seed, shuffled_clients))
    for name, whole in (("real", found.real), ("control", found.control)):  # shown by pytest -s, and when a test fails
        print(f"\nseed {seed}, {name}: losses {whole.losses}, margins {whole.margins}")
    return found


@pytest.mark.slow
def test_the_held_out_loss_falls_by_a_tenth_and_the_controls_less_than_half_as_much(pair: Pair) -> None:
    assert pair.real.losses[0] == pytest.approx(pair.control.losses[0])
    assert pair.real.fall >= 0.1
    assert pair.control.fall < pair.real.fall / 2


@pytest.mark.slow
def test_the_right_prompt_matters_more_after_tuning_and_the_control_does_not_teach_that(pair: Pair) -> None:
    for before, after, control in zip(*pair.real.margins, pair.control.margins[1], strict=True):
        assert after > before
        assert after - before > control - before


@pytest.mark.slow
def test_it_shows_an_answer_that_became_right(pair: Pair) -> None:
    ((asked, before, after),) = re.findall(r"^asked     (.+)\nbefore    (.*)\nafter     (.+)$", pair.real.text, re.MULTILINE)
    assert before != after
    answers = {f"{e.instruction} {e.input}".strip(): e.output for seed in (SEED, 1) for e in held_out(seed)}
    assert answers[asked] == after
