"""Gates without an action: AISteer360's probe directories and CAST's condition vectors.

A package of one of these decides and changes nothing by itself; the vectors or head that should
act come from another file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from steerbridge.errors import InvalidSpec, NotRepresentable, Unanswered
from steerbridge.formats import Ask, Format, Given, Holds, Loss, one_of, several, unreadable
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


class AisteerProbe(Format):
    """AISteer360 `Probe`: sum over layers of w . x, plus a bias, fires at 0 and above."""

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

    def read(self, path: Path, given: Given) -> SteeringPackage:
        info, weights = _probe(path)
        base = given.base_model(model_type=info.get("model_type"))
        layers = info["weight_layer_ids"]
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
        joined = np.concatenate([weights[f"weights.{k}"].float32() for k in layers])
        spec = SteeringSpec(
            spec_version="1.0",
            name=path.name,
            base_model=base,
            probes=(probe,),
            interventions=(),
            rules=(),
        )
        return SteeringPackage(spec, {"probe.weight": Tensor.of(joined)})

    def losses(self, package: SteeringPackage, given: Given) -> list[Loss]:
        lost = super().losses(package, given)
        probe = _only_linear(package, self.name)
        if probe.comparator in (">", "<"):
            lost.append(Loss(f"probe {probe.id}", "a score equal to the threshold fires too"))
        return lost

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
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
                self.name, f"probe {probe.id} reads places of several kinds, it holds one kind"
            )
        if any(r.position not in _POSITIONS.values() for r in probe.readings):
            raise NotRepresentable(self.name, f"probe {probe.id} reads another token of the prompt")
        layers = [r.site.layer for r in probe.readings if r.site.stream != "head_input"]
        if len(set(layers)) != len(layers):
            raise NotRepresentable(self.name, f"probe {probe.id} reads a layer twice")
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
        named = {
            f"weights.{k}": np.ascontiguousarray(p) for k, p in zip(layers, parts, strict=True)
        }
        save_file(named, path / "probe.safetensors")


def _only_linear(package: SteeringPackage, format: str) -> LinearProbe:
    found = [p for p in package.spec.probes if isinstance(p, LinearProbe)]
    if len(found) != 1:
        raise NotRepresentable(format, f"{len(found)} linear probes; it holds one")
    return found[0]


def _probe(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = path / "probe.json"
    info = files.json_object(file)
    wanted: dict[str, Any] = {
        "format_version": (1,),
        "polarity": ("positives_high",),
        "location": tuple(_SITES),
        "pooling": tuple(_POSITIONS),
    }
    for key, allowed in wanted.items():
        got = info.get(key)
        if got not in allowed:
            raise unreadable(file, key, f"one of {allowed}", repr(got))
    layers = info.get("weight_layer_ids")
    if not isinstance(layers, list) or not all(type(k) is int and k >= 0 for k in layers):
        raise unreadable(file, "weight_layer_ids", "layer numbers from 0 on", repr(layers))
    if not isinstance(info.get("bias"), int | float) or not np.isfinite(info["bias"]):
        raise unreadable(file, "bias", "a finite number", repr(info.get("bias")))
    tensors = path / "probe.safetensors"
    weights = files.safetensors(tensors)
    for k in layers:
        if f"weights.{k}" not in weights:
            raise unreadable(tensors, f"weights.{k}", "a vector", "none")
    return info, weights


class Cast(Format):
    """CAST: a condition `.svec` and the numbers of the script that uses it.

    The score is cos(h, tanh(P h)) of the pooled input of a block (arXiv 2409.05907). IBM's word
    `larger` fires when the score is below the threshold (the threshold is larger), AISteer360's
    when it is above, so the sign is asked for instead of a word.
    """

    name = "cast"
    title = "CAST condition (.svec), IBM and AISteer360"
    holds = Holds(
        probes=frozenset({"cosine"}),
        sites="inputs of blocks; prompt mean or end",
        strength="none",
    )
    asks = (
        Ask("layers", several(int), "blocks whose input the condition reads, joined by commas"),
        Ask("threshold", float, "of the score"),
        Ask(
            "fires_when",
            one_of("<", "<=", ">", ">="),
            "score OP threshold fires (IBM: larger is <, smaller is >; AISteer360: larger is >=)",
        ),
        Ask("pooling", one_of("mean", "last"), "over the prompt's tokens", "mean"),
        Ask("behaviour", Path, "the .svec that acts", Path()),
        Ask("behaviour_layers", several(int), "blocks whose input it changes", ()),
        Ask("strength", float, "factor of the behaviour", 0.0),
    )

    def recognises(self, path: Path) -> bool:
        return False  # the file is any .svec: only the user knows that it is a condition

    def contents(self, path: Path) -> dict[str, Any]:
        return svec.IbmSvec().contents(path)

    def read(self, path: Path, given: Given) -> SteeringPackage:
        answer = {ask.name: given(ask) for ask in self.asks}
        found, directions = svec.read_vectors(path, self.name)
        base = given.base_model(model_type=found["model_type"])
        tensors, probes = {}, []
        for k in answer["layers"]:
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
                            position=_POSITIONS[answer["pooling"]],
                        ),
                    ),
                    comparator=answer["fires_when"],
                    threshold=answer["threshold"],
                    direction=f"condition.{k}",
                    squash="tanh",
                )
            )
        vectors.checked({k: directions[k] for k in answer["layers"]}, base, self.name)
        acting, rules = self._behaviour(answer, tensors, probes, given)
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
        self, answer: dict[str, Any], tensors: dict[str, Tensor], probes: list[Any], given: Given
    ) -> tuple[tuple[AddVector, ...], tuple[Rule, ...]]:
        """The vector of the behaviour file behind the condition."""
        path = answer["behaviour"]
        if path == Path():
            return (), ()
        _, directions = svec.read_vectors(path, self.name)
        if not answer["strength"]:
            raise Unanswered(self.name, "strength", "factor of the behaviour, not 0")
        layers = answer["behaviour_layers"] or tuple(directions)
        tensors |= {f"behaviour.{k}": directions[k] for k in layers}
        given.lost.append(
            Loss(
                "behaviour",
                "acts from the end of the prompt on; CAST changes the prompt's own tokens too, in "
                "blocks behind the condition",
            )
        )
        vector = AddVector(
            id="behaviour",
            type="add_vector",
            position="from_prompt_end",
            alpha=answer["strength"],
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

    def losses(self, package: SteeringPackage, given: Given) -> list[Loss]:
        lost = super().losses(package, given)
        for probe in package.spec.probes:
            if isinstance(probe, CosineProbe):
                lost.append(
                    Loss(
                        f"probe {probe.id}",
                        f"the file holds its direction alone: fire at score {probe.comparator} "
                        f"{probe.threshold} of {probe.readings[0]} in your script",
                    )
                )
        return lost

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
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
                    self.name, f"probe {probe.id}: no normalised input and no score without tanh"
                )
            if str(layer) in directions:
                raise NotRepresentable(self.name, f"two conditions at layer_input[{layer}]")
            directions[str(layer)] = package.tensors[probe.direction].float32().tolist()
        svec.dump(path, package, directions)
