"""Locates the sites of a spec in a transformers model, through its own accessors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from steerbridge.errors import UnsupportedFeature
from steerbridge.fingerprint import ModelFacts, tokenizer_facts

RUNTIME: Final = "hf"

Visit = Callable[[nn.Module, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class Sites:
    """The modules at which the sites are: blocks and the output embedding."""

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    head: nn.Module
    config: Any

    def watch(self, depth: int, visit: Visit) -> Any:
        """Call `visit(module, h)` whenever the site at a depth is computed; returns a handle.

        The input of a block or of the output embedding is read where it is taken. The input of the
        final norm is read where the last block gives it: a model may use its norm elsewhere too.

        Args:
            visit: returns other states [B, Q, D] to go on with, or None.
        """
        hook: Any = torch.compiler.disable
        if depth == len(self.blocks):
            return self.blocks[-1].register_forward_hook(hook(_Output(visit)))
        module = self.head if depth > len(self.blocks) else self.blocks[depth]
        return module.register_forward_pre_hook(hook(_Input(visit)), with_kwargs=True)


class _Input:
    """A hook on what a module takes."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = self._visit(module, args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed}


class _Output:
    """A hook on what a module gives: states, or states and more."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        states = output if isinstance(output, Tensor) else output[0]
        changed = self._visit(module, states)
        if changed is None:
            return None
        return changed if isinstance(output, Tensor) else (changed, *output[1:])


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
    if decoder is head:  # ModernBERT's decoder calls its output embedding so
        decoder = inner.base_model
    if decoder is None or head is None:
        raise UnsupportedFeature(
            RUNTIME, f"{type(inner).__name__} names no decoder or no output embedding"
        )
    return Sites(inner, _blocks(decoder, config.num_hidden_layers), head, config)


def _blocks(decoder: nn.Module, count: int) -> tuple[nn.Module, ...]:
    """The one list of so many modules, the decoder's own before those of its parts."""
    own = [child for child in decoder.children() if _is_list(child, count)]
    lists = own or [module for module in decoder.modules() if _is_list(module, count)]
    if len(lists) != 1:
        raise UnsupportedFeature(
            RUNTIME, f"{type(decoder).__name__} has {len(lists)} lists of {count} blocks"
        )
    return tuple(lists[0].children())


def _is_list(module: nn.Module, count: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == count


def learned_positions(model: Any) -> int | None:
    """How many positions a model has embeddings for; None if it computes them.

    torch reports a position beyond them as an index, without a word of prompts.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT and its kin keep two rows before the first position.
    is_learned = known and any(known <= len(table.weight) <= known + 2 for table in tables)
    return known if is_learned else None


# ---------------------------------------------------------------- modalities

_IMAGES: Final = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def media_tokens(config: Any) -> tuple[int, ...]:
    """The token ids that stand for rows of an image in a prompt, frames of a video among them;
    none for a text model."""
    found = [getattr(config, name, None) for name in _IMAGES]
    # Chameleon keeps it in its map of token names.
    found.append((getattr(config, "vocabulary_map", None) or {}).get("<image>"))
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def has_vision(config: Any) -> bool:
    """True for the configuration of a vision-language model."""
    return bool(media_tokens(config))


def image_rows(model: Any, ids: Tensor) -> Tensor:
    """Which tokens [B, T] of a batch stand for rows of an image (bool)."""
    media = torch.tensor(media_tokens(model.config), dtype=ids.dtype, device=ids.device)
    return torch.isin(ids, media)


def ordinary_tokens(model: Any, count: int) -> Tensor:
    """Ids [1, count] on the model's device that stand for no row of an image: for trial passes."""
    media = media_tokens(model.config)
    ids = [i for i in range(count + len(media)) if i not in media][:count]
    return torch.tensor([ids], device=model.device)


# ---------------------------------------------------------------- facts


def facts(model: Any, tokenizer: Any = None) -> ModelFacts:
    """Fingerprint of a model; tokenizer and template only if a tokenizer is given."""
    config = model.config.get_text_config()
    return ModelFacts(
        model_type=config.model_type,
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        name=model.config.name_or_path,
        context_length=getattr(config, "max_position_embeddings", None),
        **tokenizer_facts(tokenizer),
    )
