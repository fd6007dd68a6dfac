"""LM-Steer, original and in EasyEdit2: pairs of projectors after the final norm.

`lm_steer_vector.pt` is a list [HyperParams object, {"projector1", "projector2"} each
[steers, d, rank], step]. Applied as h' = h + epsilon sum_s value_s (h P1_s) P2_s^T
(easyeditor/models/lm_steer), which is W = sum_s value_s P2_s P1_s^T at low rank. Conversion is
exact in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import heads, pickles
from steerbridge_convert.heads import Head

_CLASSES: Final = r"[\w.]*HyperParams"


EPSILON: Final = Option("epsilon", finite, "epsilon of the tool", 1e-3)
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
    options = (EPSILON, VALUES)
    write_options = (EPSILON,)

    def recognises(self, path: Path) -> bool:
        return pickles.holds(path, lambda x: "projector1" in _pair(x), _CLASSES)

    def contents(self, path: Path) -> dict[str, Any]:
        one, two = _projectors(path)
        return {"projector1": list(one.shape), "projector2": list(two.shape)}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        one, two = _projectors(path)
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
        return heads.package(path.stem, base, Head(answers.get(EPSILON), u, v))

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


def _projectors(path: Path) -> tuple[Any, Any]:
    content = pickles.load(path, _CLASSES)
    pair = _pair(content)
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
