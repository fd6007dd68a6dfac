"""`.svec` files: IBM activation-steering and AISteer360.

JSON of a vector per layer. IBM measures at the output of block k and applies at the input of
block k (activation_steering/leash_layer.py wraps the block's forward), so a key is where it
acts, not where it was found. AISteer360 applies where its method says, and may hold several
vectors a layer ([K][D]: heads, positions, bases), of which only K = 1 is one direction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from steerbridge.errors import NotRepresentable, UnreadableSource
from steerbridge.formats import Ask, Format, Given, Holds, one_of, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import files, vectors
from steerbridge_convert.gguf_vectors import STRENGTH

APPLIED_AT = Ask(
    "applied_at",
    one_of("layer_input", "layer_output"),
    "where the method adds key k: CAST and ActAdd at the block's input, CAA at its output",
)


class IbmSvec(Format):
    """activation-steering: `SteeringVector.load`; all three keys of the file are required."""

    name = "svec-ibm"
    title = "IBM activation-steering vector (.svec)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="inputs of blocks",
        strength="a vector a layer; the strength is given when it is used",
    )
    asks = (STRENGTH,)

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".svec" and path.is_file() and not _of_aisteer360(path)

    def contents(self, path: Path) -> dict[str, Any]:
        found = load(path)
        return {
            "model_type": found["model_type"],
            "directions": {k: list(np.shape(v)) for k, v in found["directions"].items()},
        }

    def read(self, path: Path, given: Given) -> SteeringPackage:
        found, by_layer = read_vectors(path, self.name)
        base = given.base_model(model_type=found["model_type"])
        vectors.checked(by_layer, base, self.name)
        return vectors.package(path.stem, base, vectors.inputs(by_layer), given(STRENGTH))

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        directions = {
            str(k): values.tolist()
            for k, values in vectors.keyed_by_input(package, self.name).items()
        }
        dump(path, package, directions)


class AisteerSvec(Format):
    """AISteer360: `SteeringVector.load`, K = 1 vector a layer."""

    name = "svec-aisteer360"
    title = "AISteer360 steering vector (.svec)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="inputs or outputs of blocks, by method",
        strength="a vector a layer; the strength is given when it is used",
    )
    asks = (STRENGTH, APPLIED_AT)
    write_asks = (APPLIED_AT,)

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".svec" and path.is_file() and _of_aisteer360(path)

    def contents(self, path: Path) -> dict[str, Any]:
        return IbmSvec().contents(path)

    def read(self, path: Path, given: Given) -> SteeringPackage:
        found, by_layer = read_vectors(path, self.name)
        base = given.base_model(model_type=found["model_type"])
        vectors.checked(by_layer, base, self.name)
        place = vectors.inputs if given(APPLIED_AT) == "layer_input" else vectors.outputs
        return vectors.package(path.stem, base, place(by_layer), given(STRENGTH))

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        if given(APPLIED_AT) == "layer_input":
            found = vectors.keyed_by_input(package, self.name)
        else:
            found = vectors.keyed_by_output(package, self.name, first=0)
        dump(path, package, {str(k): [values.tolist()] for k, values in found.items()})


def load(path: Path) -> dict[str, Any]:
    """The JSON object of a file, with `directions` an object by layer number.

    Raises:
        UnreadableSource: it is something else.
    """
    found = files.json_object(path)
    if not isinstance(found.get("directions"), dict):
        raise unreadable(path, "directions", "an object of vectors by layer", "none")
    if not isinstance(found.get("model_type"), str):
        raise unreadable(path, "model_type", "a string", repr(found.get("model_type")))
    return found


def read_vectors(path: Path, format: str) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """The file's object, and its vectors by layer.

    Raises:
        UnreadableSource: malformed.
        NotRepresentable: several vectors a layer.
    """
    found = load(path)
    by_layer = {}
    for key, value in found["directions"].items():
        field = f"directions[{key!r}]"
        if not key.isascii() or not key.isdecimal():
            raise unreadable(path, field, "a layer number from 0 on", repr(key))
        try:
            array = np.array(value, np.float64)
        except (ValueError, TypeError) as error:
            raise unreadable(path, field, "a vector of numbers", error) from error
        if array.ndim == 2 and len(array) > 1:
            raise NotRepresentable(
                format,
                f"{field} holds {len(array)} vectors (heads, positions, a basis), not one",
            )
        array = array.reshape(-1) if array.ndim == 2 else array
        if array.ndim != 1 or not array.size or not np.isfinite(array).all():
            raise unreadable(path, field, "a vector of finite numbers", f"shape {array.shape}")
        by_layer[int(key)] = Tensor.of(array)
    if not by_layer:
        raise unreadable(path, "directions", "a vector", "none")
    return found, by_layer


def _of_aisteer360(path: Path) -> bool:
    """Its vectors are lists of lists; IBM's are flat."""
    try:
        directions = load(path)["directions"]
    except UnreadableSource:
        return False
    first = next(iter(directions.values()), None)
    return isinstance(first, list) and bool(first) and isinstance(first[0], list)


def dump(path: Path, package: SteeringPackage, directions: dict[str, Any]) -> None:
    """Write vectors by layer; IBM's loader wants all three keys."""
    value = {
        "model_type": package.spec.base_model.model_type,
        "directions": directions,
        "explained_variances": {},
    }
    path.write_text(json.dumps(value, allow_nan=False))
