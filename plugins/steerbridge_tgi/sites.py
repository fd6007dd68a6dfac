"""Locates the sites of a spec in TGI's models, and reads and writes them.

Its flash models keep the residual stream in two tensors, `hidden_states` and `residual`, whose sum
enters a block; fused norms then overwrite them, so both are read before the block runs. Models
that come from transformers keep it in one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from steerbridge.errors import UnsupportedFeature
from steerbridge.fingerprint import ModelFacts, tokenizer_facts
from steerbridge_torch import decoder

RUNTIME: Final = "tgi"
_HEAD: Final = "SpeculativeHead"  # TGI's name for an output embedding
# GPT-2's block gets a residual argument but does not add it.
_WHOLE_STREAM: Final = ("FlashGPT2Layer",)


@dataclass(frozen=True, slots=True)
class Sites:
    """The modules whose input is a site: blocks, final norm, output embedding."""

    blocks: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module

    def at_depth(self, depth: int) -> nn.Module:
        """The module whose input is the site at this depth (`SteeringSpec.depth`)."""
        return (*self.blocks, self.norm, self.head)[depth]


def text_config(model: Any) -> Any:
    """The configuration of the language model in a model of TGI."""
    for holder in (model, model.model):
        config = getattr(holder, "config", None)
        if config is not None:
            return config.get_text_config() if hasattr(config, "get_text_config") else config
    raise UnsupportedFeature(RUNTIME, f"{type(model).__name__} has no configuration")


def locate(model: Any) -> Sites:
    """Find the parts of `model.model`.

    Raises:
        UnsupportedFeature: they cannot be located unambiguously.
    """
    blocks, norm = decoder(model.model, text_config(model).num_hidden_layers, RUNTIME)
    return Sites(blocks, norm, _head(model.model))


def _head(model: nn.Module) -> nn.Module:
    heads = [m for m in model.modules() if type(m).__name__ == _HEAD]
    if not heads and hasattr(model, "get_output_embeddings"):
        accessors: Any = model
        heads = [accessors.get_output_embeddings()]
    if len(heads) != 1 or heads[0] is None:
        raise UnsupportedFeature(
            RUNTIME, f"{type(model).__name__} has {len(heads)} output embeddings"
        )
    return heads[0]


def facts(model: Any) -> ModelFacts:
    """Fingerprint of a loaded model and of the tokenizer that the server decodes with."""
    config = text_config(model)
    return ModelFacts(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        name=str(getattr(model, "model_id", "")),
        **tokenizer_facts(getattr(model, "tokenizer", None)),
    )


# ---------------------------------------------------------------- the stream


@dataclass(slots=True)
class Stream:
    """The arguments of a module whose input is a site."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    residual: Tensor | None

    @property
    def hidden(self) -> Tensor:
        value: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return value

    @property
    def count(self) -> int:
        """N."""
        return self.hidden.shape[:-1].numel()

    def rows(self) -> Tensor:
        """The hidden states [N, D]; a padded batch row after row."""
        whole = self.hidden if self.residual is None else self.hidden + self.residual
        return whole.reshape(-1, whole.shape[-1])

    def replaced(self, rows: Tensor, chosen: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with new hidden states [N, D] in the chosen rows [N] (bool).

        Other rows are bit-identical in both tensors.
        """
        old, mask = self.hidden, chosen[:, None]
        hidden = torch.where(mask, rows, old.reshape(rows.shape)).reshape(old.shape)
        args, kwargs = self.args, self.kwargs
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        if self.residual is not None:
            rest = torch.where(mask, torch.zeros_like(rows), self.residual.reshape(rows.shape))
            rest = rest.reshape(self.residual.shape)
            args = (args[0], rest, *args[2:])
        return args, kwargs


def takes_residual(module: nn.Module) -> bool:
    """Whether the module's second argument is the other part of the stream."""
    names = list(inspect.signature(module.forward).parameters)
    return names[1:2] == ["residual"] and type(module).__name__ not in _WHOLE_STREAM


def stream(args: tuple[Any, ...], kwargs: dict[str, Any], takes: bool) -> Stream:
    """The stream in the arguments of a call."""
    residual = args[1] if takes and len(args) > 1 else None
    if takes and kwargs.get("residual") is not None:
        raise UnsupportedFeature(RUNTIME, "a residual passed as a keyword argument")
    return Stream(args, kwargs, residual)
