"""Builders that tests share: specs, packages and tiny models."""

from __future__ import annotations

import base64
import json
import mimetypes
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerbridge import data
from steerbridge.data import Example
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage, parse
from steerbridge.runtime import Generation, LoadedModel
from steerbridge.spec import SPEC_VERSION, Reading, tensor_shapes
from steerbridge.tensors import Tensor

FACTS = ModelFacts("llama", hidden_size=16, num_layers=4, vocab_size=64, name="tiny")

END = {"type": "prompt_end"}
MEAN = {"type": "prompt_mean"}
IMAGE = {"type": "image_mean"}
LOW_RANK = {"form": "low_rank", "u": "h.u", "v": "h.v"}

CLI = [sys.executable, "-m", "steerbridge.cli"]


def run_cli(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`steerbridge` with these arguments, until it ends."""
    command = [*CLI, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def last_json(output: str) -> Any:
    """The JSON object in the last line of a command's output."""
    return json.loads(output.splitlines()[-1])


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def data_url(path: Path) -> str:
    """A picture as `data:` URL."""
    kind, _ = mimetypes.guess_type(path)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def chat_message(prompt: Example) -> dict[str, Any]:
    """A prompt as a user message in OpenAI's format; its pictures come first."""
    if not prompt.images:
        return {"role": "user", "content": prompt.text}
    pictures = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in prompt.images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": prompt.text}]}


def compiled(folder: Path, source: str, *options: str) -> Path:
    """A program made from C source."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    path = folder / f"program{len(list(folder.iterdir()))}"
    command = [compiler, "-x", "c", "-", "-o", str(path), *options]
    subprocess.run(command, input=source.encode(), check=True)
    return path


def site(text: str) -> dict[str, Any]:
    """'layer_input[2]' -> the site as JSON."""
    stream, _, layer = text.rstrip("]").partition("[")
    return {"stream": stream, **({"layer": int(layer)} if layer else {})}


def reading(at: str, position: dict[str, Any] = END) -> dict[str, Any]:
    return {"site": site(at), "position": position}


def linear_probe(id: str = "p", **fields: Any) -> dict[str, Any]:
    """A probe on layer 2, linear unless `fields` says otherwise."""
    linear = {"weight": f"{id}.w", "bias": 0.0, "link": "identity"}
    read = {} if "token_reading" in fields else {"readings": [reading("layer_input[2]")]}
    return {
        "id": id,
        "type": "linear",
        **read,
        **(linear if fields.get("type", "linear") == "linear" else {}),
        "comparator": ">",
        "threshold": 0.0,
        **fields,
    }


def head(id: str = "h", **fields: Any) -> dict[str, Any]:
    return {
        "id": id,
        "type": "head_matrix",
        "position": "from_prompt_end",
        "eps": 0.5,
        "weight": {"form": "dense", "matrix": f"{id}.W"},
        **fields,
    }


def add_vector(*layers: int, alpha: float) -> dict[str, Any]:
    """An `add_vector` intervention at the outputs of these layers."""
    targets = [{"site": site(f"layer_output[{k}]"), "vector": f"v{k}"} for k in layers]
    return {
        "id": "v",
        "type": "add_vector",
        "position": "from_prompt_end",
        "alpha": alpha,
        "targets": targets,
    }


def rule(probes: list[str] | None, acts: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "id": "r",
        "condition": None if probes is None else {"type": "any", "probes": probes},
        "interventions": acts,
        "strength": {"type": "constant", "value": 1.0},
        **fields,
    }


def raw_spec(facts: ModelFacts = FACTS, **fields: Any) -> dict[str, Any]:
    return {
        "spec_version": SPEC_VERSION,
        "name": "test",
        "base_model": facts.info().model_dump(exclude_unset=True),
        "probes": [linear_probe()],
        "interventions": [head()],
        "rules": [rule(["p"], ["h"])],
        **fields,
    }


def package(
    facts: ModelFacts = FACTS, seed: int = 0, scale: float = 1.0, free: int = 3, **fields: Any
) -> SteeringPackage:
    """A package with random tensors of the right shapes for every name in the spec.

    `free` is the size of ranks and hidden layers.
    """
    spec = parse(raw_spec(facts, **fields))
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    sizes_of: dict[str, int] = {}
    for where, name, shape in tensor_shapes(spec):
        sizes = [sizes_of.setdefault(n, free) if isinstance(n, str) else n for n in shape]
        values = rng.normal(size=sizes) * scale
        tensors[name] = Tensor.of(np.abs(values) + 0.1 if "input_scale" in where else values)
    return SteeringPackage(spec, tensors)


def fitted(
    model: LoadedModel, prompts: Sequence[Example], readings: list[dict[str, Any]], new: int
) -> tuple[SteeringPackage, list[Generation]]:
    """A guard of these very prompts, and the model's answers with it.

    The probe is fitted by least squares: what is tested is not how well it guesses. The head is
    random and strong: it changes every answer that it acts on.
    """
    states = np.empty((len(prompts), len(readings), model.facts.hidden_size), np.float32)
    model.capture(prompts, [Reading.model_validate(r) for r in readings], states)
    x = np.nan_to_num(states.reshape(len(prompts), -1).astype(np.float64))
    y = np.array([1.0 if p.harmful else -1.0 for p in prompts])
    gram = x @ x.T
    w = x.T @ np.linalg.solve(gram + 1e-3 * np.trace(gram) / len(x) * np.eye(len(x)), y)
    scores = x @ w
    low, high = scores[y < 0].max(), scores[y > 0].min()
    assert high - low > 0.3, "the two kinds of prompts are not apart"
    made = package(
        model.facts,
        scale=1.2 / model.facts.hidden_size**0.5,
        probes=[linear_probe(readings=readings, threshold=float(high + low) / 2)],
        interventions=[head(weight=LOW_RANK, eps=30.0)],
        rules=[rule(["p"], ["h"])],
    )
    guard = SteeringPackage(made.spec, {**made.tensors, "p.w": Tensor.of(w)})
    answers = model.generate(prompts, guard, max_new_tokens=new)
    plain = model.generate(prompts, None, max_new_tokens=new)
    for prompt, steered, unsteered in zip(prompts, answers, plain, strict=True):
        assert steered.outcome is not None
        assert steered.outcome.fired == prompt.harmful
        assert (steered.tokens != unsteered.tokens) == prompt.harmful
    return guard, answers


def drawn_guard(
    folder: Path, files: Mapping[str, Path], new: int
) -> tuple[Path, list[Example], list[Generation]]:
    """A guard of four drawings for the demo model in llama.cpp: its file, the prompts with them,
    and the model's answers with it."""
    from steerbridge_demo.guard import guard_examples
    from steerbridge_llama_cpp import open_model

    prompts = guard_examples(folder, "test", per_kind=2, kinds=("image",))
    model = open_model(files["text_f32"], mmproj=files["mmproj_f32"], n_ctx=512)
    readings = [reading("layer_input[18]"), reading("layer_input[8]", IMAGE)]
    guard, answers = fitted(model, prompts, readings, new)
    model.llama.close()
    return guard.save(folder / "guard.gguf"), prompts, answers


def corpus_prompts(count: int = 6) -> list[Example]:
    """Harmful and harmless prompts in turn, `count` of each."""
    pairs = [e for e in data.corpus_examples("test") if e.kind == "pair"]
    sides = [[e for e in pairs if e.harmful is side][:count] for side in (True, False)]
    return [e for pair in zip(*sides, strict=True) for e in pair]


TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(kind: str = "llama", seed: int = 0, **fields: Any) -> Any:
    """A random model of 4 blocks and width 16, in float32."""
    import torch
    import transformers

    configs = {
        "llama": ("LlamaConfig", {}),
        "qwen2": ("Qwen2Config", {}),
        "qwen3": ("Qwen3Config", {"head_dim": 8}),
        "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8}),
        "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8}),
    }
    name, extra = configs[kind]
    config = getattr(transformers, name)(
        **{
            **TINY_TEXT,
            "max_position_embeddings": 128,
            **extra,
            **fields,
        }
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # larger than the default initialisation: answers that differ
        torch.nn.init.normal_(p, std=0.4)
    return model
