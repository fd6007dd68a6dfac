"""The environment in which a program runs steered."""

from __future__ import annotations

import hashlib
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguf import LlamaFileType

from steerbridge import gguf_model
from steerbridge.errors import UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.spec import BaseModelInfo
from steerbridge_run.programs import RUNTIME

# By system: the variable that names libraries to preload, and our library.
_PRELOADS: Final = {
    "linux": ("LD_PRELOAD", "libsteerpreload.so"),
    "darwin": ("DYLD_INSERT_LIBRARIES", "libsteerpreload.dylib"),
}
_CALIBRATED_AS: Final = "llama.cpp"  # the runtime in these programs
_MODEL: Final = ("-m", "--model")
_DRAFT: Final = ("-md", "--model-draft", "--spec-draft-model")
_TOWER: Final = ("-mm", "--mmproj")
_TEMPLATE: Final = ("--chat-template", "--chat-template-file")


@dataclass(frozen=True, slots=True)
class Models:
    """Model files that a command line of llama.cpp names, the chat template (its text, or the name
    of one that llama.cpp knows) that replaces the model's own, and the file of a vision tower."""

    main: Path | None
    drafts: tuple[Path, ...]
    template: str | None = None
    tower: Path | None = None


def library() -> Path:
    """The library to preload, beside this file.

    Raises:
        UnsupportedFeature: neither Linux nor macOS, or built without a C compiler.
    """
    path = Path(__file__).with_name(_preload()[1])
    if not path.is_file():
        raise UnsupportedFeature(
            RUNTIME, f"{path.name} was not built", "reinstall steerbridge with a C compiler"
        )
    return path


def reachable(library: Path, folder: Path) -> Path:
    """A path of the library that the dynamic linker takes: without spaces and colons, which end a
    name in its list. One is linked from the folder, or from another for temporary files.

    Raises:
        UnsupportedFeature: there is no such folder.
    """
    if not _ends_name(library):
        return library
    for safe in (folder, Path("/tmp"), Path("/dev/shm")):
        if not _ends_name(safe) and safe.is_dir():
            link = Path(tempfile.mkdtemp(prefix="steerbridge-", dir=safe)) / library.name
            link.symlink_to(library)
            return link
    raise UnsupportedFeature(
        RUNTIME, f"{library}: the dynamic linker takes no path with a space or a colon", "TMPDIR"
    )


def _ends_name(path: Path) -> bool:
    return any(character in " :" for character in str(path))


def _preload() -> tuple[str, str]:
    if sys.platform not in _PRELOADS:
        raise UnsupportedFeature(
            RUNTIME, f"{sys.platform}: only Linux and macOS support preloading"
        )
    return _PRELOADS[sys.platform]


def named_models(command: Sequence[str], environment: Mapping[str, str]) -> Models:
    """The models that llama.cpp's own programs would open; missing files are left out."""
    # The last option counts, and an option counts more than the variable.
    main = [environment.get("LLAMA_ARG_MODEL", ""), *_values(command, _MODEL)]
    towers = [environment.get("LLAMA_ARG_MMPROJ", ""), *_values(command, _TOWER)]
    drafts = [*_values(command, _DRAFT), environment.get("LLAMA_ARG_SPEC_DRAFT_MODEL", "")]
    models = [Path(name) for name in main if name and Path(name).is_file()]
    return Models(
        models[-1] if models else None,
        tuple(Path(name) for name in drafts if name and Path(name).is_file()),
        _named_template(command, environment),
        next((Path(name) for name in reversed(towers) if name and Path(name).is_file()), None),
    )


def _named_template(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    variables = ("LLAMA_ARG_CHAT_TEMPLATE", "LLAMA_ARG_CHAT_TEMPLATE_FILE")
    given = [
        *((option, environment.get(v)) for option, v in zip(_TEMPLATE, variables, strict=True)),
        *_given(command, _TEMPLATE),
    ]
    known = [(option, value) for option, value in given if value]
    if not known:
        return None
    option, value = known[-1]
    if option == "--chat-template":
        return value
    file = Path(value)
    return file.read_text("utf-8", "replace") if file.is_file() else None  # llama.cpp says so


def _values(command: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    return (value for _, value in _given(command, options))


def _given(command: Sequence[str], options: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, value in zip(command, [*command[1:], ""], strict=True):
        name, equals, inline = word.partition("=")
        if name in options:
            yield name, inline if equals else value


def environment(
    package: SteeringPackage,
    file: Path,
    events: Path,
    unsteered: Sequence[Path],
    before: Mapping[str, str],
    *,
    nonce: str = "",
    ignore: Sequence[str] = (),
) -> dict[str, str]:
    """The program's variables: the preload and its settings, which the plugin for TGI reads too.

    Args:
        file: the package as GGUF, which stays unchanged while the program runs.
        events: a socket or file for one JSON line per event.
        unsteered: GGUF models that may run beside the steered one (drafts, embeddings).
        before: the environment without Steerbridge.
        nonce: what the preload answers with, in a process that has it.
        ignore: fields of the base model that may differ.
    """
    spec = package.spec
    variable, _ = _preload()
    preloads = [str(reachable(library(), file.parent)), *filter(None, [before.get(variable)])]
    made = {
        variable: ":".join(preloads),
        "STEERBRIDGE_PACKAGE": str(file),
        "STEERBRIDGE_PACKAGE_SHA256": _digest(file),
        "STEERBRIDGE_EVENTS": str(events),
        "STEERBRIDGE_NONCE": nonce,
        "STEERBRIDGE_UNSTEERED": ";".join(map(_shape, unsteered)),
        **_identity(spec.base_model, ignore),
        "STEERBRIDGE_IGNORE": ",".join(ignore),
        "STEERBRIDGE_FILE_TYPES": ";".join(_file_types(package)),
    }
    return {**before, **made}


def new_nonce() -> str:
    """A word that only the processes of one run know."""
    return secrets.token_hex(16)


def _identity(base: BaseModelInfo, ignore: Sequence[str]) -> dict[str, str]:
    """What the preload compares with the model that it finds; empty: not compared."""
    fields = {
        "STEERBRIDGE_VOCABULARY": "vocab_size",
        "STEERBRIDGE_TOKENIZER": "tokenizer_sha256",
        "STEERBRIDGE_TEMPLATE": "chat_template_sha256",
    }
    known = {name: None if f in ignore else getattr(base, f) for name, f in fields.items()}
    return {name: "" if value is None else str(value) for name, value in known.items()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shape(path: Path) -> str:
    facts = gguf_model.read_facts(path)
    return f"{facts.model_type}:{facts.hidden_size}:{facts.num_layers}"


def _file_types(package: SteeringPackage) -> Iterator[str]:
    """`general.file_type` numbers of the quantisations that the package is calibrated for."""
    calibrations = package.spec.calibrations
    wanted = {c.quantisation for c in calibrations if c.runtime == _CALIBRATED_AS}
    for kind in LlamaFileType:
        name = gguf_model.storage_name(kind)
        if name in wanted:
            yield f"{kind.value}:{name}"
