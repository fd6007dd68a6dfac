"""How Steerbridge finds this runtime (entry point `steerbridge.runtimes`)."""

from typing import Final

from steerbridge.registry import Runtime

RUNTIME: Final = Runtime(target="steerbridge_vllm.model:open_model")
