"""The exceptions that fedkseed raises at its boundaries, before anything is changed.

Every message is one line that names the value, what was expected and what to do.
"""


class FedKSeedError(Exception):
    """Base of all errors that a user of fedkseed can cause or must know of.

    `exit_code` is the command line's: 2 for usage (the caller can mend the call), 1 for a failure. What is `private` may quote
    records, such as a column's name or a token, and stays on the machine that has them.
    """

    exit_code = 1
    private = False


class InvalidValueError(FedKSeedError, ValueError):
    """An argument outside its documented range, or of the wrong type, dtype or length."""

    exit_code = 2


class BackendError(FedKSeedError, RuntimeError):
    """A noise backend that was asked for by name cannot run here."""


class BindingError(FedKSeedError, ValueError):
    """A model or a base file that perturbations cannot be applied to."""

    exit_code = 2


class ConfigError(FedKSeedError, ValueError):
    """A setting that is unknown, out of range, or contradicts another."""

    exit_code = 2


class ModelError(FedKSeedError):
    """A model or tokenizer that cannot be loaded or used."""

    exit_code = 2
    private = True


class NoBackwardError(ModelError):
    """A model, or its loss, that cannot be backpropagated through."""


class DataError(FedKSeedError, ValueError):
    """A data file that cannot be read, or records that cannot be used."""

    exit_code = 2
    private = True


class ProtocolError(FedKSeedError, ValueError):
    """Bytes that are not a message, or a message that does not belong where it arrived."""


class PrivacyError(FedKSeedError):
    """A release that a privacy budget does not allow, or an account of releases that cannot be read."""


class LedgerError(FedKSeedError):
    """A ledger that cannot be read or written, or belongs to another base model or pool."""


class AuditError(FedKSeedError):
    """A run's log that does not lead to its ledger, or whose entries do not fit together."""


class RunError(FedKSeedError):
    """A federation that cannot go on, or a run that cannot be written."""


class TooFewRepliesError(RunError):
    """A round that was asked for three times without enough replies that could be used."""


class RunFolderError(RunError):
    """A folder that holds a run where none was expected, or none where one was."""

    exit_code = 2


def installing(extra: str) -> str:
    """The command that brings an optional part, for messages: fedkseed is on no package index yet."""
    return f"pip install -e '.[{extra}]' in fedkseed's clone"


def is_want_of_memory(error: BaseException) -> bool:
    """Whether this is torch's, on any device, or Python's way to say that memory did not suffice."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "DefaultCPUAllocator" in str(error))
    )
