"""Opens a checkpoint: a Hub id, a folder, or the word `reference`. Nothing of the weights is read but their headers.

A Hub id is looked at before it is downloaded: its configuration comes first, so a model that cannot be compressed is
refused before its weights travel. `huggingface_hub` reads HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN when it is
imported, so set them before the program starts. Files that arrived whole are never fetched again.

Not covered: whether the model has experts at all; that is seen in its structure.
"""

from __future__ import annotations

import difflib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import get_cached_repo_tree, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.checkpoint.index import INDEX_FILE, SINGLE_FILE, TensorIndex, shard_names
from moe_compress.errors import CheckpointError, UnsupportedModelError, UsageError
from moe_compress.models.families import EXPERT_COUNT_KEYS, TOP_K_KEYS
from moe_compress.models.layers import PACKED, SECTION
from moe_compress.text import first_line

REFERENCE = Path(__file__).parents[1] / "reference" / "checkpoint"
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What one of a tokenizer's files is called.
TOKENIZER_PREFIXES = ("tokenizer.", "vocab", "tekken.", "spiece")
TOKENIZER_SUFFIXES = (".model", ".tiktoken")
# Of all files that hold weights, in whatever format; the rest of a checkpoint is copied with it.
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", *PICKLE_SUFFIXES)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found readable; `revision` is the commit of a Hub id, None for a folder."""

    folder: Path
    config: PretrainedConfig
    model_id: str
    revision: str | None
    index: TensorIndex


def open_checkpoint(model: str, revision: str | None = None, *, quantized: bool = False) -> Checkpoint:
    """Find `model`, download it if need be, and check that it can be read; `quantized` ones only when asked for.

    Raises `UnsupportedModelError` for what is whole but no source of ours (GGUF, quantized, unknown architecture),
    `UsageError` for a setting that does not fit, `CheckpointError` for everything missing, damaged or out of reach.
    """
    path = REFERENCE if model == "reference" else Path(model).expanduser()
    commit = None
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"`revision` has no effect for the folder {path}; leave it out, or name a Hub id.")
        folder = path
        names = [file.name for file in folder.iterdir()]
        config = _checked_config(folder, model, names, quantized)
        _check_weights(model, names)
    else:
        refuse_path(model)
        folder = _download(model, revision, SMALL_FILES)
        commit = folder.name
        names = _repository_files(model, folder)
        config = _checked_config(folder, model, names, quantized)
        _check_weights(model, names)
        _download(model, commit, SMALL_FILES + shard_names(folder))
    return Checkpoint(folder, config, model, commit, TensorIndex.from_folder(folder))


def open_config(
    model: str, revision: str | None = None, *, quantized: bool = False
) -> tuple[PretrainedConfig, TensorIndex | None]:
    """The configuration of `model`, and its tensors' headers if its weights lie in a folder; none are downloaded."""
    path = REFERENCE if model == "reference" else Path(model).expanduser()
    if path.is_dir():
        config = _checked_config(path, model, [file.name for file in path.iterdir()], quantized)
        weights = any((path / name).exists() for name in shard_names(path))
        return config, TensorIndex.from_folder(path) if weights else None
    refuse_path(model)
    folder = _download(model, revision, SMALL_FILES)
    return _checked_config(folder, model, _repository_files(model, folder), quantized), None


def small_files(model: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder with the configuration and the tokenizer of `model`, and the commit of a Hub id; no weights travel."""
    path = REFERENCE if model == "reference" else Path(model).expanduser()
    if path.is_dir():
        return path, None
    folder = _download(model, revision, SMALL_FILES)
    return folder, folder.name


def require_weights(model: str, revision: str | None = None) -> None:
    """Raise `CheckpointError` when `model` has no weights that `open_checkpoint` reads; none are downloaded."""
    folder, commit = small_files(model, revision)
    _check_weights(
        model, [file.name for file in folder.iterdir()] if commit is None else _repository_files(model, folder)
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint in `folder`; `CheckpointError` when it has none, or a damaged one.

    From a folder without one, transformers makes some families a tokenizer that knows no words.
    """
    if not any(
        file.name.startswith(TOKENIZER_PREFIXES) or file.suffix in TOKENIZER_SUFFIXES for file in folder.iterdir()
    ):
        raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json); copy it there from the original model.")
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # every tokenizer has its own
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}.") from error
    return found


def is_local(model: str) -> bool:
    """Whether `model` is the built-in one, a folder or a path to one; else it is a Hub id."""
    return model == "reference" or model.startswith((".", "/", "~")) or Path(model).is_dir()


