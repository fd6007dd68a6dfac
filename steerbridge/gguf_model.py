"""The facts in the header of a GGUF model, under the names of a package's `base_model`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
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
    **dict.fromkeys(("exaone", "internlm3", "iquestcoder", "mistral", "mixtral"), "llama"),
    "ministral3": "mistral3",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), "deepseek2"),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_5_vl_text"), "qwen2vl"),
    "cohere": "command-r",
    "falcon_mamba": "mamba",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "granitemoe_swa": "granite_swa",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "llama4_text": "llama4",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
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


# What is known of the rows that llama.cpp makes of a picture, by its projector.
_TOWERS: Final = {
    "idefics3": "rows as in transformers, exactly if the tower has SiLU and nothing is resized",
    "mlp": "other rows than in transformers: its class token stands behind the patches",
    **dict.fromkeys(
        ("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger"),
        "as many rows as in transformers, at the same positions; their values are rounded (GELU)",
    ),
}


def describe_tower(path: Path) -> str:
    """The projector of a vision tower and how its rows compare with those in transformers.

    Raises:
        BrokenPackage: no well-formed GGUF file.
        DataError: it holds no vision tower.
    """
    metadata = gguf_file.read(path).metadata
    projector = metadata.get("clip.vision.projector_type", metadata.get("clip.projector_type"))
    if not isinstance(projector, str):
        raise DataError(Problem("clip.projector_type", "that of a vision tower", "none"), path)
    told = _TOWERS.get(projector, "not compared with transformers")
    advice = "" if projector == "idefics3" else "; train or calibrate the guard in llama.cpp"
    return f"{projector}: {told}{advice}"


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


@cache
def _tried() -> frozenset[str]:
    file = resources.files("steerbridge") / "architectures.json"
    return frozenset(json.loads(file.read_text("utf-8")))


def is_tried(architecture: str) -> bool:
    """Whether models of an architecture were steered in llama.cpp by `make conformance-models`; of
    others, only the names in their graphs are known."""
    return architecture in _tried()


def in_words_of(base: BaseModelInfo, known: ModelFacts) -> ModelFacts:
    """The facts with the package's own word for the architecture if it means the same graph."""
    same = architecture(base.model_type) == architecture(known.model_type or "")
    return replace(known, model_type=base.model_type) if same else known


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")
