"""Locates the sites of a spec in a transformers model, through its own accessors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from steerbridge.errors import UnsupportedFeature
from steerbridge.fingerprint import ModelFacts, text_sha256, tokenizer_sha256

RUNTIME = "hf"


@dataclass(frozen=True, slots=True)
class Sites:
    """The modules whose input is a site: blocks (and final norm) and the output embedding."""

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    head: nn.Module
    config: Any

    def at_depth(self, depth: int) -> nn.Module:
        """The module whose first input is the site at this depth."""
        if depth < len(self.blocks):
            return self.blocks[depth]
        if depth > len(self.blocks):
            return self.head
        model: Any = self.model
        return _final_norm(model.get_decoder())


def locate(model: Any) -> Sites:
    """Find decoder blocks and output embedding of a causal (or vision-) language model.

    Raises:
        UnsupportedFeature: not a generating decoder, or its parts cannot be located unambiguously.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    if not isinstance(inner, PreTrainedModel) or not isinstance(inner, GenerationMixin):
        raise UnsupportedFeature(RUNTIME, f"{type(model).__name__} is not a generating model")
    if inner.config.is_encoder_decoder:
        raise UnsupportedFeature(RUNTIME, "encoder-decoder models have no prompt end to read")
    config = inner.config.get_text_config()
    accessors: Any = inner
    decoder, head = accessors.get_decoder(), accessors.get_output_embeddings()
    if decoder is None or head is None:
        raise UnsupportedFeature(
            RUNTIME, f"{type(inner).__name__} names no decoder or no output embedding"
        )
    lists = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    if len(lists) != 1:
        raise UnsupportedFeature(
            RUNTIME,
            f"{type(decoder).__name__} has {len(lists)} lists of {config.num_hidden_layers} blocks",
        )
    return Sites(inner, tuple(lists[0]), head, config)


def _final_norm(decoder: nn.Module) -> nn.Module:
    norms = [m for name, m in decoder.named_children() if name in _FINAL_NORMS]
    if len(norms) != 1:
        raise UnsupportedFeature(
            RUNTIME, f"the final norm of {type(decoder).__name__} is not known"
        )
    return norms[0]


_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def has_vision(config: Any) -> bool:
    """True for the configuration of a vision-language model."""
    return image_token(config) is not None


def image_token(config: Any) -> int | None:
    """The token id that stands for rows of an image in a prompt; None for a text model."""
    for name in ("image_token_id", "image_token_index"):
        if (token := getattr(config, name, None)) is not None:
            return int(token)
    # Chameleon keeps it in its map of token names.
    names = getattr(config, "vocabulary_map", None) or {}
    return names.get("<image>")


def image_rows(model: Any, ids: Tensor) -> Tensor:
    """Which tokens [B, T] of a batch stand for rows of an image (bool)."""
    token = image_token(model.config)
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token


def facts(model: Any, tokenizer: Any = None) -> ModelFacts:
    """Fingerprint of a model; tokenizer and template only if a tokenizer is given."""
    config = model.config.get_text_config()
    template = getattr(tokenizer, "chat_template", None)
    return ModelFacts(
        model_type=config.model_type,
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        name=model.config.name_or_path,
        tokenizer_sha256=_tokenizer_hash(tokenizer),
        chat_template_sha256=text_sha256(template) if isinstance(template, str) else None,
    )


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    by_id = sorted((id, token) for token, id in tokenizer.get_vocab().items())
    return tokenizer_sha256(token for _, token in by_id)
