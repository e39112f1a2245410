"""The contract table as marks: every law runs over every row of it."""

import pytest

from tests.support import laws

backends = pytest.mark.parametrize("backend", laws.BACKENDS)
quick_backends = pytest.mark.parametrize("backend", laws.QUICK_BACKENDS)
families = pytest.mark.parametrize("family", laws.FAMILIES)
kinds = pytest.mark.parametrize("kind", laws.FLOAT_TYPES, ids=str)
half_types = pytest.mark.parametrize("kind", laws.HALF_TYPES, ids=str)
