"""A format: vectors of an imaginary tool, `{"toy_vectors": {"1": [0.5, ...]}}` by block.

`steerbridge convert` does the rest: it finds out which format a file has, asks for the options,
says what would be lost, reads a new file back, compares, and only then puts it in its place.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge import SteeringPackage
from steerbridge.errors import NotRepresentable
from steerbridge.format import Answers, Format, Holds, Option, unreadable
from steerbridge.package import parse
from steerbridge.spec import AddVector, ConstantStrength
from steerbridge.tensors import Tensor

# The file does not say it, and a wrong guess would change the meaning: no default.
STRENGTH: Final = Option("strength", float, "factor that the vectors were used with")


class ToyFormat(Format):
    """One vector for the output of each block, added at every position."""

    name = "toy"
    title = "Toy vectors (JSON)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="outputs of blocks",
        strength="one vector per block; the tool sets the scale",
    )
    options = (STRENGTH,)

    def recognises(self, path: Path) -> bool:
        """See `Format`. It must not fail, whatever the file is."""
        if path.suffix != ".json" or not path.is_file():
            return False
        try:
            return "toy_vectors" in json.loads(path.read_text("utf-8"))
        except (ValueError, TypeError):
            return False

    def contents(self, path: Path) -> dict[str, Any]:
        """See `Format`: what `steerbridge inspect` shows."""
        return {"blocks": {str(block): len(vector) for block, vector in _vectors(path).items()}}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        """See `Format`."""
        base, vectors = answers.base_model(), _vectors(path)
        spec = {
            "spec_version": "1.0",
            "name": path.stem,
            "base_model": base.to_json(),
            "probes": [],
            "interventions": [
                {
                    "id": "vector",
                    "type": "add_vector",
                    "position": "all_positions",
                    "alpha": answers.get(STRENGTH),
                    "targets": [
                        {
                            "site": {"stream": "layer_output", "layer": block},
                            "vector": f"vector.{block}",
                        }
                        for block in vectors
                    ],
                }
            ],
            "rules": [
                {
                    "id": "always",
                    "condition": None,
                    "interventions": ["vector"],
                    "strength": {"type": "constant", "value": 1.0},
                }
            ],
        }
        tensors = {f"vector.{block}": Tensor.of(vector) for block, vector in vectors.items()}
        return SteeringPackage(parse(spec), tensors)  # checks every name and shape

    def whole(self, package: SteeringPackage) -> dict[str, str]:  # noqa: ARG002
        """See `Format`: how to read all of a written file as it stands there."""
        return {STRENGTH.name: "1"}

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:  # noqa: ARG002
        """See `Format`: alpha and strength become part of the vectors."""
        spec, sums = package.spec, defaultdict[int, Any](lambda: np.float32(0))
        for rule in spec.rules:
            for act in map(spec.intervention, rule.interventions):
                if not isinstance(act, AddVector):
                    continue  # `losses` has said so
                if not isinstance(rule.strength, ConstantStrength):
                    raise NotRepresentable(self.name, f"rule {rule.id}: a strength by score")
                factor = np.float32(act.alpha * rule.strength.value)
                for target in act.targets:
                    block = spec.depth(target.site) - 1
                    if block < 0:
                        raise NotRepresentable(self.name, f"{target.site}: no block's output")
                    sums[block] += factor * package.tensors[target.vector].float32()
        content = {str(block): [float(x) for x in sums[block]] for block in sorted(sums)}
        path.write_text(json.dumps({"toy_vectors": content}), "utf-8")


def _vectors(path: Path) -> dict[int, NDArray[np.float32]]:
    """Vectors by block; files come from strangers, so nothing is taken on trust."""
    try:
        content = json.loads(path.read_text("utf-8"))["toy_vectors"]
        vectors = {int(block): np.array(v, np.float32) for block, v in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise unreadable(path, "toy_vectors", "lists of numbers by block", error) from error
    for block, vector in vectors.items():
        if block < 0 or vector.ndim != 1 or not np.isfinite(vector).all():
            raise unreadable(path, f"block {block}", "a list of finite numbers", vector.shape)
    return vectors
