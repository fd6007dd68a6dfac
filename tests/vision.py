"""Tiny random vision-language models, and prompts with images for them without a processor."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from helpers import TINY_TEXT

IMAGE = 60  # the token that stands for a row of an image
FAMILIES = (
    *("idefics3", "smolvlm", "llava", "llava_onevision", "chameleon"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"),
)
_TEXT = {**TINY_TEXT, "max_position_embeddings": 256}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_QWEN = {
    "text_config": {
        **_TEXT,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 1, 1],
            "rope_theta": 10000.0,
        },
    },
    "video_token_id": 61,
    "vision_start_token_id": 58,
    "vision_end_token_id": 59,
}
_LLAMA = {**_TEXT, "model_type": "llama"}


def _chameleon_names() -> dict[str, int]:
    """Names of token ids as Chameleon spells them: A to J are the digits of an image token."""
    digits = ("".join(chr(65 + int(d)) for d in str(i)) for i in range(16))
    names = {f"IMGIMG{d}Z": 40 + i for i, d in enumerate(digits)}
    return {"<image>": IMAGE, **names}


_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "idefics3": (
        "Idefics3",
        {"text_config": _LLAMA, "vision_config": _TOWER, "scale_factor": 2, "pad_token_id": 0},
    ),
    "smolvlm": (
        "SmolVLM",
        {"text_config": _LLAMA, "vision_config": _TOWER, "scale_factor": 2, "pad_token_id": 0},
    ),
    "llava": (
        "Llava",
        {
            "text_config": _LLAMA,
            "vision_config": {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        },
    ),
    "llava_onevision": (
        "LlavaOnevision",
        {
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
            "vision_feature_layer": -1,
        },
    ),
    "chameleon": (
        "Chameleon",
        {
            **_TEXT,
            "vocabulary_map": _chameleon_names(),
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "resolution": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
            },
        },
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {**_QWEN, "vision_config": {**_QWEN_TOWER, "embed_dim": 16, "mlp_ratio": 2}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            **_QWEN,
            "vision_config": {
                **_QWEN_TOWER,
                "out_hidden_size": 16,
                "intermediate_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            **_QWEN,
            "vision_config": {
                **_QWEN_TOWER,
                "out_hidden_size": 16,
                "intermediate_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**_TEXT, "head_dim": 8, "sliding_window": 64},
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "boi_token_index": 58,
            "eoi_token_index": 59,
        },
    ),
}


def tiny(family: str, seed: int = 0) -> Any:
    """A random model of 4 blocks and width 16, in float32."""
    name, fields = _CONFIGS[family]
    token = {} if family == "chameleon" else {"image_token_id": IMAGE}
    if family in ("llava", "llava_onevision", "gemma3"):
        token["image_token_index"] = IMAGE
    config = getattr(transformers, f"{name}Config")(**fields, **token)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for p in model.parameters():  # larger than the default initialisation: answers that differ
        torch.nn.init.normal_(p, std=0.4)
    with torch.no_grad():
        model.get_output_embeddings().weight[IMAGE] = 0  # no image in an answer
    return model


def pictures(family: str, seeds: list[int]) -> dict[str, torch.Tensor]:
    """Model inputs of one random image for each seed."""

    def noise(*shape: int) -> torch.Tensor:
        parts = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(parts)

    if family in ("idefics3", "smolvlm"):
        return {"pixel_values": noise(1, 3, 16, 16)}
    if family == "llava_onevision":
        sizes = torch.tensor([[16, 16]] * len(seeds))
        return {"pixel_values": noise(2, 3, 16, 16), "image_sizes": sizes}
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * len(seeds))
        return {"pixel_values": noise(16, 96).flatten(0, 1), "image_grid_thw": grid}
    return {"pixel_values": noise(3, 16, 16)}


def rows_per_image(model: Any, family: str) -> int:
    """How many image tokens one image of `pictures` takes in a prompt."""
    features = model.get_image_features(**pictures(family, [0]))
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def inputs(family: str, ids: torch.Tensor, seeds: list[int]) -> dict[str, torch.Tensor]:
    """What the model needs beside ids [B, T] and mask: pixels, and types of tokens."""
    extra = pictures(family, seeds) if seeds else {}
    if family.startswith("qwen"):
        extra["mm_token_type_ids"] = (ids == IMAGE).int()
    if family == "gemma3":
        extra["token_type_ids"] = (ids == IMAGE).long()
    return extra
