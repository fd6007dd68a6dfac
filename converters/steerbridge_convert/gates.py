"""Gates without interventions: probe directories of AISteer360 and condition vectors of CAST.

A package made from one of these only decides and changes nothing by itself; the vectors or head
that should act come from another file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from steerbridge.errors import InvalidOption, InvalidSpec, MissingOption, NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Loss,
    Option,
    block,
    finite,
    one_of,
    require_known,
    several,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    AddVector,
    Condition,
    ConstantStrength,
    CosineProbe,
    LayerInput,
    LayerOutput,
    LinearProbe,
    PromptEnd,
    PromptMean,
    Reading,
    Rule,
    SteeringSpec,
    Target,
)
from steerbridge.tensors import Tensor
from steerbridge_convert import files, probers, svec, vectors

_POSITIONS: Final[dict[str, PromptMean | PromptEnd]] = {
    "mean": PromptMean(type="prompt_mean"),
    "last": PromptEnd(type="prompt_end"),
}
_SITES: Final[dict[str, Any]] = {"layer_input": LayerInput, "layer_output": LayerOutput}


_KEYS: Final = frozenset(
    {
        *("format_version", "polarity", "model_type", "location", "pooling"),
        *("layer_ids", "weight_layer_ids", "bias", "meta"),
    }
)


class AisteerProbe(Format):
    """AISteer360 `Probe`: fires if the sum over layers of w . x plus a bias is at least 0."""

    name = "probe-aisteer360"
    title = "AISteer360 probe (directory)"
    holds = Holds(
        probes=frozenset({"linear"}),
        sites="inputs or outputs of blocks; prompt end or mean",
        strength="none",
    )
    exact = False  # thresholds and normalisation are folded into weights and bias

    def recognises(self, path: Path) -> bool:
        return (path / "probe.json").is_file() and (path / "probe.safetensors").is_file()

    def contents(self, path: Path) -> dict[str, Any]:
        info, weights = _probe(path)
        return {"probe": info, "weights": {k: list(v.shape) for k, v in weights.items()}}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        info, weights = _probe(path)
        require_known(self.name, "probe.json", info, _KEYS)
        base = answers.base_model(model_type=info.get("model_type"))
        layers = info["layer_ids"]  # of the stored weights, those that the tool uses
        site, position = _SITES[info["location"]], _POSITIONS[info["pooling"]]
        vectors.checked({k: weights[f"weights.{k}"] for k in layers}, base, self.name)
        probe = LinearProbe(
            id="probe",
            type="linear",
            readings=tuple(
                Reading(site=site(stream=info["location"], layer=k), position=position)
                for k in layers
            ),
            comparator=">=",
            threshold=0.0,
            weight="probe.weight",
            bias=float(info["bias"]),
            link="identity",
        )
        weight = np.concatenate([weights[f"weights.{k}"].float32() for k in layers])
        spec = SteeringSpec(
            spec_version="1.0",
            name=path.name,
            base_model=base,
            probes=(probe,),
            interventions=(),
            rules=(),
        )
        return SteeringPackage(spec, {"probe.weight": Tensor.of(weight)})

    def losses(self, package: SteeringPackage, answers: Answers) -> list[Loss]:
        losses = super().losses(package, answers)
        probe = _only_linear(package, self.name)
        if probe.comparator in (">", "<"):
            losses.append(
                Loss(f"probe {probe.id}", "a score equal to the threshold will also fire")
            )
        return losses

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        probe = _only_linear(package, self.name)
        streams = {r.site.stream for r in probe.readings}
        places = {
            str(r.position): k
            for r in probe.readings
            for k, p in _POSITIONS.items()
            if p == r.position
        }
        if len(streams) != 1 or streams == {"head_input"} or len(places) != 1:
            raise NotRepresentable(
                self.name, f"probe {probe.id} reads several kinds of places; it supports one kind"
            )
        if any(r.position not in _POSITIONS.values() for r in probe.readings):
            raise NotRepresentable(self.name, f"probe {probe.id} reads another token of the prompt")
        layers = [r.site.layer for r in probe.readings if r.site.stream != "head_input"]
        if len(set(layers)) != len(layers):
            raise NotRepresentable(self.name, f"probe {probe.id} reads one layer twice")
        w, bias = probers.as_linear(package, probe, self.name)
        parts = w.reshape(len(layers), -1)
        info = {
            "format_version": 1,
            "polarity": "positives_high",
            "model_type": package.spec.base_model.model_type,
            "location": next(iter(streams)),
            "pooling": next(iter(places.values())),
            "layer_ids": layers,
            "weight_layer_ids": layers,
            "bias": bias,
            "meta": {"written_by": "steerbridge"},
        }
        path.mkdir()
        (path / "probe.json").write_text(json.dumps(info, indent=2, allow_nan=False) + "\n")
        tensors = {
            f"weights.{k}": np.ascontiguousarray(p) for k, p in zip(layers, parts, strict=True)
        }
        save_file(tensors, path / "probe.safetensors")


def _only_linear(package: SteeringPackage, format: str) -> LinearProbe:
    linear = [p for p in package.spec.probes if isinstance(p, LinearProbe)]
    if len(linear) != 1:
        raise NotRepresentable(format, f"{len(linear)} linear probes; it supports one")
    return linear[0]


def _probe(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = path / "probe.json"
    info = files.json_object(file)
    supported: dict[str, Any] = {
        "format_version": (1,),
        "polarity": ("positives_high",),
        "location": tuple(_SITES),
        "pooling": tuple(_POSITIONS),
    }
    for key, allowed in supported.items():
        got = info.get(key)
        if got not in allowed or isinstance(got, bool | float):
            raise unreadable(file, key, f"one of {allowed}", shown(got))
    for key in ("layer_ids", "weight_layer_ids"):
        layers = info.get(key)
        numbers = isinstance(layers, list) and all(type(k) is int and k >= 0 for k in layers)
        if not numbers or not layers or len(set(layers)) != len(layers):
            raise unreadable(file, key, "numbers of layers from 0 on, each once", shown(layers))
    layers = info["layer_ids"]
    files.number(info.get("bias"), "bias", file)
    tensors = path / "probe.safetensors"
    weights = files.safetensors(tensors)
    for k in layers:
        if f"weights.{k}" not in weights:
            raise unreadable(tensors, f"weights.{k}", "a vector", "none")
    return info, weights


class Cast(Format):
    """CAST: a condition `.svec` and the numbers from the script that uses it.

    The score is cos(h, tanh(P h)) of the pooled input of a block (arXiv 2409.05907). `larger` means
    a score below the threshold in IBM's code and one above it in AISteer360, so the option takes
    the comparison sign instead of a word.
    """

    name = "cast"
    title = "CAST condition (.svec), IBM and AISteer360"
    holds = Holds(
        probes=frozenset({"cosine"}),
        sites="inputs of blocks; prompt mean or end",
        strength="none",
    )
    options = (
        Option("layers", several(block), "blocks whose input the condition reads, comma-separated"),
        Option("threshold", finite, "threshold of the score"),
        Option(
            "fires_when",
            one_of("<", "<=", ">", ">="),
            "fires if score OP threshold (IBM: larger is <, smaller >; AISteer360: larger is >=)",
        ),
        Option("pooling", one_of("mean", "last"), "pooling over the tokens of the prompt", "mean"),
        Option("behaviour", Path, "the .svec of the behaviour vector", Path()),
        Option("behaviour_layers", several(block), "blocks whose input the behaviour changes", ()),
        Option("strength", finite, "factor of the behaviour", 0.0),
    )

    def recognises(self, path: Path) -> bool:
        return False  # any .svec file looks the same: only the user knows that it is a condition

    def replaces(self, path: Path) -> bool:
        return path.suffix == ".svec" and path.is_file() and svec.holds_vectors(path)

    def contents(self, path: Path) -> dict[str, Any]:
        return svec.IbmSvec().contents(path)

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        values = {option.name: answers.get(option) for option in self.options}
        content, directions = svec.read_vectors(path, self.name)
        base = answers.base_model(model_type=content["model_type"])
        tensors, probes = {}, []
        for k in values["layers"]:
            if k not in directions:
                raise unreadable(path, f"directions['{k}']", "a vector", "none")
            tensors[f"condition.{k}"] = directions[k]
            probes.append(
                CosineProbe(
                    id=f"condition-{k}",
                    type="cosine",
                    readings=(
                        Reading(
                            site=LayerInput(stream="layer_input", layer=k),
                            position=_POSITIONS[values["pooling"]],
                        ),
                    ),
                    comparator=values["fires_when"],
                    threshold=values["threshold"],
                    direction=f"condition.{k}",
                    squash="tanh",
                )
            )
        vectors.checked({k: directions[k] for k in values["layers"]}, base, self.name)
        acting, rules = self._behaviour(values, tensors, probes, answers)
        spec = SteeringSpec(
            spec_version="1.0",
            name=path.stem,
            base_model=base,
            probes=tuple(probes),
            interventions=acting,
            rules=rules,
        )
        try:
            return SteeringPackage(spec, tensors)
        except InvalidSpec as error:
            raise NotRepresentable(self.name, str(error)) from error

    def _behaviour(
        self,
        values: dict[str, Any],
        tensors: dict[str, Tensor],
        probes: list[Any],
        answers: Answers,
    ) -> tuple[tuple[AddVector, ...], tuple[Rule, ...]]:
        """The behaviour vector and the rule that applies it under the condition."""
        path = values["behaviour"]
        if path == Path():
            return (), ()
        _, directions = svec.read_vectors(path, self.name)
        if not values["strength"]:
            raise MissingOption(self.name, "strength", "factor of the behaviour; not 0")
        layers = values["behaviour_layers"]
        if not layers:
            raise MissingOption(self.name, "behaviour_layers", "blocks that the behaviour changes")
        if missing := sorted(set(layers) - set(directions)):
            raise InvalidOption(
                self.name,
                "behaviour_layers",
                f"layers {missing}: {path.name} has {sorted(directions)}",
            )
        tensors |= {f"behaviour.{k}": directions[k] for k in layers}
        answers.losses.append(
            Loss(
                "behaviour",
                "acts from the end of the prompt on; CAST also changes the prompt's own tokens, in "
                "blocks after the condition",
            )
        )
        vector = AddVector(
            id="behaviour",
            type="add_vector",
            position="from_prompt_end",
            alpha=values["strength"],
            targets=tuple(
                Target(site=LayerInput(stream="layer_input", layer=k), vector=f"behaviour.{k}")
                for k in layers
            ),
        )
        rule = Rule(
            id="cast",
            condition=Condition(type="any", probes=tuple(p.id for p in probes)),
            interventions=("behaviour",),
            strength=ConstantStrength(type="constant", value=1.0),
        )
        return (vector,), (rule,)

    def losses(self, package: SteeringPackage, answers: Answers) -> list[Loss]:
        losses = super().losses(package, answers)
        for probe in package.spec.probes:
            if isinstance(probe, CosineProbe):
                losses.append(
                    Loss(
                        f"probe {probe.id}",
                        f"only its direction is stored: your script must fire at score "
                        f"{probe.comparator} {probe.threshold} of {probe.readings[0]}",
                    )
                )
        return losses

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        probes = [p for p in package.spec.probes if isinstance(p, CosineProbe)]
        layers = ",".join(str(package.spec.depth(p.readings[0].site)) for p in probes)
        return {"layers": layers, "threshold": "0", "fires_when": ">"}

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        directions: dict[str, Any] = {}
        for probe in package.spec.probes:
            if not isinstance(probe, CosineProbe):
                continue
            site = probe.readings[0].site
            layer = package.spec.depth(site)
            if len(probe.readings) != 1 or layer >= package.spec.base_model.num_layers:
                raise NotRepresentable(self.name, f"probe {probe.id} on {probe.readings[0]}")
            if probe.squash != "tanh" or probe.input_mean or probe.input_scale:
                raise NotRepresentable(
                    self.name, f"probe {probe.id}: its input is normalised or its score has no tanh"
                )
            if str(layer) in directions:
                raise NotRepresentable(self.name, f"two conditions at layer_input[{layer}]")
            directions[str(layer)] = package.tensors[probe.direction].float32().tolist()
        svec.dump(path, package, directions)
