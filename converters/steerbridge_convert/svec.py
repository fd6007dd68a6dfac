"""`.svec` files: IBM activation-steering and AISteer360.

JSON with one vector per layer. IBM measures at the output of block k and applies at the input of
block k (activation_steering/leash_layer.py wraps the block's forward), so a key says where the
vector acts, not where it was measured. AISteer360 applies at the site that its method defines and
may store several vectors per layer ([K][D]: heads, positions, bases); only K = 1 is supported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import NotRepresentable, UnreadableSource
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Option,
    one_of,
    require_known,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import files, vectors
from steerbridge_convert.scope import OPTIONS, WHOLE, scope

APPLIED_AT = Option(
    "applied_at",
    one_of("layer_input", "layer_output"),
    "where the method adds vector k: CAST and ActAdd at the input of block k, CAA at its output",
)


_KEYS: Final = frozenset(
    {
        *("model_type", "directions", "explained_variances"),
        *("num_heads", "head_dim", "probe_accuracies"),
    }
)


class IbmSvec(Format):
    """activation-steering: `SteeringVector.load`, which requires all three keys of the file."""

    name = "svec-ibm"
    title = "IBM activation-steering vector (.svec)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="inputs of blocks",
        strength="one vector per layer; the tool sets the strength when it runs",
    )
    options = OPTIONS

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".svec" and path.is_file() and not _of_aisteer360(path)

    def replaces(self, path: Path) -> bool:
        return self.recognises(path) and holds_vectors(path)

    def contents(self, path: Path) -> dict[str, Any]:
        content = load(path)
        return {
            "model_type": content["model_type"],
            "directions": {k: _shape(v, k, path) for k, v in content["directions"].items()},
        }

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        content, by_layer = read_vectors(path, self.name)
        base = answers.base_model(model_type=content["model_type"])
        vectors.checked(by_layer, base, self.name)
        return vectors.scoped(path.stem, base, by_layer, vectors.inputs, scope(answers, by_layer))

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return WHOLE

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        directions = {
            str(k): values.tolist()
            for k, values in vectors.keyed_by_input(package, self.name).items()
        }
        dump(path, package, directions)


class AisteerSvec(Format):
    """AISteer360: `SteeringVector.load` with K = 1 vector per layer."""

    name = "svec-aisteer360"
    title = "AISteer360 steering vector (.svec)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="inputs or outputs of blocks, depending on the method",
        strength="one vector per layer; the tool sets the strength when it runs",
    )
    options = (*OPTIONS, APPLIED_AT)
    write_options = (APPLIED_AT,)

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".svec" and path.is_file() and _of_aisteer360(path)

    def contents(self, path: Path) -> dict[str, Any]:
        return IbmSvec().contents(path)

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        content, by_layer = read_vectors(path, self.name)
        base = answers.base_model(model_type=content["model_type"])
        vectors.checked(by_layer, base, self.name)
        place = vectors.inputs if answers.get(APPLIED_AT) == "layer_input" else vectors.outputs
        return vectors.scoped(path.stem, base, by_layer, place, scope(answers, by_layer))

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return WHOLE

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        if answers.get(APPLIED_AT) == "layer_input":
            by_block = vectors.keyed_by_input(package, self.name)
        else:
            by_block = vectors.keyed_by_output(package, self.name)
        dump(path, package, {str(k): [values.tolist()] for k, values in by_block.items()})


def _shape(value: Any, key: str, path: Path) -> list[int]:
    try:
        return list(np.shape(value))
    except ValueError as error:
        raise unreadable(path, f"directions[{key!r}]", "a vector of numbers", error) from error


def load(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file; its `directions` is an object by layer number.

    Raises:
        UnreadableSource: malformed.
    """
    content = files.json_object(path)
    require_known("svec", path.name, content, _KEYS)
    for key in ("num_heads", "head_dim"):  # of AISteer360: vectors of attention heads
        if content.get(key) is not None:
            raise NotRepresentable("svec", f"{path.name}: {key} = {shown(content[key])}")
    if not isinstance(content.get("directions"), dict):
        raise unreadable(path, "directions", "an object of vectors by layer", "none")
    if not isinstance(content.get("model_type"), str):
        raise unreadable(path, "model_type", "a string", shown(content.get("model_type")))
    return content


def read_vectors(path: Path, format: str) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """The object in the file, and its vectors by layer.

    Raises:
        UnreadableSource: malformed.
        NotRepresentable: a layer has several vectors.
    """
    content = load(path)
    by_layer = {}
    for key, value in content["directions"].items():
        field = f"directions[{key!r}]"
        if not key.isascii() or not key.isdecimal():
            raise unreadable(path, field, "a layer number, 0 or higher", shown(key))
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
    return content, by_layer


def holds_vectors(path: Path) -> bool:
    """True for a file with the keys of this format."""
    try:
        load(path)
    except UnreadableSource:
        return False
    return True


def _of_aisteer360(path: Path) -> bool:
    """True if the vectors are lists of lists, as in AISteer360; in IBM's files they are flat."""
    try:
        directions = load(path)["directions"]
    except UnreadableSource:
        return False
    first = next(iter(directions.values()), None)
    return isinstance(first, list) and bool(first) and isinstance(first[0], list)


def dump(path: Path, package: SteeringPackage, directions: dict[str, Any]) -> None:
    """Write vectors by layer; IBM's loader requires all three keys."""
    value = {
        "model_type": package.spec.base_model.model_type,
        "directions": directions,
        "explained_variances": {},
    }
    path.write_text(json.dumps(value, allow_nan=False))
