"""The two encodings of a steering package as formats, so that any conversion can use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from steerbridge import encodings
from steerbridge.errors import PackageError
from steerbridge.format import Answers, Format, Holds
from steerbridge.package import SteeringPackage, load
from steerbridge_convert import files

_EVERYTHING = Holds(
    probes=frozenset({"mlp", "linear", "cosine"}),
    token_readings=True,
    interventions=frozenset({"head_matrix", "add_vector", "project_out", "say"}),
    gates=True,
    from_prompt_end=True,
    sites="inputs and outputs of blocks, head input",
    strength="alpha, eps and the rule's strength",
    records=True,
)


class _Package(Format):
    holds = _EVERYTHING
    atomic = True  # it also keeps the other files of a directory
    one_file: ClassVar[bool]

    def contents(self, path: Path) -> dict[str, Any]:
        package = load(path)
        return {
            "spec": package.spec.to_json(),
            "tensors": {
                name: {"dtype": t.dtype, "shape": list(t.shape)}
                for name, t in package.tensors.items()
            },
        }

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        package = load(path)
        if answers.base is not None:  # the package names its model itself
            own = package.spec.base_model
            answers.base_model(hidden_size=own.hidden_size, num_layers=own.num_layers)
        return package

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        if (path.suffix == ".gguf") != self.one_file:
            want = "a name that ends in .gguf" if self.one_file else "one that does not"
            raise PackageError(f"a {self.title} has {want}", path)
        package.save(path)


class PackageDirectory(_Package):
    """`steering_config.json` and `steering.safetensors`."""

    name = "steerbridge"
    title = "Steering package (directory)"
    one_file = False

    def recognises(self, path: Path) -> bool:
        return (path / encodings.CONFIG_NAME).is_file()


class PackageGguf(_Package):
    """One GGUF file, for llama.cpp."""

    name = "steerbridge-gguf"
    title = "Steering package (GGUF)"
    one_file = True

    def recognises(self, path: Path) -> bool:
        metadata = files.gguf_metadata(path)
        return metadata.get("general.architecture") == encodings.GGUF_ARCHITECTURE
