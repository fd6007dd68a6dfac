"""A head matrix as a LoRA on the output embedding: llama.cpp (GGUF) and PEFT.

delta = scale B A with scale = alpha / r (PEFT's rsLoRA: alpha / sqrt(r)). E h + eps E W h is the
adapter A = V [r, d], B = eps E U [V, r] of W = U V, or A = W, B = eps E at full rank; alpha = r,
so that the scale of the adapter is 1. Writing needs a model whose output embedding is not tied to
the input: llama.cpp applies an adapter of a tied embedding to the input, PEFT to both.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFWriter
from gguf.quants import dequantize
from safetensors.numpy import save_file

from steerbridge import gguf_file, gguf_model
from steerbridge.errors import NotRepresentable
from steerbridge.format import Answers, Format, Holds, Loss, require_known, shown, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Float32, Tensor
from steerbridge_convert import files, heads
from steerbridge_convert.heads import Head

_HOLDS: Final = Holds(
    interventions=frozenset({"head_matrix"}),
    from_prompt_end=True,  # only positions that produce logits reach the output embedding
    sites="head input",
    strength="folded into B; requests may scale it",
)


_GGUF_KEYS: Final = frozenset({"adapter.type", "adapter.lora.alpha"})
# Options of PEFT 0.21 that say where a file comes from, how it was trained or what it is about;
# and those that change what it does, with the values at which they do nothing.
_NEUTRAL: Final = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules"),
        *("inference_mode", "lora_alpha", "lora_dropout", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type"),
        "use_rslora",
    }
)
_OFF: Final[dict[str, tuple[Any, ...]]] = {
    **dict.fromkeys(
        (
            *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "corda_config"),
            *("kasa_config", "layer_replication", "layers_pattern", "layers_to_transform"),
            *("loftq_config", "lora_ga_config", "megatron_config", "modules_to_save"),
            *("monteclora_config", "rank_pattern", "target_parameters"),
            *("trainable_token_indices", "use_bdlora", "velora_config"),
        ),
        (None, [], {}),
    ),
    **dict.fromkeys(
        ("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"),
        (False, None),
    ),
    "bias": ("none",),
    # The others move a part of the base model's weights into the adapter.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


class _HeadLora(Format):
    holds = _HOLDS
    exact = False  # W is recovered by least squares
    needs_model = True

    def factors(self, path: Path) -> tuple[Float32, Float32, float]:
        """A [r, d], B [V, r] and the scale of the file."""
        raise NotImplementedError

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        base = answers.base_model()
        a, b, scale = self.factors(path)
        embedding = heads.output_embedding(answers)
        if (len(b), a.shape[1]) != embedding.shape:
            raise NotRepresentable(
                self.name, f"an adapter [{len(b)}, {a.shape[1]}] for an embedding {embedding.shape}"
            )
        u, residual = heads.fitted(embedding, lambda part: b[part])
        if residual > 1e-3:
            answers.losses.append(
                Loss(
                    path.name,
                    f"a share of {residual:.3f} of B (Frobenius norm) is not E U: lost",
                )
            )
        if len(a) >= base.hidden_size:
            return heads.package(path.stem, base, Head(scale, Tensor.of(u @ a)))
        return heads.package(path.stem, base, Head(scale, Tensor.of(u), Tensor.of(a)))

    def adapter(self, package: SteeringPackage, answers: Answers) -> tuple[Float32, Float32]:
        """A and B for the head of the package; B includes the strength.

        Raises:
            NotRepresentable: the model's embedding is tied.
        """
        _, head = heads.only(package, self.name)
        embedding = heads.output_embedding(answers)
        if embedding.tied:
            raise NotRepresentable(
                self.name,
                f"{answers.model} shares {embedding.name} between input and output, so an adapter "
                "would change the input; use the package itself (steerbridge-gguf)",
            )
        eps = np.float32(head.eps)
        if head.v is None:
            a, right = head.matrix.float32(), None
        else:
            a, right = head.v.float32(), head.matrix.float32()
        b = np.empty((embedding.shape[0], len(a)), np.float32)
        for part, rows in embedding.rows():
            b[part] = eps * (rows if right is None else rows @ right)
        return a, b


class GgufLora(_HeadLora):
    """llama.cpp: `--lora FILE`; loader in src/llama-adapter.cpp."""

    name = "lora-gguf"
    title = "llama.cpp LoRA on the head (GGUF)"

    def recognises(self, path: Path) -> bool:
        return files.gguf_metadata(path).get("adapter.type") == "lora"

    def contents(self, path: Path) -> dict[str, Any]:
        file = files.gguf(path)
        return {
            "metadata": {k: v for k, v in file.metadata.items() if not isinstance(v, list)},
            "tensors": {n: [t.type.name, *t.shape] for n, t in file.tensors.items()},
        }

    def factors(self, path: Path) -> tuple[Float32, Float32, float]:
        file = files.gguf(path)
        require_known(self.name, "keys", file.metadata, _GGUF_KEYS, files.GGUF_DESCRIPTIVE)
        names = ("output.weight.lora_a", "output.weight.lora_b")
        _refuse_others(self.name, file.tensors, names)
        a, b = (_matrix(file.tensors[n]) for n in names)
        _fit(a, b, path)
        key = "adapter.lora.alpha"
        alpha = files.number(file.metadata.get(key, 0), key, path)
        return a, b, alpha / len(a) if alpha else 1.0  # as in llama.cpp: 0 means no division

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        a, b = self.adapter(package, answers)
        assert answers.model is not None
        architecture = (
            files.gguf(answers.model).metadata["general.architecture"]
            if answers.model.is_file()
            else gguf_model.architecture(package.spec.base_model.model_type)
        )
        if architecture not in MODEL_ARCH_NAMES.values():
            raise NotRepresentable(self.name, f"{architecture}: no architecture of llama.cpp")

        def fill(writer: GGUFWriter) -> None:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", float(len(a)))
            writer.add_tensor("output.weight.lora_a", np.ascontiguousarray(a))
            writer.add_tensor("output.weight.lora_b", b)

        gguf_file.write(path, architecture, fill)


class PeftLora(_HeadLora):
    """PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

    name = "peft"
    title = "PEFT LoRA on lm_head (directory)"

    def recognises(self, path: Path) -> bool:
        return (path / "adapter_config.json").is_file()

    def contents(self, path: Path) -> dict[str, Any]:
        tensors = files.safetensors(path / "adapter_model.safetensors")
        shapes = {n: [t.dtype, *t.shape] for n, t in tensors.items()}
        return {"config": _config(path), "tensors": shapes}

    def factors(self, path: Path) -> tuple[Float32, Float32, float]:
        config = _config(path)
        require_known(self.name, "adapter_config.json", config, {*_NEUTRAL, *_OFF})
        for key, off in _OFF.items():
            if key in config and config[key] not in off:
                raise NotRepresentable(self.name, f"{key} = {shown(config[key])}")
        tensors = files.safetensors(path / "adapter_model.safetensors")
        names = tuple(
            next((n for n in tensors if n.endswith(f"lm_head.lora_{side}.weight")), f"lora_{side}")
            for side in "AB"
        )
        _refuse_others(self.name, tensors, names)
        a, b = (tensors[n].float32() for n in names)
        _fit(a, b, path)
        rank, alpha = len(a), files.number(config.get("lora_alpha"), "lora_alpha", path)
        if config.get("r") != rank:
            raise unreadable(path, "r", f"{rank}, as in the tensors", shown(config.get("r")))
        return a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        a, b = self.adapter(package, answers)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": package.spec.base_model.name,
            "inference_mode": True,
            "target_modules": ["lm_head"],
            "r": len(a),
            "lora_alpha": len(a),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
        }
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        key = "base_model.model.lm_head.lora_{}.weight"
        save_file(
            {key.format("A"): np.ascontiguousarray(a), key.format("B"): b},
            path / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )


def _refuse_others(format: str, tensors: Any, names: tuple[str, ...]) -> None:
    missing = [n for n in names if n not in tensors]
    # By default PEFT also saves the unchanged base head.
    others = [n for n in tensors if n not in names and not n.endswith(".base_layer.weight")]
    if missing or others:
        what = f"adapters of {', '.join(others[:4])}" if others else f"no {', '.join(missing)}"
        raise NotRepresentable(
            format, f"{what}: only an adapter of the output embedding is a head matrix"
        )


def _fit(a: Float32, b: Float32, path: Path) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise unreadable(path, "lora_a and lora_b", "[r, d] and [V, r]", f"{a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise unreadable(path, "lora_a and lora_b", "finite values", "NaN or infinity")


def _matrix(tensor: gguf_file.GgufTensor) -> Float32:
    rows = tensor.data.reshape(tensor.shape[0], -1)
    return np.asarray(dequantize(rows, tensor.type), np.float32)


def _config(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json"
    config = files.json_object(file)
    if config.get("peft_type") != "LORA":
        raise unreadable(file, "peft_type", "'LORA'", shown(config.get("peft_type")))
    return config
