"""The two encodings of a steering package: a directory and a single GGUF file.

Each has a `read` that maps the tensors and a `write` into a fresh place; checks of meaning
and renaming into place are `package.py`'s work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import SafetensorError, safe_open

from steerbridge import _json, gguf_file
from steerbridge.errors import BrokenPackage, Problem
from steerbridge.tensors import STORAGE, Dtype, Tensor

CONFIG_NAME: Final = "steering_config.json"
TENSORS_NAME: Final = "steering.safetensors"
GGUF_ARCHITECTURE: Final = "steering"
GGUF_TYPE: Final = "adapter"
GGUF_SPEC_KEY: Final = "steering.spec"

_GGML_TYPES: Final[dict[Dtype, GGMLQuantizationType]] = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}

Parts = tuple[Any, dict[str, Tensor]]  # the spec as plain JSON, the tensors by name


# ---------------------------------------------------------------- directory


def read_directory(path: Path) -> Parts:
    """Read `steering_config.json` and map `steering.safetensors`.

    Raises:
        BrokenPackage: a file is missing, malformed, or a link out of the directory's files.
    """
    return (
        _json.loads(_regular(path / CONFIG_NAME).read_bytes(), CONFIG_NAME),
        map_safetensors(_regular(path / TENSORS_NAME)),
    )


def write_directory(path: Path, spec: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into the existing directory `path`."""
    (path / CONFIG_NAME).write_bytes(_json.dumps(spec))
    _write_safetensors(path / TENSORS_NAME, tensors)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Stream tensors into a file of the documented layout, widest dtype first (aligned).

    The library's own writer takes BF16 through torch or a raw interface that changed between
    its releases; its reader checks what is written here before it is used (`map_safetensors`).
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].array.dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "steerbridge"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.array.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name].array).data)


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise BrokenPackage(Problem(path.name, "a file", "none"), path.parent)
    if path.name == CONFIG_NAME and path.stat().st_size > _json.MAX_BYTES:
        size = f"{path.stat().st_size} bytes"
        raise BrokenPackage(Problem(path.name, f"at most {_json.MAX_BYTES} bytes", size))
    return path


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Let the library validate the header (sizes, offsets, overlaps), then map by offset."""
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise BrokenPackage(Problem(path.name, "a safetensors file", str(error)), path) from error
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    for name, info in header.items():
        dtype = _dtype(info["dtype"], name, path)
        begin, end = info["data_offsets"]
        raw = data[start + begin : start + end]
        tensors[name] = _view(raw, dtype, tuple(info["shape"]))
    return tensors


# ---------------------------------------------------------------- GGUF


def read_gguf(path: Path) -> Parts:
    """Map a package stored as one GGUF file.

    Raises:
        BrokenPackage: not a GGUF file, or one that holds something else.
    """
    file = gguf_file.read(path)
    for key, want in (
        ("general.architecture", GGUF_ARCHITECTURE),
        ("general.type", GGUF_TYPE),
    ):
        if (got := file.metadata.get(key)) != want:
            raise BrokenPackage(Problem(key, repr(want), repr(got)), path)
    text = file.metadata.get(GGUF_SPEC_KEY)
    if not isinstance(text, str):
        raise BrokenPackage(Problem(GGUF_SPEC_KEY, "a string", type(text).__name__), path)
    tensors = {
        name: _view(t.data, _dtype(t.type.name, name, path), t.shape)
        for name, t in file.tensors.items()
    }
    return _json.loads(text.encode(), GGUF_SPEC_KEY), tensors


def write_gguf(path: Path, spec: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write the package to the file `path`."""

    def fill(writer: GGUFWriter) -> None:
        writer.add_type(GGUF_TYPE)
        # The general.* keys are copies for tools that list GGUF files; only the spec counts.
        writer.add_name(spec["name"])
        if spec.get("description"):
            writer.add_description(spec["description"])
        if spec.get("license"):
            writer.add_license(spec["license"])
        writer.add_string(GGUF_SPEC_KEY, _json.dumps(spec).decode())
        for name, tensor in sorted(tensors.items()):
            array = np.ascontiguousarray(tensor.array)
            writer.add_tensor(name, array, raw_dtype=_GGML_TYPES[tensor.dtype])

    gguf_file.write(path, GGUF_ARCHITECTURE, fill)


# ---------------------------------------------------------------- both


def _dtype(name: str, tensor: str, path: Path) -> Dtype:
    if name not in STORAGE:
        raise BrokenPackage(Problem(f"tensor {tensor!r}", "F32, F16 or BF16", name), path)
    return name


def _view(raw: np.ndarray[Any, Any], dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    storage = STORAGE[dtype]
    assert raw.nbytes == math.prod(shape) * storage.itemsize, "sizes were checked by the reader"
    if raw.ctypes.data % storage.itemsize:  # safetensors aligns only to its JSON header
        raw = raw.copy()
    return Tensor(dtype, raw.view(storage).reshape(shape))
