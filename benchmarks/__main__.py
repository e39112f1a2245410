"""`python -m benchmarks [NAME ...]`: the named benchmarks, or those that need no GPU, one after the other."""

import importlib
import sys

# beside these: gpu, and edges, whose million clients take half an hour
ON_ANY_MACHINE = ("noise", "step", "round", "secure", "swap")

for name in sys.argv[1:] or ON_ANY_MACHINE:
    importlib.import_module(f".{name}", __package__).main()
