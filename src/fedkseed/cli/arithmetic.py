"""`fedkseed merge` and `fedkseed diff`: weighted sums of ledgers, and how far two of them lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkseed.cli.console import say, say_rows
from fedkseed.cli.outputs import make_folder_for, require_new
from fedkseed.errors import ConfigError
from fedkseed.kseed.arithmetic import merge as merged
from fedkseed.kseed.arithmetic import pages_of
from fedkseed.kseed.distance import difference, moved_rms
from fedkseed.kseed.ledger import Ledger
from fedkseed.report.summary import noted_promise
from fedkseed.runs.checkpoints import TENSORS
from fedkseed.runs.folder import tuned_file
from fedkseed.text import counted

UNITS = {"absolute": "", "proportional": " of itself"}


def merge(paths: Sequence[Path], weights: str | None, output: Path) -> None:
    """Write the weighted sum of ledgers over one base; nothing that exists is overwritten.

    Args:
        paths: runs' folders or ledgers' files.
        weights: numbers separated by commas, one for each; None for the mean.
        output: the file to write.

    Raises:
        ConfigError: the weights are no such numbers, or a run is a baseline's.
        RunFolderError: the output exists, or a path does not.
        FedKSeedError: a ledger cannot be read, or they do not add up.
    """
    factors = None if weights is None else _numbers(weights, len(paths))
    require_new(output)
    files = [_ledger_file(path) for path in paths]
    ledger = merged(files, factors)
    make_folder_for(output)
    ledger.save(output)
    sizes = ", ".join(str(size) for size in sorted({page.pool.size for page in ledger.pages}))
    say(f"{output}: {output.stat().st_size:,} bytes, {counted(len(ledger.pages), 'page')}, K = {sizes}")
    if len({page.movement for page in ledger.pages}) == 1:
        say(f"moves a weight by {moved_rms(ledger):.3g}{UNITS[ledger.pages[0].movement]} (root mean square)")
    for path, file in zip(paths, files, strict=True):
        if (promised := noted_promise(Ledger.load(file).made_with)) is not None:
            say(f"{path} promises {promised}; {output.name} promises nothing of itself, as the runs may share records")


def diff(one: Path, other: Path) -> None:
    """Show how far two tuned models over one base lie from it and from each other, from their numbers alone.

    Raises:
        FedKSeedError: see `fedkseed.kseed.distance.difference` and `merge`.
    """
    first, second = (Ledger.load(_ledger_file(path)) for path in (one, other))
    found = difference(first, second, (str(one), str(other)))
    unit = UNITS[found.movement]
    one_pool = len({page.pool for ledger in (first, second) for page in pages_of(ledger)}) == 1
    shared = "of one pool" if one_pool else "of several pools, some of both" if found.shared else "of different pools"
    exact = "so lengths are exact but for small tensors" if one_pool else "so lengths are right in expectation"
    rows = {
        "base": first.base.fingerprint,
        "from the base": f"{found.moved[0]:.4g}{unit} and {found.moved[1]:.4g}{unit}, root mean square of the tuned weights",
        "apart": f"{found.apart:.4g}{unit}" + (f", {found.apart / found.moved[0]:.1%} of the first" if found.moved[0] else ""),
        "cosine": f"{found.cosine:.4f} between the two moves",
        "directions": f"{shared}, {exact}",
    }
    say_rows(rows)


def _ledger_file(path: Path) -> Path:
    file = tuned_file(path)
    if file.name == TENSORS:
        raise ConfigError(f"{path} is the run of a baseline, which has no ledger; give runs of FedKSeed, or ledgers")
    return file


def _numbers(weights: str, count: int) -> list[float]:
    try:
        numbers = [float(word) for word in weights.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ConfigError(f"--weights is {weights!r:.80}; expected {count} numbers with commas between, one for each ledger")
    return numbers
