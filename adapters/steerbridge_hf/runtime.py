"""How Steerbridge finds this runtime (entry point `steerbridge.runtimes`)."""

from typing import Final

from steerbridge.registry import Runtime

RUNTIME: Final = Runtime(
    target="steerbridge_hf.model:open_model", engine="steerbridge_hf.engine:open_engine", extra="hf"
)
