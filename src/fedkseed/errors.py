"""The exceptions that fedkseed raises at its boundaries, before anything is changed.

Every message is one line that names the value, what was expected and what to do.
"""


class FedKSeedError(Exception):
    """Base of all errors that a user of fedkseed can cause or must know of."""


class InvalidValueError(FedKSeedError, ValueError):
    """An argument outside its documented range, or of the wrong type, dtype or length."""


class BackendError(FedKSeedError, RuntimeError):
    """A noise backend that was asked for by name cannot run here."""


class BindingError(FedKSeedError, ValueError):
    """A model or a base file that perturbations cannot be applied to."""
