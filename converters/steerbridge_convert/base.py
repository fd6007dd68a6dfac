"""Facts about the base model, read from that model's own files when an artifact lacks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from steerbridge import encodings, gguf_model
from steerbridge.errors import DataError
from steerbridge.format import unreadable
from steerbridge.package import load
from steerbridge.spec import BaseModelInfo
from steerbridge_convert import files


def base_model(path: Path) -> BaseModelInfo:
    """Read the facts from a model directory (`config.json`), GGUF model or steering package.

    Raises:
        UnreadableSource: the path is none of these.
        FileNotFoundError: the path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}")
    if (path / encodings.CONFIG_NAME).is_file():
        return load(path).spec.base_model
    if path.is_dir():
        return _of_config(path / "config.json")
    metadata = files.gguf(path).metadata
    if metadata.get("general.architecture") == encodings.GGUF_ARCHITECTURE:
        return load(path).spec.base_model
    try:
        return gguf_model.facts_of(metadata, path).info()
    except (DataError, ValueError) as error:
        raise unreadable(path, "metadata", "a language model", error) from error


# Names of transformers' configurations; the older ones have others than `hidden_size`.
_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "vocab_size": ("vocab_size",),
}
# What a configuration of a vision-language model leaves out, being as its class has it.
_DEFAULTS: Final[dict[str, dict[str, int]]] = {
    "llama": {"hidden_size": 4096, "num_layers": 32, "vocab_size": 32000},
    "mistral": {"hidden_size": 4096, "num_layers": 32, "vocab_size": 32000},
    "gemma": {"hidden_size": 3072, "num_layers": 28, "vocab_size": 256000},
    "gemma2": {"hidden_size": 2304, "num_layers": 26, "vocab_size": 256000},
}


def _of_config(file: Path) -> BaseModelInfo:
    whole = files.json_object(file)
    try:
        config = {**whole, **(whole.get("text_config") or {})}  # the language model of a VLM
        model_type = config["model_type"]
        stated: dict[str, Any] = {
            field: next((config[name] for name in names if name in config), None)
            for field, names in _NAMES.items()
        }
        default = _DEFAULTS.get(model_type, {})
        stated = {f: default.get(f) if value is None else value for f, value in stated.items()}
        architectures: list[str] = whole.get("architectures") or []
        return BaseModelInfo(
            name=str(whole.get("_name_or_path") or file.parent.name),
            model_type=model_type,
            architecture=architectures[0] if architectures else None,
            **stated,
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise unreadable(file, "config", "a transformers configuration", error) from error
