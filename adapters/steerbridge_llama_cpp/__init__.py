"""Steerbridge for llama.cpp through llama-cpp-python.

llama = SteeredLlama("model.gguf", package="guard.gguf")
llama.create_chat_completion(messages)["steering"]
"""

from typing import TYPE_CHECKING

from steerbridge.registry import lazy

if TYPE_CHECKING:
    from steerbridge_llama_cpp.context import SteeredContext
    from steerbridge_llama_cpp.llama import SteeredLlama, steer
    from steerbridge_llama_cpp.model import LlamaCppModel, open_model
    from steerbridge_llama_cpp.session import Session

__all__ = ["LlamaCppModel", "Session", "SteeredContext", "SteeredLlama", "open_model", "steer"]

__getattr__ = lazy(
    __name__,
    {
        "LlamaCppModel": "steerbridge_llama_cpp.model",
        "Session": "steerbridge_llama_cpp.session",
        "SteeredContext": "steerbridge_llama_cpp.context",
        "SteeredLlama": "steerbridge_llama_cpp.llama",
        "open_model": "steerbridge_llama_cpp.model",
        "steer": "steerbridge_llama_cpp.llama",
    },
    extra="llama-cpp",
)
