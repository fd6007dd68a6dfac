"""One artifact per format, with values for its options; shared by tests and benchmarks.

The package that an artifact is made from is the richest that the format represents without loss.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import helpers
from helpers import LOW_RANK, MEAN, head, linear_probe, package, reading, rule
from steerbridge.fingerprint import ModelFacts
from steerbridge.format import get_format
from steerbridge.package import SteeringPackage, load
from steerbridge.tensors import Tensor
from steerbridge_convert import convert

ALWAYS = {"probes": [], "rules": [rule(None, ["v"])]}
DENSE_HEAD = {"probes": [], "interventions": [head()], "rules": [rule(None, ["h"])]}
LOW_HEAD = {**DENSE_HEAD, "interventions": [head(weight=LOW_RANK)]}


def vector(*places: str, alpha: float = 1.0) -> dict[str, Any]:
    """`add_vector` on every prompt."""
    return {
        "id": "v",
        "type": "add_vector",
        "position": "all_positions",
        "alpha": alpha,
        "targets": [{"site": helpers.site(at), "vector": f"v{i}"} for i, at in enumerate(places)],
    }


def mlp(at: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A prober with one hidden layer and two classes, the harmful one first."""
    layers = [{"weight": f"p.{i}.w", "bias": f"p.{i}.b"} for i in range(2)]
    return {
        "id": "p",
        "type": "mlp",
        "readings": [at],
        "layers": layers,
        "activation": "relu",
        "output": {"type": "softmax", "classes": ["bad", "good"], "harmful": "bad"},
        "comparator": ">",
        "threshold": 0.5,
        **fields,
    }


@dataclass(frozen=True, slots=True)
class Sample:
    """Fields of the package, name of the artifact, option values for writing and for reading."""

    fields: dict[str, Any]
    suffix: str = ""
    name: str = "artifact"
    write: dict[str, str] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)


AT_OFFSET = reading("layer_input[2]", {"type": "prompt_end", "offset": -1})
_OUTPUTS = {**ALWAYS, "interventions": [vector("layer_output[1]", "layer_output[2]")]}
_INPUTS = {**ALWAYS, "interventions": [vector("layer_input[2]", "layer_input[3]")]}
ALL_LAYERS = {"strength": "1", "layers": "all", "positions": "all_positions"}
SAMPLES: dict[str, Sample] = {
    "steerbridge": Sample({}),
    "steerbridge-gguf": Sample({}, ".gguf"),
    "control-vector": Sample(_OUTPUTS, ".gguf", read=ALL_LAYERS),
    "repeng": Sample(
        {**ALWAYS, "interventions": [vector("layer_output[0]", "layer_output[2]")]},
        ".gguf",
        read=ALL_LAYERS,
    ),
    "easysteer": Sample(_OUTPUTS, ".gguf", read=ALL_LAYERS),
    "glp": Sample(
        {
            **ALWAYS,
            "interventions": [
                vector("layer_output[1]", "layer_output[2]", alpha=0.75) | {"type": "project_out"}
            ],
        },
        ".gguf",
    ),
    "directions": Sample(
        {**ALWAYS, "interventions": [vector("layer_input[0]", "layer_output[2]")]},
        ".npy",
        read={**ALL_LAYERS, "act": "add", "site": "layer_input"},
    ),
    "easysteer-payload": Sample(_OUTPUTS, ".json", read=ALL_LAYERS),
    "vllm-hook": Sample({**ALWAYS, "interventions": [vector("layer_output[2]")]}),
    "sae-lens": Sample(
        {**ALWAYS, "interventions": [vector("layer_output[2]")]},
        read={"feature": "3", "strength": "1", "positions": "all_positions"},
    ),
    "svec-ibm": Sample(_INPUTS, ".svec", read=ALL_LAYERS),
    "svec-aisteer360": Sample(
        _INPUTS,
        ".svec",
        write={"applied_at": "layer_input"},
        read={**ALL_LAYERS, "applied_at": "layer_input"},
    ),
    "steering-vectors": Sample(_OUTPUTS, ".pt", read=ALL_LAYERS),
    "easyedit": Sample(_OUTPUTS, read=ALL_LAYERS),
    "hotwire": Sample(_OUTPUTS, ".pt", read=ALL_LAYERS),
    "steerkit": Sample(
        {**ALWAYS, "interventions": [vector("layer_output[2]")]},
        ".probe.safetensors",
        read={"positions": "all_positions"},
    ),
    "autosteer": Sample(
        {"probes": [mlp(AT_OFFSET)]},
        write={"eps": "0.5", "offset": "-1"},
        read={"eps": "0.5", "offset": "-1"},
    ),
    "safeswitch": Sample({"probes": [mlp(reading("head_input"), comparator=">=")]}),
    "lm-steer": Sample(
        LOW_HEAD, ".pt", "lm_steer_vector", {"epsilon": "0.5"}, {"epsilon": "0.5", "values": "1"}
    ),
    "lora-gguf": Sample(LOW_HEAD, ".gguf"),
    "peft": Sample(LOW_HEAD),
    "probe-aisteer360": Sample(
        {
            "probes": [
                linear_probe(
                    readings=[reading("layer_input[1]", MEAN), reading("layer_input[3]", MEAN)],
                    comparator=">=",
                )
            ],
            "interventions": [],
            "rules": [],
        }
    ),
    "cast": Sample(
        {
            "probes": [
                {
                    "id": "condition-2",
                    "type": "cosine",
                    "readings": [reading("layer_input[2]", MEAN)],
                    "direction": "c",
                    "squash": "tanh",
                    "comparator": ">",
                    "threshold": 0.04,
                }
            ],
            "interventions": [],
            "rules": [],
        },
        ".svec",
        read={"layers": "2", "threshold": "0.04", "fires_when": ">"},
    ),
}
FORMAT_NAMES = sorted(SAMPLES)
WRITABLE = [name for name in FORMAT_NAMES if get_format(name).writable]
HIDDEN = 64  # hidden size of AutoSteer's prober


