"""The facts in the header of a GGUF model, under the names of a package's `base_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gguf import MODEL_ARCH_NAMES, LlamaFileType

from steerbridge import gguf_file
from steerbridge.errors import DataError, Problem
from steerbridge.fingerprint import ModelFacts, text_sha256, tokenizer_sha256
from steerbridge.spec import BaseModelInfo

# llama.cpp's name of an architecture where it is not transformers' model_type without `_`,
# `-` and a trailing `_text`. Several model types share the `llama` graph.
_ARCHITECTURES: Final = {
    "mistral": "llama",
    "mixtral": "llama",
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm": "chatglm",
    "granitemoehybrid": "granitehybrid",
    "qwen2_5_vl": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "phi": "phi2",
}


def read_facts(path: Path) -> ModelFacts:
    """Facts of a GGUF language model; only its header is read.

    Raises:
        BrokenPackage: no well-formed GGUF file.
        DataError: it holds no language model.
    """
    return facts_of(gguf_file.read(path).metadata, path)


def facts_of(metadata: Mapping[str, Any], path: Path) -> ModelFacts:
    """The same from metadata already read; `model_type` is llama.cpp's architecture.

    Raises:
        DataError: a field is missing or of another type.
    """
    architecture = metadata.get("general.architecture")
    numbers = [metadata.get(f"{architecture}.{key}") for key in ("embedding_length", "block_count")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not all(isinstance(n, int) for n in numbers) or not tokens:
        got = f"architecture {architecture!r}, width and blocks {numbers}"
        raise DataError(Problem("metadata", "a language model with its vocabulary", got), path)
    template = metadata.get("tokenizer.chat_template")
    return ModelFacts(
        model_type=architecture,
        hidden_size=int(numbers[0]),  # type: ignore[arg-type]
        num_layers=int(numbers[1]),  # type: ignore[arg-type]
        vocab_size=len(tokens),
        name=metadata.get("general.name") or path.stem,
        tokenizer_sha256=tokenizer_sha256(unpadded(list(tokens))),
        chat_template_sha256=text_sha256(template) if template else None,
    )


def unpadded(tokens: list[str]) -> list[str]:
    """The vocabulary without the padding that converters add up to the embedding's size."""
    while tokens and tokens[-1] == f"[PAD{len(tokens) - 1}]":
        tokens.pop()
    return tokens


def storage_name(kind: LlamaFileType) -> str:
    """Name of the weights' storage as in `calibrations`: F32, F16, Q4_1, Q4_K_M, ..."""
    return kind.name.removeprefix("ALL_").removeprefix("MOSTLY_")


def architecture(model_type: str) -> str:
    """llama.cpp's name of a model type of transformers, or of an architecture of llama.cpp."""
    name = _plain(_ARCHITECTURES.get(model_type, model_type.removesuffix("_text")))
    return next((known for known in MODEL_ARCH_NAMES.values() if _plain(known) == name), name)


def in_words_of(base: BaseModelInfo, known: ModelFacts) -> ModelFacts:
    """The facts with the package's own word for the architecture if it means the same graph."""
    same = architecture(base.model_type) == architecture(known.model_type or "")
    return replace(known, model_type=base.model_type) if same else known


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")
