"""What a run's settings need beside fedkseed itself, asked for before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from fedkseed.errors import ConfigError, installing
from fedkseed.privacy.accountant import require_accountant
from fedkseed.runs.settings import RunConfig


def require_secure(config: RunConfig) -> None:
    """Refuse secure sums whose extra is not installed.

    Raises:
        ConfigError: it is not.
    """
    if config.secure_sums == "on" and not (find_spec("cryptography") and find_spec("Crypto")):
        raise ConfigError(f"--secure-sums on needs an extra; install it with: {installing('secure')}")


def require_extras(config: RunConfig) -> None:
    """The same of secure sums and of the account of epsilon; a baseline's is asked for with its model.

    Raises:
        ConfigError: one is not installed.
    """
    require_secure(config)
    if config.dp is not None:
        require_accountant()
