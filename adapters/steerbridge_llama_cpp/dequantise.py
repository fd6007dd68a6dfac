"""An F32 copy of a GGUF model: the same weights without quantisation, to compare runtimes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

from steerbridge.atomic import replacing

_OWN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def dequantise(source: Path, target: Path) -> Path:
    """Write an F32 GGUF file with the metadata of `source` and its weights dequantised.

    One tensor is in memory at a time; the file appears whole or not at all.
    """
    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    with replacing(target) as fresh:
        _write(reader, GGUFWriter(fresh, architecture))
    return target


def _write(reader: GGUFReader, writer: GGUFWriter) -> None:
    try:
        writer.add_file_type(LlamaFileType.ALL_F32)
        copy_metadata(reader, writer)
        for tensor in reader.tensors:
            shape = [int(n) for n in reversed(tensor.shape)]
            bytes_ = 4 * int(np.prod(shape))
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(np.float32), bytes_, GGMLQuantizationType.F32
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(dequantize(tensor.data, tensor.tensor_type))
    finally:
        writer.close()


def copy_metadata(reader: Any, writer: Any, without: Collection[str] = ()) -> None:
    """Copy the fields of a `GGUFReader` that a `GGUFWriter` does not set itself."""
    for name, field in reader.fields.items():
        if name.startswith(_OWN) or name in without:
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=item)
