"""Several packages as one: what each does is done, in their order; nothing of it is changed.

Ids and tensors of the second and later packages get the package's number behind their names where
they are taken. What was measured (evidence, calibrated thresholds) was measured of the parts, each
alone, and is a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from steerbridge import gguf_model
from steerbridge.errors import NotRepresentable
from steerbridge.format import Loss
from steerbridge.package import SteeringPackage, parse
from steerbridge.spec import BaseModelInfo
from steerbridge.tensors import Tensor

# Fields of probes and interventions that name a tensor.
_TENSORS: Final = frozenset(
    {
        *("matrix", "u", "v", "vector", "weight", "bias", "direction"),
        *("input_mean", "input_scale"),
    }
)
_PARTS: Final = ("probes", "interventions", "rules")


def combined(packages: Sequence[SteeringPackage], name: str) -> tuple[SteeringPackage, list[Loss]]:
    """One package of several for one model, and what is lost.

    Raises:
        NotRepresentable: they are for different models.
        InvalidSpec: together they break a rule of the format.
    """
    losses: list[Loss] = []
    whole: dict[str, Any] = {part: [] for part in _PARTS}
    tensors: dict[str, Tensor] = {}
    for number, package in enumerate(packages, 1):
        spec = package.spec.to_json()
        taken = {part: {one["id"] for one in whole[part]} for part in _PARTS}
        ids = {
            part: {
                one["id"]: f"{one['id']}-{number}" if one["id"] in taken[part] else one["id"]
                for one in spec[part]
            }
            for part in _PARTS
        }
        names = {n: f"{n}.{number}" if n in tensors else n for n in package.tensors}
        for part in _PARTS:
            whole[part] += [_renamed(one, part, ids, names) for one in spec[part]]
        tensors |= {names[n]: tensor for n, tensor in package.tensors.items()}
        for field in ("evidence", "calibrations"):
            if spec.get(field):
                losses.append(Loss(f"{field} of {spec['name']}", "was measured without the others"))
    model = _one_model([package.spec.base_model for package in packages])
    versions = [package.spec.spec_version for package in packages]
    whole |= {
        "spec_version": max(versions, key=lambda v: tuple(map(int, v.split(".")))),
        "name": name,
        "base_model": model.to_json(),
    }
    return SteeringPackage(parse(whole), tensors), losses


def _one_model(models: Sequence[BaseModelInfo]) -> BaseModelInfo:
    """What is known of the one model that all are for."""
    first = models[0]
    for other in models[1:]:
        alike = all(
            one == two or None in (one, two)
            for one, two in zip(_said(first), _said(other), strict=True)
        )
        if not alike:
            raise NotRepresentable(
                "a package", f"two models, {first.name} and {other.name}, in one"
            )
    return max(models, key=lambda model: sum(value is not None for value in _said(model)))


def _said(model: BaseModelInfo) -> tuple[Any, ...]:
    return (
        gguf_model.architecture(model.model_type),
        model.hidden_size,
        model.num_layers,
        model.vocab_size,
        model.tokenizer_sha256,
        model.chat_template_sha256,
    )


def _renamed(
    value: Any, part: str, ids: Mapping[str, Mapping[str, str]], names: Mapping[str, str]
) -> Any:
    """A part of a spec under its new names."""
    new = _with_tensors(value, names) | {"id": ids[part][value["id"]]}
    if part != "rules":
        return new
    probes = ids["probes"]
    if condition := new.get("condition"):
        new["condition"] = condition | {"probes": [probes[id] for id in condition["probes"]]}
    if "probe" in new["strength"]:
        new["strength"] = new["strength"] | {"probe": probes[new["strength"]["probe"]]}
    return new | {"interventions": [ids["interventions"][id] for id in new["interventions"]]}


def _with_tensors(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(one, names) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: names[held]
        if key in _TENSORS and isinstance(held, str)
        else _with_tensors(held, names)
        for key, held in value.items()
    }
