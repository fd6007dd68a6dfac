"""Write beside, then rename: a target appears whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_writable(target: Path) -> None:
    """Refuse a file that could not be written later: before an hour of work, not after it.

    Raises:
        OSError: its folder cannot be made or written, or it is a directory.
    """
    parent = target.parent.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is no directory, so {target} cannot be written")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target} cannot be written: {parent} is not writable")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh path, beside `target`, for a file or a directory that takes its place at the end.

    After an error in the block nothing is left of it and `target` is as it was. A process that is
    killed leaves the old target or the new one, whole (where the system can exchange two
    directories: Linux), and may leave a hidden folder beside it.

    Raises:
        OSError: the parent cannot be written, or a file would replace a directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    made, old = folder / target.name, folder / "old"
    try:
        yield made
        if made.is_dir() and target.is_dir():
            if _exchange(made, target):
                return
            target.rename(old)
        made.replace(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Let two directories change places in one step; False where that is not possible."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return int(rename(here, bytes(one), here, bytes(two), exchange)) == 0
