"""Muon for the matrices of the tower, AdamW for all else.

Muon (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024) replaces the
momentum of a matrix by the nearest one whose singular values are about one. `torch.optim.Muon`
does the same in bfloat16, which a CPU without such units emulates slowly; hence this one in F32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 5
_MOMENTUM: Final = 0.95
_DECAY: Final = 0.01
_MATRICES: Final = "model.vision_model.encoder."


class Muon(torch.optim.Optimizer):
    """Steps of matrices [N, M] along their orthogonalised Nesterov momentum.

    A step has the root mean square of AdamW's, 0.2 of the learning rate (J. Liu et al., "Muon
    is Scalable for LLM Training", arXiv 2502.16982).
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                momentum = state.setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                update = orthogonalised(matrix.grad.lerp(momentum, _MOMENTUM))
                matrix.mul_(1 - group["lr"] * _DECAY)
                matrix.add_(update, alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonalised(matrix_NM: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    tall = matrix_NM.shape[0] > matrix_NM.shape[1]
    x = matrix_NM.T if tall else matrix_NM
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    update: Tensor = x.T if tall else x
    return update


class Optimisers:
    """Muon and AdamW over what is trained of a model, and over parameters given by name."""

    def __init__(self, model: Any, peak: float, others: Iterable[dict[str, Any]] = ()) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in trained if n.startswith(_MATRICES) and p.ndim == 2]
        rest = [p for n, p in trained if not (n.startswith(_MATRICES) and p.ndim == 2)]
        groups = [{"params": rest, "lr": peak / 2}, *others]
        self.parameters = [p for _, p in trained] + [p for g in others for p in g["params"]]
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=_DECAY)
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (Muon(matrices, peak), adam)
        self.peaks = [[g["lr"] for g in o.param_groups] for o in self.optimisers]

    def step(self, loss: Tensor, rate: float) -> None:
        """Backward, clip to a norm of one, and step at `rate` of the peak learning rates."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, peaks in zip(self.optimisers, self.peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            optimiser.step()
