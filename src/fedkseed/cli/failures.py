"""How a command ends by what a user can mend: one line, and exit code 2 (usage) or 1 (failure)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedkseed.errors import FedKSeedError, is_want_of_memory
from fedkseed.text import one_line


@contextmanager
def one_line_each(tell: Callable[[object], None]) -> Iterator[None]:
    """End the process where what is inside fails by what a user can mend; anything else is a fault of ours, and raised.

    Args:
        tell: shows the line.
    """
    try:
        yield
    except FedKSeedError as error:
        tell(error)
        sys.exit(error.exit_code)
    except PermissionError as error:
        tell(f"{error.filename}: {error.strerror}; give files and folders that this user may use")
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_want_of_memory(error):
            raise
        tell(
            f"no memory for what was to be done ({one_line(error, 80)}); a smaller --batch-size or --max-length "
            "needs less, so does --dtype bfloat16; a run goes on with --resume"
        )
        sys.exit(1)
