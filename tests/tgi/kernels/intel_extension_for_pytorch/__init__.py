"""Stand-ins in torch for the kernels that TGI's flash classes call on a CPU.

With this folder on PYTHONPATH the server takes the machine for one with Intel's extension and loads
its own `FlashCausalLM`, unmodified. Slow, and for tests only.
"""

from . import distributed, llm

__all__ = ["distributed", "llm"]
