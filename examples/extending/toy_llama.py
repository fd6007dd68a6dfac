"""Somebody else's engine: a llama in numpy, F32, from a folder as transformers writes it.

Nothing here knows Steerbridge. What a guard needs of an engine is `visit`: it is called with the
rows at each depth, and the model goes on with the rows that it returns. Depth k is the input of
block k, depth `layers` that of the final norm, and depth `layers + 1` that of the output embedding.

Shapes: T rows (tokens), D width, H heads, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Float32 = NDArray[np.float32]
Visit = Callable[[int, Float32], Float32]  # (depth, rows [T, D]) -> rows


class Llama:
    """The model. It keeps no cache: every token evaluates all rows again."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self._weights = load_file(folder / "model.safetensors")
        self.layers: int = self.config["num_hidden_layers"]
        self.head = self._weights["lm_head.weight"]  # [V, D]

    def forward(self, ids: list[int], visit: Visit) -> Float32:
        """Logits [T, V]."""
        with np.errstate(all="ignore"):  # a guard is there to notice what is not finite
            x = self._weights["model.embed_tokens.weight"][ids]
            for layer in range(self.layers):
                x = visit(layer, x)
                x = x + self._attention(layer, x)
                x = x + self._mlp(layer, x)
            x = self._norm(visit(self.layers, x), self._weights["model.norm.weight"])
            return _f32(visit(self.layers + 1, x) @ self.head.T)

    def _weight(self, layer: int, name: str) -> Float32:
        return self._weights[f"model.layers.{layer}.{name}.weight"]

    def _attention(self, layer: int, x: Float32) -> Float32:
        x = self._norm(x, self._weight(layer, "input_layernorm"))
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q, k, v = (
            (x @ self._weight(layer, f"self_attn.{name}_proj").T).reshape(len(x), count, -1)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        k, v = (np.repeat(part, heads // groups, axis=1) for part in (self._rotated(k), v))
        scores = np.einsum("thd,shd->hts", self._rotated(q), k) / np.sqrt(q.shape[2])
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf  # what comes later
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1)
        return _f32(mixed @ self._weight(layer, "self_attn.o_proj").T)

    def _mlp(self, layer: int, x: Float32) -> Float32:
        x = self._norm(x, self._weight(layer, "post_attention_layernorm"))
        gate, up = (x @ self._weight(layer, f"mlp.{name}_proj").T for name in ("gate", "up"))
        return _f32((gate / (1 + np.exp(-gate)) * up) @ self._weight(layer, "mlp.down_proj").T)

    def _norm(self, x: Float32, weight: Float32) -> Float32:
        mean = (x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"]
        return _f32(x / np.sqrt(mean) * weight)

    def _rotated(self, x: Float32) -> Float32:
        """Rotary positions on [T, H, D/H]: first half against second half."""
        half = x.shape[2] // 2
        angle = np.arange(len(x))[:, None] * self.config["rope_theta"] ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return _f32(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2))


class Tokenizer:
    """Bytes, and special tokens after them."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary = content["model"]["vocab"] | special
        self.tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        self.end = special[config["eos_token"]]
        self.template: str | None = config.get("chat_template")
        self._special = special

    def encode(self, text: str) -> list[int]:
        pieces = re.split("(" + "|".join(map(re.escape, self._special)) + ")", text)
        ids = ([self._special[p]] if p in self._special else list(p.encode()) for p in pieces)
        return [id for piece in ids for id in piece]

    def decode(self, ids: list[int]) -> bytes:
        return bytes(id for id in ids if id < 256)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The text of a chat, up to where the answer begins."""
        if self.template is None:
            return "\n".join(message["content"] for message in messages)
        template = jinja2.Template(self.template)
        text: str = template.render(messages=messages, add_generation_prompt=True)
        return text


def _f32(values: NDArray[Any]) -> Float32:
    return np.asarray(values, np.float32)
