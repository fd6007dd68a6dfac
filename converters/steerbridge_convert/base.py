"""The base model of an artifact whose files do not say it: read from that model's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerbridge import encodings
from steerbridge.fingerprint import text_sha256, tokenizer_sha256
from steerbridge.formats import unreadable
from steerbridge.package import load
from steerbridge.spec import BaseModelInfo
from steerbridge_convert import files


def base_model(path: Path) -> BaseModelInfo:
    """What a model directory (`config.json`), a GGUF model or a steering package says.

    Raises:
        UnreadableSource: the path is none of them.
        FileNotFoundError: there is nothing.
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
    return _of_gguf(metadata, path)


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


def _of_gguf(metadata: Any, path: Path) -> BaseModelInfo:
    architecture = metadata.get("general.architecture")
    tokens = list(metadata.get("tokenizer.ggml.tokens") or [])
    vocabulary = len(tokens)
    while tokens and tokens[-1] == f"[PAD{len(tokens) - 1}]":  # up to the embedding's size
        tokens.pop()
    template = metadata.get("tokenizer.chat_template")
    known = {"chat_template_sha256": text_sha256(template)} if template else {}
    try:
        return BaseModelInfo(
            name=metadata.get("general.name") or path.stem,
            model_type=architecture,
            hidden_size=metadata.get(f"{architecture}.embedding_length"),
            num_layers=metadata.get(f"{architecture}.block_count"),
            vocab_size=vocabulary,
            tokenizer_sha256=tokenizer_sha256(tokens),
            **known,
        )
    except ValueError as error:
        raise unreadable(path, "metadata", "a language model", error) from error
