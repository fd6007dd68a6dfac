"""How Steerbridge finds this runtime (entry point `steerbridge.runtimes`)."""

from typing import Final

from steerbridge.registry import Runtime

RUNTIME: Final = Runtime(
    target="steerbridge_llama_cpp.model:open_model",
    engine="steerbridge_llama_cpp.engine:open_engine",
    extra="llama-cpp",
)
