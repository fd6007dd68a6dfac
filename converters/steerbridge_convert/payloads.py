"""EasySteer's payloads as JSON: what `easysteer.vectors.to_json_payload` writes.

    {"version": 1, "kind": "direction", "tensors": {"layer.K": {"shape": [d], "data": BASE64}},
     "extra": {}, "sha256": ...}

Data are little-endian float32; `layer.K` acts at the output of block K (payloads.py of EasySteer,
September 2026). Which algorithm runs a direction is said by the request: `direct` adds it (the
default), `erase` takes it out. The other kinds (`linear`, `lowrank`, `reft`, `concept_pair`,
`router`) change the inside of blocks by a matrix or by their experts, which a package cannot do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import NotRepresentable, UnreadableSource
from steerbridge.format import Answers, Format, Holds, require_known, shown, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Float32, Tensor
from steerbridge_convert import files, vectors
from steerbridge_convert.scope import ACT, LAYERS, POSITIONS, STRENGTH, WHOLE, scope

_KEYS: Final = frozenset({"version", "kind", "tensors", "extra", "sha256"})
_LAYER: Final = re.compile(r"^layer\.(\d{1,5})$")
_VERSION: Final = 1
_ACT: Final = replace(ACT, default="add")


class EasySteerPayload(Format):
    """A `DirectionVector`."""

    name = "easysteer-payload"
    title = "EasySteer payload (JSON)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="outputs of blocks",
        strength="one vector per layer; the request sets the scale",
    )
    options = (LAYERS, POSITIONS, STRENGTH, _ACT)

    def recognises(self, path: Path) -> bool:
        if path.suffix != ".json" or not path.is_file():
            return False
        try:
            content = files.json_object(path)
        except UnreadableSource:
            return False
        return set(content) >= _KEYS

    def contents(self, path: Path) -> dict[str, Any]:
        content = _payload(path)
        shapes = {name: shown(part.get("shape")) for name, part in content["tensors"].items()}
        return {"kind": content["kind"], "tensors": shapes}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        by_block = _directions(_payload(path), path)
        base = answers.base_model()
        vectors.checked(by_block, base, self.name)
        chosen, act = scope(answers, by_block), answers.get(_ACT)
        return vectors.scoped(path.stem, base, by_block, vectors.outputs, chosen, act)

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return WHOLE

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        by_block = vectors.keyed_by_output(package, self.name)
        raw = {f"layer.{k}": np.ascontiguousarray(v, "<f4").tobytes() for k, v in by_block.items()}
        width = package.spec.base_model.hidden_size
        tensors = {
            name: {"shape": [width], "data": base64.b64encode(data).decode()}
            for name, data in sorted(raw.items())
        }
        content = {
            "version": _VERSION,
            "kind": "direction",
            "tensors": tensors,
            "extra": {},
            "sha256": _digest("direction", {k: ((width,), v) for k, v in raw.items()}),
        }
        path.write_text(json.dumps(content))


def _payload(path: Path) -> dict[str, Any]:
    content = files.json_object(path)
    require_known("easysteer-payload", path.name, content, _KEYS)
    for key, kind in (("version", int), ("kind", str), ("tensors", dict), ("extra", dict)):
        if type(content.get(key)) is not kind:
            raise unreadable(path, key, f"of type {kind.__name__}", shown(content.get(key)))
    if content["version"] != _VERSION:
        raise unreadable(path, "version", str(_VERSION), shown(content["version"]))
    for name, part in content["tensors"].items():
        if not isinstance(part, dict):
            raise unreadable(path, name[:60], "an object with shape and data", shown(part))
    return content


def _directions(content: Mapping[str, Any], path: Path) -> dict[int, Tensor]:
    if content["kind"] != "direction":
        kind = shown(content["kind"])
        raise NotRepresentable(
            "easysteer-payload", f"kind {kind}: only directions act on the residual stream alone"
        )
    require_known("easysteer-payload", "extra", content["extra"], ())
    raw: dict[str, tuple[tuple[int, ...], bytes]] = {}
    by_block: dict[int, Tensor] = {}
    for name, part in content["tensors"].items():
        number = _LAYER.match(name)
        if number is None:
            raise unreadable(path, name[:60], "layer.N", shown(name))
        require_known("easysteer-payload", name, part, {"shape", "data"})
        shape, values = _values(part, name, path)
        raw[name] = (shape, values.tobytes())
        if int(number[1]) in by_block:
            raise unreadable(path, name, "one direction a layer", "another of the same number")
        by_block[int(number[1])] = Tensor.of(values)
    if not by_block:
        raise unreadable(path, "tensors", "layer.N", "none")
    if (want := _digest("direction", raw)) != content.get("sha256"):
        raise unreadable(path, "sha256", want, shown(content.get("sha256")))
    return by_block


def _values(part: Mapping[str, Any], name: str, path: Path) -> tuple[tuple[int, ...], Float32]:
    shape, text = part.get("shape"), part.get("data")
    sizes = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not sizes or len(shape) != 1 or not isinstance(text, str):  # type: ignore[arg-type]
        raise unreadable(path, name, "shape [d] and data in base64", shown(part))
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise unreadable(path, name, "base64", error) from error
    want = 4 * math.prod(shape)  # type: ignore[arg-type]
    if len(data) != want:
        raise unreadable(path, name, f"{want} bytes for {shape}", len(data))
    values = np.frombuffer(data, "<f4")
    if not np.isfinite(values).all():
        raise unreadable(path, name, "finite values", "NaN or infinity")
    return tuple(shape), values  # type: ignore[arg-type]


def _digest(kind: str, tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> str:
    """`_wire_digest` of EasySteer's payloads.py, for a payload without extras."""
    digest = hashlib.sha256(f"{kind}:{_VERSION}".encode())
    for name, (shape, data) in sorted(tensors.items()):
        digest.update(name.encode() + str(shape).encode() + data)
    return digest.hexdigest()
