"""vLLM-Hook (now MIA): a JSON file whose `steering` says how a vector of a `torch.save` file acts.

    {"steering": {"method": "add_vector", "coefficient": 4, "optimal_layer": 15,
                  "vector_path": "vector.pt", "positions": "all_tokens", "phase": "both"}}

The vector's file is a dict of `dir` [d], an array or a tensor, and `avg_proj`, a number. At the
outputs of the blocks of `optimal_layer`, `add_vector` adds coefficient times dir; `adjust_rs` moves
the projection to avg_proj, h + (avg_proj - h . dir) dir, which is a projection out and an addition
(docs/configurations.md and steer_activation_worker.py of IBM/vLLM-Hook, versions of 2026).
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
    Loss,
    Option,
    require_known,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    AddVector,
    BaseModelInfo,
    ProjectOut,
    Target,
)
from steerbridge.tensors import Tensor
from steerbridge_convert import files, pickles, vectors

CONFIG: Final = "steering.json"
VECTOR: Final = "vector.pt"
_VECTOR: Final = Option(
    "vector",
    Path,
    "the file of the vector; by default `vector_path`, from the JSON file's folder",
    Path(),
)
_KEYS: Final = frozenset(
    {
        *("method", "coefficient", "optimal_layer", "phase", "positions"),
        *("apply_at_all_positions", "vector_path"),
    }
)
# Of the other sections: what other workers read, and what only speed depends on.
_SECTIONS: Final = frozenset(
    {"steering", "model_info", "hidden_states", "params", "hookq", "optimizations"}
)
_POSITIONS: Final = {"all_tokens": "all_positions", "last_token": "from_prompt_end"}


class VllmHook(Format):
    """Written as a directory of both files, with one vector."""

    name = "vllm-hook"
    title = "vLLM-Hook steering (JSON and .pt)"
    holds = Holds(
        interventions=frozenset({"add_vector"}),
        from_prompt_end=True,
        sites="outputs of blocks",
        strength="coefficient",
    )
    options = (_VECTOR,)

    def recognises(self, path: Path) -> bool:
        file = _file(path)
        if file.suffix != ".json" or not file.is_file():
            return False
        try:
            steering = files.json_object(file).get("steering")
        except UnreadableSource:
            return False
        return isinstance(steering, dict) and "vector_path" in steering

    def contents(self, path: Path) -> dict[str, Any]:
        return {"steering": {key: shown(value) for key, value in _steering(path).items()}}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        steering = _steering(path)
        base = answers.base_model()
        direction, projection = _stored(_vector_file(path, steering, answers))
        blocks = _blocks(path, steering, base)
        vectors.checked(dict.fromkeys(blocks, direction), base, self.name)
        position = self._position(steering)
        acts: list[tuple[str, type[AddVector] | type[ProjectOut], float]] = [
            (
                "vector",
                AddVector,
                files.number(steering.get("coefficient", 0), "coefficient", _file(path)),
            )
        ]
        if (method := steering.get("method", "adjust_rs")) == "adjust_rs":
            if projection is None:
                raise unreadable(path, "avg_proj", "a number, for adjust_rs", "none")
            acts = [("out", ProjectOut, 1.0), ("in", AddVector, projection)]
            answers.losses.append(
                Loss(
                    "adjust_rs",
                    "measures the projection behind the block's MLP; the tool measures it before",
                )
            )
        elif method != "add_vector":
            raise NotRepresentable(self.name, f"method = {shown(method)}")
        sites = vectors.outputs(dict.fromkeys(blocks, direction))
        targets = tuple(Target(site=site, vector="dir") for site in sites)
        acting = tuple(
            kind(
                id=id,
                type="add_vector" if kind is AddVector else "project_out",  # type: ignore[arg-type]
                position=position,  # type: ignore[arg-type]
                alpha=alpha,
                targets=targets,
            )
            for id, kind, alpha in acts
        )
        return vectors.always(_file(path).stem, base, acting, {"dir": direction})

    def _position(self, steering: Mapping[str, Any]) -> str:
        """Which tokens change, in the words of the spec.

        Raises:
            NotRepresentable: those of one phase alone.
        """
        if (phase := steering.get("phase", "both")) != "both":
            raise NotRepresentable(self.name, f"phase = {shown(phase)}")
        said = steering.get("positions")
        if said is None:
            if steering.get("apply_at_all_positions", True) is not True:
                raise NotRepresentable(
                    self.name,
                    "apply_at_all_positions = false, which releases read differently; say "
                    "positions: last_token for the prompt's last token and every new one",
                )
            said = "all_tokens"
        if not isinstance(said, str) or said not in _POSITIONS:
            raise NotRepresentable(self.name, f"positions = {shown(said)}")
        return _POSITIONS[said]

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        by_block = vectors.keyed_by_output(package, self.name)
        first, *others = by_block.values()
        if any(not np.array_equal(first, other) for other in others):
            raise NotRepresentable(self.name, "vectors that differ by layer; it has one")
        positions = {act.position for _, act in vectors.acting(package, AddVector)}
        if len(positions) != 1:
            raise NotRepresentable(self.name, "vectors that act on different tokens")
        words = {ours: theirs for theirs, ours in _POSITIONS.items()}
        steering = {
            "method": "add_vector",
            "coefficient": 1.0,
            "optimal_layer": list(by_block) if others else next(iter(by_block)),
            "vector_path": VECTOR,
            "phase": "both",
            "positions": words[positions.pop()],
        }
        path.mkdir()
        info = {"model_id": package.spec.base_model.name}
        content = {"model_info": info, "steering": steering}
        (path / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        pickles.save({"dir": pickles.torch_tensor(first)}, path / VECTOR)


def _file(path: Path) -> Path:
    return path / CONFIG if path.is_dir() else path


def _steering(path: Path) -> dict[str, Any]:
    content = files.json_object(_file(path))
    require_known("vllm-hook", _file(path).name, content, _SECTIONS)
    steering = content.get("steering")
    if not isinstance(steering, dict):
        raise unreadable(_file(path), "steering", "an object", shown(steering))
    require_known("vllm-hook", "steering", steering, _KEYS)
    return steering


def _vector_file(path: Path, steering: Mapping[str, Any], answers: Answers) -> Path:
    """The file of the vector: the user's, or one beside or below the JSON file."""
    chosen: Path = answers.get(_VECTOR)
    if chosen != Path():
        return chosen
    folder, name = _file(path).parent, steering.get("vector_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise unreadable(_file(path), "vector_path", "a path", shown(name))
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise NotRepresentable(
            "vllm-hook", f"vector_path {shown(name)} leads out of the folder; give --set vector="
        )
    return folder / name


def _stored(file: Path) -> tuple[Tensor, float | None]:
    """The vector [d], and the projection that it is moved to."""
    if not file.is_file():
        raise unreadable(file, "file", "the vector", "none")
    content = pickles.load(file)
    if not isinstance(content, dict):
        raise unreadable(file, "torch file", "a dict of dir and avg_proj", shown(content))
    require_known("vllm-hook", file.name, map(str, content), {"dir", "avg_proj"})
    direction = pickles.tensor(content.get("dir"), "dir", file, 1)
    value = content.get("avg_proj")
    if value is None:
        return direction, None
    if not isinstance(value, int | float):
        value = float(pickles.tensor(value, "avg_proj", file, 0).float32())
    return direction, files.number(value, "avg_proj", file)


def _blocks(path: Path, steering: Mapping[str, Any], base: BaseModelInfo) -> list[int]:
    """The blocks of `optimal_layer`: a number, several, or all."""
    said = steering.get("optimal_layer")
    if said == "all":
        return list(range(base.num_layers))
    numbers = said if isinstance(said, list) else [said]
    if not numbers or not all(type(k) is int and k >= 0 for k in numbers):
        raise unreadable(_file(path), "optimal_layer", "blocks from 0 on, or all", shown(said))
    if len(set(numbers)) != len(numbers):
        raise unreadable(_file(path), "optimal_layer", "each block once", shown(said))
    return sorted(numbers)
