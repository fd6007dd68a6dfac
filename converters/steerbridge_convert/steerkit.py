"""steerkit: one probe direction for one layer (`.probe.safetensors`, schema 3).

The layer is a TransformerLens hook: `resid_pre` k is the input of block k, `resid_post` k its
output. Directions are unit vectors; the strength is `auto_alpha` if steerkit calibrated one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from steerbridge.errors import InvalidOption, MissingOption, NotRepresentable
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
from steerbridge.spec import AddVector, LayerInput, LayerOutput
from steerbridge.tensors import Tensor
from steerbridge_convert import files, vectors
from steerbridge_convert.scope import POSITIONS

_METHOD: Final = Option(
    "method", str, "name of the direction in the file", "default_method of the file"
)
_STRENGTH: Final = Option("strength", finite, "factor of the direction", "auto_alpha of the file")


_KEYS: Final = frozenset(
    {
        *("schema_version", "layer", "n_total_layers", "normalized_depth", "model_id"),
        *("hook_site", "hook_name", "default_method", "auto_alpha", "bias_json"),
        *("metrics_json", "created_at", "extras_json"),
    }
)


class Steerkit(Format):
    """`Probe.load` and `Probe.save` of steerkit.probe."""

    name = "steerkit"
    title = "steerkit probe (.probe.safetensors)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        sites="input or output of one block",
        strength="auto_alpha",
    )
    options = (_METHOD, _STRENGTH, POSITIONS)

    def recognises(self, path: Path) -> bool:
        return (
            path.name.endswith(".safetensors")
            and path.is_file()
            and "hook_site" in files.safetensors_metadata(path)
        )

    def contents(self, path: Path) -> dict[str, Any]:
        directions, metadata = _load(path)
        return {"metadata": metadata, "directions": {k: [len(v)] for k, v in directions.items()}}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        directions, metadata = _load(path)
        require_known(self.name, "metadata", metadata, _KEYS)
        if metadata.get("schema_version") != "3":
            found = shown(metadata.get("schema_version"))
            raise unreadable(path, "schema_version", "'3'", found)
        hook = f"blocks.{metadata.get('layer')}.hook_{metadata['hook_site']}"
        if metadata.get("hook_name", hook) != hook:
            raise unreadable(path, "hook_name", repr(hook), shown(metadata["hook_name"]))
        method = answers.values.get("method", metadata.get("default_method", ""))
        if method not in directions:
            error = InvalidOption if "method" in answers.values else MissingOption
            raise error(self.name, "method", f"one of {', '.join(directions)}")
        alpha = answers.values.get("strength", metadata.get("auto_alpha", ""))
        if not alpha:
            raise MissingOption(self.name, "strength", "the file has no auto_alpha")
        base = answers.base_model(num_layers=_whole(metadata, "n_total_layers", path))
        layer = _whole(metadata, "layer", path)
        vectors.checked({layer: directions[method]}, base, self.name)
        sites = {"resid_pre": vectors.inputs, "resid_post": vectors.outputs}
        if (site := metadata["hook_site"]) not in sites:
            raise NotRepresentable(self.name, f"hook_site {site!r}: only the residual stream")
        placed = sites[site]({layer: Tensor.of(directions[method])})
        strength, positions = _STRENGTH.parse(alpha, self.name), answers.get(POSITIONS)
        return vectors.package(path.stem, base, placed, strength, positions)

    def whole(self, package: SteeringPackage) -> Mapping[str, str]:
        return {POSITIONS.name: "all_positions"}

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        acting = vectors.acting(package, AddVector)
        by_depth = vectors.by_depth(package)
        if len(by_depth) != 1:
            raise NotRepresentable(self.name, f"vectors at {len(by_depth)} layers; it supports one")
        base = package.spec.base_model
        site = acting[0][1].targets[0].site
        values = next(iter(by_depth.values()))
        norm = np.float32(np.linalg.norm(values.astype(np.float64)))
        if norm == 0:
            raise NotRepresentable(self.name, "a zero vector has no direction")
        where = {LayerInput: "resid_pre", LayerOutput: "resid_post"}[type(site)]
        metadata = {
            "schema_version": "3",
            "layer": str(site.layer),
            "n_total_layers": str(base.num_layers),
            "normalized_depth": f"{(site.layer + 1) / (base.num_layers + 1):.6f}",
            "model_id": base.name,
            "hook_site": where,
            "hook_name": f"blocks.{site.layer}.hook_{where}",
            "default_method": "mass_mean",
            "auto_alpha": repr(float(norm)),
            "bias_json": "{}",
            "metrics_json": "{}",
            "created_at": "",
            "extras_json": json.dumps({"written_by": "steerbridge"}),
        }
        save_file({"direction.mass_mean": values / norm}, path, metadata=metadata)


def _load(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            known = [name for name in names if name.startswith("direction.")]
            require_known("steerkit", path.name, names, known)
            directions = {name.partition(".")[2]: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError) as error:
        raise unreadable(path, "file", "a safetensors file of float vectors", error) from error
    for name, values in directions.items():
        if values.ndim != 1 or not np.isfinite(values).all():
            raise unreadable(path, f"direction.{name}", "a finite vector", f"shape {values.shape}")
    if not directions:
        raise unreadable(path, "tensors", "direction.METHOD", "none")
    return directions, metadata


def _whole(metadata: dict[str, str], key: str, path: Path) -> int:
    text = metadata.get(key, "")
    if not text.removeprefix("-").isdecimal():
        raise unreadable(path, key, "a whole number", shown(text))
    return int(text)
