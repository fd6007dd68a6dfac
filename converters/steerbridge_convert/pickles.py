"""Files written by `torch.save`, read without running any code from them.

The restricted unpickler of torch (`weights_only=True`) rebuilds tensors and containers and rejects
every other name. A format may allow classes of its tool; they become inert objects that only hold
attributes, so the tool's code is never imported. Arrays of numpy become objects that check their
bytes before there is an array. Only this module needs torch.

What a file may cost is known before torch sees it: nothing in it is compressed, and its records do
not hold more than the file does.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge.errors import RuntimeMissing
from steerbridge.format import unreadable
from steerbridge.tensors import Tensor

MAX_PICKLE: Final = 1 << 24  # bytes of what is not tensors
MAX_LIST: Final = 1 << 24  # bytes of the list of a file's records


class Bag:
    """Stand-in for an object of another tool: keeps its attributes, runs none of its code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(kwargs)


class _Dtype:
    """A data type of numpy as it is pickled: its code, and later its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        """The type.

        Raises:
            TypeError, ValueError: not a plain number's.
        """
        dtype = np.dtype(self.order + self.code if self.order in "<>" else self.code)
        if dtype.kind not in "fiu":
            raise ValueError(f"numbers, found {dtype}")
        return dtype


class Array:
    """An array of numpy as it is pickled: shape, type and bytes."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def numpy(self) -> NDArray[Any]:
        """The array, over the bytes that are there.

        Raises:
            TypeError, ValueError: bytes and shape do not fit together.
        """
        _, shape, dtype, fortran, raw = self.state
        order: Any = "F" if fortran else "C"
        return np.frombuffer(raw, dtype.numpy()).reshape(shape, order=order)


def _scalar(dtype: Any, raw: bytes) -> int | float:
    """A number of numpy."""
    value: int | float = np.frombuffer(raw, dtype.numpy(), 1)[0].item()
    return value


_NUMPY: Final = [
    (_Dtype, "numpy.dtype"),
    (Array, "numpy.ndarray"),
    *((Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def load(path: Path, classes: str = "") -> Any:
    """The contents of the file, with tensors memory-mapped.

    Args:
        classes: regular expression for the full names of classes that the file may contain.

    Raises:
        UnreadableSource: not a `torch.save` file, truncated, or it names anything else.
        RuntimeMissing: torch is not installed.
    """
    torch = _torch()
    _check_records(path)
    try:
        with _allowed(torch, path, classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises many types for malformed data
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise unreadable(path, "torch file", "tensors and plain containers", reason) from error


def _check_records(path: Path) -> None:
    """Look at the list of the file's records, which is bounded itself, and at nothing else."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if (begin := file.read(4)) != b"PK\x03\x04":
            old = "the layout before torch 1.6, or a bare pickle: save it again with torch.save"
            got = old if begin[:1] == b"\x80" else "something else"
            raise unreadable(path, "torch file", "an archive of torch.save", got)
        length = _list_length(file, size)
        if length > MAX_LIST:
            raise unreadable(path, "list of records", f"at most {MAX_LIST} bytes", length)
        try:
            records = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise unreadable(path, "torch file", "a whole archive", error) from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise unreadable(path, record.filename, "a record stored as it is", "a compressed one")
        if record.filename.endswith("/data.pkl") and record.file_size > MAX_PICKLE:
            want = f"at most {MAX_PICKLE} bytes"
            raise unreadable(path, record.filename, want, record.file_size)
    if (total := sum(record.file_size for record in records)) > size:
        raise unreadable(path, "records", f"at most the {size} bytes of the file", total)


def _list_length(file: Any, size: int) -> int:
    """Bytes of the list of records, as the end of a zip file tells them; 0 if it does not."""
    file.seek(max(0, size - (1 << 16) - 22))
    tail = file.read()
    end, wide = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    if end < 0 or len(tail) < end + 16:
        return 0
    length = int(struct.unpack_from("<I", tail, end + 12)[0])
    if length == 0xFFFFFFFF and 0 <= wide <= len(tail) - 48:  # zip64 has a field of its own
        length = int(struct.unpack_from("<Q", tail, wide + 40)[0])
    return length


@contextmanager
def _allowed(torch: Any, path: Path, classes: str) -> Iterator[None]:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if classes else []
    bags = [(type("Bag", (Bag,), {}), name) for name in names if re.fullmatch(classes, name)]
    with torch.serialization.safe_globals([*_NUMPY, *bags]):
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
    """Check that `value` is a finite float tensor, or such an array; float64 becomes float32.

    Raises:
        UnreadableSource: another type, another number of dimensions, more elements than there are
            bytes for, or values not finite.
    """
    torch = _torch()
    want = f"a float tensor of {dimensions} dimensions"
    if isinstance(value, Array):
        try:
            value = torch.from_numpy(np.array(value.numpy(), copy=True))
        except (TypeError, ValueError, AttributeError) as error:
            raise unreadable(path, what, want, error) from error
    if not isinstance(value, torch.Tensor):
        raise unreadable(path, what, want, type(value).__name__)
    value = value.detach()
    if value.layout != torch.strided or value.dim() != dimensions or 0 in value.shape:
        raise unreadable(path, what, want, f"shape {tuple(value.shape)}")
    name = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if name is None:
        raise unreadable(path, what, want, str(value.dtype))
    size, stored_bytes = math.prod(value.shape) * value.element_size(), _storage(value)
    if size > stored_bytes:
        raise unreadable(path, what, f"{size} bytes for {tuple(value.shape)}", stored_bytes)
    if name == "BF16":
        stored = Tensor("BF16", value.contiguous().view(torch.int16).numpy().view("<u2"))
    elif value.dtype == torch.float64:
        stored = Tensor.of(value.numpy())
    else:
        stored = Tensor(name, value.contiguous().numpy())
    if not stored.finite():
        raise unreadable(path, what, "finite values", "NaN or infinity")
    return stored


def _storage(value: Any) -> int:
    """Bytes that a tensor lies in; fewer than its elements take where it repeats itself."""
    return int(value.untyped_storage().nbytes())


_NAMES: Final[dict[str, Any]] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F32",
}


def holds(path: Path, test: Callable[[Any], bool], classes: str = "") -> bool:
    """True for a `torch.save` file whose contents pass a test.

    Raises:
        UnreadableSource: malformed, or it names other classes.
    """
    if not path.is_file() or path.suffix not in (".pt", ".pth", ".bin"):
        return False
    return test(load(path, classes))


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RuntimeMissing("torch", extra="convert") from error
    return torch
