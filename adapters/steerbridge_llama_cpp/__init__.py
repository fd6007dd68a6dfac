"""Steerbridge for llama.cpp through llama-cpp-python.

llama = SteeredLlama("model.gguf", package="guard.gguf")
llama.create_chat_completion(messages)["steering"]
"""

try:
    import llama_cpp  # noqa: F401
except ImportError as error:
    from steerbridge.errors import RuntimeMissing

    raise RuntimeMissing("llama-cpp-python", extra="llama-cpp") from error

from steerbridge_llama_cpp.context import SteeredContext
from steerbridge_llama_cpp.llama import SteeredLlama, steer
from steerbridge_llama_cpp.model import LlamaCppModel, open_model
from steerbridge_llama_cpp.session import Session

__all__ = ["LlamaCppModel", "Session", "SteeredContext", "SteeredLlama", "open_model", "steer"]
