"""Differential privacy: the Gaussian mechanism, what it takes for granted, and what it costs (docs/privacy.md).

Pure functions of their arguments, among them the source of random bytes; `accountant` alone imports dp-accounting.
"""

from fedkseed.privacy.mechanism import Mechanism, Source, poisson_sample
from fedkseed.privacy.settings import DELTA, WITHHELD, Privacy, Unit

__all__ = ["DELTA", "WITHHELD", "Mechanism", "Privacy", "Source", "Unit", "poisson_sample"]
