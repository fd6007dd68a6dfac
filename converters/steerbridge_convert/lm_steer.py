"""LM-Steer and EasyEdit2's LM-Steer: pairs of projectors after the final norm.

`lm_steer_vector.pt` is a list [HyperParams object, {"projector1", "projector2"} each
[steers, d, rank], step]. Applied as h' = h + epsilon sum_s value_s (h P1_s) P2_s^T
(easyeditor/models/lm_steer), which is W = sum_s value_s P2_s P1_s^T at low rank: exact both ways.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import NotRepresentable
from steerbridge.formats import Ask, Format, Given, Holds, several, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import heads, pickles
from steerbridge_convert.heads import Head

_CLASSES: Final = r"[\w.]*HyperParams"


EPSILON: Final = Ask("epsilon", float, "the tool's epsilon", 1e-3)
VALUES: Final = Ask("values", several(float), "steer_values, one a steer, joined by commas")


class LmSteer(Format):
    """`lm_steer_vector.pt`; what stands in it beside the tensors is never built."""

    name = "lm-steer"
    title = "LM-Steer projectors (.pt)"
    holds = Holds(
        interventions=frozenset({"head_matrix"}),
        from_prompt_end=True,  # after the final norm the prompt's rows change nothing
        sites="head input",
        strength="epsilon and steer_values are given when it is used",
    )
    asks = (EPSILON, VALUES)
    write_asks = (EPSILON,)

    def recognises(self, path: Path) -> bool:
        return pickles.holds(path, lambda x: "projector1" in _pair(x), _CLASSES)

    def contents(self, path: Path) -> dict[str, Any]:
        one, two = _projectors(path)
        return {"projector1": list(one.shape), "projector2": list(two.shape)}

    def read(self, path: Path, given: Given) -> SteeringPackage:
        one, two = _projectors(path)
        values, base = given(VALUES), given.base_model()
        if one.shape[1] != base.hidden_size:
            raise NotRepresentable(
                self.name, f"projectors of width {one.shape[1]} on a model of {base.hidden_size}"
            )
        if len(values) != len(one):
            raise NotRepresentable(self.name, f"{len(values)} values for {len(one)} steers")
        scaled = [
            p if value == 1 else np.float32(value) * p for value, p in zip(values, two, strict=True)
        ]
        u = Tensor.of(np.concatenate(scaled, axis=1))
        v = Tensor.of(np.concatenate([p.T for p in one], axis=0))
        return heads.package(path.stem, base, Head(given(EPSILON), u, v))

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        _, head = heads.only(package, self.name)
        u = head.matrix.float32()
        v = np.eye(len(u), dtype=np.float32) if head.v is None else head.v.float32()
        factor = np.float32(head.eps / given(EPSILON))
        two = u if head.eps == given(EPSILON) else factor * u
        projectors = {
            "projector1": pickles.torch_tensor(np.ascontiguousarray(v.T)[None]),
            "projector2": pickles.torch_tensor(two[None]),
        }
        pickles.save([None, projectors, 0], path)


def _projectors(path: Path) -> tuple[Any, Any]:
    pair = _pair(found := pickles.load(path, _CLASSES))
    if not {"projector1", "projector2"} <= set(pair):
        raise unreadable(path, "list", "[.., {projector1, projector2}, step]", type(found).__name__)
    one, two = (pickles.tensor(pair[k], k, path, 3).float32() for k in ("projector1", "projector2"))
    if one.shape != two.shape:
        raise unreadable(path, "projector2", f"shape {one.shape}", two.shape)
    return one, two


def _pair(found: Any) -> dict[Any, Any]:
    """The tensors of the list, or of a file that holds them alone."""
    pair = found[1] if isinstance(found, list) and len(found) == 3 else found
    return pair if isinstance(pair, dict) else {}
