"""What the preload cannot see, seen from outside: processes without it, and a hidden llama.cpp.

On Linux `run` adopts every process that its program starts. One that opens a model file without
having answered (it lost the preload, has elevated privileges or is linked statically), or with a
llama.cpp inside another library, ends with all the others: no answer is better than an unguarded
one. So does a shard of TGI that takes connections before it has said that the package is attached,
and a server of vLLM that does so before one of its workers has.
On macOS nothing is seen; there the answer of the program itself is all there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError

from steerbridge_run import preload, programs

_PROC: Final = Path("/proc")
_GGUF: Final = b"GGUF"
_PR_SET_CHILD_SUBREAPER: Final = 36
_SHARD: Final = re.compile(rb"text[-_]generation[-_]server|steerbridge_tgi")
# Engines and workers of vLLM listen before they load a model, for one another.
_VLLM: Final = re.compile(rb"(^|/)vllm\0|vllm\.entrypoints|VLLM::APIServer")
_SHELL: Final = re.compile(rb"([^\0]*/)?(sh|ash|bash|dash|fish|ksh|zsh)\0")
_ACCEPTS: Final = "00010000"  # a flag in /proc/net/unix: listen() was called
_LISTENS: Final = "0A"  # a state in /proc/net/tcp
SECONDS: Final = 0.02  # between two looks
_LOOKS: Final = 10  # at a shard that listens, until what it said before must have been read


def adopt() -> None:
    """Become the parent of every orphan that this process's children leave (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Processes that a process started, and those that they started (Linux)."""
    found, waiting = [], [root]
    while waiting:
        children = _children(waiting.pop())
        found += children
        waiting += children
    return found


def _children(pid: int) -> list[int]:
    listed = []
    with contextlib.suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                listed += [int(child) for child in (task / "children").read_text().split()]
    return listed


@dataclass
class Watchdog:
    """Looks at the processes of `run` until it is closed.

    Args:
        answered: whether the preload of a process has said that it is there.
        attached: the processes that have said that the package is attached.
        stop: called with a reason, once; then the processes are killed.
    """

    answered: Callable[[int], bool]
    attached: Callable[[], Set[int]]
    stop: Callable[[str], None]
    _kinds: dict[tuple[int, int, int], str] = field(default_factory=dict)
    _seen: dict[int, frozenset[str]] = field(default_factory=dict)
    _listening: dict[int, int] = field(default_factory=dict)  # looks at a shard, which is stopped
    _closed: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to look, in a thread (Linux)."""
        if sys.platform == "linux":
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        for pid in list(self._listening):
            self._go_on(pid)

    def _watch(self) -> None:
        while not self._closed.wait(SECONDS):
            pids = descendants(os.getpid())
            # Servers first: one that listens may answer while the files of others are looked at.
            reasons = itertools.chain(map(self._shard_fault, pids), map(self._fault, pids))
            if reason := next(filter(None, reasons), ""):
                self.stop(reason)
                kill_all()
                return

    def _fault(self, pid: int) -> str:
        """Why a process must end; empty if it need not."""
        paths = frozenset(_mapped(pid)) | frozenset(_opened(pid))
        if paths == self._seen.get(pid):
            return ""
        kinds = {path: self._kind(path) for path in paths}
        models = sorted(path for path, kind in kinds.items() if kind == "model")
        # A fork has its parent's preload, and has answered nothing under its own number.
        if models and not self.answered(pid) and "guard" not in kinds.values():
            return (
                f"process {pid} ({_name(pid)}) opened {models[0]} without the guard: it was "
                "started with another environment, is linked statically, or has elevated privileges"
            )
        if models and (hidden := [path for path, kind in kinds.items() if kind == "hidden"]):
            return (
                f"process {pid} ({_name(pid)}) runs {models[0]} with a llama.cpp that is hidden in "
                f"{hidden[0]}; `steerbridge serve` runs the model guarded"
            )
        self._seen[pid] = paths
        return ""

    def _shard_fault(self, pid: int) -> str:
        """Why a server of TGI or vLLM must end; empty if it need not, or is none."""
        command = _command(pid)
        kind = "TGI" if _SHARD.search(command) else "vLLM" if _is_vllm(command) else ""
        # Workers of vLLM attach the package; another of its processes takes the connections.
        if not self.attached().isdisjoint(_vllm_with(pid) if kind == "vLLM" else {pid}):
            self._go_on(pid)
            return ""
        if not kind or not (_listens if kind == "TGI" else _listens_at_port)(pid):
            return ""
        looks = self._listening.get(pid, 0) + 1
        if looks == 1:  # it answers nobody while what it said before may still have to be read
            _signal(pid, signal.SIGSTOP)
        self._listening[pid] = looks
        if looks < _LOOKS:
            return ""
        return (
            f"process {pid} ({_name(pid)}) serves a model of {kind} without the package: install "
            "steerbridge into the server's environment, and start it without `-S`"
        )

    def _go_on(self, pid: int) -> None:
        if self._listening.pop(pid, 0):
            _signal(pid, signal.SIGCONT)

    def _kind(self, path: str) -> str:
        """`model`, `guard` (the preload), `hidden` (llama.cpp that cannot be hooked), or empty."""
        try:
            found = os.stat(path)
        except OSError:
            return ""
        if not stat.S_ISREG(found.st_mode):
            return ""
        key = found.st_dev, found.st_ino, found.st_size
        if key not in self._kinds:
            self._kinds[key] = _kind_of(Path(path))
        return self._kinds[key]


def _kind_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == _GGUF:
            return "model"
        if path.name == preload.library().name and path.samefile(preload.library()):
            return "guard"
        return "hidden" if start == programs.ELF and programs.hides_llama(path) else ""
    except (OSError, ValueError, ELFError):
        return ""


def _mapped(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
            _, slash, path = line.partition("/")
            if slash:
                yield slash + path


def _opened(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                if (path := os.readlink(entry.path)).startswith("/"):
                    yield path


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "cmdline").read_bytes()
    return b""


def _vllm_with(pid: int) -> set[int]:
    """The processes of the server of vLLM that a process belongs to."""
    while (parent := _parent(pid)) not in (0, os.getpid()) and _is_vllm(_command(parent)):
        pid = parent
    return {pid, *descendants(pid)}


def _is_vllm(command: bytes) -> bool:
    """Whether a process with this command runs vLLM, and is no shell that starts it."""
    return _VLLM.search(command) is not None and _SHELL.match(command) is None


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        behind_name = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2]
        return int(behind_name.split()[1])
    return 0


def _listens(pid: int) -> bool:
    """Whether a process takes connections at a Unix socket that has a path."""
    listening = set()
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "net" / "unix").read_text(errors="replace").splitlines():
            _, _, _, flags, _, _, inode, *path = line.split(maxsplit=7)
            if flags == _ACCEPTS and path and path[0].startswith("/"):
                listening.add(f"socket:[{inode}]")
    return _holds(pid, listening)


def _listens_at_port(pid: int) -> bool:
    """Whether a process takes connections at a TCP port."""
    listening = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / str(pid) / "net" / table).read_text().splitlines()[1:]:
                _, _, _, state, _, _, _, _, _, inode, *_ = line.split()
                if state == _LISTENS:
                    listening.add(f"socket:[{inode}]")
    return _holds(pid, listening)


def _holds(pid: int, sockets: set[str]) -> bool:
    """Whether a process has one of these sockets open."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(_PROC / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) in sockets:
                    return True
    return False


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "comm").read_text().strip()
    return "ended"


def kill_all() -> None:
    """Kill every process that this one started, and those that they started."""
    for pid in descendants(os.getpid()):
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
