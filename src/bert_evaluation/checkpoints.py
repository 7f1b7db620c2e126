"""Checkpoints and hub data sets: the built-in ones, local folders, hub names. Offline first, safetensors only."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from bert_evaluation import builtin
from bert_evaluation.capturing import longest_input
from bert_evaluation.errors import CheckpointError, DatasetError
from bert_evaluation.squad.dataset import Dataset, from_rows, read_squad

T = TypeVar("T")
HELP_HUB = "give a folder, or connect once so that it is kept in the hub's cache"


def load(name: str | Path = builtin.NAME, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A question-answering model in float32 and eval mode, and its fast tokenizer, which knows the longest input.

    `name` is `built-in`, a local folder, or a checkpoint of the hub, taken from its cache if it is there. Raises
    CheckpointError for one that is not to be had, has no safetensors weights, or has no question-answering head.
    """
    folder = _folder(name, builtin.CHECKPOINT)
    if folder is None and _looks_like_path(name):
        raise CheckpointError(f"There is no checkpoint folder {name}.")
    if folder is not None:
        _check_files(folder)
    source = str(folder or name)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model, info = _fetch(name, folder, lambda local: _model(source, local))
    if missing := sorted(info["missing_keys"]):
        made_for = (model.config.architectures or ["model of another task"])[0]
        raise CheckpointError(
            f"{name} has no question-answering head: it is a {made_for} without the weights {', '.join(missing[:4])};"
            " give a checkpoint that was fine-tuned for question answering."
        )
    return model.to(device).eval(), load_tokenizer(name, longest_input(model))


def load_tokenizer(name: str | Path, longest: int) -> Any:
    """The fast tokenizer of a checkpoint whose model reads so many tokens at most. Raises CheckpointError."""
    folder = _folder(name, builtin.CHECKPOINT)
    source = str(folder or name)
    tokenizer = _fetch(
        name, folder, lambda local: transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
    )
    # transformers makes up an empty tokenizer where a checkpoint has none.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{name} has no tokenizer: tokenizer.json is missing; save the tokenizer beside the model."
        )
    if not tokenizer.is_fast:
        raise CheckpointError(f"{name} has no fast tokenizer (tokenizer.json), which tells where a token stands.")
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of all that decides what a fast tokenizer makes of a text."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the last call
        content.pop(state, None)
    more = [tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.cls_token_id]
    return hashlib.sha256(json.dumps([content, more]).encode()).hexdigest()


def load_dataset(name: str | Path = builtin.NAME, split: str = "validation") -> Dataset:
    """The built-in questions, a SQuAD JSON file, or the validation split of a data set of the hub or in a folder."""
    if name == builtin.NAME:
        return Dataset(builtin.NAME, read_squad(builtin.QUESTIONS).examples)
    path = Path(name).expanduser()
    if path.is_file() or path.suffix == ".json" or (_looks_like_path(name) and not path.is_dir()):
        return read_squad(path)
    datasets.disable_progress_bars()
    try:
        return _offline_first(lambda local: from_rows(str(name), _rows(str(name), split, local or path.is_dir())))
    except DatasetError:
        raise
    except Exception as error:
        hint = "" if path.is_dir() else f"; {HELP_HUB}"
        raise DatasetError(f"The data set {name} cannot be had: {_first_line(error)}{hint}.") from error


def _rows(name: str, split: str, local: bool) -> Any:
    """The rows of a folder or of the hub's cache, streamed so that no copy is made; else of the hub."""
    if not local:
        return datasets.load_dataset(name, split=split)
    try:
        folder = name if Path(name).is_dir() else snapshot_download(name, repo_type="dataset", local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        # What is not among the hub's files may still be among the tables that datasets made of them.
        return datasets.load_dataset(name, split=split, download_config=datasets.DownloadConfig(local_files_only=True))
    return datasets.load_dataset(folder, split=split, streaming=True)


def _model(source: str, local: bool) -> tuple[Any, dict[str, Any]]:
    # In float32 whatever is stored: transformers 5 would run float16 weights in float16, far slower on a CPU.
    model, info = transformers.AutoModelForQuestionAnswering.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=local
    )
    return model, info


def _folder(name: str | Path, built_in: Path) -> Path | None:
    if name == builtin.NAME:
        return built_in
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _looks_like_path(name: str | Path) -> bool:
    """Whether a name cannot be one of the hub, which are `model` or `owner/model`."""
    text = str(name)
    return (
        isinstance(name, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or (os.sep != "/" and os.sep in text)
    )


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.")
    if any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code as they load;"
            " save it again with save_pretrained, which writes safetensors."
        )
    raise CheckpointError(f"{folder} has no weights: model.safetensors is missing.")


def _offline_first(get: Callable[[bool], T]) -> T:
    try:
        return get(True)
    except DatasetError:  # it was there
        raise
    except Exception:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise
    return get(False)


def _fetch(name: str | Path, folder: Path | None, get: Callable[[bool], T]) -> T:
    try:
        return get(True) if folder is not None else _offline_first(get)
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of {name} are damaged: {_first_line(error)}; fetch or save them again."
        ) from error
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            raise CheckpointError(f"{name} has no question-answering head: transformers knows none for it.") from error
        hint = "" if folder is not None else f"; {HELP_HUB}"
        raise CheckpointError(f"The checkpoint {name} cannot be loaded: {_first_line(error)}{hint}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
