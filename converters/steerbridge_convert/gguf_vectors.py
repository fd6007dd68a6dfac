"""GGUF files with `direction.N` tensors: llama.cpp control vectors, repeng and EasySteer.

The tools share one layout and differ in rules. A direction is added to the output of the block
with its number (llama.cpp: src/llama-adapter.cpp and common_control_vector_load of
common/common.cpp, repeng: export_gguf and import_gguf of extract.py). llama.cpp starts at block 1
and rejects a file with any other tensor, so it cannot steer block 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFWriter

from steerbridge import gguf_file
from steerbridge.errors import NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Loss,
    Option,
    one_of,
    require_known,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import files, vectors
from steerbridge_convert.scope import OPTIONS, WHOLE, scope

ARCHITECTURE: Final = "controlvector"
HINT: Final = Option(
    "hint", one_of("check", "ignore"), "compare the file's model_hint with the base model", "check"
)
GLP: Final = ("glp.", "dspark.")  # prefixes of its keys, the second in older files
HINT_KEY: Final = f"{ARCHITECTURE}.model_hint"
_DIRECTION: Final = re.compile(r"^direction\.(\d{1,5})$")
_DTYPES: Final = {"F32": "<f4", "F16": "<f2"}
# What the tools write: how many directions there are, and how EasySteer found them. A key with the
# prefix of another tool may turn the addition into something else (`glp.mode`, `hook_site`).
_KEYS: Final = frozenset(
    f"{ARCHITECTURE}.{name}"
    for name in (
        *("model_hint", "layer_count", "method"),
        *("normalize", "token_pos", "n_positive", "n_negative"),
    )
)


class _Directions(Format):
    options = (*OPTIONS, HINT)
    hint = HINT
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="outputs of blocks",
        strength="one vector per layer; the runtime sets the scale",
    )

    def contents(self, path: Path) -> dict[str, Any]:
        file = files.gguf(path)
        return {
            "metadata": {k: v for k, v in file.metadata.items() if not isinstance(v, list)},
            "directions": {
                str(k): list(v.shape) for k, v in sorted(directions(file, path).items())
            },
        }

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        file = files.gguf(path)
        require_known(self.name, "keys", file.metadata, _KEYS, files.GGUF_DESCRIPTIVE)
        by_block = directions(file, path)
        hint = file.metadata.get(HINT_KEY) if answers.get(self.hint) == "check" else None
        try:
            base = answers.base_model(model_type=hint)
        except NotRepresentable as error:
            reason = f"{error.reason} (--set hint=ignore reads it for that model all the same)"
            raise NotRepresentable(self.name, reason) from None
        vectors.checked(by_block, base, self.name)
        chosen = scope(answers, by_block)
        return vectors.scoped(path.stem, base, by_block, vectors.outputs, chosen)

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        by_block = vectors.keyed_by_output(package, self.name, self.omits)

        def fill(writer: GGUFWriter) -> None:
            # repeng rejects a file without the hint; llama.cpp ignores these keys.
            writer.add_string(HINT_KEY, package.spec.base_model.model_type)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(by_block))
            self.describe(writer)
            for number, values in by_block.items():
                writer.add_tensor(f"direction.{number}", np.ascontiguousarray(values))

        gguf_file.write(path, ARCHITECTURE, fill)

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return WHOLE

    def describe(self, writer: GGUFWriter) -> None:
        """Add metadata that only this tool uses."""


class ControlVector(_Directions):
    """llama.cpp: `--control-vector FILE`; it starts at block 1, also for files of repeng."""

    name = "control-vector"
    title = "llama.cpp control vector (GGUF)"
    omits = frozenset({1})
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="outputs of blocks 1 and up",
        strength="one vector per layer; the runtime sets the scale",
    )

    def recognises(self, path: Path) -> bool:
        return _kind(path) == "control-vector"

    def losses(self, package: SteeringPackage, answers: Answers) -> list[Loss]:
        losses = super().losses(package, answers)
        by_depth = vectors.by_depth(package)
        if 1 in by_depth and len(by_depth) > 1:
            losses.append(
                Loss("the vector after block 0", "is dropped: llama.cpp starts at block 1")
            )
        return losses


class Repeng(_Directions):
    """repeng: `ControlVector.import_gguf`; keys start at 0, the runtime sets the coefficient."""

    name = "repeng"
    title = "repeng ControlVector (GGUF)"

    def recognises(self, path: Path) -> bool:
        return _kind(path) == "repeng"


class EasySteer(_Directions):
    """EasySteer: the layout of repeng plus the name of the method."""

    name = "easysteer"
    title = "EasySteer vector (GGUF)"
    # Its hints are model names ("qwen2.5"), not model types.
    hint = replace(HINT, default="ignore")
    options = (*OPTIONS, hint)

    def recognises(self, path: Path) -> bool:
        return _kind(path) == "easysteer"

    def describe(self, writer: GGUFWriter) -> None:
        writer.add_string(f"{ARCHITECTURE}.method", "steerbridge")


def is_glp(metadata: Mapping[str, Any]) -> bool:
    """True if a file says that its directions are projections (see `glp`)."""
    return any(key.startswith(GLP) for key in metadata)


def _kind(path: Path) -> str | None:
    """The format of a file, or None if it is none of the three."""
    metadata = files.gguf_metadata(path)
    if metadata.get("general.architecture") != ARCHITECTURE or is_glp(metadata):
        return None
    if f"{ARCHITECTURE}.method" in metadata:
        return "easysteer"
    return "repeng" if "direction.0" in files.gguf(path).tensors else "control-vector"


def directions(file: gguf_file.GgufFile, path: Path) -> dict[int, Tensor]:
    """The directions of a file by number.

    Raises:
        UnreadableSource: other tensors, types, or two of one number.
    """
    by_block = {}
    for name, tensor in file.tensors.items():
        number = _DIRECTION.match(name)
        if number is None:
            raise unreadable(path, "tensor name", "direction.N", repr(name))
        # llama.cpp only accepts F32; steerkit and others also write F16.
        if tensor.type.name not in _DTYPES or len(tensor.shape) != 1:
            raise unreadable(
                path, name, "F32 or F16 with one dimension", f"{tensor.type.name} {tensor.shape}"
            )
        stored = Tensor(tensor.type.name, tensor.data.view(_DTYPES[tensor.type.name]))  # type: ignore[arg-type]
        if not stored.finite():
            raise unreadable(path, name, "finite values", "NaN or infinity")
        if int(number[1]) in by_block:  # llama.cpp adds them up, others take one
            raise unreadable(path, name, "one direction a layer", "another of the same number")
        by_block[int(number[1])] = stored
    if not by_block:
        raise unreadable(path, "tensors", "direction.N", "none")
    return by_block
