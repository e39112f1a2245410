"""`fedkseed merge` and `fedkseed diff`, on runs and ledgers."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.command_line import CommandLine, assert_one_line, flags
from tests.support.tiny import tiny_settings

import fedkseed as fk


@pytest.fixture(scope="module")
def another(fedkseed: CommandLine, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the same base, in another pool."""
    run = tmp_path_factory.mktemp("another") / "run"
    assert fedkseed("simulate", *flags(tiny_settings(tiny, seed=8, num_rounds=1)), "--run", run).code == 0
    return run


def test_merge_writes_what_python_adds_up(fedkseed: CommandLine, finished: Path, another: Path, tmp_path: Path) -> None:
    a, b = (fk.Ledger.load(run / "ledger.safetensors") for run in (finished, another))
    result = fedkseed("merge", finished, another, "--weights", "-1,0.5", "--to", tmp_path / "both")
    assert (result.code, result.stderr) == (0, "")
    assert fk.Ledger.load(tmp_path / "both").digest() == fk.merge([a, b], [-1, 0.5]).digest()
    size = (tmp_path / "both").stat().st_size
    assert result.stdout.startswith(f"{tmp_path / 'both'}: {size:,} bytes, 2 pages, K = 64\nmoves a weight by ")
    assert fedkseed("merge", another, tmp_path / "both", "--to", tmp_path / "new" / "folder" / "mean").code == 0
    assert fk.Ledger.load(tmp_path / "new" / "folder" / "mean").digest() == fk.merge([b, fk.merge([a, b], [-1, 0.5])]).digest()
    shown = " ".join(fedkseed("inspect", tmp_path / "both").stdout.split())
    assert "pages 2, the last is shown above; 1 of coefficients numbers of K = 64, absolute, times " in shown


def test_merge_says_what_private_ledgers_promise(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    """The merged one says nothing, so whoever merges must know it now."""
    privacy = {"unit": "record", "delta": 1e-5, "clip_norm": 1.0, "noise_multiplier": 2.0, "epsilon": 1.25}
    ledger = fk.Ledger.load(finished / "ledger.safetensors")
    replace(ledger, made_with={"privacy": privacy}).save(tmp_path / "private")
    result = fedkseed("merge", finished, tmp_path / "private", "--to", tmp_path / "both")
    assert (result.code, result.stderr) == (0, "")
    (said,) = [line for line in result.stdout.splitlines() if " promises " in line]
    assert said.startswith(f"{tmp_path / 'private'} promises epsilon 1.25 at delta 1e-05, of each record added or taken away")
    assert said.endswith("; both promises nothing of itself, as the runs may share records")
    assert fk.Ledger.load(tmp_path / "both").made_with is None


def test_a_merged_ledger_is_evaluated_and_exported(
    fedkseed: CommandLine, tiny: Path, finished: Path, another: Path, tmp_path: Path
) -> None:
    assert fedkseed("merge", finished, another, "--to", tmp_path / "mean.safetensors").code == 0
    data = ("--model", tiny / "model")
    shown = fedkseed("evaluate", tmp_path / "mean.safetensors", *data, "--data", tiny / "records.jsonl", "--limit", 4)
    assert (shown.code, shown.stderr) == (0, "")
    exported = fedkseed("export", tmp_path / "mean.safetensors", tmp_path / "out", *data)
    assert exported.code == 0, exported.stderr
    from fedkseed.models.loading import load_model

    model, tuned = load_model(tiny / "model", "float32"), load_model(tmp_path / "out", "float32")
    fk.apply(model, tmp_path / "mean.safetensors")
    for (name, x), (_, y) in zip(sorted(model.named_parameters()), sorted(tuned.named_parameters()), strict=True):
        assert x.equal(y), name


def test_diff_shows_lengths_and_says_what_they_hold_for(
    fedkseed: CommandLine, finished: Path, another: Path, tmp_path: Path
) -> None:
    a = fk.Ledger.load(finished / "ledger.safetensors")
    result = fedkseed("diff", finished, another)
    assert (result.code, result.stderr) == (0, "")
    shown = " ".join(result.stdout.split())
    length = float(np.linalg.norm(a.coefficients.astype(float)))
    assert f"from the base {length:.4g} and " in shown
    assert a.base.fingerprint in shown
    assert "cosine 0.0000 between" in shown
    assert "directions of different pools, so lengths are right in expectation" in shown
    (2 * a).save(tmp_path / "double")
    shown = " ".join(fedkseed("diff", finished, tmp_path / "double").stdout.split())
    assert f"apart {length:.4g}, 100.0% of the first" in shown
    assert "cosine 1.0000 between" in shown
    assert "directions of one pool, so lengths are exact but for small tensors" in shown
    (a + fk.Ledger.load(another / "ledger.safetensors")).save(tmp_path / "sum")
    assert "directions of several pools, some of both, so" in " ".join(
        fedkseed("diff", finished, tmp_path / "sum").stdout.split()
    )


def test_mistakes_are_one_line_and_write_nothing(fedkseed: CommandLine, finished: Path, tmp_path: Path) -> None:
    a = fk.Ledger.load(finished / "ledger.safetensors")
    replace(a, base=replace(a.base, fingerprint="ab" * 32)).save(tmp_path / "other")
    to = ("--to", tmp_path / "new")
    for weights in ("1", "1,2,3", "1,x", "", "1;2"):
        says = f"--weights is {weights!r}; expected 2 numbers with commas between, one for each ledger"
        assert_one_line(fedkseed("merge", finished, finished, *to, "--weights", weights), 2, says)
    assert_one_line(fedkseed("merge", finished, finished, *to, "--weights", "1,nan"), 2, "a weight is nan; expected a finite")
    assert_one_line(
        fedkseed("merge", finished, tmp_path / "other", *to), 1, f"{tmp_path / 'other'} is over the base model abab"
    )
    assert_one_line(fedkseed("diff", finished, tmp_path / "other"), 1, f"{tmp_path / 'other'} is over the base model abab")
    assert_one_line(fedkseed("merge", finished, tmp_path / "none", *to), 2, "none: no such run or ledger")
    assert_one_line(fedkseed("merge", finished, tmp_path, *to), 2, "holds no run")
    assert not (tmp_path / "new").exists()
    before = (tmp_path / "other").read_bytes()
    assert_one_line(fedkseed("merge", finished, "--to", tmp_path / "other"), 2, "other exists; give an output that does not")
    assert (tmp_path / "other").read_bytes() == before
    shutil.copy(finished / "config.toml", tmp_path / "text")
    assert_one_line(fedkseed("diff", finished, tmp_path / "text"), 1, "not a ledger, or damaged")
