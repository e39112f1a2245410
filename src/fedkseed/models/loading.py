"""Loading a causal language model and its tokenizer, with errors of one line.

transformers is imported within the functions, so that importing this module is quick.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch

from fedkseed.errors import BindingError, InvalidValueError, ModelError, RunError
from fedkseed.files import placed
from fedkseed.models.adapter_folder import CONFIG as ADAPTER
from fedkseed.models.adapter_folder import base_of, has_adapter, is_adapter, on_hub
from fedkseed.models.base import FileBase, stored_dtypes
from fedkseed.models.dtypes import Dtype
from fedkseed.models.hub import files_on_hub, has_cached, in_cache
from fedkseed.models.parameters import NamedParameter, is_plain_float, is_quantised, named_parameters
from fedkseed.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "*.bin")
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
T = TypeVar("T")


def load_model(source: str | Path, dtype: Dtype = "auto", device: str | torch.device = "cpu") -> PreTrainedModel:
    """A causal LM in eval mode. Nothing that a model folder brings along is executed.

    Args:
        source: a folder with config.json and weights; a folder with a LoRA adapter, whose base model is loaded with the adapter
            in place; or a hub id of either: taken from the local cache, else downloaded.
        dtype: of the weights; "auto" is what the checkpoint says.
        device: where torch shall put it.

    Raises:
        InvalidValueError: an unknown dtype, or a device that torch cannot use here.
        ModelError: no such folder, a folder without configuration or weights, a hub id out of reach, an architecture
            that transformers does not know as a causal LM, weights that are damaged or incomplete, an adapter of another
            kind or whose base model is not here.
    """
    if dtype not in get_args(Dtype):
        raise InvalidValueError(f"dtype {dtype!r} is unknown; expected one of {', '.join(get_args(Dtype))}")
    require_device(device)
    folder = _folder(source)
    alone = folder is not None and is_adapter(folder)
    if folder is not None and alone:
        _require_base(folder)
    elif folder is not None:
        _refuse_adapter(source, (folder / ADAPTER).is_file())
        _require(folder, ("config.json",), "config.json")
        _require(folder, WEIGHT_FILES, "weights (model.safetensors)")

    def load(local_files_only: bool) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(
            folder or source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            local_files_only=local_files_only,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            # transformers would fill them with random numbers, other ones on every client
            missing = sorted(info["missing_keys"])
            raise ValueError(f"its weights lack {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
        loaded: PreTrainedModel = model.to(device).eval()
        return loaded

    model = _load(source, folder, "causal language model", load)
    if alone:
        model.name_or_path = str(folder if placed(source).is_dir() else source)  # transformers names the base model
    else:
        _refuse_adapter(source, has_adapter(model))  # as a hub id may have one
    return model


def _refuse_adapter(source: str | Path, found: bool) -> None:
    """An adapter beside a model would be loaded with it, and be all that is saved again."""
    if found:
        raise ModelError(
            f"{source}: an adapter ({ADAPTER}) lies beside the model, and it is not clear which of them is meant; move the "
            "adapter's files away to tune the model without it, or give the adapter in a folder of its own"
        )


def _require_base(folder: Path) -> None:
    """Refuse an adapter whose base model is not on this machine."""
    base = base_of(folder)
    try:
        known = placed(base).is_dir() or has_cached(base)
    except ModelError:  # no hub id either
        known = False
    if not known:
        raise ModelError(
            f"{folder}: its base model {base!r:.80} is no folder here, nor in the local cache; download it, or set "
            f"base_model_name_or_path in {ADAPTER}"
        )


def require_device(device: str | torch.device) -> None:
    """Raise an InvalidValueError if torch cannot use the device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError(f"device {str(device)!r} cannot be used here ({one_line(error)}); try 'cpu'") from None


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; source as for `load_model`. An adapter without one has its base model's.

    Raises:
        ModelError: no such folder, a folder without tokenizer files, a hub id out of reach, damaged files.
    """
    folder = _folder(source)
    if folder is not None and is_adapter(folder) and not _has(folder, TOKENIZER_FILES):
        _require_base(folder)
        return load_tokenizer(base_of(folder))
    if folder is not None:
        _require(folder, TOKENIZER_FILES, "tokenizer (tokenizer.json)")

    def load(local_files_only: bool) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder or source, local_files_only=local_files_only, trust_remote_code=False
        )
        return tokenizer

    return _load(source, folder, "tokenizer", load)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, **options: Any) -> None:
    """Write a Hugging Face folder, with `card` as its README.md: whole, or not at all. `options` go to `save_pretrained`.

    Raises:
        RunError: it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _quiet(bars=False):
            model.save_pretrained(partial, **options)
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, Exception):  # Ctrl-C; the others are OSError, and safetensors' own on a full disk
            raise
        advice = "make room or choose another place"
        if any(is_quantised(parameter) for parameter in model.parameters()):
            advice = "not every quantised model can be saved again: publish the ledger, and apply it to the base"
        raise RunError(f"{folder}: cannot write the model ({one_line(error)}); {advice}") from error


