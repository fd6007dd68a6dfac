"""Vectors in `torch.save` files: steering-vectors, EasyEdit2 and hotwire-vllm.

All three add the vector, times a multiplier that the runtime sets, to the output of block k.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from steerbridge.errors import InvalidOption, MissingOption, NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Option,
    require_known,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Float32, Tensor
from steerbridge_convert import bare, pickles, vectors
from steerbridge_convert.scope import OPTIONS, WHOLE, scope

_HOLDS: Final = Holds(
    interventions=frozenset({"add_vector"}),
    sites="outputs of blocks",
    strength="one vector per layer; the runtime sets the multiplier",
)


class _TorchVectors(Format):
    holds = _HOLDS
    options: ClassVar[tuple[Option, ...]] = OPTIONS

    def vectors(self, path: Path) -> dict[int, Tensor]:
        """Vectors by the block whose output they change."""
        raise NotImplementedError

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return WHOLE

    def contents(self, path: Path) -> dict[str, Any]:
        by_block = self.vectors(path)
        return {"vectors": {str(k): [v.dtype, *v.shape] for k, v in sorted(by_block.items())}}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        return self.package(path, self.vectors(path), answers)

    def package(
        self, path: Path, by_block: Mapping[int, Tensor], answers: Answers
    ) -> SteeringPackage:
        """A package of the vectors of a file."""
        base = answers.base_model()
        vectors.checked(by_block, base, self.name)
        chosen = scope(answers, by_block)
        return vectors.scoped(path.stem, base, by_block, vectors.outputs, chosen)


class SteeringVectors(_TorchVectors):
    """steering-vectors: a dict of the two fields, or the dataclass saved by `torch.save`.

    The tool defines no file format; users save the object. Steerbridge writes the dict, so that
    `SteeringVector(**torch.load(path))` works without a pickled class.
    """

    name = "steering-vectors"
    title = "steering-vectors (.pt)"

    def recognises(self, path: Path) -> bool:
        return pickles.holds(path, lambda x: "layer_activations" in _fields(x), _OBJECT)

    def vectors(self, path: Path) -> dict[int, Tensor]:
        fields = _fields(pickles.load(path, _OBJECT))
        known = {"layer_activations", "layer_type"}
        require_known(self.name, path.name, map(str, fields), known)
        activations = fields.get("layer_activations")
        if not isinstance(activations, dict) or not activations:
            raise unreadable(path, "layer_activations", "tensors by layer", shown(activations))
        if (kind := fields.get("layer_type", "decoder_block")) != "decoder_block":
            raise NotRepresentable(self.name, f"layer_type {kind!r}: only the residual stream")
        return {
            _number(k, path): pickles.tensor(v, f"layer_activations[{k}]", path, 1)
            for k, v in activations.items()
        }

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        by_block = vectors.keyed_by_output(package, self.name)
        activations = {k: pickles.torch_tensor(v) for k, v in by_block.items()}
        pickles.save({"layer_activations": activations, "layer_type": "decoder_block"}, path)


def _fields(content: Any) -> dict[Any, Any]:
    """The fields of the dict or of the stand-in for the dataclass."""
    return content if isinstance(content, dict) else getattr(content, "__dict__", {})


_OBJECT: Final = r"steering_vectors\.steering_vector\.SteeringVector"
_LAYER_FILE: Final = re.compile(r"^layer_(\d{1,5})(?:_(\w[\w.]{0,99}))?\.pt$")
_PLAIN: Final = "plain"
_VARIANT: Final = Option(
    "variant",
    str,
    "which of the vectors of a layer: the end of their files' names (act_and_freq_trim0.35, "
    f"merged_vector), or {_PLAIN}; only if there are several",
    "",
)


class EasyEdit(_TorchVectors):
    """EasyEdit2: a directory of `layer_{k}.pt` (CAA, vector_prompt, SAE) or
    `layer_{k}_merged_vector.pt` (merge), or of `layer_{k}_{mode}_trim{t}.pt` (STA, which writes
    several to choose from)."""

    name = "easyedit"
    title = "EasyEdit2 vectors (directory)"

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and any(_LAYER_FILE.match(p.name) for p in path.iterdir())

    options = (*OPTIONS, _VARIANT)

    def contents(self, path: Path) -> dict[str, Any]:
        return {"files": sorted(file.name for files in _variants(path).values() for file in files)}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        variants, chosen = _variants(path), answers.get(_VARIANT)
        if not chosen and len(variants) > 1:
            raise MissingOption(self.name, _VARIANT.name, f"one of {', '.join(variants)}")
        if chosen and chosen not in variants:
            choices = f"{shown(chosen)}: the directory has {', '.join(variants)}"
            raise InvalidOption(self.name, _VARIANT.name, choices)
        by_block = {}
        for file in variants[chosen or next(iter(variants))]:
            number = _LAYER_FILE.match(file.name)
            assert number is not None
            if int(number[1]) in by_block:
                raise unreadable(path, file.name, "one file a layer", "two")
            by_block[int(number[1])] = pickles.tensor(pickles.load(file), "tensor", file, 1)
        return self.package(path, by_block, answers)

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        path.mkdir()
        for k, values in vectors.keyed_by_output(package, self.name).items():
            pickles.save(pickles.torch_tensor(values), path / f"layer_{k}.pt")


def _variants(path: Path) -> dict[str, list[Path]]:
    """The files of a directory by the end of their names."""
    stored = [p for p in sorted(path.iterdir()) if p.suffix in (".pt", ".pth")]
    require_known(
        EasyEdit.name, path.name, [p.name for p in stored if not _LAYER_FILE.match(p.name)], ()
    )
    variants: dict[str, list[Path]] = {}
    for file in stored:
        if number := _LAYER_FILE.match(file.name):
            variants.setdefault(number[2] or _PLAIN, []).append(file)
    if not variants:
        raise unreadable(path, "files", "layer_{k}.pt", "none")
    return variants


class Hotwire(_TorchVectors):
    """hotwire-vllm: a tensor [layers, d] whose rows a request selects, or one vector [d]."""

    name = "hotwire"
    title = "hotwire-vllm vectors (.pt)"

    def recognises(self, path: Path) -> bool:
        if bare.described(path):
            return False
        return pickles.holds(path, lambda x: hasattr(x, "dim") and x.dim() in (1, 2))

    def contents(self, path: Path) -> dict[str, Any]:
        return {"tensor": list(np.shape(self._tensor(path)))}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        array, base = self._tensor(path), answers.base_model()
        if array.ndim == 2 and len(array) != base.num_layers:
            raise NotRepresentable(
                self.name,
                f"{len(array)} rows for {base.num_layers} blocks of {base.name} (persona vectors "
                "have one more: --from directions)",
            )
        rows = np.broadcast_to(array, (base.num_layers, array.shape[-1]))
        vectors.checked({0: rows[0]}, base, self.name)
        # A row of zeros is a layer that has no vector: to add it is to do nothing.
        there = {k: row for k, row in enumerate(rows) if row.any()}
        chosen = scope(answers, there)
        by_block = {k: Tensor.of(there[k]) for k in chosen.strengths}
        return vectors.scoped(path.stem, base, by_block, vectors.outputs, chosen)

    def _tensor(self, path: Path) -> Float32:
        tensor = pickles.load(path)
        if isinstance(tensor, dict):  # hotwire takes the first tensor, whatever its key
            if len(tensor) != 1:
                raise NotRepresentable(
                    self.name, f"{len(tensor)} entries: the tool takes the first and drops the rest"
                )
            (tensor,) = tensor.values()
        dimensions = 1 if getattr(tensor, "ndim", 2) == 1 else 2
        return pickles.tensor(tensor, "tensor", path, dimensions).float32()

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        base = package.spec.base_model
        rows = np.zeros((base.num_layers, base.hidden_size), np.float32)
        for k, values in vectors.keyed_by_output(package, self.name).items():
            rows[k] = values
        pickles.save(pickles.torch_tensor(rows), path)


def _number(key: Any, path: Path) -> int:
    if not isinstance(key, int) or isinstance(key, bool) or key < 0:
        raise unreadable(path, "layer_activations", "layer numbers, 0 or higher", shown(key))
    return key
