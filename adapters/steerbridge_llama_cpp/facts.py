"""Fingerprint and quantisation of a llama.cpp model."""

from __future__ import annotations

from typing import Any

import llama_cpp
from gguf import LlamaFileType

from steerbridge import gguf_model
from steerbridge.fingerprint import ModelFacts, text_sha256, tokenizer_sha256
from steerbridge.spec import BaseModelInfo


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
        context_length=model.n_ctx_train(),
        tokenizer_sha256=tokenizer_sha256(_tokens(model)),
        chat_template_sha256=None if template is None else text_sha256(template),
    )


def facts_for(model: Any, base: BaseModelInfo) -> ModelFacts:
    """The facts, with the package's name for the architecture if both name the same graph."""
    return gguf_model.in_words_of(base, facts(model))


def _tokens(model: Any) -> list[str]:
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    raw = (llama_cpp.llama_vocab_get_text(vocab, id) for id in range(model.n_vocab()))
    return gguf_model.unpadded([text.decode("utf-8", "surrogateescape") for text in raw])


def quantisation(model: Any) -> str:
    """`storage_name` of the weights, or `unknown`."""
    try:
        kind = LlamaFileType(int(model.metadata()["general.file_type"]))
    except (KeyError, ValueError):
        return "unknown"
    return gguf_model.storage_name(kind)
