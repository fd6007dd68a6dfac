"""A tiny llama model in numpy: the ground that the conformance kit stands on.

Its weights are random but fixed by a seed, its tokens are bytes, and it is computed here, without
torch and without hooks, so that no runtime can agree with it by sharing a mistake. It is written as
a Hugging Face folder and as a GGUF file.

Two bytes are traps: `NAN` has an embedding that is not a number; `OVERFLOW` makes channel 0
infinite at the input of block `TRAP_LAYER + 1`, as an overflow in half precision would. A third,
`MARK`, has so long an embedding that a linear probe finds it among any others.

With a vision tower (`steerbridge.testing.vision`) it is the language model of an Idefics3.

Shapes: T rows, D width, H heads, G heads of keys and values, F inner width, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray
from safetensors.numpy import save_file

from steerbridge import gguf_file
from steerbridge.atomic import replacing
from steerbridge.fingerprint import ModelFacts, text_sha256, tokenizer_sha256
from steerbridge.testing import vision

Float32 = NDArray[np.float32]
Edit = Callable[[int, Float32], Float32]  # (depth, rows) -> rows

LAYERS: Final = 4
WIDTH: Final = 32
HEADS: Final = 4
KV_HEADS: Final = 2
INNER: Final = 64
CONTEXT: Final = 1024
EOS: Final = 256  # the first ids are the 256 bytes
END: Final = vision.END  # in a prompt: EOS
EPS: Final = 1e-5
THETA: Final = 10000.0
NAN: Final = "\x01"
OVERFLOW: Final = "\x02"
TRAP_LAYER: Final = 1
MARK: Final = "#"
_TRAP: Final = WIDTH - 1  # a channel that is zero for every other token
PAD: Final = 259
_SPECIAL: Final = (vision.END_TOKEN, "<|user|>", "<|assistant|>", "<|pad|>", *vision.TOKENS)
_BLANK_LINE: Final = "\u010a\u010a"  # two newlines, one token: libmtmd asks for it
_MERGES: Final = [" ".join(_BLANK_LINE)]
VOCAB: Final = 256 + len(_SPECIAL) + 1
_LATER: Final = len(vision.TOKENS) + 1  # tokens that only prompts with pictures hold
TEMPLATE: Final = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A message is its content, so that a prompt with pictures can be asked through a chat.
CONTENT_TEMPLATE: Final = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@dataclass
class Cache:
    """Keys and values [T, G, D/H] of the rows so far, by layer."""

    keys: list[Float32] = field(default_factory=list)
    values: list[Float32] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.keys[0]) if self.keys else 0


class TinyModel:
    """The model.

    Args:
        template: a chat template, or none: then a prompt is its bytes.
        pictures: whether it has a vision tower; its chat template is then `CONTENT_TEMPLATE`.
        head: width of an attention head; some runtimes have none so narrow as the usual 8.
    """

    def __init__(
        self,
        seed: int = 0,
        template: str | None = None,
        *,
        pictures: bool = False,
        head: int = WIDTH // HEADS,
    ) -> None:
        self.template = CONTENT_TEMPLATE if pictures else template
        self.head = head
        self.weights = _weights(seed, head)
        self.tower = vision.Tower(WIDTH, _TRAP) if pictures else None
        self.answers: dict[Any, Any] = {}  # of the unsteered model, kept by the oracle

    # ------------------------------------------------------------ tokens

    @staticmethod
    def encode(text: str) -> list[int]:
        """Token ids of a prompt: its bytes in UTF-8; `END` is one token; rows of a picture have ids
        from VOCAB on."""
        ids: list[int] = []
        for character in text:
            if character in vision.PICTURES:
                ids += _picture_ids(character)
            else:
                ids += [EOS] if character == END else character.encode()
        return ids

    @staticmethod
    def of_picture(ids: list[int]) -> NDArray[np.bool_]:
        """Which rows of a prompt [T] are a picture's."""
        return np.asarray(ids) >= VOCAB

    @cached_property
    def inputs(self) -> Float32:
        """What block 0 reads for each id: embeddings, then the rows of every picture."""
        rows = [self.tower.rows(picture) for picture in vision.PICTURES] if self.tower else []
        return np.concatenate([self.weights["embedding"], *rows])

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary as byte-level BPE writes it."""
        return [*_byte_names(), *_SPECIAL, _BLANK_LINE]

    @property
    def facts(self) -> ModelFacts:
        """What a runtime must find out about the model."""
        return ModelFacts(
            "llama",
            hidden_size=WIDTH,
            num_layers=LAYERS,
            vocab_size=VOCAB,
            name="tiny",
            architecture=_IDEFICS if self.tower else _LLAMA,
            tokenizer_sha256=tokenizer_sha256(self.tokens),
            chat_template_sha256=None if self.template is None else text_sha256(self.template),
        )

    # ------------------------------------------------------------ computation

    def forward(
        self, ids: list[int], cache: Cache | None = None, edit: Edit | None = None
    ) -> tuple[dict[int, Float32], Float32]:
        """Hidden states of new rows by depth, and their logits [T, V].

        Depth L is `layer_input[L]` (L = LAYERS: the input of the final norm), LAYERS + 1 is
        `head_input`; states are those before `edit`.

        Args:
            cache: rows that came before; the new ones are added.
            edit: changes rows at a depth before the model goes on with them.
        """
        cache = cache if cache is not None else Cache()
        before = cache.rows
        states: dict[int, Float32] = {}
        with np.errstate(all="ignore"):  # the traps
            x = self.inputs[ids]
            for layer in range(LAYERS):
                x = _noted(layer, x, states, edit)
                x = x + self._attention(layer, x, cache, before)
                x = x + self._mlp(layer, x)
            x = _noted(LAYERS, x, states, edit)
            x = _norm(x, self.weights["final_norm"])
            x = _noted(LAYERS + 1, x, states, edit)
            return states, x @ self.weights["head"].T

    def _attention(self, layer: int, x: Float32, cache: Cache, before: int) -> Float32:
        w = {name: self.weights[f"{layer}.{name}"] for name in ("q", "k", "v", "o")}
        h = _norm(x, self.weights[f"{layer}.attention_norm"])
        size, at = self.head, np.arange(before, before + len(x))
        q = _rotated((h @ w["q"].T).reshape(-1, HEADS, size), at)
        k = _rotated((h @ w["k"].T).reshape(-1, KV_HEADS, size), at)
        v = (h @ w["v"].T).reshape(-1, KV_HEADS, size)
        if layer == len(cache.keys):
            cache.keys.append(k)
            cache.values.append(v)
        else:
            cache.keys[layer] = np.concatenate([cache.keys[layer], k])
            cache.values[layer] = np.concatenate([cache.values[layer], v])
        each = HEADS // KV_HEADS
        keys = np.repeat(cache.keys[layer], each, axis=1)
        values = np.repeat(cache.values[layer], each, axis=1)
        scores = q.swapaxes(0, 1) @ keys.transpose(1, 2, 0) / np.float32(size**0.5)
        later = np.arange(keys.shape[0])[None, :] > at[:, None]
        scores = np.where(later[None], np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        mixed = (weights @ values.swapaxes(0, 1)).swapaxes(0, 1)
        return np.asarray(mixed.reshape(len(x), -1) @ w["o"].T, np.float32)

    def _mlp(self, layer: int, x: Float32) -> Float32:
        w = {name: self.weights[f"{layer}.{name}"] for name in ("gate", "up", "down")}
        h = _norm(x, self.weights[f"{layer}.mlp_norm"])
        gate = h @ w["gate"].T
        return np.asarray((gate / (1 + np.exp(-gate)) * (h @ w["up"].T)) @ w["down"].T, np.float32)

    # ------------------------------------------------------------ files

    def save_folder(self, path: Path) -> Path:
        """Write `config.json`, weights and tokenizer as transformers reads them."""
        with replacing(path) as fresh:
            fresh.mkdir()
            (fresh / "config.json").write_text(json.dumps(self._config()))
            (fresh / "tokenizer.json").write_text(json.dumps(self._tokenizer()))
            (fresh / "tokenizer_config.json").write_text(json.dumps(self._tokenizer_config()))
            tensors = {}
            for name, weight in self.weights.items():
                layer, _, part = name.rpartition(".")
                name = _FOLDER[part].format(layer)
                if self.tower:
                    name = name.replace("model.", "model.text_model.")
                tensors[name] = weight
            if self.tower:
                tensors |= self.tower.tensors()
                (fresh / "processor_config.json").write_text(json.dumps(vision.processor()))
            save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        return path

    def save_gguf(self, path: Path) -> Path:
        """Write a GGUF file of architecture `llama`, in F32."""
        path.parent.mkdir(parents=True, exist_ok=True)
        gguf_file.write(path, "llama", self._fill)
        return path

    def save_mmproj(self, path: Path) -> Path:
        """Write the vision tower as libmtmd reads it, in F32."""
        assert self.tower, "a model without pictures has no vision tower"
        path.parent.mkdir(parents=True, exist_ok=True)
        gguf_file.write(path, "clip", self.tower.fill)
        return path

    def _config(self) -> dict[str, Any]:
        text = _config(self.head)
        if not self.tower:
            return text
        return {
            "architectures": [_IDEFICS],
            "model_type": "idefics3",
            "text_config": text,
            "vision_config": self.tower.config(),
            "scale_factor": vision.SCALE,
            "image_token_id": 256 + _SPECIAL.index(vision.IMAGE),
            **{key: text[key] for key in _SHARED},
        }

    def _fill(self, writer: GGUFWriter) -> None:
        writer.add_name("tiny")
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(WIDTH)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(EPS)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(THETA)
        writer.add_vocab_size(VOCAB)
        self.fill_vocabulary(writer)
        for name, weight in self.weights.items():
            layer, _, part = name.rpartition(".")
            heads = {"q": HEADS, "k": KV_HEADS}.get(part)
            array = weight if heads is None else _interleaved(weight, heads)
            writer.add_tensor(_GGUF[part].format(layer), np.ascontiguousarray(array))

    def fill_vocabulary(self, writer: GGUFWriter) -> None:
        """Add the tokenizer and the chat template to a GGUF file of any model."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(self.tokens)
        writer.add_token_types([1] * 256 + [3] * len(_SPECIAL) + [1])  # normal, control
        writer.add_token_merges(_MERGES)
        writer.add_eos_token_id(EOS)
        writer.add_pad_token_id(PAD)
        writer.add_add_bos_token(False)
        if self.template is not None:
            writer.add_chat_template(self.template)

    def _tokenizer(self) -> dict[str, Any]:
        special = [
            {
                "id": 256 + i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, name in enumerate(_SPECIAL)
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {**level, "use_regex": True},
            "post_processor": None,
            "decoder": {**level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {token: i for i, token in enumerate(self.tokens)},
                "merges": _MERGES,
            },
        }

    def _tokenizer_config(self) -> dict[str, Any]:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _SPECIAL[0],
            "pad_token": _SPECIAL[PAD - 256],
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
        }
        return config if self.template is None else {**config, "chat_template": self.template}


