"""The semantics of a package in torch alone: what HF, TGI and vLLM stand on.

Kernels score probes and rewrite rows; decisions say which rules hold; the ledger proves that every
site of a pass was reached once. Nothing here knows a library of models.
"""

from steerbridge_torch.blocks import decoder
from steerbridge_torch.decisions import Judged, begins, strengths
from steerbridge_torch.kernels import Weights, quantisation, weights_sha256
from steerbridge_torch.ledger import Ledger
from steerbridge_torch.products import rounded
from steerbridge_torch.tokens import NEVER, RowLogits, RowScores, wide

__all__ = [
    "NEVER",
    "Judged",
    "Ledger",
    "RowLogits",
    "RowScores",
    "Weights",
    "begins",
    "decoder",
    "quantisation",
    "rounded",
    "strengths",
    "weights_sha256",
    "wide",
]
