"""Every type of transformers' causal language models as a tiny random model.

Configurations are made generically: the class is built with its defaults, and the attributes that
it then has are set to small values by their names (`SIZES`). `OVERRIDES` has what a type needs
besides. A type that is no decoder, or that cannot be built so, is `Absent`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import warnings
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TYPES: Final = tuple(sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
PROMPTS: Final = ([5, 9, 13, 21, 8], [7, 3, 11], [40, 41, 42, 43, 44, 45, 46, 17, 19], [30, 31])
VOCABULARY: Final = 96
BLOCKS: Final = 4
LARGEST: Final = 8_000_000  # parameters; more means that a size was missed
# Of the weights: with the default initialisation most answers are alike; with the largest that
# some models bear, they are not numbers.
STDS: Final = (0.4, 0.2, 0.1, 0.05)
SEEDS: Final = 4

_NAMED: Final[tuple[tuple[str, int], ...]] = (
    ("hidden_size n_embd d_model embedding_dim word_embed_proj_dim lru_width embedding_size", 32),
    ("num_hidden_layers n_layer n_layers num_layers num_blocks", BLOCKS),
    ("num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads", 4),
    ("mamba_num_heads linear_num_heads linear_num_value_heads", 4),
    ("num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads", 2),
    ("head_dim attention_head_size kv_channels dim_head swa_head_dim linear_head_dim", 8),
    ("linear_key_head_dim linear_value_head_dim attention_head_dim index_head_dim", 8),
    ("v_head_dim qk_nope_head_dim qk_rope_head_dim", 8),
    ("kv_lora_rank q_lora_rank o_lora_rank laurel_rank hc_lowrank", 16),
    ("intermediate_size ffn_dim ffn_hidden_size n_inner dff dim_ff feed_forward_size", 48),
    ("dense_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size", 48),
    ("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size", 24),
    ("shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size", 24),
    ("shared_experts_intermediate_size", 24),
    ("num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num", 4),
    ("num_experts_per_tok num_experts_per_token moe_topk moe_k", 2),
    ("n_group num_expert_group", 2),
    ("topk_group first_k_dense_replace num_dense_layers moe_layer_start_index", 1),
    ("max_position_embeddings n_positions n_ctx max_seq_len context_length", 128),
    ("original_max_position_embeddings", 128),
    ("sliding_window sliding_window_size attention_chunk_size attention_window_size", 8),
    ("local_attention keep_window_size window_size chunk_size mamba_chunk_size block_size", 8),
    ("state_size ssm_state_size mamba_d_state hidden_size_per_layer_input", 8),
    ("time_step_rank mamba_dt_rank", 4),
    ("index_n_heads", 2),
    ("index_topk", 32),  # all: scores of zero are many, and which of them are chosen is arbitrary
    ("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCABULARY),
    ("pad_token_id", 0),
    ("bos_token_id", 1),
    ("eos_token_id", 2),
)
SIZES: Final = {name: value for names, value in _NAMED for name in names.split()}

_MAMBA_HEADS: Final = {"mamba_n_heads": 4, "mamba_d_head": 16}
_IN_TURN: Final = ["linear_attention", "full_attention"] * 2
_SHARED: Final = ["sliding_attention", "full_attention"] * 2
_DOTS3: Final = {
    "per_layer_config": {
        i: {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2} for i in (2, 3)
    }
}
_QWEN4: Final = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
OVERRIDES: Final[dict[str, dict[str, Any]]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "decoder_config": {"hidden_size_global": 32}},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"sliding_window": 64},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA_HEADS},
    "gemma3n_text": {"layer_types": _SHARED, "num_kv_shared_layers": 2},
    "git": {"vision_config": {"num_hidden_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA_HEADS, "layer_types": _IN_TURN},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _IN_TURN},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16, "num_heads": 4, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "mllama": {"text_config": {"cross_attention_layers": [3]}},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_head_dim": 16},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (8, 24),
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "autocast_kernel_dtype": "float32"},
    "zamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

_DRAFTS: Final = "drafts for another model, from that model's keys and values"
_DECODES: Final = "decoder of an encoder-decoder"
_NO_DECODERS: Final = {
    "bert-generation": "an encoder",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _DECODES,
    "musicgen_melody": _DECODES,
    "trocr": _DECODES,
    "xlnet": "its attention goes both ways (permutation language model)",
}


def chosen(what: str | None) -> argparse.Namespace:
    """What a tool is asked for: `types`, and `update`. Its models are tiny: one thread is best."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--update", action="store_true", help="Write pins and docs/models.md.")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return parser.parse_args()


class Absent(Exception):
    """A type that has no tiny model here; the reason is its message."""


def tiny(name: str, seed: int = 0, **settings: Any) -> Any:
    """A random model of a type, in float32, whose answers to `PROMPTS` differ.

    Args:
        settings: of its configuration, beside the usual ones.

    Raises:
        Absent: no decoder, or it cannot be built or evaluated.
    """
    if reason := _no_decoder(name):
        raise Absent(reason)
    try:
        model = _built(name, seed, settings)
    except Exception as error:  # of any kind: they are other people's classes
        raise Absent(f"cannot be built: {short(error)}") from error
    model.generation_config.eos_token_id = None  # answers of one length
    try:
        _draw(model, seed)
    except Exception as error:
        raise Absent(f"cannot be evaluated: {short(error)}") from error
    return model


def short(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")


def _no_decoder(name: str) -> str:
    """Why a type is no decoder-only model; empty if it is one."""
    if name in _NO_DECODERS:
        return _NO_DECODERS[name]
    if getattr(CONFIG_MAPPING[name], "is_encoder_decoder", False) is True:
        return _DECODES
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and name != "reformer":
        return "an encoder"
    return ""


def _built(name: str, seed: int, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _small(CONFIG_MAPPING[name], {**OVERRIDES.get(name, {}), **settings})
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise ValueError(f"{size} parameters in the smallest configuration")
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float().eval()


def _small(kind: Any, given: dict[str, Any]) -> Any:
    """A configuration of a class with small sizes, its parts too."""
    usual = kind()
    parts = getattr(kind, "sub_configs", {})
    values = {name: value for name, value in SIZES.items() if _takes(kind, usual, name)}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent: no groups
    for name in parts:
        if (part := getattr(usual, name, None)) is not None:
            values[name] = _small(type(part), given.get(name, {}))
    return kind(**{**values, **{n: v for n, v in given.items() if n not in parts}})


def _takes(kind: Any, usual: Any, name: str) -> bool:
    """True if a configuration has a size of this name that can be set."""
    defined = getattr(kind, name, None)
    if isinstance(defined, property) and defined.fset is None:
        return False
    try:
        return isinstance(getattr(usual, name, None), int)
    except Exception:  # a size that each layer has for itself
        return True


def _draw(model: Any, seed: int) -> None:
    """Give the weights the largest spread with which answers are numbers, and differ."""
    for std, more in itertools.product(STDS, range(SEEDS)):
        torch.manual_seed(seed + more)
        for weight, p in model.named_parameters():  # biases are the same for all prompts
            torch.nn.init.normal_(p, std=std / 4 if weight.endswith("bias") else std)
        with torch.no_grad():
            outputs = [model(input_ids=torch.tensor([p]), use_cache=False) for p in PROMPTS]
        rows = [output.logits[0, -1] for output in outputs]
        finite = all(bool(row.isfinite().all()) for row in rows)
        if finite and len({int(row.argmax()) for row in rows}) > 1:
            return
    raise ValueError(f"no spread of the weights among {STDS} gives answers that differ")
