"""Steerbridge for Hugging Face transformers.

with steer(model, package) as session:
    model.generate(**inputs)
session.outcomes[0].fired
"""

from steerbridge_hf.adapter import Session, steer
from steerbridge_hf.model import HfModel, open_model

__all__ = ["HfModel", "Session", "open_model", "steer"]
