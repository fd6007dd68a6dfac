"""A steering package in memory: load it, check it, save it.

Everything else (adapters, converters, training, the CLI) leans on this module.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import ValidationError

from steerbridge import _json, encodings, fingerprint
from steerbridge import spec as spec_module
from steerbridge.atomic import replacing, require_writable
from steerbridge.errors import (
    BrokenPackage,
    InvalidSpec,
    PackageError,
    Problem,
    UnsupportedVersion,
)
from steerbridge.fingerprint import ModelFacts
from steerbridge.registry import requires
from steerbridge.spec import (
    SUPPORTED_MAJOR,
    ConstantStrength,
    ScoreStrength,
    SteeringSpec,
    Strength,
)
from steerbridge.tensors import Tensor


@dataclass(frozen=True, slots=True)
class SteeringPackage:
    """A spec and the tensors it names, checked against each other on construction.

    Raises:
        InvalidSpec: lists every rule that spec and tensors break.
    """

    spec: SteeringSpec
    tensors: Mapping[str, Tensor]
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if problems := [*spec_module.problems(self.spec), *_tensor_problems(self)]:
            raise InvalidSpec(problems, self.path)
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @property
    def sha256(self) -> str:
        """Hash of the spec but for `created`, and of the tensors' bytes: the same for a directory
        and a GGUF file, and for two trainings with the same seed and data."""
        spec = {key: value for key, value in self.spec.to_json().items() if key != "created"}
        digest = hashlib.sha256(_json.dumps(spec))
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            digest.update(np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def check(self, facts: ModelFacts, ignore: Collection[str] = ()) -> tuple[str, ...]:
        """Compare with a model; see `fingerprint.check`."""
        return fingerprint.check(self.spec.base_model, facts, ignore)

    def calibrated(
        self, runtime: str, quantisation: str, weights: Callable[[], str] | None = None
    ) -> SteeringPackage:
        """The package with thresholds fitted for this runtime, quantisation and checkpoint, if it
        has any; `weights` as in `SteeringSpec.calibrated`."""
        spec = self.spec.calibrated(runtime, quantisation, weights)
        return SteeringPackage(spec, self.tensors, self.path)

    def unconditional(self) -> SteeringPackage:
        """The same interventions without probes and conditions: what they do when they act.

        A strength that follows a score acts as with a score of 1.
        """
        rules = tuple(
            rule.replace(condition=None, strength=_constant(rule.strength))
            for rule in self.spec.rules
        )
        return self.replace(probes=(), rules=rules, calibrations=())

    def scaled(self, factor: float) -> SteeringPackage:
        """The package whose rules act `factor` times as strongly."""
        rules = tuple(
            rule.replace(strength=_times(rule.strength, factor)) for rule in self.spec.rules
        )
        return self.replace(rules=rules)

    def replace(
        self, *, tensors: Mapping[str, Tensor] | None = None, **changes: Any
    ) -> SteeringPackage:
        """A package in memory with other tensors or other fields of the spec.

        Raises:
            InvalidSpec: the result breaks a rule of the format.
        """
        try:
            spec = self.spec.replace(**changes) if changes else self.spec
        except ValidationError as error:
            raise InvalidSpec([_problem(e) for e in error.errors()]) from error
        return SteeringPackage(spec, self.tensors if tensors is None else tensors)

    def save(self, path: str | Path) -> Path:
        """Write a directory, or one GGUF file if the path ends in `.gguf`; return the path.

        The content is written beside the target, read back, compared and renamed into place.
        Other files of an existing package directory (a model card) are carried over.

        Raises:
            PackageError: the target exists and is something else, or did not read back equal.
        """
        target = check_target(path)
        if target.suffix == ".gguf":
            _save_gguf(self, target)
        else:
            _save_directory(self, target)
        return target


def _constant(strength: Strength) -> ConstantStrength:
    if isinstance(strength, ScoreStrength):
        return ConstantStrength(type="constant", value=strength.scale)
    return strength


def _times(strength: Strength, factor: float) -> Strength:
    name = "scale" if isinstance(strength, ScoreStrength) else "value"
    return strength.replace(**{name: getattr(strength, name) * factor})


def load(source: str | Path, *, revision: str | None = None) -> SteeringPackage:
    """Load a package from a directory, a GGUF file, or a Hugging Face hub id.

    Raises:
        BrokenPackage, UnsupportedVersion, InvalidSpec: see `steerbridge.errors`.
        RuntimeMissing: a hub id was given and huggingface-hub is not installed.
        FileNotFoundError: the path does not exist and is not a hub id.
    """
    path = Path(source)
    if not path.exists():
        path = _download(str(source), revision)
    if path.is_dir():
        raw, tensors = encodings.read_directory(path)
    else:
        raw, tensors = encodings.read_gguf(path)
    spec = parse(raw, path)
    for name, near in spec_module.unknown_fields(spec):
        if near:  # other unknown fields may be of a newer minor version
            warnings.warn(f"{path}: {name} is not known: did you mean {near}?", stacklevel=2)
    return SteeringPackage(spec, tensors, path)


def parse(raw: Any, path: Path | None = None) -> SteeringSpec:
    """Turn plain JSON values into a spec.

    Raises:
        UnsupportedVersion: another major version.
        InvalidSpec: names each wrong field, what was expected and what was found.
    """
    version = raw.get("spec_version") if isinstance(raw, dict) else None
    major = version.partition(".")[0] if isinstance(version, str) else ""
    if major.isdecimal() and major.isascii() and major != str(SUPPORTED_MAJOR):
        raise UnsupportedVersion(str(version), f"{SUPPORTED_MAJOR}.x", path)
    try:
        return SteeringSpec.model_validate_json(_json.dumps(raw))
    except ValidationError as error:
        raise InvalidSpec([_problem(e) for e in error.errors()], path) from error
    except ValueError as error:  # NaN and infinity have no JSON
        raise InvalidSpec([Problem("spec", "JSON values", str(error))], path) from error


def _problem(error: Any) -> Problem:
    """One pydantic error as field path, expectation and finding."""
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).strip(".")
    if error["type"] == "missing":
        return Problem(where or "spec", "this field", "nothing")
    want = error["msg"].removeprefix("Input should be ")
    if error["type"] == "extra_forbidden":
        near = spec_module.nearest(str(error["loc"][-1]), spec_module.field_names())
        want = "no such field" + (f" (did you mean {near}?)" if near else "")
    got = repr(error["input"])
    return Problem(where or "spec", want, got if len(got) <= 80 else got[:77] + "...")


def _tensor_problems(package: SteeringPackage) -> list[Problem]:
    problems: list[Problem] = []
    sizes: dict[str, int] = {}
    for where, name, want in spec_module.tensor_shapes(package.spec):
        tensor = package.tensors.get(name)
        if tensor is None:
            problems.append(Problem(where, f"tensor {name!r} in the package", "none"))
            continue
        free_to_size = [sizes.get(n, n) if isinstance(n, str) else n for n in want]
        if len(tensor.shape) != len(want) or any(
            isinstance(n, int) and n != size
            for n, size in zip(free_to_size, tensor.shape, strict=False)
        ):
            shape = f"[{', '.join(str(n) if isinstance(n, int) else 'any' for n in free_to_size)}]"
            problems.append(Problem(f"{where} ({name!r})", f"shape {shape}", str(tensor.shape)))
            continue
        sizes.update({n: s for n, s in zip(want, tensor.shape, strict=True) if isinstance(n, str)})
        if 0 in tensor.shape:
            problems.append(Problem(f"{where} ({name!r})", "sizes of 1 or more", str(tensor.shape)))
    for name, tensor in package.tensors.items():
        if not spec_module.is_tensor_name(name):
            problems.append(Problem("tensor name", "1 to 63 of A-Z a-z 0-9 _ . -", repr(name)))
        if not tensor.finite():
            problems.append(Problem(f"tensor {name!r}", "finite values", "NaN or infinity"))
    problems.extend(_scale_problems(package))
    return problems


def _scale_problems(package: SteeringPackage) -> list[Problem]:
    """A scale divides the probe's input, so it must be positive."""
    problems = []
    for i, probe in enumerate(package.spec.probes):
        tensor = package.tensors.get(probe.input_scale or "")
        if tensor is not None and not (tensor.float32() > 0).all():
            problems.append(
                Problem(f"probes[{i}].input_scale", "positive values", "zero or negative ones")
            )
    return problems


