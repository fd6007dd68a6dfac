"""One artifact a format, with the answers that its files leave open; tests and benchmarks share it.

The package a format is written from is the richest that it holds without a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpers
from helpers import MEAN, head, linear_probe, package, reading, rule
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage
from steerbridge_convert import convert

ALWAYS = {"probes": [], "rules": [rule(None, ["v"])]}
LOW = {"form": "low_rank", "u": "h.u", "v": "h.v"}
DENSE_HEAD = {"probes": [], "interventions": [head()], "rules": [rule(None, ["h"])]}
LOW_HEAD = {**DENSE_HEAD, "interventions": [head(weight=LOW)]}


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
    """A prober of one hidden layer and two classes, the harmful one first."""
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
    """Fields of the package, the target's name, answers when writing and when reading."""

    fields: dict[str, Any]
    suffix: str = ""
    name: str = "artifact"
    write: dict[str, str] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)


AT_OFFSET = reading("layer_input[2]", {"type": "prompt_end", "offset": -1})
_OUTPUTS = {**ALWAYS, "interventions": [vector("layer_output[1]", "layer_output[2]")]}
_INPUTS = {**ALWAYS, "interventions": [vector("layer_input[2]", "layer_input[3]")]}
_ONE = {"strength": "1"}
SAMPLES: dict[str, Sample] = {
    "steerbridge": Sample({}),
    "steerbridge-gguf": Sample({}, ".gguf"),
    "control-vector": Sample(_OUTPUTS, ".gguf", read=_ONE),
    "repeng": Sample(
        {**ALWAYS, "interventions": [vector("layer_output[0]", "layer_output[2]")]},
        ".gguf",
        read=_ONE,
    ),
    "easysteer": Sample(_OUTPUTS, ".gguf", read=_ONE),
    "svec-ibm": Sample(_INPUTS, ".svec", read=_ONE),
    "svec-aisteer360": Sample(
        _INPUTS,
        ".svec",
        write={"applied_at": "layer_input"},
        read={**_ONE, "applied_at": "layer_input"},
    ),
    "steering-vectors": Sample(_OUTPUTS, ".pt", read=_ONE),
    "easyedit": Sample(_OUTPUTS, read=_ONE),
    "hotwire": Sample(_OUTPUTS, ".pt", read={**_ONE, "layers": "1,2"}),
    "steerkit": Sample(
        {**ALWAYS, "interventions": [vector("layer_output[2]")]}, ".probe.safetensors"
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
HIDDEN = 64  # of AutoSteer's prober


def sample(name: str, facts: ModelFacts = helpers.FACTS) -> SteeringPackage:
    """The package that the artifact of a format is written from."""
    return package(
        facts, free=HIDDEN if "mlp" in str(SAMPLES[name].fields) else 3, **SAMPLES[name].fields
    )


def written(name: str, folder: Path, model: Path | None, facts: ModelFacts = helpers.FACTS) -> Path:
    """The artifact of a format, in a folder of its own."""
    found = SAMPLES[name]
    source = sample(name, facts).save(folder / name / "source")
    target = folder / name / f"{found.name}{found.suffix}"
    convert(source, target, to=name, answers=found.write, model=model, allow_loss=name == "cast")
    return target


def asked(source: str, target: str) -> dict[str, str]:
    """Answers for a conversion between two formats."""
    from steerbridge.formats import named

    answers = dict(SAMPLES[source].read)
    for ask in named(target).write_asks:
        if ask.name in SAMPLES[target].write:
            answers.setdefault(ask.name, SAMPLES[target].write[ask.name])
    return answers
