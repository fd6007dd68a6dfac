"""Bare directions: an array, and hardly a word of what it is for.

A vector [d], or a row for each layer: [n, d] by block, or [n + 1, d] by `hidden_states` of
transformers, whose row k enters block k (persona vectors, arXiv 2507.21509). It lies in a `.npy`
file, alone in a safetensors file, or in one of `torch.save`. A `direction.pt` beside its
`direction_metadata.json` is of refusal_direction (arXiv 2406.11717): it was measured at the input
of block `layer`, and is added there or taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file

from steerbridge.errors import ConversionError, NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Loss,
    Option,
    one_of,
    require_known,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import files, pickles, vectors
from steerbridge_convert.scope import ACT, LAYERS, POSITIONS, STRENGTH, WHOLE, scope

MEASURED: Final = "direction_metadata.json"
_DIRECTION: Final = "direction.pt"
_SITE: Final = Option(
    "site",
    one_of("layer_input", "layer_output"),
    "where layer k acts: at the input or at the output of block k",
)
_TORCH: Final = (".pt", ".pth")


class Directions(Format):
    """Written as [n + 1, d] by depth; what acts at no depth is a row of zeros."""

    name = "directions"
    title = "Bare directions (.npy, .safetensors, .pt)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="inputs and outputs of blocks",
        strength="one vector per layer; what reads the array sets the strength",
    )
    options = (LAYERS, POSITIONS, STRENGTH, ACT, _SITE)

    def recognises(self, path: Path) -> bool:
        if path.is_dir():
            return (path / MEASURED).is_file() and (path / _DIRECTION).is_file()
        if path.suffix == ".safetensors":
            return path.is_file() and _alone(path)
        # Others look like those of torch.save: see `hotwire`.
        return path.is_file() and (path.suffix == ".npy" or described(path))

    def replaces(self, path: Path) -> bool:
        try:
            return path.is_file() and bool(_read(path))
        except ConversionError:
            return False

    def contents(self, path: Path) -> dict[str, Any]:
        tensor, measured = _read(path)
        return {"shape": [tensor.dtype, *tensor.shape], **measured}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        tensor, measured = _read(path)
        base = answers.base_model(hidden_size=tensor.shape[-1])
        if measured:
            said = {"layers": str(measured["layer"]), "site": "layer_input"}
            answers = replace(answers, values={**said, **answers.values})
        act, site, n = answers.get(ACT), answers.get(_SITE), base.num_layers
        if len(tensor.shape) == 1:
            rows = dict.fromkeys(range(n), tensor)
        elif tensor.shape[0] == n or (tensor.shape[0] == n + 1 and site == "layer_input"):
            # A row of zeros is a layer that has no vector.
            rows = {k: _row(tensor, k) for k in range(tensor.shape[0]) if tensor.array[k].any()}
        else:
            raise NotRepresentable(
                self.name, f"{tensor.shape[0]} rows at {site} for {n} blocks of {base.name}"
            )
        if measured and act == "project_out":
            what = "also takes it out of what the attention and the MLP of each block write"
            answers.losses.append(Loss("refusal_direction", what))
        place = vectors.inputs if site == "layer_input" else vectors.outputs

        def placed(chosen: vectors.Vectors) -> vectors.Placed:
            last = {n - 1: chosen[n]} if n in chosen else {}
            inner = {k: v for k, v in chosen.items() if k != n}
            return {**place(inner), **vectors.outputs(last)}

        return vectors.scoped(path.stem, base, rows, placed, scope(answers, rows), act)

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return {**WHOLE, ACT.name: "add", _SITE.name: "layer_input"}

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        base, by_depth = package.spec.base_model, vectors.by_depth(package)
        rows = np.zeros((base.num_layers + 1, base.hidden_size), np.float32)
        for depth, values in by_depth.items():
            rows[depth] = values
        if path.suffix in _TORCH:
            pickles.save(pickles.torch_tensor(rows), path)
        elif path.suffix == ".safetensors":
            save_file({"directions": rows}, path)
        elif path.suffix == ".npy":
            np.save(path, rows)
        else:
            raise NotRepresentable(self.name, f"{path.name}: ends in .npy, .safetensors or .pt")


def described(path: Path) -> bool:
    """True for the direction of a run of refusal_direction."""
    return path.name == _DIRECTION and path.with_name(MEASURED).is_file()


def _alone(path: Path) -> bool:
    """True for one tensor that is no probe of steerkit, which may hold one direction as well."""
    return "hook_site" not in files.safetensors_metadata(path) and len(files.safetensors(path)) == 1


def _row(tensor: Tensor, k: int) -> Tensor:
    return Tensor(tensor.dtype, np.ascontiguousarray(tensor.array[k]))


def _read(path: Path) -> tuple[Tensor, Mapping[str, Any]]:
    """The array [d] or [rows, d], and what refusal_direction says about it."""
    if path.is_dir():
        path = path / _DIRECTION
    measured: Mapping[str, Any] = {}
    if described(path):
        measured = files.json_object(path.with_name(MEASURED))
        require_known("directions", MEASURED, measured, {"pos", "layer"})
        if type(measured.get("layer")) is not int or measured["layer"] < 0:
            want = "the number of a block"
            raise unreadable(path.with_name(MEASURED), "layer", want, shown(measured.get("layer")))
    readers = {".npy": _numpy, ".safetensors": _safetensors} | dict.fromkeys(_TORCH, _torch)
    if path.suffix not in readers or not path.is_file():
        raise unreadable(path, "file", "a .npy, .safetensors or .pt file", path.suffix or "none")
    tensor = readers[path.suffix](path)
    if len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
        raise unreadable(path, "array", "[d] or [rows, d]", shown(tensor.shape))
    if not tensor.finite():
        raise unreadable(path, "array", "finite values", "NaN or infinity")
    return tensor, measured


def _numpy(path: Path) -> Tensor:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses a header as Python, which fails in many ways
        raise unreadable(path, "file", "an array of numpy", error) from error
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise unreadable(path, "array", "float16, float32 or float64", array.dtype)
    return Tensor.of(array, "F16" if array.dtype.itemsize == 2 else "F32")


def _safetensors(path: Path) -> Tensor:
    require_known("directions", path.name, files.safetensors_metadata(path), {"format"})
    tensors = files.safetensors(path)
    if len(tensors) != 1:
        raise unreadable(path, "tensors", "one", len(tensors))
    return next(iter(tensors.values()))


def _torch(path: Path) -> Tensor:
    value = pickles.load(path)
    return pickles.tensor(value, "tensor", path, 1 if getattr(value, "ndim", 2) == 1 else 2)