def base_path(source: str | Path, model: torch.nn.Module) -> Path | None:
    """The folder that `fedkseed.bind(base=...)` may re-read the base weights from, or None to keep a copy in memory.

    That is `source`, if it is a local folder whose safetensors hold every parameter under its name, in its shape and
    with its value, and either in its dtype or widened to float32 on loading. Values are compared once, a stretch at a
    time (0.6 s per GB from the page cache), since some architectures are rearranged when they are loaded.

    Args:
        source: what the model was loaded from.
        model: as it was loaded, not yet moved.
    """
    folder = placed(source)
    if not folder.is_dir():
        return None
    try:
        entries = named_parameters(model)
        base = FileBase(folder, entries)
    except BindingError:
        return None
    parameters = {entry.name: entry.parameter.detach().reshape(-1) for entry in entries}
    for batch in base.batches(list(parameters)):
        for stretch in batch:
            loaded = parameters[stretch.name][stretch.start : stretch.start + stretch.values.numel()]
            if loaded.dtype not in (torch.float32, stretch.values.dtype):
                return None
            if not torch.equal(stretch.values.to(loaded.device, loaded.dtype), loaded):
                return None
    return folder


def files_of(source: str | Path) -> Path | None:
    """The folder with the files of a model that was loaded: a local one, or a hub id's in the cache; None if there is none."""
    folder = placed(source)
    if folder.is_dir():
        return folder
    try:
        found = in_cache(str(source), "config.json")
    except ModelError:  # no hub id
        return None
    return found.parent if found else None


def read_files(model: torch.nn.Module, entries: Sequence[NamedParameter]) -> Callable[[NamedParameter], torch.Tensor] | None:
    """What gives a parameter's values in the files that a model was loaded from; None unless it is what loading these gives.

    Args:
        model: as it was loaded, in any precision.
        entries: its parameters.
    """
    folder = files_of(getattr(model, "name_or_path", "") or "/")
    try:
        base = FileBase(folder, entries) if folder is not None else None
    except BindingError:
        return None
    if base is None:
        return None
    for entry in entries:
        if not torch.equal(base.tensor(entry.name).to(entry.parameter.dtype), entry.parameter.detach().cpu()):
            return None
    return lambda entry: base.tensor(entry.name)


def give_stored_dtypes(model: PreTrainedModel, source: str | Path) -> None:
    """Cast every tensor of a model to the type that it has in the files of `source`; where these are no safetensors, or name it
    otherwise, to the type that the configuration names. An adapter's are left as they are."""
    if has_adapter(model):
        return
    folder = files_of(source)
    try:
        stored = stored_dtypes(folder) if folder is not None else {}
    except BindingError:
        stored = {}
    usual = _configured_dtype(source)
    for entry in named_parameters(model):
        dtype = next((stored[name] for name in entry.aliases if name in stored), usual)
        if dtype is not None and is_plain_float(entry.parameter):
            entry.parameter.data = entry.parameter.data.to(dtype)


def _configured_dtype(source: str | Path) -> torch.dtype | None:
    folder = _folder(source)

    def load(local_files_only: bool) -> torch.dtype | None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder or source, local_files_only=local_files_only)
        dtype = getattr(config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else None

    return _load(source, folder, "configuration", load)


def _folder(source: str | Path) -> Path | None:
    """The local folder that is meant: a hub's adapter's is in the cache; None for another hub id."""
    name, path = str(source), placed(source)
    if not name.strip():
        raise ModelError("the model's name is empty; give a model folder, or a hub id such as 'owner/name'")
    try:
        is_folder, exists = path.is_dir(), path.exists()
        if is_folder:
            next(path.iterdir(), None)
    except OSError as error:
        raise ModelError(f"{name}: cannot look there ({error.strerror}); give a folder that this user may read") from error
    if is_folder:
        return path
    if exists:
        raise ModelError(f"{name}: not a folder; give the folder that holds config.json and the weights")
    if isinstance(source, Path) or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder; check the path, or give a hub id such as 'owner/name'")
    return on_hub(name)


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(path for pattern in patterns for path in folder.glob(pattern))


def _require(folder: Path, patterns: tuple[str, ...], what: str) -> None:
    if not _has(folder, patterns):
        raise ModelError(f"{folder}: no {what} in this folder; give a whole Hugging Face model folder")


def _load(source: str | Path, folder: Path | None, what: str, load: Callable[[bool], T]) -> T:
    """Call `load(local_files_only=True)`; for a hub id that the cache does not hold (or not whole) `load(False)`."""
    cached_error: ModelError | None = None
    if folder is not None or has_cached(str(source)):
        try:
            with _quiet(bars=False):
                return _call(source, what, load, local_files_only=True)
        except ModelError as error:
            if folder is not None:
                raise
            cached_error = error
    try:
        files_on_hub(str(source))
    except ModelError as error:
        raise cached_error or error from None
    with _quiet(bars=True):  # a download shall show its progress
        return _call(source, what, load, local_files_only=False)


def _call(source: str | Path, what: str, load: Callable[[bool], T], local_files_only: bool) -> T:
    try:
        return load(local_files_only)
    except Exception as error:  # transformers and its parsers raise anything: OSError, ValueError, SafetensorError, KeyError
        raise ModelError(
            f"{source}: no {what} could be loaded ({one_line(error)}); check that the folder or hub id is whole and of "
            "a causal LM"
        ) from error


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Without transformers' advice, and without its progress bars unless asked for; its settings are put back."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
