"""Our own two encodings as formats, so that they take part in every conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerbridge import encodings
from steerbridge.formats import Format, Given, Holds
from steerbridge.package import SteeringPackage, load
from steerbridge_convert import files

_EVERYTHING = Holds(
    probes=frozenset({"mlp", "linear", "cosine"}),
    interventions=frozenset({"head_matrix", "add_vector", "project_out"}),
    gates=True,
    from_prompt_end=True,
    sites="inputs and outputs of blocks, head input",
    strength="alpha, eps and the rule's strength",
    records=True,
)


class _Package(Format):
    holds = _EVERYTHING
    atomic = True  # and keeps the other files of a directory

    def contents(self, path: Path) -> dict[str, Any]:
        package = load(path)
        return {
            "spec": encodings.plain(package.spec),
            "tensors": {
                name: {"dtype": t.dtype, "shape": list(t.shape)}
                for name, t in package.tensors.items()
            },
        }

    def read(self, path: Path, given: Given) -> SteeringPackage:
        return load(path)

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        package.save(path)


class PackageDirectory(_Package):
    """`steering_config.json` and `steering.safetensors`."""

    name = "steerbridge"
    title = "Steering package (directory)"

    def recognises(self, path: Path) -> bool:
        return (path / encodings.CONFIG_NAME).is_file()


class PackageGguf(_Package):
    """One GGUF file, for llama.cpp."""

    name = "steerbridge-gguf"
    title = "Steering package (GGUF)"

    def recognises(self, path: Path) -> bool:
        metadata = files.gguf_metadata(path)
        return metadata.get("general.architecture") == encodings.GGUF_ARCHITECTURE
