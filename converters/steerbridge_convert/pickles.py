"""Files written by `torch.save`, read without running any code from them.

The restricted unpickler of torch (`weights_only=True`) rebuilds tensors and containers and rejects
every other name. A format may allow classes of its tool; they become inert objects that only hold
attributes, so the tool's code is never imported. Only this module needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import RuntimeMissing, UnreadableSource
from steerbridge.format import unreadable
from steerbridge.tensors import Tensor


class Bag:
    """Stand-in for an object of another tool: keeps its attributes, runs none of its code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(kwargs)


def load(path: Path, classes: str = "") -> Any:
    """The contents of the file, with tensors memory-mapped if its layout allows.

    Args:
        classes: regular expression for the full names of classes that the file may contain.

    Raises:
        UnreadableSource: not a `torch.save` file, truncated, or it names anything else.
        RuntimeMissing: torch is not installed.
    """
    torch = _torch()
    try:
        with _allowed(torch, path, classes):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:  # the file layout before torch 1.6 cannot be mapped
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the unpickler raises many types for malformed data
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise unreadable(path, "torch file", "tensors and plain containers", reason) from error


@contextmanager
def _allowed(torch: Any, path: Path, classes: str) -> Iterator[None]:
    if not classes:
        yield
        return
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    bags = [(type("Bag", (Bag,), {}), name) for name in names if re.fullmatch(classes, name)]
    with torch.serialization.safe_globals(bags):
        yield


def save(value: Any, path: Path) -> None:
    """`torch.save` of tensors and plain containers."""
    _torch().save(value, path)


def torch_tensor(tensor: Tensor | Any) -> Any:
    """A torch tensor that shares memory with a package's tensor or a float32 array if possible."""
    torch = _torch()
    if not isinstance(tensor, Tensor):
        return torch.from_numpy(np.require(tensor, np.float32, ["C", "W"]))
    if tensor.dtype == "BF16":
        bits = np.require(tensor.array, np.uint16, ["C", "W"]).view(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16)
    return torch.from_numpy(np.require(tensor.array, None, ["C", "W"]))


def tensor(value: Any, what: str, path: Path, dimensions: int) -> Tensor:
    """Check that `value` is a finite float tensor; float64 is converted to float32.

    Raises:
        UnreadableSource: another type, another number of dimensions, or values not finite.
    """
    torch = _torch()
    want = f"a float tensor of {dimensions} dimensions"
    if not isinstance(value, torch.Tensor):
        raise unreadable(path, what, want, type(value).__name__)
    value = value.detach()
    if value.layout != torch.strided or value.dim() != dimensions or 0 in value.shape:
        raise unreadable(path, what, want, f"shape {tuple(value.shape)}")
    name = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if name is None:
        raise unreadable(path, what, want, str(value.dtype))
    if name == "BF16":
        stored = Tensor("BF16", value.contiguous().view(torch.int16).numpy().view("<u2"))
    elif value.dtype == torch.float64:
        stored = Tensor.of(value.numpy())
    else:
        stored = Tensor(name, value.contiguous().numpy())
    if not stored.finite():
        raise unreadable(path, what, "finite values", "NaN or infinity")
    return stored


_NAMES: Final[dict[str, Any]] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F32",
}


def holds(path: Path, test: Callable[[Any], bool], classes: str = "") -> bool:
    """True for a `torch.save` file whose contents pass a test."""
    if not path.is_file() or path.suffix not in (".pt", ".pth", ".bin"):
        return False
    try:
        return test(load(path, classes))
    except UnreadableSource:
        return False


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RuntimeMissing("torch", extra="convert") from error
    return torch
