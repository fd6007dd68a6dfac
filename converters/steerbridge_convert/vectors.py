"""Vectors added to the residual stream: what the files of most tools hold.

A depth counts places in the order of computation: depth L is `layer_input[L]`, which is
`layer_output[L - 1]`. Tools number layers by input or output; only this module's callers know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from steerbridge.errors import NotRepresentable
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    AddVector,
    BaseModelInfo,
    ConstantStrength,
    LayerInput,
    LayerOutput,
    Rule,
    SteeringSpec,
    Target,
)
from steerbridge.tensors import Float32, Tensor

Vectors = Mapping[int, Tensor]  # by layer number of a tool, or by depth


def package(
    name: str,
    base: BaseModelInfo,
    sites: Mapping[LayerInput | LayerOutput, Tensor],
    strength: float,
    position: str = "all_positions",
) -> SteeringPackage:
    """A package that adds `strength` times each vector on every prompt."""
    names = {site: f"vector.{site.stream}.{site.layer}" for site in sites}
    vector = AddVector(
        id="vector",
        type="add_vector",
        position=position,  # type: ignore[arg-type] # pydantic checks the word
        alpha=strength,
        targets=tuple(Target(site=site, vector=names[site]) for site in sites),
    )
    spec = SteeringSpec(
        spec_version="1.0",
        name=name,
        base_model=base,
        probes=(),
        interventions=(vector,),
        rules=(
            Rule(
                id="always",
                condition=None,
                interventions=("vector",),
                strength=ConstantStrength(type="constant", value=1.0),
            ),
        ),
    )
    return SteeringPackage(spec, {names[site]: tensor for site, tensor in sites.items()})


def outputs(vectors: Vectors) -> dict[LayerInput | LayerOutput, Tensor]:
    """Sites of vectors that act at the output of the block they are numbered by."""
    return {LayerOutput(stream="layer_output", layer=k): v for k, v in sorted(vectors.items())}


def inputs(vectors: Vectors) -> dict[LayerInput | LayerOutput, Tensor]:
    """Sites of vectors that act at the input of the block they are numbered by."""
    return {LayerInput(stream="layer_input", layer=k): v for k, v in sorted(vectors.items())}


def by_depth(package: SteeringPackage) -> dict[int, Float32]:
    """The sum of all vectors that rules add, by depth, each times its alpha and strength.

    A rule whose strength follows a score counts with its full scale. Vectors that act alone and
    with factor 1 keep their bits.
    """
    found: dict[int, Float32] = {}
    for rule, vector in acting(package):
        factor = np.float32(vector.alpha * strength(rule))
        for target in vector.targets:
            depth = package.spec.depth(target.site)
            values = package.tensors[target.vector].float32()
            values = values if factor == 1 else factor * values
            found[depth] = found[depth] + values if depth in found else values
    return dict(sorted(found.items()))


def acting(package: SteeringPackage) -> list[tuple[Rule, AddVector]]:
    """Each rule with each vector that it adds."""
    return [
        (rule, found)
        for rule in package.spec.rules
        for id in rule.interventions
        if isinstance(found := package.spec.intervention(id), AddVector)
    ]


def strength(rule: Rule) -> float:
    """The constant of a rule, or the scale of one that follows a score."""
    if isinstance(rule.strength, ConstantStrength):
        return rule.strength.value
    return rule.strength.scale


def keyed_by_output(package: SteeringPackage, format: str, first: int) -> dict[int, Float32]:
    """Vectors by the number of the block whose output they change.

    Raises:
        NotRepresentable: one acts before the output of block `first`.
    """
    return _keyed(
        package, format, shift=1, allowed=range(first, package.spec.base_model.num_layers)
    )


def keyed_by_input(package: SteeringPackage, format: str) -> dict[int, Float32]:
    """Vectors by the number of the block whose input they change.

    Raises:
        NotRepresentable: one acts after the last block.
    """
    return _keyed(package, format, shift=0, allowed=range(package.spec.base_model.num_layers))


def _keyed(package: SteeringPackage, format: str, shift: int, allowed: range) -> dict[int, Float32]:
    side = "output" if shift else "input"
    found: dict[int, Float32] = {}
    for depth, values in by_depth(package).items():
        if depth - shift not in allowed:
            raise NotRepresentable(
                format,
                f"a vector at layer_input[{depth}]; it steers the {side}s of blocks "
                f"{allowed.start}..{allowed.stop - 1}",
            )
        found[depth - shift] = values
    if not found:
        raise NotRepresentable(format, "no rule adds a vector")
    return found


def checked(vectors: Mapping[int, Any], base: BaseModelInfo, format: str) -> None:
    """Vectors by block number fit the base model.

    Raises:
        NotRepresentable: a number beyond its blocks, or another width.
    """
    for number, vector in vectors.items():
        if number not in range(base.num_layers):
            raise NotRepresentable(
                format, f"layer {number} of {base.name}, which has blocks 0..{base.num_layers - 1}"
            )
        if vector.shape != (base.hidden_size,):
            raise NotRepresentable(
                format,
                f"layer {number}: shape {vector.shape} on {base.name} of width {base.hidden_size}",
            )
