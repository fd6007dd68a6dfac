"""Logits of the tiny random model, with and without a package."""

from __future__ import annotations

from typing import Any

import torch

from steerbridge.package import SteeringPackage
from steerbridge_hf import steer

TOKENS = torch.tensor([[5, 9, 13, 21, 8]])


@torch.no_grad()
def logits(model: Any, package: SteeringPackage | None = None) -> torch.Tensor:
    """Logits of every token of `TOKENS`."""
    if package is None:
        return model(TOKENS).logits[0]
    with steer(model, package, ignore=("model_type",)) as session:
        return passed(session, model, TOKENS)[0]


def passed(session: Any, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of one forward call that is a batch of requests."""
    with session.request(torch.ones_like(tokens)):
        return model(tokens).logits


@torch.no_grad()
def head_inputs(model: Any) -> torch.Tensor:
    """Hidden states of `TOKENS` before the output embedding."""
    return model.model(TOKENS).last_hidden_state[0]


def assert_alike(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
