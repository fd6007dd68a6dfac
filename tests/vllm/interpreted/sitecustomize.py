"""Python imports this at its start where the folder is on its path.

Kernels of Triton then run in its interpreter, on a machine without a GPU. The second model runner
of vLLM has no other way there.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


class Interpreter(DriverBase):
    """What is asked of a device's driver before its kernels are interpreted."""

    def __init__(self) -> None:  # of DriverBase: it wants nothing
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        del device
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("an interpreter is not timed")


backends["cpu"] = SimpleNamespace(driver=Interpreter, compiler=None)
driver.set_active(Interpreter())
