"""GGUF files of `direction.N` tensors: llama.cpp's control vectors, repeng and EasySteer.

One layout, three sets of rules. A direction is added to the output of the block of its number
(llama.cpp: src/llama-adapter.cpp and common_control_vector_load of common/common.cpp, repeng:
export_gguf and import_gguf of extract.py). llama.cpp reads from block 1 on and refuses a file
with any other tensor, so block 0 cannot be steered there.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFWriter

from steerbridge import gguf_file
from steerbridge.formats import Ask, Format, Given, Holds, Loss, one_of, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import files, vectors

ARCHITECTURE: Final = "controlvector"
STRENGTH: Final = Ask(
    "strength", float, "factor of the vectors when they were used (1 = as stored)"
)
HINT: Final = Ask(
    "hint", one_of("check", "ignore"), "compare the file's model_hint with the base model", "check"
)
_HINT: Final = f"{ARCHITECTURE}.model_hint"
_DIRECTION: Final = re.compile(r"^direction\.(\d{1,5})$")
_DTYPES: Final = {"F32": "<f4", "F16": "<f2"}


class _Directions(Format):
    asks = (STRENGTH, HINT)
    first = 0  # the first block that can be steered
    hint = HINT
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="outputs of blocks",
        strength="a vector a layer; the scale is given when it is used",
    )

    def contents(self, path: Path) -> dict[str, Any]:
        file = files.gguf(path)
        return {
            "metadata": {k: v for k, v in file.metadata.items() if not isinstance(v, list)},
            "directions": {
                str(k): list(v.shape) for k, v in sorted(_directions(file, path).items())
            },
        }

    def read(self, path: Path, given: Given) -> SteeringPackage:
        file = files.gguf(path)
        found = _directions(file, path)
        hint = file.metadata.get(_HINT) if given(self.hint) == "check" else None
        base = given.base_model(model_type=hint)
        vectors.checked(found, base, self.name)
        return vectors.package(path.stem, base, vectors.outputs(found), given(STRENGTH))

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        found = vectors.keyed_by_output(package, self.name, self.first)

        def fill(writer: GGUFWriter) -> None:
            # repeng refuses a file without the hint; llama.cpp reads none of these keys.
            writer.add_string(_HINT, package.spec.base_model.model_type)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(found))
            self.describe(writer)
            for number, values in found.items():
                writer.add_tensor(f"direction.{number}", np.ascontiguousarray(values))

        gguf_file.write(path, ARCHITECTURE, fill)

    def describe(self, writer: GGUFWriter) -> None:
        """Further metadata of this tool."""


class ControlVector(_Directions):
    """llama.cpp: `--control-vector FILE`; every file, also one of repeng, from block 1 on."""

    name = "control-vector"
    title = "llama.cpp control vector (GGUF)"
    first = 1
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="outputs of blocks 1 and up",
        strength="a vector a layer; the scale is given when it is used",
    )

    def recognises(self, path: Path) -> bool:
        return _kind(path) == "control-vector"

    def losses(self, package: SteeringPackage, given: Given) -> list[Loss]:
        lost = super().losses(package, given)
        if 1 in (found := vectors.by_depth(package)) and len(found) > 1:
            lost.append(Loss("the vector after block 0", "is dropped: llama.cpp steers from 1 on"))
        return lost

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        super().write(_without_block_0(package), path, given)


class Repeng(_Directions):
    """repeng: `ControlVector.import_gguf`; keys from 0 on, the coefficient is the runtime's."""

    name = "repeng"
    title = "repeng ControlVector (GGUF)"

    def recognises(self, path: Path) -> bool:
        return _kind(path) == "repeng"


class EasySteer(_Directions):
    """EasySteer: repeng's layout with the method's name beside it."""

    name = "easysteer"
    title = "EasySteer vector (GGUF)"
    # Its hints are names of models ("qwen2.5"), not types.
    hint = replace(HINT, default="ignore")
    asks = (STRENGTH, hint)

    def recognises(self, path: Path) -> bool:
        return _kind(path) == "easysteer"

    def describe(self, writer: GGUFWriter) -> None:
        writer.add_string(f"{ARCHITECTURE}.method", "steerbridge")


def _without_block_0(package: SteeringPackage) -> SteeringPackage:
    """The package without vectors after block 0 (a loss that was allowed)."""
    kept = []
    for x in package.spec.interventions:
        if x.type == "add_vector":
            targets = tuple(t for t in x.targets if package.spec.depth(t.site) != 1)
            x = x.model_copy(update={"targets": targets})
        kept.append(x)
    spec = package.spec.model_copy(update={"interventions": tuple(kept)})
    return SteeringPackage(spec, package.tensors)


def _kind(path: Path) -> str | None:
    """Which of the three a file is; None for something else."""
    metadata = files.gguf_metadata(path)
    if metadata.get("general.architecture") != ARCHITECTURE:
        return None
    if f"{ARCHITECTURE}.method" in metadata:
        return "easysteer"
    return "repeng" if "direction.0" in files.gguf(path).tensors else "control-vector"


def _directions(file: gguf_file.GgufFile, path: Path) -> dict[int, Tensor]:
    found = {}
    for name, tensor in file.tensors.items():
        number = _DIRECTION.match(name)
        if number is None:
            raise unreadable(path, "tensor name", "direction.N", repr(name))
        # llama.cpp takes F32 alone; steerkit and others also write F16.
        if tensor.type.name not in _DTYPES or len(tensor.shape) != 1:
            raise unreadable(
                path, name, "F32 or F16 of one dimension", f"{tensor.type.name} {tensor.shape}"
            )
        stored = Tensor(tensor.type.name, tensor.data.view(_DTYPES[tensor.type.name]))  # type: ignore[arg-type]
        if not stored.finite():
            raise unreadable(path, name, "finite values", "NaN or infinity")
        found[int(number[1])] = stored
    if not found:
        raise unreadable(path, "tensors", "direction.N", "none")
    return found
