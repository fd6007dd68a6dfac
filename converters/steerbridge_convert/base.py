"""Facts about the base model, read from that model's own files when an artifact lacks them."""

from __future__ import annotations

from pathlib import Path

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


def _of_config(file: Path) -> BaseModelInfo:
    whole = files.json_object(file)
    try:
        config = {**whole, **whole.get("text_config", {})}  # the language model of a VLM
        architectures: list[str] = whole.get("architectures") or []
        return BaseModelInfo(
            name=str(whole.get("_name_or_path") or file.parent.name),
            model_type=config["model_type"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            **({"architecture": architectures[0]} if architectures else {}),
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise unreadable(file, "config", "a transformers configuration", error) from error
