"""Vectors in files of `torch.save`: steering-vectors, EasyEdit2 and hotwire-vllm.

All three add to the output of block k, times a multiplier of the runtime.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from steerbridge.errors import NotRepresentable
from steerbridge.formats import Ask, Format, Given, Holds, several, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Float32, Tensor
from steerbridge_convert import pickles, vectors
from steerbridge_convert.gguf_vectors import STRENGTH

_HOLDS: Final = Holds(
    interventions=frozenset({"add_vector"}),
    sites="outputs of blocks",
    strength="a vector a layer; the multiplier is given when it is used",
)


class _TorchVectors(Format):
    holds = _HOLDS
    asks: ClassVar[tuple[Ask, ...]] = (STRENGTH,)

    def vectors(self, path: Path) -> dict[int, Tensor]:
        """Vectors by the block whose output they change."""
        raise NotImplementedError

    def contents(self, path: Path) -> dict[str, Any]:
        found = self.vectors(path)
        return {"vectors": {str(k): [v.dtype, *v.shape] for k, v in sorted(found.items())}}

    def read(self, path: Path, given: Given) -> SteeringPackage:
        found = self.vectors(path)
        base = given.base_model()
        vectors.checked(found, base, self.name)
        return vectors.package(path.stem, base, vectors.outputs(found), given(STRENGTH))


class SteeringVectors(_TorchVectors):
    """steering-vectors: its two fields as a dict, or the dataclass saved by `torch.save`.

    The package defines no file; users save the object. It is written as the dict, so that
    `SteeringVector(**torch.load(path))` needs no pickled class.
    """

    name = "steering-vectors"
    title = "steering-vectors (.pt)"

    def recognises(self, path: Path) -> bool:
        return pickles.holds(path, lambda x: "layer_activations" in _fields(x), _OBJECT)

    def vectors(self, path: Path) -> dict[int, Tensor]:
        fields = _fields(pickles.load(path, _OBJECT))
        activations = fields.get("layer_activations")
        if not isinstance(activations, dict) or not activations:
            raise unreadable(path, "layer_activations", "tensors by layer", repr(activations))
        if (kind := fields.get("layer_type", "decoder_block")) != "decoder_block":
            raise NotRepresentable(self.name, f"layer_type {kind!r}: only the residual stream")
        return {
            _number(k, path): pickles.tensor(v, f"layer_activations[{k}]", path, 1)
            for k, v in activations.items()
        }

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        found = vectors.keyed_by_output(package, self.name, first=0)
        activations = {k: pickles.torch_tensor(v) for k, v in found.items()}
        pickles.save({"layer_activations": activations, "layer_type": "decoder_block"}, path)


def _fields(found: Any) -> dict[Any, Any]:
    """Of the dict or of the dataclass's stand-in."""
    return found if isinstance(found, dict) else getattr(found, "__dict__", {})


_OBJECT: Final = r"steering_vectors\.steering_vector\.SteeringVector"
_LAYER_FILE: Final = re.compile(r"^layer_(\d{1,5})\.pt$")


class EasyEdit(_TorchVectors):
    """EasyEdit2 (CAA, vector_prompt, merge, SAE): a directory of `layer_{k}.pt`."""

    name = "easyedit"
    title = "EasyEdit2 vectors (directory)"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and any(_LAYER_FILE.match(p.name) for p in path.iterdir())

    def vectors(self, path: Path) -> dict[int, Tensor]:
        found = {}
        for file in sorted(path.iterdir()):
            if number := _LAYER_FILE.match(file.name):
                found[int(number[1])] = pickles.tensor(pickles.load(file), "tensor", file, 1)
        if not found:
            raise unreadable(path, "files", "layer_{k}.pt", "none")
        return found

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        path.mkdir()
        for k, values in vectors.keyed_by_output(package, self.name, first=0).items():
            pickles.save(pickles.torch_tensor(values), path / f"layer_{k}.pt")


class Hotwire(_TorchVectors):
    """hotwire-vllm: a tensor [layers, d] of which a request names rows, or one vector [d]."""

    name = "hotwire"
    title = "hotwire-vllm vectors (.pt)"
    layers = Ask("layers", several(int), "blocks whose outputs requests steer, joined by commas")
    asks = (STRENGTH, layers)

    def recognises(self, path: Path) -> bool:
        return pickles.holds(path, lambda x: hasattr(x, "dim") and x.dim() in (1, 2))

    def contents(self, path: Path) -> dict[str, Any]:
        return {"tensor": list(np.shape(self._tensor(path)))}

    def read(self, path: Path, given: Given) -> SteeringPackage:
        array = self._tensor(path)
        layers, base = given(self.layers), given.base_model()
        if array.ndim == 2 and len(array) != base.num_layers:
            raise NotRepresentable(
                self.name, f"{len(array)} rows for {base.num_layers} blocks of {base.name}"
            )
        vectors.checked(
            dict.fromkeys(layers, array if array.ndim == 1 else array[0]), base, self.name
        )
        found = {k: Tensor.of(array if array.ndim == 1 else array[k]) for k in layers}
        return vectors.package(path.stem, base, vectors.outputs(found), given(STRENGTH))

    def _tensor(self, path: Path) -> Float32:
        found = pickles.load(path)
        if isinstance(found, dict):  # hotwire takes the first tensor, whatever its key
            found = next((v for v in found.values() if hasattr(v, "dim")), None)
        dimensions = 1 if getattr(found, "ndim", 2) == 1 else 2
        return pickles.tensor(found, "tensor", path, dimensions).float32()

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        base = package.spec.base_model
        rows = np.zeros((base.num_layers, base.hidden_size), np.float32)
        for k, values in vectors.keyed_by_output(package, self.name, first=0).items():
            rows[k] = values
        pickles.save(pickles.torch_tensor(rows), path)


def _number(key: Any, path: Path) -> int:
    if not isinstance(key, int) or isinstance(key, bool) or key < 0:
        raise unreadable(path, "layer_activations", "layer numbers from 0 on", repr(key))
    return key
