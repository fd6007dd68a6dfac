"""LM-Steer, original and in EasyEdit2: pairs of projectors after the final norm.

A checkpoint is a list [options, {"projector1", "projector2"} each [steers, d, rank], step]; the
options (argparse's of the original, HyperParams of EasyEdit2) hold the epsilon it was trained with.
Applied as h' = h + epsilon sum_s value_s (h P1_s) P2_s^T (lm_steer/models/steers.py), which is
W = sum_s value_s P2_s P1_s^T at low rank. Conversion is exact in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Option,
    finite,
    require_known,
    several,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import files, heads, pickles
from steerbridge_convert.heads import Head

# The first of the list: options of EasyEdit2, or what the original's command line said.
_KINDS: Final = frozenset({"projector1", "add_vec", "offset_vec"})
_CLASSES: Final = r"[\w.]*HyperParams|argparse\.Namespace"
_EPSILON: Final = 1e-3  # of both tools
EPSILON: Final = Option("epsilon", finite, "epsilon of the tool", _EPSILON)
_STORED: Final = replace(EPSILON, default="what the file says, else that of the tool")
VALUES: Final = Option("values", several(finite), "steer_values, one per steer, comma-separated")


class LmSteer(Format):
    """`lm_steer_vector.pt`; objects in it other than tensors are never constructed."""

    name = "lm-steer"
    title = "LM-Steer projectors (.pt)"
    holds = Holds(
        interventions=frozenset({"head_matrix"}),
        from_prompt_end=True,  # after the final norm, changes to the prompt's tokens have no effect
        sites="head input",
        strength="the tool sets epsilon and steer_values when it runs",
    )
    options = (_STORED, VALUES)
    write_options = (EPSILON,)

    def recognises(self, path: Path) -> bool:
        return pickles.holds(path, lambda x: not _KINDS.isdisjoint(map(str, _pair(x))), _CLASSES)

    def contents(self, path: Path) -> dict[str, Any]:
        one, two = _projectors(pickles.load(path, _CLASSES), path)
        return {"projector1": list(one.shape), "projector2": list(two.shape)}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        content = pickles.load(path, _CLASSES)
        one, two = _projectors(content, path)
        said = EPSILON.name in answers.values
        epsilon = answers.get(_STORED) if said else _stored(content, path)
        values, base = answers.get(VALUES), answers.base_model()
        if one.shape[1] != base.hidden_size:
            raise NotRepresentable(
                self.name,
                f"projectors of width {one.shape[1]} for a model of width {base.hidden_size}",
            )
        if len(values) != len(one):
            raise NotRepresentable(self.name, f"{len(values)} values for {len(one)} steers")
        scaled = [
            p if value == 1 else np.float32(value) * p for value, p in zip(values, two, strict=True)
        ]
        u = Tensor.of(np.concatenate(scaled, axis=1))
        v = Tensor.of(np.concatenate([p.T for p in one], axis=0))
        return heads.package(path.stem, base, Head(epsilon, u, v))

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return {VALUES.name: "1"}

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        _, head = heads.only(package, self.name)
        u = head.matrix.float32()
        v = np.eye(len(u), dtype=np.float32) if head.v is None else head.v.float32()
        factor = np.float32(head.eps / answers.get(EPSILON))
        two = u if head.eps == answers.get(EPSILON) else factor * u
        projectors = {
            "projector1": pickles.torch_tensor(np.ascontiguousarray(v.T)[None]),
            "projector2": pickles.torch_tensor(two[None]),
        }
        pickles.save([None, projectors, 0], path)


def _stored(content: Any, path: Path) -> float:
    """The epsilon of the options that a file holds, or the tools' default.

    Raises:
        NotRepresentable: they say that the change is of another kind.
    """
    said = getattr(content[0], "__dict__", {}) if isinstance(content, list) and content else {}
    for key, used in (("adaptor_class", "multiply"), ("adapted_component", "final_layer")):
        if said.get(key, used) != used:
            raise NotRepresentable("lm-steer", f"{key} = {shown(said[key])}")
    return files.number(said.get("epsilon", _EPSILON), "epsilon", path)


def _projectors(content: Any, path: Path) -> tuple[Any, Any]:
    pair = _pair(content)
    if other := {"add_vec", "offset_vec"} & set(map(str, pair)):
        raise NotRepresentable("lm-steer", f"{', '.join(other)}: it adds, and multiplies nothing")
    if not {"projector1", "projector2"} <= set(pair):
        raise unreadable(
            path, "list", "[.., {projector1, projector2}, step]", type(content).__name__
        )
    require_known("lm-steer", path.name, map(str, pair), {"projector1", "projector2"})
    one, two = (pickles.tensor(pair[k], k, path, 3).float32() for k in ("projector1", "projector2"))
    if one.shape != two.shape:
        raise unreadable(path, "projector2", f"shape {one.shape}", two.shape)
    return one, two


def _pair(content: Any) -> dict[Any, Any]:
    """The tensors in the list, or in a file that contains nothing else."""
    pair = content[1] if isinstance(content, list) and len(content) == 3 else content
    return pair if isinstance(pair, dict) else {}
