"""The vision tower of the tiny model, in numpy, and the pictures that prompts hold.

The tower has one block and the projector of Idefics3: a picture of 64 x 64 pixels becomes 2 x 2
tiles and an overview of 32 x 32, each four rows of the language model. Its numbers are those that
transformers and libmtmd compute alike: pixels and patch kernel are exact in half precision, the
activation is SiLU.

In a prompt a picture is one character of `PICTURES`. Its rows have ids of their own behind the
vocabulary, so that a prompt with pictures is a list of ids as any other (`TinyModel.encode`).

Shapes: P patches of a tile, C channels of the tower, D width of the language model.
"""

from __future__ import annotations

import base64
import io
import itertools
from typing import Any, Final

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

PICTURES: Final = "\x1c\x1d\x1e"
TILE: Final = 32
TILES: Final = 2  # a side
PATCH: Final = 8
SCALE: Final = 2  # patches a side that become one row
TILE_ROWS: Final = (TILE // PATCH // SCALE) ** 2
PICTURE_ROWS: Final = (TILES * TILES + 1) * TILE_ROWS
CHANNELS: Final = 16
HEADS: Final = 2
INNER: Final = 32
EPS: Final = 1e-6
PIXEL_MEAN: Final = 127.5 / 255
PIXEL_STD: Final = 128 / 255
IMAGE: Final = "<image>"
END: Final = "\x04"  # in a prompt: the token that ends a turn
END_TOKEN: Final = "<|end|>"
TOKENS: Final = (
    "<fake_token_around_image>",
    IMAGE,
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
)
_PROJECTION: Final = "projection"


def png(picture: str) -> bytes:
    """A picture as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_pixels(picture)).save(file, "png")
    return file.getvalue()


def pictures(prompt: str) -> list[bytes]:
    """The pictures of a prompt as PNG files, in order."""
    return [png(character) for character in prompt if character in PICTURES]


def marked(prompt: str, marker: str) -> str:
    """The prompt with a marker in the place of each picture."""
    shown = "".join(marker if character in PICTURES else character for character in prompt)
    return text(shown)


def text(prompt: str) -> str:
    """A prompt without pictures as a text that a tokenizer takes."""
    return prompt.replace(END, END_TOKEN)


def content(prompt: str) -> list[dict[str, Any]]:
    """A prompt as the content of a chat message: parts of text, and pictures as `data:` URLs."""
    parts: list[dict[str, Any]] = []
    for shows, run in itertools.groupby(prompt, lambda character: character in PICTURES):
        for piece in run if shows else ["".join(run)]:
            parts.append(_picture_part(piece) if shows else {"type": "text", "text": text(piece)})
    return parts


def _picture_part(picture: str) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


class Tower:
    """Vision tower and projector.

    Args:
        width: D.
        silent: a channel of the language model that stays zero.
        seed: of the weights.
    """

    def __init__(self, width: int, silent: int, seed: int = 0) -> None:
        self.weights = _weights(width, silent, seed)

    def rows(self, picture: str) -> Float32:
        """The rows [PICTURE_ROWS, D] of a picture: its tiles row by row, then the overview."""
        return np.concatenate([self._tile(tile) for tile in _tiles(_pixels(picture))])

    def _tile(self, tile: NDArray[np.uint8]) -> Float32:
        w = self.weights
        pixels = (tile.astype(np.float32) * 2 - 255) / 256
        side = TILE // PATCH
        patches = pixels.reshape(side, PATCH, side, PATCH, 3).transpose(0, 2, 4, 1, 3)
        kernel = w["patch.weight"].reshape(CHANNELS, -1)
        embedded = patches.reshape(side * side, -1) @ kernel.T + w["patch.bias"] + w["position"]
        x = np.asarray(embedded, np.float32)
        x = x + self._attention(self._norm("norm1", x))
        x = x + self._mlp(self._norm("norm2", x))
        x = self._norm("norm", x)
        squares = x.reshape(side // SCALE, SCALE, side // SCALE, SCALE * CHANNELS)
        shuffled = squares.transpose(0, 2, 1, 3).reshape(TILE_ROWS, -1)
        return np.asarray(shuffled @ w[_PROJECTION].T, np.float32)

    def _norm(self, name: str, x: Float32) -> Float32:
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + EPS)
        return np.asarray(
            scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"], np.float32
        )

    def _linear(self, name: str, x: Float32) -> Float32:
        return np.asarray(
            x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"], np.float32
        )

    def _attention(self, x: Float32) -> Float32:
        size = CHANNELS // HEADS
        q, k, v = (self._linear(name, x).reshape(-1, HEADS, size) for name in "qkv")
        scores = q.swapaxes(0, 1) @ k.transpose(1, 2, 0) / np.float32(size**0.5)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        mixed = (weights @ v.swapaxes(0, 1)).swapaxes(0, 1)
        return self._linear("o", mixed.reshape(len(x), -1))

    def _mlp(self, x: Float32) -> Float32:
        h = self._linear("up", x)
        return self._linear("down", np.asarray(h / (1 + np.exp(-h)), np.float32))

    # ------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        """`vision_config` of an Idefics3 model."""
        return {
            "hidden_size": CHANNELS,
            "intermediate_size": INNER,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "image_size": TILE,
            "patch_size": PATCH,
            "hidden_act": "silu",
            "layer_norm_eps": EPS,
        }

    def tensors(self) -> dict[str, Float32]:
        """The weights as an Idefics3 model names them."""
        return {
            _FOLDER[part].format(kind): weight
            for name, weight in self.weights.items()
            for part, _, kind in [name.partition(".")]
        }

    def fill(self, writer: GGUFWriter) -> None:
        """Write what libmtmd reads, in F32."""
        writer.add_type("mmproj")
        writer.add_name("tiny")
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("idefics3")
        writer.add_vision_projection_dim(self.weights[_PROJECTION].shape[0])
        writer.add_vision_image_size(TILE)
        writer.add_vision_patch_size(PATCH)
        writer.add_vision_embedding_length(CHANNELS)
        writer.add_vision_feed_forward_length(INNER)
        writer.add_vision_block_count(1)
        writer.add_vision_head_count(HEADS)
        writer.add_vision_attention_layernorm_eps(EPS)
        writer.add_vision_image_mean([PIXEL_MEAN] * 3)
        writer.add_vision_image_std([PIXEL_STD] * 3)
        writer.add_vision_projector_scale_factor(SCALE)
        writer.add_uint32("clip.vision.preproc_image_size", TILES * TILE)
        writer.add_vision_use_silu(True)
        for name, weight in self.weights.items():
            part, _, kind = name.partition(".")
            writer.add_tensor(_GGUF[part].format(kind), np.ascontiguousarray(weight))


def processor() -> dict[str, Any]:
    """`processor_config.json` of an Idefics3 model."""
    return {
        "processor_class": "Idefics3Processor",
        "image_seq_len": TILE_ROWS,
        "image_processor": {
            "image_processor_type": "Idefics3ImageProcessor",
            "do_convert_rgb": True,
            "do_image_splitting": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [PIXEL_MEAN] * 3,
            "image_std": [PIXEL_STD] * 3,
            "max_image_size": {"longest_edge": TILE},
            "resample": 1,  # Lanczos
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": TILES * TILE},
        },
    }


def _pixels(picture: str) -> NDArray[np.uint8]:
    """Coloured squares [H, W, 3], other ones for each picture."""
    rng = np.random.default_rng(PICTURES.index(picture))
    squares = rng.integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    return squares.repeat(TILES * TILE // 8, axis=0).repeat(TILES * TILE // 8, axis=1)


def _tiles(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    from PIL import Image

    tiles = [
        pixels[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]
        for y in range(TILES)
        for x in range(TILES)
    ]
    overview = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
    return [*tiles, np.asarray(overview)]


def _weights(width: int, silent: int, seed: int) -> dict[str, Float32]:
    rng = np.random.default_rng([seed, 3])

    def random(*shape: int, scale: float = 0.3) -> Float32:
        return rng.normal(scale=scale, size=shape).astype(np.float32)

    kernel = random(CHANNELS, 3, PATCH, PATCH, scale=0.1)
    weights = {
        "patch.weight": kernel.astype(np.float16).astype(np.float32),  # libmtmd rounds it
        "patch.bias": random(CHANNELS),
        "position": random((TILE // PATCH) ** 2, CHANNELS),
    }
    for norm in ("norm1", "norm2", "norm"):
        weights[f"{norm}.weight"] = 1 + random(CHANNELS, scale=0.1)
        weights[f"{norm}.bias"] = random(CHANNELS, scale=0.1)
    sizes = dict.fromkeys("qkvo", (CHANNELS, CHANNELS))
    for name, (out, into) in {**sizes, "up": (INNER, CHANNELS), "down": (CHANNELS, INNER)}.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = random(out, into), random(out)
    weights[_PROJECTION] = random(width, CHANNELS * SCALE**2, scale=0.15)
    weights[_PROJECTION][silent] = 0
    return weights


_LAYER: Final = "model.vision_model.encoder.layers.0."
_FOLDER: Final = {
    "patch": "model.vision_model.embeddings.patch_embedding.{}",
    "position": "model.vision_model.embeddings.position_embedding.weight",
    "norm1": _LAYER + "layer_norm1.{}",
    "norm2": _LAYER + "layer_norm2.{}",
    "q": _LAYER + "self_attn.q_proj.{}",
    "k": _LAYER + "self_attn.k_proj.{}",
    "v": _LAYER + "self_attn.v_proj.{}",
    "o": _LAYER + "self_attn.out_proj.{}",
    "up": _LAYER + "mlp.fc1.{}",
    "down": _LAYER + "mlp.fc2.{}",
    "norm": "model.vision_model.post_layernorm.{}",
    "projection": "model.connector.modality_projection.proj.weight",
}
_GGUF: Final = {
    "patch": "v.patch_embd.{}",
    "position": "v.position_embd.weight",
    "norm1": "v.blk.0.ln1.{}",
    "norm2": "v.blk.0.ln2.{}",
    "q": "v.blk.0.attn_q.{}",
    "k": "v.blk.0.attn_k.{}",
    "v": "v.blk.0.attn_v.{}",
    "o": "v.blk.0.attn_out.{}",
    "up": "v.blk.0.ffn_up.{}",
    "down": "v.blk.0.ffn_down.{}",
    "norm": "v.post_ln.{}",
    "projection": "mm.model.fc.weight",
}