def _weights(seed: int, size: int) -> dict[str, Float32]:
    rng = np.random.default_rng(seed)

    def random(*shape: int, scale: float = 0.4) -> Float32:
        return rng.normal(scale=scale, size=shape).astype(np.float32)

    weights = {"embedding": random(VOCAB - _LATER, WIDTH, scale=1.0)}
    for layer in range(LAYERS):
        weights |= {
            f"{layer}.attention_norm": 1 + random(WIDTH, scale=0.1),
            f"{layer}.q": random(HEADS * size, WIDTH),
            f"{layer}.k": random(KV_HEADS * size, WIDTH),
            f"{layer}.v": random(KV_HEADS * size, WIDTH),
            f"{layer}.o": random(WIDTH, HEADS * size),
            f"{layer}.mlp_norm": 1 + random(WIDTH, scale=0.1),
            f"{layer}.gate": random(INNER, WIDTH),
            f"{layer}.up": random(INNER, WIDTH),
            f"{layer}.down": random(WIDTH, INNER),
        }
        for part in ("q", "k", "v", "gate", "up"):
            weights[f"{layer}.{part}"][:, _TRAP] = 0
        weights[f"{layer}.o"][_TRAP] = weights[f"{layer}.down"][_TRAP] = 0
    weights["final_norm"] = 1 + random(WIDTH, scale=0.1)
    weights["head"] = random(VOCAB, WIDTH)
    # Answers are printable ASCII, so that their text says which tokens they are. The logit of
    # every other token is 0, which is never the largest; so an answer ends by its length.
    weights["head"][[i for i in range(VOCAB) if not 32 <= i < 127]] = 0
    of_pictures = random(_LATER, WIDTH, scale=1.0)
    weights["embedding"] = np.concatenate([weights["embedding"], of_pictures])
    weights["embedding"][:, _TRAP] = 0
    weights["embedding"][ord(NAN)] = np.nan
    weights["embedding"][ord(MARK)] *= 4
    _set_overflow(weights)
    return weights


