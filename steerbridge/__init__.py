"""Steerbridge: train a safety guard once, run the same steering package in every runtime.

The core needs numpy only; runtimes are extras (`pip install 'steerbridge[hf]'`) with import
packages of their own, such as `steerbridge_hf`.
"""

from steerbridge.errors import SteerbridgeError
from steerbridge.package import SteeringPackage, load
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome, names, open_model
from steerbridge.spec import SteeringSpec

__all__ = [
    "Outcome",
    "SteerbridgeError",
    "SteeringPackage",
    "SteeringSpec",
    "Verdict",
    "load",
    "names",
    "open_model",
]
