"""Write beside, then rename: a target appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh path, beside `target`, for a file or a directory that takes its place at the end.

    After an error in the block nothing is left of it and `target` is as it was.

    Raises:
        OSError: the parent cannot be written, or a file would replace a directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    made, old = folder / target.name, folder / "old"
    try:
        yield made
        if made.is_dir() and target.is_dir():  # cannot be replaced in one step
            target.rename(old)
        made.replace(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