def refuse_path(model: str) -> None:
    """Say what is wrong with a path that is no folder; a folder and a Hub id pass."""
    path = REFERENCE if model == "reference" else Path(model).expanduser()
    if path.is_dir():
        return
    if model == "reference":
        raise CheckpointError("This installation lacks the reference model; install moe-compress again.")
    if path.suffix == ".gguf":
        raise UnsupportedModelError(_gguf(model))
    if path.exists():
        raise UsageError(f"{path} is a file; name the folder of the checkpoint.")
    if is_local(model):
        raise UsageError(f"The checkpoint folder {path} does not exist.")


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """The repository's matching files in the cache; one sentence for every way this can fail."""
    at = f" at revision `{revision}`" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise CheckpointError(f"`{repository}` is neither a folder that exists nor a Hub id (owner/name).") from None
    except GatedRepoError as error:
        raise CheckpointError(
            f"The model {repository} is gated; accept its terms on its Hub page and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no folder `{repository}`, and no such model on the Hub that you may read; check the name, or "
            "log in with `hf auth login` if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"The model {repository} has no revision `{revision}`; name a branch, a tag or a commit."
        ) from error
    except LocalEntryNotFoundError as error:
        if is_offline_mode():
            message = (
                f"The model {repository}{at} is not (completely) in the local cache and HF_HUB_OFFLINE forbids to "
                "download it; unset it, or name a folder."
            )
        else:
            message = (
                f"The Hub cannot be reached for {repository}{at}, and the local cache does not hold all of it; try "
                "again when you are online."
            )
        raise CheckpointError(message) from error
    except Exception as error:  # the HTTP library's own exceptions are no part of the Hub client's interface
        raise CheckpointError(
            f"The download of {repository}{at} failed ({first_line(error)}); start again, "
            "files that are complete are kept."
        ) from error


def _repository_files(repository: str, folder: Path) -> list[str]:
    """The names of all files in the repository, as the download noted them, or those at hand without such a note."""
    try:
        return [file.path for file in get_cached_repo_tree(repository, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        return [file.name for file in folder.iterdir()]


def _checked_config(folder: Path, model: str, names: list[str], quantized: bool) -> PretrainedConfig:
    """The configuration, read without running any code that comes with the checkpoint."""
    if "config.json" not in names:
        if any(name.endswith(".gguf") for name in names):
            raise UnsupportedModelError(_gguf(model))
        raise CheckpointError(f"{model} holds no config.json, so it is no transformers checkpoint; name another.")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (ValueError, AttributeError):
        raise CheckpointError(f"The config.json of {model} is damaged; download it again.") from None
    method = _quantization(content)
    if method is not None and not quantized:
        raise UnsupportedModelError(
            f"{model} is quantized ({method}), but only unquantized sources are supported; name the original model, "
            "or dequantize it to bfloat16 first."
        )
    if model_type not in CONFIG_MAPPING:
        if "AutoConfig" in (content.get("auto_map") or {}):
            raise UnsupportedModelError(
                f"{model} (`{model_type}`) is defined by Python code in its repository, which is never run; only "
                "architectures that transformers itself holds are supported."
            )
        raise UnsupportedModelError(_unknown_architecture(model, model_type))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every architecture checks its own settings
        raise CheckpointError(f"The config.json of {model} is not accepted: {first_line(error)}.") from error
    assert isinstance(config, PretrainedConfig)
    text: Any = config.get_text_config()
    counts, picks = ([getattr(text, key, None) for key in keys] for keys in (EXPERT_COUNT_KEYS, TOP_K_KEYS))
    for count, pick in itertools.product(counts, picks):
        if isinstance(count, int) and isinstance(pick, int) and count > 0 and not 1 <= pick <= count:
            raise CheckpointError(f"The config.json of {model} is not accepted: {pick} of {count} experts per token.")
    return config


def _check_weights(model: str, names: list[str]) -> None:
    """Refuse what is not safetensors, by the names of all files."""
    if INDEX_FILE in names or SINGLE_FILE in names:
        return
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise CheckpointError(
            f"{model} has its weights only as pickle files ({pickles[0]}), which can run any code when they are "
            "opened; only safetensors is read, so on a machine you can spare, load it with transformers and save it "
            "again with `save_pretrained`, which writes safetensors."
        )
    if any(name.endswith(".gguf") for name in names):
        raise UnsupportedModelError(_gguf(model))
    raise CheckpointError(
        f"{model} holds no safetensors weights ({SINGLE_FILE}, or {INDEX_FILE} with the files it names); download it "
        "again, or name another."
    )


def _quantization(content: dict[str, Any]) -> str | None:
    """The method a config says its weights are quantized with."""
    if PACKED in (content.get(SECTION) or {}):
        return "by moe-compress"
    for section in (content, content.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                return str(section[key].get("quant_method", "method not named"))
    return None


def _unknown_architecture(model: str, model_type: str | None) -> str:
    if model_type is None:
        return f"The config.json of {model} names no `model_type`, so its architecture is unknown; add it."
    close = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
    hint = f" (did you mean `{close[0]}`?)" if close else ""
    return (
        f"{model} is a `{model_type}`, which transformers {transformers.__version__} does not know{hint}; "
        "update transformers, or correct its config.json."
    )


def _gguf(model: str) -> str:
    return f"{model} is a GGUF, a format for running models; name the safetensors checkpoint it was made from."
