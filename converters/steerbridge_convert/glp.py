"""GLP files (GGUF layer projection): directions that are projected out, with what that takes.

The container is a control vector's: GGUF, `direction.N` [d] at the output of block N from 1 on.
Keys `glp.*` say that it is no addition: `glp.mode` (absent: `add`), `glp.hook_point`, `glp.rank`,
`glp.alpha_default`, the layers once more and a hash of the tensors' bytes (spec/GLP.md of
msuiche/weightless, versions of September 2026; older files say `dspark.*`).

    h <- h - alpha (d . h) d        with unit d
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFWriter

from steerbridge import gguf_file
from steerbridge.errors import MissingOption, NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Option,
    finite,
    require_known,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.spec import AddVector, ProjectOut
from steerbridge.tensors import Float32, Tensor
from steerbridge_convert import files, gguf_vectors, vectors
from steerbridge_convert.gguf_vectors import GLP

HOOK: Final = "residual_stream_post_layer"
UNIT: Final = 1e-3  # how far from one a norm may be: some tools normalise once more
_STRENGTH: Final = Option(
    "strength", finite, "share of the direction that is taken out", "glp.alpha_default of the file"
)
# Those that describe, and those whose value is checked.
_DESCRIPTIVE: Final = (
    *("method", "contrast", "created", "validation", "derived_at", "derive_at", "orthonormal"),
    *("base_model", "base_revision"),
)
_CHECKED: Final = (
    *("mode", "hook_point", "spec_version", "rank", "structure", "alpha_default"),
    *("layer_ids_zero_based", "content_sha256"),
)


@dataclass(frozen=True, slots=True)
class _File:
    """What a file says: its keys without their prefix, and its directions."""

    said: Mapping[str, Any]
    hint: str | None
    directions: dict[int, Tensor]


class Glp(Format):
    """One direction a layer (rank 1), after the residual stream of the layer."""

    name = "glp"
    title = "GLP projection (GGUF)"
    holds = Holds(
        interventions=frozenset({"project_out"}),
        sites="outputs of blocks 1 and up",
        strength="glp.alpha_default",
    )
    options = (_STRENGTH,)

    def recognises(self, path: Path) -> bool:
        return gguf_vectors.is_glp(files.gguf_metadata(path))

    def contents(self, path: Path) -> dict[str, Any]:
        file = _read(path)
        shapes = {str(k): list(v.shape) for k, v in sorted(file.directions.items())}
        return {"glp": dict(file.said), "directions": shapes}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        file = _read(path)
        mode = file.said.get("mode", "add")
        expected = {
            "mode": ("add", "project"),
            "hook_point": (HOOK,),
            "spec_version": (1, "1"),
            "rank": (1, "1"),
            "structure": ("per-layer",),
        }
        for key, allowed in expected.items():
            if key in file.said and file.said[key] not in allowed:
                raise NotRepresentable(self.name, f"{key} = {shown(file.said[key])}")
        alpha = answers.values.get("strength", file.said.get("alpha_default"))
        if alpha is None:
            raise MissingOption(self.name, "strength", "the file has no glp.alpha_default")
        base = answers.base_model(model_type=file.hint)
        vectors.checked(file.directions, base, self.name)
        return vectors.package(
            path.stem,
            base,
            vectors.outputs(file.directions),
            _STRENGTH.parse(str(alpha), self.name),
            act=ProjectOut if mode == "project" else AddVector,
        )

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        directions, alpha = self._projections(package)
        digest = hashlib.sha256()
        for values in directions.values():
            digest.update(values.tobytes())

        def fill(writer: GGUFWriter) -> None:
            writer.add_type(gguf_vectors.ARCHITECTURE)
            writer.add_name(package.spec.name)
            writer.add_string(gguf_vectors.HINT_KEY, package.spec.base_model.model_type)
            writer.add_string("glp.mode", "project")
            writer.add_string("glp.hook_point", HOOK)
            writer.add_uint32("glp.spec_version", 1)
            writer.add_uint32("glp.rank", 1)
            writer.add_bool("glp.orthonormal", True)
            writer.add_float32("glp.alpha_default", alpha)
            writer.add_string("glp.layer_ids_zero_based", ",".join(map(str, directions)))
            writer.add_string("glp.content_sha256", digest.hexdigest())
            for number, values in directions.items():
                writer.add_tensor(f"direction.{number}", values)

        gguf_file.write(path, gguf_vectors.ARCHITECTURE, fill)

    def _projections(self, package: SteeringPackage) -> tuple[dict[int, Float32], float]:
        """Unit directions by block, and the one strength of all of them.

        Raises:
            NotRepresentable: they differ in strength, two act at one place, or one before block 1.
        """
        spec = package.spec
        directions: dict[int, Float32] = {}
        alphas: set[np.float32] = set()
        for rule, out in vectors.acting(package, ProjectOut):
            for target in out.targets:
                block = spec.depth(target.site) - 1
                if not 1 <= block < spec.base_model.num_layers or block in directions:
                    raise NotRepresentable(self.name, f"intervention {out.id} at {target.site}")
                values = package.tensors[target.vector].float32()
                norm = float(np.linalg.norm(values.astype(np.float64)))
                if norm == 0:
                    raise NotRepresentable(self.name, f"a zero vector at {target.site}")
                exact = abs(norm - 1) < vectors.UNIT
                directions[block] = np.ascontiguousarray(values if exact else values / norm, "<f4")
                strength = out.alpha * vectors.strength(rule) * (1 if exact else norm**2)
                alphas.add(np.float32(strength))
        if not alphas:
            raise NotRepresentable(self.name, "no rule projects anything out")
        if max(alphas) - min(alphas) > 1e-6 * abs(max(alphas)):
            raise NotRepresentable(self.name, "strengths that differ by layer; it has one")
        return dict(sorted(directions.items())), float(max(alphas))


def _read(path: Path) -> _File:
    file = files.gguf(path)
    mine = {k: v for k, v in file.metadata.items() if k.startswith(GLP)}
    said = {k.partition(".")[2]: v for k, v in mine.items()}
    if len(said) != len(mine):
        raise unreadable(path, "keys", "each once", ", ".join(sorted(mine)))
    known = {f"{prefix}{key}" for prefix in GLP for key in (*_CHECKED, *_DESCRIPTIVE)}
    known |= {gguf_vectors.HINT_KEY, f"{gguf_vectors.ARCHITECTURE}.layer_count"}
    require_known("glp", "keys", file.metadata, known, files.GGUF_DESCRIPTIVE)
    directions = gguf_vectors.directions(file, path)
    for number, values in directions.items():
        norm = float(np.linalg.norm(values.float32().astype(np.float64)))
        if number == 0 or abs(norm - 1) > UNIT:
            want = "unit directions of layers from 1 on"
            raise unreadable(path, f"direction.{number}", want, f"a norm of {norm:.4g}")
    _check_copies(path, said, directions)
    hint = file.metadata.get(gguf_vectors.HINT_KEY)
    return _File(said, hint if isinstance(hint, str) else None, directions)


def _check_copies(path: Path, said: Mapping[str, Any], directions: Mapping[int, Tensor]) -> None:
    """What a file says twice must agree: a stack that is shifted by a layer steers badly, not not
    at all."""
    layers = said.get("layer_ids_zero_based")
    numbers = ",".join(map(str, sorted(directions)))
    if isinstance(layers, str) and layers.replace(" ", "") != numbers:
        raise unreadable(path, "layer_ids_zero_based", numbers, shown(layers))
    digest = hashlib.sha256()
    for _, values in sorted(directions.items()):
        digest.update(np.ascontiguousarray(values.array).tobytes())
    if (hashed := said.get("content_sha256", digest.hexdigest())) != digest.hexdigest():
        raise unreadable(path, "content_sha256", digest.hexdigest(), shown(hashed))
