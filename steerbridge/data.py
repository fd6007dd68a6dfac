"""Prompts with labels: what training and evaluation read.

A JSON Lines file holds one object per line, in one of two shapes:
  {"prompt": "...", "harmful": true, "kind": "general", "images": ["a.png"]}
  {"harmful": "...", "harmless": "...", "image": "a.png"}        an aligned pair
`harmful` of the first shape defaults to false, `kind` to "general", paths are relative to
the file. `system` may hold a system message, `group` name what prompts are held out by together
(see `folds`). The same fields may be the columns of a CSV or Parquet file, or of a dataset that
`datasets` saved to disk.
"""

from __future__ import annotations

import base64
import hashlib
import mimetypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerbridge import _json, tables
from steerbridge.errors import BrokenPackage, DataError, Problem


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its label. `pair` joins the two sides of an aligned pair or twin, `group`
    prompts that are alike otherwise, such as one question about many pictures. `system` is the
    system message before it."""

    text: str
    harmful: bool
    kind: str = "general"
    pair: str | None = None
    images: tuple[Path, ...] = field(default=())
    group: str | None = None
    system: str | None = None

    def messages(self, content: Any) -> list[dict[str, Any]]:
        """The chat for a template: the system message, if any, and the user's content.

        Content of several parts makes the system message one too: templates want one kind.
        """
        system: Any = self.system
        if not isinstance(content, str):
            system = [{"type": "text", "text": system}]
        before = [] if self.system is None else [{"role": "system", "content": system}]
        return [*before, {"role": "user", "content": content}]


def read_examples(path: str | Path) -> list[Example]:
    """Read examples from a file or directory of any kind that is known.

    `.jsonl`; `.csv` and `.tsv`; `.parquet`; the directory of a dataset that `datasets` saved to
    disk; else a directory of images (`read_images`).

    Raises:
        DataError: names what cannot be used.
        RuntimeMissing: Parquet or a saved dataset without pyarrow (extra `eval`).
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            want = "the folder of one of its splits"
            raise DataError(Problem("dataset", want, "a dataset with splits"), path)
        if not (path / "state.json").is_file():
            return read_images(path)
        return _from_rows(tables.saved_dataset(path), path)
    if path.suffix in (".csv", ".tsv"):
        return _from_rows(tables.separated(path), path)
    if path.suffix == ".parquet":
        return _from_rows(tables.parquet(path), path)
    return read_jsonl(path)


def _from_rows(rows: Sequence[Any], path: Path) -> list[Example]:
    examples = [
        example
        for number, row in enumerate(rows, 1)
        for example in _examples(row, path, f"row {number}", None)
    ]
    if not examples:
        raise DataError(Problem("file", "at least one example", "none"), path)
    return examples


def read_jsonl(path: Path, kind: str | None = None) -> list[Example]:
    """Read examples from a JSON Lines file; `kind` replaces the kind of every one.

    Raises:
        DataError: names the line and field that cannot be used.
        FileNotFoundError: there is no such file.
    """
    examples: list[Example] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = _json.loads(line, f"line {number}")
        except BrokenPackage as error:
            raise DataError(error.problem, path) from error
        examples.extend(_examples(record, path, f"line {number}", kind))
    if not examples:
        raise DataError(Problem("file", "at least one example", "none"), path)
    return examples


def _examples(record: Any, path: Path, where: str, kind: str | None) -> Iterator[Example]:
    if not isinstance(record, dict):
        raise DataError(Problem(where, "a JSON object", type(record).__name__), path)
    if "harmless" in record:
        images = _images(record, path, where)
        for side in ("harmful", "harmless"):
            yield Example(
                _text(record, side, path, where),
                side == "harmful",
                kind or "pair",
                f"{path.name}:{where.split()[-1]}",
                images,
                system=_name(record, "system", path, where),
            )
        return
    harmful = record.get("harmful", False)
    if not isinstance(harmful, bool):
        raise DataError(Problem(f"{where}.harmful", "true or false", repr(harmful)), path)
    text = _text(record, "prompt", path, where)
    kind = kind or record.get("kind", "general")
    pair, group, system = (_name(record, key, path, where) for key in ("pair", "group", "system"))
    yield Example(text, harmful, kind, pair, _images(record, path, where), group, system)


def _name(record: dict[str, Any], key: str, path: Path, where: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(Problem(f"{where}.{key}", "a text", repr(value)), path)
    return value


def _text(record: dict[str, Any], key: str, path: Path, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(Problem(f"{where}.{key}", "a text that is not empty", repr(value)), path)
    return value


def _images(record: dict[str, Any], path: Path, where: str) -> tuple[Path, ...]:
    value = record.get("images", record.get("image", []))
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise DataError(Problem(f"{where}.images", "paths", repr(value)), path)
    images = tuple(path.parent / name for name in names)
    for image in images:
        if not image.is_file():
            raise DataError(Problem(f"{where}.images", "an image file", str(image)), path)
    return images


QUESTIONS = ("What is in the picture?", "Describe this image.", "What does this show?")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def read_images(directory: Path) -> list[Example]:
    """Images in the folders `harmful` and `harmless`, each with a question in turn.

    Their kind is `image`.

    Raises:
        DataError: neither folder holds an image.
    """
    examples = [
        Example(QUESTIONS[i % len(QUESTIONS)], label == "harmful", "image", None, (path,))
        for label in ("harmful", "harmless")
        for i, path in enumerate(sorted((directory / label).glob("*")))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not examples:
        want = "images in the folders harmful and harmless"
        raise DataError(Problem("directory", want, "none"), directory)
    return examples


def as_url(image: Path) -> str:
    """An image file as a `data:` URL."""
    kind = mimetypes.guess_type(image.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def corpus_examples(split: str) -> list[Example]:
    """The prompts shipped with Steerbridge, of one split (train, validation or test)."""
    from steerbridge import corpus

    return [
        Example(
            p.text,
            p.harmful,
            "borderline" if p.kind == "twin" and not p.harmful else p.kind,
            None if p.partner is None else f"corpus:{p.kind}:{p.partner}",
        )
        for p in corpus.prompts(split=split)
    ]


def sha256(examples: Iterable[Example]) -> str:
    """Hash of texts, labels, pairs, system messages and image bytes, in order."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(f"{e.text}\0{e.harmful}\0{e.kind}\0{e.pair}\0".encode())
        if e.system is not None:
            digest.update(f"system\0{e.system}\0".encode())
        for image in e.images:
            digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()


def folds(examples: Sequence[Example], count: int, seed: int) -> list[int]:
    """A fold 0..count-1 for each example; those of a group share one, and both sides of a pair
    without groups.

    Folds are derived from group, pair or text, so adding data reassigns nothing.
    """
    keys = (e.group or e.pair or e.text for e in examples)
    return [
        int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "little") % count
        for key in keys
    ]