def _set_overflow(weights: dict[str, Float32]) -> None:
    """After its norm the trap's channel is sqrt(WIDTH), whatever else is in the row. Two units make
    2.2e38 of it, which is a float32, and add both to channel 0: 4.4e38 is none."""
    weights["embedding"][ord(OVERFLOW), _TRAP] = 1e4
    weights[f"{TRAP_LAYER}.mlp_norm"][_TRAP] = 1
    for unit in (INNER - 2, INNER - 1):
        for part in ("gate", "up"):
            weights[f"{TRAP_LAYER}.{part}"][unit] = 0
            weights[f"{TRAP_LAYER}.{part}"][unit, _TRAP] = 2.2e38**0.5 / WIDTH**0.5
        weights[f"{TRAP_LAYER}.down"][:, unit] = 0
        weights[f"{TRAP_LAYER}.down"][0, unit] = 1


def _noted(depth: int, x: Float32, states: dict[int, Float32], edit: Edit | None) -> Float32:
    states[depth] = x
    return x if edit is None else np.asarray(edit(depth, x), np.float32)


def _norm(x: Float32, weight: Float32) -> Float32:
    mean = (x * x).mean(axis=-1, keepdims=True, dtype=np.float32)
    return np.asarray(x / np.sqrt(mean + np.float32(EPS)) * weight, np.float32)