def sample(name: str, facts: ModelFacts = helpers.FACTS) -> SteeringPackage:
    """The package that the artifact of a format is made from."""
    made = package(
        facts, free=HIDDEN if "mlp" in str(SAMPLES[name].fields) else 3, **SAMPLES[name].fields
    )
    if name != "glp":
        return made
    unit = {k: t.float32() / np.linalg.norm(t.float32()) for k, t in made.tensors.items()}
    return made.replace(tensors={k: Tensor.of(v) for k, v in unit.items()})


def written(name: str, folder: Path, model: Path | None, facts: ModelFacts = helpers.FACTS) -> Path:
    """The artifact of a format, in a folder of its own."""
    artifact = SAMPLES[name]
    package = sample(name, facts)
    source = package.save(folder / name / "source")
    target = folder / name / f"{artifact.name}{artifact.suffix}"
    if name == "sae-lens":
        return autoencoder(target, package.tensors["v0"].float32())
    convert(source, target, to=name, answers=artifact.write, model=model, allow_loss=name == "cast")
    return target


def autoencoder(folder: Path, row: Any, **config: Any) -> Path:
    """A sparse autoencoder as SAELens 6 saves it, on the output of block 2; `row` is feature 3."""
    features = 5
    decoder = np.random.default_rng(0).normal(size=(features, len(row))).astype(np.float32)
    decoder[3] = row
    encoder = np.ascontiguousarray(decoder.T)
    biases = {"b_enc": np.zeros(features, np.float32), "b_dec": np.zeros(len(row), np.float32)}
    folder.mkdir(parents=True)
    save_file({"W_dec": decoder, "W_enc": encoder, **biases}, folder / "sae_weights.safetensors")
    stored = {
        "d_in": len(row),
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.2.hook_resid_post", "sae_lens_version": "6.54.12"},
        "architecture": "standard",
        **config,
    }
    (folder / "cfg.json").write_text(json.dumps(stored))
    return folder


def read_as_package(name: str, path: Path, weights: Path, **answers: str) -> SteeringPackage:
    """The artifact of a format, converted into a package in a new folder."""
    target = Path(tempfile.mkdtemp(prefix="read.", dir=path.parent)) / "package"
    values = {**SAMPLES[name].read, **answers}
    convert(path, target, source_format=name, answers=values, base=weights, model=weights)
    return load(target)


def answers_between(source: str, target: str) -> dict[str, str]:
    """Option values for a conversion between two formats."""
    answers = dict(SAMPLES[source].read)
    for option in get_format(target).write_options:
        if option.name in SAMPLES[target].write:
            answers.setdefault(option.name, SAMPLES[target].write[option.name])
    return answers
