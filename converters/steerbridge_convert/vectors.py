"""Vectors added to the residual stream, which most tools store.

Depth numbers sites in the order of computation: depth L is `layer_input[L]`, which equals
`layer_output[L - 1]`. Tools number layers by input or by output; the callers of this module know
which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import numpy as np

from steerbridge.errors import NotRepresentable
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    AddVector,
    BaseModelInfo,
    ConstantStrength,
    LayerInput,
    LayerOutput,
    ProjectOut,
    Rule,
    SteeringSpec,
    Target,
)
from steerbridge.tensors import Float32, Tensor
from steerbridge_convert.scope import Scope

UNIT: Final = 1e-5  # how far from one the norm of a unit vector in float32 may be
Vectors = Mapping[int, Tensor]  # by a tool's layer number, or by depth
Acting = TypeVar("Acting", AddVector, ProjectOut)


Placed = Mapping[LayerInput | LayerOutput, Tensor]


def package(
    name: str,
    base: BaseModelInfo,
    sites: Placed,
    strength: float,
    position: str = "all_positions",
    act: type[AddVector] | type[ProjectOut] = AddVector,
) -> SteeringPackage:
    """A package that adds `strength` times each vector on every prompt, or takes it out."""
    return _package(name, base, {strength: sites}, position, act)


def scoped(
    name: str,
    base: BaseModelInfo,
    vectors: Vectors,
    place: Callable[[Vectors], Placed],
    scope: Scope,
    act: str = "add",
) -> SteeringPackage:
    """A package that adds the vectors of a file on every prompt, where and as strongly as was said,
    or takes their directions out.

    Args:
        vectors: by the tool's number of the layer; `place` makes sites of them.
        act: `add` or `project_out`.

    Raises:
        NotRepresentable: a vector of zeros has no direction.
    """
    if act == "project_out":
        vectors = {k: _direction(vectors[k], k) for k in scope.strengths}
    groups = {
        strength: place({k: vectors[k] for k, s in scope.strengths.items() if s == strength})
        for strength in dict.fromkeys(scope.strengths.values())
    }
    kind = ProjectOut if act == "project_out" else AddVector
    return _package(name, base, groups, scope.position, kind)


def _direction(vector: Tensor, layer: int) -> Tensor:
    """The unit vector."""
    values = vector.float32().astype(np.float64)
    norm = float(np.linalg.norm(values))
    if norm == 0:
        raise NotRepresentable("project_out", f"layer {layer}: a vector of zeros has no direction")
    return vector if abs(norm - 1) < UNIT else Tensor.of(values / norm)


def _package(
    name: str,
    base: BaseModelInfo,
    groups: Mapping[float, Placed],
    position: str,
    act: type[AddVector] | type[ProjectOut],
) -> SteeringPackage:
    kind: Any = "add_vector" if act is AddVector else "project_out"
    placed = {site: tensor for sites in groups.values() for site, tensor in sites.items()}
    names = {site: f"vector.{site.stream}.{site.layer}" for site in placed}
    acting = tuple(
        act(
            id="vector" if len(groups) == 1 else f"vector-{i}",
            type=kind,
            position=position,  # type: ignore[arg-type] # pydantic checks the word
            alpha=strength,
            targets=tuple(Target(site=site, vector=names[site]) for site in sites),
        )
        for i, (strength, sites) in enumerate(groups.items(), 1)
    )
    return always(name, base, acting, {names[site]: tensor for site, tensor in placed.items()})


def always(
    name: str,
    base: BaseModelInfo,
    interventions: tuple[AddVector | ProjectOut, ...],
    tensors: Mapping[str, Tensor],
) -> SteeringPackage:
    """A package whose interventions act on every prompt, in this order."""
    rule = Rule(
        id="always",
        condition=None,
        interventions=tuple(one.id for one in interventions),
        strength=ConstantStrength(type="constant", value=1.0),
    )
    spec = SteeringSpec(
        spec_version="1.0",
        name=name,
        base_model=base,
        probes=(),
        interventions=interventions,
        rules=(rule,),
    )
    return SteeringPackage(spec, tensors)


def outputs(vectors: Vectors) -> dict[LayerInput | LayerOutput, Tensor]:
    """Sites of vectors that act at the output of the block with their number."""
    return {LayerOutput(stream="layer_output", layer=k): v for k, v in sorted(vectors.items())}


def inputs(vectors: Vectors) -> dict[LayerInput | LayerOutput, Tensor]:
    """Sites of vectors that act at the input of the block with their number."""
    return {LayerInput(stream="layer_input", layer=k): v for k, v in sorted(vectors.items())}


def by_depth(package: SteeringPackage) -> dict[int, Float32]:
    """The sum of all vectors that rules add, by depth, each times its alpha and strength.

    A rule whose strength follows a score counts with its full scale. A vector that is alone at its
    depth and has factor 1 stays bit-identical.
    """
    sums: dict[int, Float32] = {}
    for rule, vector in acting(package, AddVector):
        with np.errstate(over="ignore"):
            factor = np.float32(vector.alpha * strength(rule))
        for target in vector.targets:
            depth = package.spec.depth(target.site)
            values = package.tensors[target.vector].float32()
            with np.errstate(over="ignore", invalid="ignore"):  # no reader takes infinity
                values = values if factor == 1 else factor * values
                sums[depth] = sums[depth] + values if depth in sums else values
    return dict(sorted(sums.items()))


def acting(package: SteeringPackage, kind: type[Acting]) -> list[tuple[Rule, Acting]]:
    """Each rule paired with each intervention of a kind that it applies."""
    return [
        (rule, act)
        for rule in package.spec.rules
        for id in rule.interventions
        if isinstance(act := package.spec.intervention(id), kind)
    ]


def told(package: SteeringPackage) -> tuple[str, ...]:
    """Where each vector acts and how strongly, in words."""
    lines = []
    for act in package.spec.interventions:
        if isinstance(act, AddVector | ProjectOut):
            sites = ", ".join(str(target.site) for target in act.targets)
            lines.append(f"{act.type} {act.alpha:g} times at {sites} ({act.position})")
    return tuple(lines)


def strength(rule: Rule) -> float:
    """The constant strength of a rule, or the scale of one that follows a score."""
    if isinstance(rule.strength, ConstantStrength):
        return rule.strength.value
    return rule.strength.scale


def keyed_by_output(
    package: SteeringPackage, format: str, omits: frozenset[int] = frozenset()
) -> dict[int, Float32]:
    """Vectors by the number of the block whose output they change, without those at `omits`.

    Args:
        omits: depths.

    Raises:
        NotRepresentable: a vector acts before the output of block 0, or none is left.
    """
    return _keyed(package, format, shift=1, omits=omits)


def keyed_by_input(package: SteeringPackage, format: str) -> dict[int, Float32]:
    """Vectors by the number of the block whose input they change.

    Raises:
        NotRepresentable: a vector acts after the last block, or there is none.
    """
    return _keyed(package, format, shift=0)


def _keyed(
    package: SteeringPackage, format: str, shift: int, omits: frozenset[int] = frozenset()
) -> dict[int, Float32]:
    blocks = [k for k in range(package.spec.base_model.num_layers) if k + shift not in omits]
    side = "output" if shift else "input"
    by_block: dict[int, Float32] = {}
    for depth, values in by_depth(package).items():
        if depth in omits:
            continue
        block = depth - shift
        if block not in blocks:
            raise NotRepresentable(
                format,
                f"a vector at layer_input[{depth}]; it steers the {side}s of blocks "
                f"{blocks[0]}..{blocks[-1]}",
            )
        by_block[block] = values
    if not by_block:
        raise NotRepresentable(format, f"no rule adds a vector at the {side} of a block it steers")
    return by_block


def checked(vectors: Mapping[int, Any], base: BaseModelInfo, format: str) -> None:
    """Check that vectors by block number fit the base model.

    Raises:
        NotRepresentable: a block that the model does not have, or another width.
    """
    for number, vector in vectors.items():
        if number not in range(base.num_layers):
            raise NotRepresentable(
                format, f"layer {number}; {base.name} has blocks 0..{base.num_layers - 1}"
            )
        if vector.shape != (base.hidden_size,):
            raise NotRepresentable(
                format,
                f"layer {number}: shape {vector.shape}; {base.name} has width {base.hidden_size}",
            )
