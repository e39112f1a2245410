"""Models on a hub: what the local cache has of them, and what the hub itself says.

huggingface_hub is imported within the functions, so that importing this module is quick.
"""

from __future__ import annotations

from pathlib import Path

from fedkseed.errors import ModelError
from fedkseed.text import one_line

SECONDS = 10
"""After which a hub that does not answer is out of reach; transformers would retry for half a minute."""


def in_cache(hub_id: str, *names: str) -> Path | None:
    """The first of these files of a hub's model that the local cache has; None if it has none.

    Raises:
        ModelError: it is no hub id.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = (try_to_load_from_cache(hub_id, name) for name in names)
        return next((Path(path) for path in found if isinstance(path, str)), None)
    except HFValidationError as error:
        raise ModelError(f"{hub_id!r}: neither a folder nor a hub id ({one_line(error)}); give one of the two") from None


def has_cached(hub_id: str) -> bool:
    """Whether the local cache has a model of that id, or a part of it.

    Raises:
        ModelError: it is no hub id.
    """
    return in_cache(hub_id, "config.json", "tokenizer_config.json") is not None


def files_on_hub(hub_id: str) -> frozenset[str]:
    """The names of a model's files on the hub, which is asked.

    Raises:
        ModelError: it is out of reach, or does not give the model.
    """
    from huggingface_hub import model_info

    try:
        return frozenset(file.rfilename for file in model_info(hub_id, timeout=SECONDS).siblings or ())
    except Exception as error:  # of whichever HTTP library, or the hub's own
        raise ModelError(
            f"{hub_id}: no such folder here, nothing whole of that id in the local cache, and the hub does not give it "
            f"({one_line(error)}); download the model and give its folder, or check the id and the network"
        ) from error
