"""Put what was written into its place: nothing that somebody else put there is lost.

A target that exists is left alone unless it is to be overwritten. Then a file must be of the
target's format, and of a directory only those files go that Steerbridge wrote: it leaves a list.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from steerbridge.atomic import replacing
from steerbridge.errors import PackageError
from steerbridge.format import Format

LIST: Final = ".steerbridge-files.json"


def require_free(format: Format, target: Path, overwrite: bool) -> None:
    """Refuse a target that is in the way.

    Raises:
        PackageError: it exists and is not to be overwritten, or is nothing that Steerbridge wrote.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise PackageError("exists; --overwrite replaces what Steerbridge wrote there", target)
    if not format.replaces(target):
        raise PackageError(f"exists and is not a {format.title}", target)
    if target.is_dir() and not format.atomic and not (target / LIST).is_file():
        raise PackageError(f"was not written by Steerbridge (it has no {LIST})", target)


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A fresh path for a file or a directory that takes the place of `target` at the end; other
    files of a directory stay in it.

    Raises:
        PackageError: a new file would take the place of one that Steerbridge did not write.
    """
    with replacing(target) as fresh:
        yield fresh
        if fresh.is_dir():
            ours = _files(fresh)
            if target.is_dir():
                _keep_others(target, fresh)
            (fresh / LIST).write_text(json.dumps({"files": ours}, indent=2) + "\n")


def _files(folder: Path) -> list[str]:
    """Files and links in a directory, however deep; links to directories are not followed."""
    return sorted(
        str(item.relative_to(folder))
        for place, folders, names in os.walk(folder)
        for item in (Path(place) / name for name in (*folders, *names))
        if item.is_symlink() or not item.is_dir()
    )


def _listed(folder: Path) -> set[str]:
    """The files that Steerbridge wrote to a directory.

    Raises:
        PackageError: the list is broken.
    """
    path = folder / LIST
    if not path.is_file():
        return set()
    try:
        return set(map(str, json.loads(path.read_text("utf-8"))["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError("is no list of the files that Steerbridge wrote", path) from error


def _keep_others(old: Path, fresh: Path) -> None:
    ours = _listed(old)
    for place, folders, names in os.walk(old):
        if not folders and not names:  # an empty one of somebody else
            (fresh / Path(place).relative_to(old)).mkdir(parents=True, exist_ok=True)
    for name in _files(old):
        if name in ours or name == LIST:
            continue
        if (fresh / name).exists():
            raise PackageError(f"{name} is there and Steerbridge did not write it", old)
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / name, fresh / name, follow_symlinks=False)
        except OSError:  # another file system below, or none that knows hard links
            shutil.copy2(old / name, fresh / name, follow_symlinks=False)