def _rotated(x: Float32, at: NDArray[np.int64]) -> Float32:
    """Rotary positions on [T, heads, size], first half against second half."""
    half = x.shape[2] // 2
    angle = at[:, None] * THETA ** (-np.arange(half) / half)
    cos, sin = (f(angle)[:, None, :].astype(np.float32) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def _interleaved(weight: Float32, heads: int) -> Float32:
    """Rows in the order of llama.cpp, which rotates neighbours instead of halves."""
    halves = weight.reshape(heads, 2, -1, WIDTH)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _picture_ids(picture: str) -> list[int]:
    """Rows of a picture between the tokens that Idefics3 puts around its tiles."""
    tokens = {name: 256 + i for i, name in enumerate(_SPECIAL)}
    start = tokens["<fake_token_around_image>"]
    first = VOCAB + vision.PICTURES.index(picture) * vision.PICTURE_ROWS
    rows = iter(range(first, first + vision.PICTURE_ROWS))

    def tile(name: str) -> list[int]:
        return [start, tokens[name], *itertools.islice(rows, vision.TILE_ROWS)]

    ids: list[int] = []
    for r in range(1, vision.TILES + 1):
        for c in range(1, vision.TILES + 1):
            ids += tile(f"<row_{r}_col_{c}>")
        ids.append(ord("\n") if r < vision.TILES else VOCAB - 1)
    return [*ids, *tile("<global-img>"), start]


def _byte_names() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, spare = {}, 256
    for byte in range(256):
        names[byte] = chr(byte) if byte in printable else chr(spare)
        spare += byte not in printable
    return [names[byte] for byte in range(256)]


def _config(head: int) -> dict[str, Any]:
    return {
        "architectures": [_LLAMA],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "float32",
        "_name_or_path": "tiny",
    }


_LLAMA: Final = "LlamaForCausalLM"
_IDEFICS: Final = "Idefics3ForConditionalGeneration"
_SHARED: Final = (
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "_name_or_path",
)
_FOLDER: Final = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_GGUF: Final = {
    "embedding": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}