# ---------------------------------------------------------------- saving


def check_target(path: str | Path) -> Path:
    """The path as `save` takes it, if a package can be written there.

    Raises:
        PackageError: it exists and is something else.
        OSError: its folder cannot be written.
    """
    target = Path(path)
    if target.suffix == ".gguf":
        if target.is_dir():
            raise PackageError("a directory is in the way of the GGUF file", target)
        ours = target.exists() and _is_gguf_package(target)
        free = not target.exists()
    else:
        ours = (target / encodings.CONFIG_NAME).is_file()
        free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not ours and not free:
        raise PackageError("exists and is not a steering package", target)
    require_writable(target.parent / f".{target.name}")  # what is renamed into its place
    return target


def _is_gguf_package(path: Path) -> bool:
    try:
        encodings.read_gguf(path)
    except BrokenPackage:
        return False
    return True


def _save_gguf(package: SteeringPackage, target: Path) -> None:
    with replacing(target) as fresh:
        encodings.write_gguf(fresh, package.spec.to_json(), package.tensors)
        _compare(package, *encodings.read_gguf(fresh), target)


def _save_directory(package: SteeringPackage, target: Path) -> None:
    with replacing(target) as fresh:
        fresh.mkdir()
        encodings.write_directory(fresh, package.spec.to_json(), package.tensors)
        _compare(package, *encodings.read_directory(fresh), target)
        if target.exists():
            _carry_over(target, fresh)


def _carry_over(old: Path, new: Path) -> None:
    for item in old.iterdir():
        if item.name in (encodings.CONFIG_NAME, encodings.TENSORS_NAME):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True)
        else:
            shutil.copy2(item, new / item.name, follow_symlinks=False)


def _compare(package: SteeringPackage, raw: Any, tensors: dict[str, Tensor], path: Path) -> None:
    if raw != package.spec.to_json() or tensors != dict(package.tensors):
        raise BrokenPackage(Problem("written file", "what was saved", "something else"), path)


def _download(source: str, revision: str | None) -> Path:
    if source.endswith(".gguf") or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no steering package at {source}")
    with requires("hf"):
        from huggingface_hub import snapshot_download
    names = [encodings.CONFIG_NAME, encodings.TENSORS_NAME]
    return Path(snapshot_download(source, revision=revision, allow_patterns=names))
