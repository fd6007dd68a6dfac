"""The operator by which a compiled model calls the guard in the middle of a pass.

A hook before a block calls it with the residual stream. It is opaque to the compiler, which keeps
it where it is; vLLM divides its graphs there (`SPLITTING`), so that it runs as Python in every
pass. Which guard is meant is not in the graph: graphs are cached on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import torch
from torch import Tensor

SPLITTING: Final = "steerbridge::visit"


class Visitor(Protocol):
    """What is called at each site."""

    def visit(self, depth: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Read the stream at a depth, and rewrite it in place: `hidden` + `residual` [N, D]."""
        ...


_now: Visitor | None = None


@contextmanager
def visiting(visitor: Visitor) -> Iterator[None]:
    """The guard of the pass that runs inside."""
    global _now
    before, _now = _now, visitor
    try:
        yield
    finally:
        _now = before


@torch.library.custom_op(SPLITTING, mutates_args=("hidden", "residual"))
def visit(hidden: Tensor, residual: Tensor | None, depth: int) -> None:
    """See `Visitor`; outside `visiting` nothing happens, as in vLLM's trial passes."""
    if _now is not None:
        _now.visit(depth, hidden, residual)


@visit.register_fake
def _(hidden: Tensor, residual: Tensor | None, depth: int) -> None:  # noqa: ARG001 - an operator's
    return None
