"""Keys that tools write into their files, each with a value that changes something or describes it,
and what a reader has to make of it; shared by tests and `make bench-convert`.

`understood`: the package says what the file says, or the key describes and changes nothing.
`refused`: an error names the key. `reported`: a loss names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gguf import GGUFWriter
from safetensors.numpy import load_file, save_file

from artifacts import SAMPLES
from steerbridge import gguf_file
from steerbridge.errors import ConversionError
from steerbridge_convert import read

UNDERSTOOD, REFUSED, REPORTED = "understood", "refused", "reported"
_DESCRIBED: Final = {
    "general.name": ("a vector", UNDERSTOOD),
    "controlvector.layer_count": (2, UNDERSTOOD),
    "controlvector.model_hint": ("another", REFUSED),
    # GLP and its older name: the direction is projected out, at a site of its own.
    "glp.mode": ("project", REFUSED),
    "glp.hook_point": ("ffn_out_pre_residual", REFUSED),
    "glp.alpha_default": (2.0, REFUSED),
    "glp.rank": (2, REFUSED),
    "glp.spec_version": (1, REFUSED),
    "dspark.mode": ("project", REFUSED),
    # steerkit: `resid_pre` is the input of a block.
    "hook_site": ("resid_pre", REFUSED),
    "hook_name": ("blocks.2.hook_resid_pre", REFUSED),
    "steerkit.method": ("logistic", REFUSED),
    "n_total_layers": (4, REFUSED),
}
_PEFT_NEUTRAL: Final = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": "elsewhere",
    "eva_config": {"rho": 2.0},
    "exclude_modules": ["model"],
    "inference_mode": False,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "revision": "main",
    "task_type": "CAUSAL_LM",
}
_PEFT_ACTIVE: Final = {
    "alora_invocation_tokens": [1, 2],
    "alpha_pattern": {"lm_head": 3},
    "arrow_config": {"top_k": 2},
    "bias": "all",
    "corda_config": {"corda_method": "ipm"},
    "ensure_weight_tying": True,
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "kasa_config": {"beta": 1},
    "layer_replication": [[0, 2], [1, 3]],
    "layers_pattern": "layers",
    "layers_to_transform": [1],
    "loftq_config": {"loftq_bits": 4},
    "lora_bias": True,
    "lora_ga_config": {"stable_gamma": 16},
    "megatron_config": {"a": 1},
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"a": 1},
    "rank_pattern": {"lm_head": 2},
    "target_parameters": ["lm_head.weight"],
    "trainable_token_indices": [1],
    "use_bdlora": {"a": 1},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"a": 1},
    "option_of_a_newer_release": True,
}

# Format -> key (SECTION/KEY inside another) -> (value, what a reader makes of it).
KEYS: Final[Mapping[str, Mapping[str, tuple[Any, str]]]] = {
    "control-vector": _DESCRIBED,
    "repeng": _DESCRIBED,
    "easysteer": {
        **{k: v for k, v in _DESCRIBED.items() if k != "controlvector.model_hint"},
        "controlvector.method": ("caa", UNDERSTOOD),
        "controlvector.normalize": (True, UNDERSTOOD),
        "controlvector.token_pos": (-1, UNDERSTOOD),
        "controlvector.n_positive": (10.0, UNDERSTOOD),
        "controlvector.n_negative": (10.0, UNDERSTOOD),
        "controlvector.sign": (-1, REFUSED),
    },
    "glp": {
        **{
            f"glp.{key}": ("a", UNDERSTOOD)
            for key in ("method", "contrast", "created", "validation", "derived_at", "base_model")
        },
        "general.base_model.0.version": ("a", UNDERSTOOD),
        "glp.alpha_default": (2.0, UNDERSTOOD),
        "glp.mode": ("add", UNDERSTOOD),
        "glp.orthonormal": (True, UNDERSTOOD),
        "glp.hook_point": ("ffn_out_pre_residual", REFUSED),
        "glp.spec_version": (2, REFUSED),
        "glp.rank": (2, REFUSED),
        "glp.structure": ("per-execution-step", REFUSED),
        "glp.layer_ids_zero_based": ("0,1", REFUSED),
        "glp.content_sha256": ("0", REFUSED),
        "glp.dir_scales": ("1.0,0.5", REFUSED),
        "dspark.mode": ("project", REFUSED),
        "controlvector.model_hint": ("another", REFUSED),
    },
    "lora-gguf": {
        "general.name": ("a", UNDERSTOOD),
        "adapter.lora.alpha": (7.0, UNDERSTOOD),
        "adapter.alora.invocation_tokens": ([1, 2], REFUSED),
        "adapter.lora.prompt_prefix": ("a", REFUSED),
        "adapter.lora.task_name": ("a", REFUSED),
    },
    "peft": {
        **{k: (v, UNDERSTOOD) for k, v in _PEFT_NEUTRAL.items()},
        **{k: (v, REFUSED) for k, v in _PEFT_ACTIVE.items()},
        "lora_alpha": (7, UNDERSTOOD),
        "use_rslora": (True, UNDERSTOOD),
    },
    "safeswitch": {
        **dict.fromkeys(
            ("epochs", "batch_size", "learning_rate", "random_seed", "neg_weight"), (1, UNDERSTOOD)
        ),
        **dict.fromkeys(
            ("base_dir", "data_dir", "job_name", "ckpt", "gpu", "llm"), ("a", UNDERSTOOD)
        ),
        **dict.fromkeys(("wandb", "overwrite"), (True, UNDERSTOOD)),
        "layer_id": (2, UNDERSTOOD),
        "token_rule": ("multi", REFUSED),
        "n_decode": (3, REFUSED),
        "label": ("safety", REPORTED),
    },
    "probe-aisteer360": {
        "layer_ids": ([1], UNDERSTOOD),
        "bias": (1.5, UNDERSTOOD),
        "meta": ({"a": 1}, UNDERSTOOD),
        "format_version": (1.0, REFUSED),
        "polarity": ("positives_low", REFUSED),
        "location": ("attn_output", REFUSED),
        "pooling": ("max", REFUSED),
        "model_type": ("another", REFUSED),
        "calibration": (0.3, REFUSED),
    },
    "svec-ibm": {
        "explained_variances": ({"2": 0.5}, UNDERSTOOD),
        "model_type": ("another", REFUSED),
        "head_dim": (8, REFUSED),
        "scale": (2.0, REFUSED),
    },
    "svec-aisteer360": {
        "probe_accuracies": ({"1:2": 0.5}, UNDERSTOOD),
        "num_heads": (4, REFUSED),
        "head_dim": (4, REFUSED),
        "model_type": ("another", REFUSED),
    },
    "steerkit": {
        "model_id": ("a", UNDERSTOOD),
        "metrics_json": ('{"a": 1}', UNDERSTOOD),
        "auto_alpha": ("3.5", UNDERSTOOD),
        "hook_site": ("attn_out", REFUSED),
        "hook_name": ("blocks.0.hook_resid_pre", REFUSED),
        "schema_version": ("4", REFUSED),
        "layer": ("x", REFUSED),
        "polarity": ("inverted", REFUSED),
    },
    "steering-vectors": {
        "layer_type": ("self_attn", REFUSED),
        "scale": (2.0, REFUSED),
    },
    "lm-steer": {"projector3": (1, REFUSED)},
    "easysteer-payload": {
        "version": (2, REFUSED),
        "kind": ("concept_pair", REFUSED),
        "extra": ({"layer": 1}, REFUSED),
        "sha256": ("0", REFUSED),
        "scale": (2.0, REFUSED),
    },
    "vllm-hook": {
        "model_info": ({"name": "a"}, UNDERSTOOD),
        "optimizations": ({"MIA_WRITER_PROCESS": 0}, UNDERSTOOD),
        "steering/coefficient": (2.0, UNDERSTOOD),
        "steering/optimal_layer": ([1, 2], UNDERSTOOD),
        "steering/positions": ("last_token", UNDERSTOOD),
        "steering/phase": ("prefill", REFUSED),
        "steering/method": ("adjust_rs", REFUSED),
        "steering/vector_path": ("../vector.pt", REFUSED),
        "steering/normalize": (True, REFUSED),
    },
    "sae-lens": {
        **dict.fromkeys(("d_sae", "dtype", "device", "apply_b_dec_to_input"), (1, UNDERSTOOD)),
        "architecture": ("transcoder", REFUSED),
        "k": (32, UNDERSTOOD),
        "rescale_acts_by_decoder_norm": (True, UNDERSTOOD),
        "metadata/model_name": ("a", UNDERSTOOD),
        "metadata/hook_name": ("blocks.2.hook_resid_pre", UNDERSTOOD),
        "metadata/hook_head_index": (1, REFUSED),
        "metadata/hook_name_out": ("blocks.2.hook_mlp_out", REFUSED),
        "normalize_activations": ("layer_norm", REFUSED),
        "reshape_activations": ("hook_z", REFUSED),
        "finetuning_scaling_factor": (True, REFUSED),
        "decoder_rotation": ("a", REFUSED),
    },
}
# Those whose files hold tensors under fixed names and nothing else.
WITHOUT_KEYS: Final = ("autosteer", "cast", "directions", "easyedit", "hotwire")


def verdict(format: str, key: str, value: Any, artifact: Path, folder: Path, weights: Path) -> str:
    """What our reader makes of an artifact with this key."""
    changed = folder / artifact.name
    if artifact.is_dir():
        shutil.copytree(artifact, changed)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact, changed)
    _set(changed, key, value)
    sample = SAMPLES[format]
    try:
        _, losses = read(
            changed, source_format=format, answers=sample.read, base=weights, model=weights
        )
    except ConversionError as error:
        named = key.rpartition("/")[2] in str(error) or str(value) in str(error)
        return REFUSED if named else f"refused without its name: {error}"
    return REPORTED if losses else UNDERSTOOD


def _set(path: Path, key: str, value: Any) -> None:
    described = {"adapter_config.json", "probe.json", "args.json", "steering.json", "cfg.json"}
    if path.is_dir():
        path = next(p for p in path.iterdir() if p.name in described)
    if path.suffix in (".json", ".svec"):
        content = json.loads(path.read_text())
        section, _, name = key.rpartition("/")
        (content[section] if section else content)[name] = value
        path.write_text(json.dumps(content))
    elif path.suffix == ".gguf":
        _set_gguf(path, key, value)
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata())
        save_file(load_file(path), path, metadata | {key: value})
    else:
        import torch

        content = torch.load(path)
        (content[1] if isinstance(content, list) else content)[key] = value
        torch.save(content, path)


def _set_gguf(path: Path, key: str, value: Any) -> None:
    old = gguf_file.read(path)
    metadata = {**old.metadata, key: value}
    tensors = {name: t.data.view("<f4").reshape(t.shape).copy() for name, t in old.tensors.items()}

    def fill(writer: GGUFWriter) -> None:
        for name, held in metadata.items():
            if name == "general.architecture":
                continue
            add: Any = {
                bool: writer.add_bool,
                int: writer.add_int32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }[type(held)]
            add(name, held)
        for name, array in tensors.items():
            writer.add_tensor(name, array)

    gguf_file.write(path, old.metadata["general.architecture"], fill)
