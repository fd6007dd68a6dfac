"""What kind of program a command starts, and whether a preloaded library would work in it."""

from __future__ import annotations

import contextlib
import mmap
import os
import shlex
import shutil
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from macholib.MachO import MachO

from steerbridge.errors import UnsupportedFeature

RUNTIME: Final = "steerbridge run"
_ENTRY: Final = "llama_decode"
# A string of llama.cpp's loader that every build contains, stripped or not.
_TRACE: Final = b"llama_model_loader"
ELF: Final = b"\x7fELF"
# The function by which libllama hands a graph's callback to ggml, across two libraries or in one.
_HOOK: Final = "ggml_backend_sched_set_eval_callback"
# macOS removes every DYLD variable from Apple's programs and from what they start.
_PROTECTED: Final = ("/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/", "/usr/libexec/", "/System/")
_STATIC: Final = "a control vector or LoRA of it may do (see docs/run.md)"
# Programs that run llama.cpp where no preload goes.
_APART: Final = {
    "ollama": "starts its own build of llama.cpp from a daemon",
    "lms": "talks to LM Studio, which starts its own build of llama.cpp",
    "lm-studio": "starts its own build of llama.cpp",
    "llamafile": "has llama.cpp linked into it",
    "koboldcpp": "has llama.cpp hidden in a library of its own",
    "gpt4all": "has llama.cpp hidden in a library of its own",
    "jan": "starts its own build of llama.cpp from a daemon",
    "docker": "runs programs in containers, which do not see the guard",
    "podman": "runs programs in containers, which do not see the guard",
    "flatpak": "runs programs in containers, which do not see the guard",
    "snap": "runs programs in containers, which do not see the guard",
}
_SERVE: Final = (
    "`steerbridge serve GUARD --model MODEL.gguf`, and give the app its address as that of an "
    "OpenAI or Ollama server: http://127.0.0.1:8080"
)


@dataclass(frozen=True, slots=True)
class Program:
    """A program as it will be started. `interpreter` runs it, if it is a script.

    `libraries` are those it is linked to; it may load others later.
    """

    path: Path
    interpreter: Program | None
    libraries: tuple[str, ...]

    @property
    def runs(self) -> Program:
        """The binary that is started: the program itself, or its interpreter."""
        return self.interpreter.runs if self.interpreter else self

    @property
    def names_llama(self) -> bool:
        """True if it is linked to libllama, so it certainly runs models."""
        return _names_llama(self.libraries)


def _names_llama(libraries: tuple[str, ...]) -> bool:
    return any(Path(name).name.startswith("libllama.") for name in libraries)


def inspect(command: str, system: str = sys.platform) -> Program:
    """Look at a program without running it.

    Args:
        system: where it would run, as `sys.platform` names it.

    Raises:
        FileNotFoundError: there is no such command.
        UnsupportedFeature: the dynamic linker would ignore a preload, or llama.cpp is linked
            into the program, so its calls cannot be intercepted.
    """
    if (why := _APART.get(Path(command).name.lower().removesuffix(".exe"))) is not None:
        raise UnsupportedFeature(RUNTIME, f"{Path(command).name} {why}", _SERVE)
    located = shutil.which(command)
    if located is None:
        raise FileNotFoundError(f"no command {command!r}")
    return _look(Path(located).resolve(), system, depth=0)


def _look(path: Path, system: str, depth: int) -> Program:
    _check_privileges(path, system)
    with path.open("rb") as file:
        start = file.read(256)
    if start.startswith(b"#!") and depth < 4:
        words = shlex.split(start[2:].splitlines()[0].decode(errors="replace"))
        if Path(words[0]).name == "env":
            _check_privileges(Path(words[0]), system)
            words = [w for w in words[1:] if not w.startswith("-") and "=" not in w]
        interpreter = Path(_which(words[0], path)).resolve()
        return Program(path, _look(interpreter, system, depth + 1), ())
    try:
        return Program(path, None, _libraries(path))
    except (ELFError, ValueError, struct.error) as error:
        raise UnsupportedFeature(RUNTIME, f"{path} is neither a program nor a script") from error


def _which(name: str, script: Path) -> str:
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"no interpreter {name!r} for {script}")
    return path


def _check_privileges(path: Path, system: str) -> None:
    """Refuse programs with elevated privileges: the dynamic linker ignores preloads there."""
    raised = path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    if system == "linux":
        with contextlib.suppress(OSError):  # a file system without attributes
            raised = raised or "security.capability" in os.listxattr(path)
    if system == "darwin" and str(path).startswith(_PROTECTED):
        raise UnsupportedFeature(
            RUNTIME,
            f"{path} belongs to macOS, which removes preloads from it and from what it starts",
            "start an interpreter directly, one that is not Apple's",
        )
    if raised:
        raise UnsupportedFeature(
            RUNTIME, f"{path} has elevated privileges, so the linker ignores preloads"
        )


def _libraries(path: Path) -> tuple[str, ...]:
    """Libraries that a binary is linked to; refuses a binary that contains llama.cpp."""
    with path.open("rb") as file:
        elf = file.read(4) == ELF
    needed, defines = _of_elf(path) if elf else _of_mach_o(path)
    if defines or (not _names_llama(needed) and _holds(path, _TRACE)):
        raise UnsupportedFeature(RUNTIME, f"{path} has llama.cpp linked into it", _STATIC)
    return needed


def _of_elf(path: Path) -> tuple[tuple[str, ...], bool]:
    """Libraries, and whether it defines llama.cpp's functions itself."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        sections = list(elf.iter_sections())
        dynamic = [s for s in sections if isinstance(s, DynamicSection)]
        needed = tuple(str(t.needed) for s in dynamic for t in s.iter_tags("DT_NEEDED"))  # type: ignore[attr-defined]
        # Every symbol's name stands in the file; parsing all of node's symbols takes seconds.
        defines = _holds(path, _ENTRY.encode()) and any(
            symbol["st_shndx"] != "SHN_UNDEF"
            for s in sections
            if isinstance(s, SymbolTableSection)
            for symbol in s.get_symbol_by_name(_ENTRY) or ()
        )
    if not dynamic:
        raise UnsupportedFeature(RUNTIME, f"{path} is linked statically", _STATIC)
    return needed, defines


def hides_llama(library: Path) -> bool:
    """Whether an ELF library contains a llama.cpp that cannot be hooked.

    Its functions, or the one that sets a graph's callback, are no dynamic symbols: calls between
    them never pass the dynamic linker.
    """
    if not _holds(library, _TRACE):
        return False
    with library.open("rb") as file:
        tables = [
            section
            for section in ELFFile(file).iter_sections()
            if isinstance(section, SymbolTableSection) and section.name == ".dynsym"
        ]
        return not all(
            any(table.get_symbol_by_name(name) for table in tables) for name in (_ENTRY, _HOOK)
        )


def _of_mach_o(path: Path) -> tuple[tuple[str, ...], bool]:
    """The same; symbols are not checked, as a Mach-O program's own may be stripped."""
    read: Any = MachO
    kinds = read(str(path)).headers  # one for each kind of processor
    return tuple(name for kind in kinds for _, _, name in kind.walkRelocatables()), False


def _holds(path: Path, word: bytes) -> bool:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(word) >= 0
