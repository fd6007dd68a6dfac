"""Steerbridge for Hugging Face transformers.

with steer(model, package) as session:
    model.generate(**inputs)
session.outcomes[0].fired
"""

from typing import TYPE_CHECKING

from steerbridge.registry import lazy

if TYPE_CHECKING:
    from steerbridge_hf.adapter import Session, steer
    from steerbridge_hf.model import HfModel, open_model

__all__ = ["HfModel", "Session", "open_model", "steer"]

__getattr__ = lazy(
    __name__,
    {
        "HfModel": "steerbridge_hf.model",
        "Session": "steerbridge_hf.adapter",
        "open_model": "steerbridge_hf.model",
        "steer": "steerbridge_hf.adapter",
    },
    extra="hf",
)
