"""What a llama.cpp model says of itself: fingerprint and quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import llama_cpp
from gguf import LlamaFileType

from steerbridge.fingerprint import ModelFacts, text_sha256, tokenizer_sha256
from steerbridge.spec import BaseModelInfo

# llama.cpp's name of an architecture where it is not transformers' model_type without `_`,
# `-` and a trailing `_text`. Several model types share the `llama` graph.
_ARCHITECTURES: Final = {"mistral": "llama", "qwen2_5_vl_text": "qwen2vl", "phi": "phi2"}


def facts(model: Any) -> ModelFacts:
    """Fingerprint of a `LlamaModel`; `model_type` is llama.cpp's architecture."""
    metadata = model.metadata()
    template = metadata.get("tokenizer.chat_template")
    return ModelFacts(
        model_type=metadata.get("general.architecture"),
        hidden_size=model.n_embd(),
        num_layers=llama_cpp.llama_model_n_layer(model.model),
        vocab_size=model.n_vocab(),
        name=metadata.get("general.name", ""),
        tokenizer_sha256=tokenizer_sha256(_tokens(model)),
        chat_template_sha256=None if template is None else text_sha256(template),
    )


def facts_for(model: Any, base: BaseModelInfo) -> ModelFacts:
    """The facts with the package's own word for the architecture if it means the same graph."""
    known = facts(model)
    same = _architecture(base.model_type) == _plain(known.model_type or "")
    return replace(known, model_type=base.model_type) if same else known


def _architecture(model_type: str) -> str:
    return _plain(_ARCHITECTURES.get(model_type, model_type.removesuffix("_text")))


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")


def _tokens(model: Any) -> Iterator[str]:
    """The vocabulary without the padding that converters add up to the embedding's size."""
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    count = model.n_vocab()

    def text(id: int) -> str:
        raw: bytes = llama_cpp.llama_vocab_get_text(vocab, id)
        return raw.decode("utf-8", "surrogateescape")

    while count and text(count - 1) == f"[PAD{count - 1}]":
        count -= 1
    return map(text, range(count))


def quantisation(model: Any) -> str:
    """Name of the weights' storage as in `calibrations`: F32, F16, Q4_1, Q4_K_M, ..."""
    try:
        kind = LlamaFileType(int(model.metadata()["general.file_type"]))
    except (KeyError, ValueError):
        return "unknown"
    return kind.name.removeprefix("ALL_").removeprefix("MOSTLY_")
