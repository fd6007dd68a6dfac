"""A tiny random model whose blocks, but one, see a window of sixteen rows (architecture gemma3)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from steerbridge import gguf_file
from steerbridge.testing.model import TinyModel


def save(path: Path) -> Path:
    gguf_file.write(path, "gemma3", _fill)
    return path


def _fill(writer: GGUFWriter) -> None:
    width, inner, layers, size, window = 64, 96, 6, 16, 16
    tiny = TinyModel()
    rng = np.random.default_rng(5)

    def add(name: str, *shape: int, scale: float = 0.2) -> None:
        weight = rng.normal(scale=scale, size=shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(name, weight.astype(np.float32))

    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(window)
    tiny.fill_vocabulary(writer)
    add("token_embd.weight", len(tiny.tokens), width)
    add("output_norm.weight", width)
    for i in range(layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"blk.{i}.{name}.weight", width)
        for name in ("attn_q_norm", "attn_k_norm"):
            add(f"blk.{i}.{name}.weight", size)
        add(f"blk.{i}.attn_q.weight", 4 * size, width)
        add(f"blk.{i}.attn_k.weight", 2 * size, width)
        add(f"blk.{i}.attn_v.weight", 2 * size, width)
        add(f"blk.{i}.attn_output.weight", width, 4 * size)
        add(f"blk.{i}.ffn_gate.weight", inner, width)
        add(f"blk.{i}.ffn_up.weight", inner, width)
        add(f"blk.{i}.ffn_down.weight", width, inner)
