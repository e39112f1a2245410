"""`python -m benchmarks`: every benchmark, one after the other."""

from . import noise

noise.main()
