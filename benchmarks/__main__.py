"""`python -m benchmarks [NAME ...]`: the named benchmarks, or all, one after the other."""

import sys

from . import noise, round, step

BENCHMARKS = {"noise": noise.main, "step": step.main, "round": round.main}

for name in sys.argv[1:] or BENCHMARKS:
    BENCHMARKS[name]()
