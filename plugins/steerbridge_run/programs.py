"""What kind of program a command starts, and why a preload would not reach it."""

from __future__ import annotations

import contextlib
import mmap
import os
import shlex
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from steerbridge.errors import UnsupportedFeature

RUNTIME: Final = "steerbridge run"
_ENTRY: Final = "llama_decode"
# A word of llama.cpp's loader that is in every build of it, stripped or not.
_TRACE: Final = b"llama_model_loader"
_STATIC: Final = "a control vector or LoRA of it may do (see docs/run.md)"


@dataclass(frozen=True, slots=True)
class Program:
    """A program as it will be started. `interpreter`: who runs it, if it is a script.

    `libraries` are those it names itself; it may load others later.
    """

    path: Path
    interpreter: Program | None
    libraries: tuple[str, ...]

    @property
    def runs(self) -> Program:
        """The ELF program that is started in the end."""
        return self.interpreter.runs if self.interpreter else self

    @property
    def names_llama(self) -> bool:
        """True if it is linked to libllama, so that it surely runs models."""
        return any(name.startswith("libllama.") for name in self.libraries)


def inspect(command: str) -> Program:
    """Look at a program without running it.

    Raises:
        FileNotFoundError: there is no such command.
        UnsupportedFeature: the dynamic linker would ignore a preload, or llama.cpp is linked
            into the program, where nothing can stand in between.
    """
    found = shutil.which(command)
    if found is None:
        raise FileNotFoundError(f"no command {command!r}")
    return _look(Path(found).resolve(), depth=0)


def _look(path: Path, depth: int) -> Program:
    with path.open("rb") as file:
        start = file.read(256)
    if start.startswith(b"#!") and depth < 4:
        words = shlex.split(start[2:].splitlines()[0].decode(errors="replace"))
        if Path(words[0]).name == "env":
            words = [w for w in words[1:] if not w.startswith("-") and "=" not in w]
        return Program(path, _look(Path(_which(words[0], path)).resolve(), depth + 1), ())
    _check_privileges(path)
    try:
        return Program(path, None, _libraries(path))
    except ELFError as error:
        raise UnsupportedFeature(RUNTIME, f"{path} is neither an ELF program nor a script") from (
            error
        )


def _which(name: str, script: Path) -> str:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no interpreter {name!r} for {script}")
    return found


def _check_privileges(path: Path) -> None:
    """The dynamic linker ignores preloads in programs with privileges of their own."""
    raised = path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    with contextlib.suppress(OSError):  # a file system without attributes
        raised = raised or "security.capability" in os.listxattr(path)
    if raised:
        raise UnsupportedFeature(
            RUNTIME, f"{path} has privileges of its own, so the linker ignores preloads"
        )


def _libraries(path: Path) -> tuple[str, ...]:
    """Libraries that an ELF program names; refuses one with llama.cpp inside."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        sections = list(elf.iter_sections())
        dynamic = [s for s in sections if isinstance(s, DynamicSection)]
        needed = tuple(str(t.needed) for s in dynamic for t in s.iter_tags("DT_NEEDED"))  # type: ignore[attr-defined]
        defines = any(
            symbol["st_shndx"] != "SHN_UNDEF"
            for s in sections
            if isinstance(s, SymbolTableSection)
            for symbol in s.get_symbol_by_name(_ENTRY) or ()
        )
    if not dynamic:
        raise UnsupportedFeature(RUNTIME, f"{path} is linked statically", _STATIC)
    if defines or (not any(n.startswith("libllama.") for n in needed) and _holds(path, _TRACE)):
        raise UnsupportedFeature(RUNTIME, f"{path} has llama.cpp linked into it", _STATIC)
    return needed


def _holds(path: Path, word: bytes) -> bool:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(word) >= 0
