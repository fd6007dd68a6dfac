"""Prompts with labels: what training, calibration and evaluation work on.

`steerbridge.datasets` reads them from files.
"""

from __future__ import annotations

import base64
import hashlib
import mimetypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its label. `pair` joins the two sides of an aligned pair or twin, `group`
    prompts that are alike otherwise, such as one question about many pictures. `system` is the
    system message before it, `source` the file and row that it was read from."""

    text: str
    harmful: bool
    kind: str = "general"
    pair: str | None = None
    images: tuple[Path, ...] = field(default=())
    group: str | None = None
    system: str | None = None
    source: str = field(default="", compare=False)

    def messages(self, content: Any) -> list[dict[str, Any]]:
        """The chat for a template: the system message, if any, and the user's content.

        Content of several parts makes the system message one too: templates want one kind.
        """
        system: Any = self.system
        if not isinstance(content, str):
            system = [{"type": "text", "text": system}]
        before = [] if self.system is None else [{"role": "system", "content": system}]
        return [*before, {"role": "user", "content": content}]


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
            group=None if p.template is None else f"corpus:{p.template}",
            source=f"corpus {p.kind} ({split})",
        )
        for p in corpus.prompts(split=split)
    ]


def sha256(examples: Iterable[Example]) -> str:
    """Hash of texts, labels, kinds, pairs, groups, system messages and image bytes, in order."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(f"{e.text}\0{e.harmful}\0{e.kind}\0{e.pair}\0".encode())
        for name, value in (("group", e.group), ("system", e.system)):
            if value is not None:
                digest.update(f"{name}\0{value}\0".encode())
        for image in e.images:
            digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()
