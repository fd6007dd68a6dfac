"""Finds the decoder in a model of another library by what it is: a list of as many blocks as the
configuration names, and the norm behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn

from steerbridge.errors import UnsupportedFeature

_NORMS: Final = ("norm", "ln_f", "final_layer_norm", "norm_f")


def decoder(model: nn.Module, layers: int, runtime: str) -> tuple[tuple[nn.Module, ...], nn.Module]:
    """The blocks of the language model, and its final norm.

    Raises:
        UnsupportedFeature: they cannot be located unambiguously.
    """
    found = [(parent, child) for parent, child in _lists(model) if len(child) == layers]
    name = type(model).__name__
    if len(found) != 1:
        raise UnsupportedFeature(runtime, f"{name} has {len(found)} lists of {layers} blocks")
    [(parent, blocks)] = found
    norms = [getattr(parent, norm) for norm in _NORMS if hasattr(parent, norm)]
    if len(norms) != 1:
        raise UnsupportedFeature(runtime, f"the final norm of {type(parent).__name__} is not known")
    return tuple(blocks), norms[0]


def _lists(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Lists of modules with their parents, those of a vision tower excluded."""
    for name, module in model.named_modules():
        if "vision" not in name:
            for child in module.children():
                if isinstance(child, nn.ModuleList):
                    yield module, child
