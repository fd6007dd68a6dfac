"""Prompts with labels: what training, calibration and evaluation work on.

`steerbridge.datasets` reads them from files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its label, in one form.

    Attributes:
        text: the request, or all that stands around it too.
        pair: joins the two sides of an aligned pair or twin.
        group: joins prompts that are alike otherwise, such as one question about many pictures.
        system: the system message before it.
        source: the file and row that it was read from.
        turns: earlier messages of the dialogue: (role, content).
        prefill: how the answer begins.
        raw: the text stands alone, without the chat template.
        form: name of the form (see `steerbridge.datasets.forms`).
    """

    text: str
    harmful: bool
    kind: str = "general"
    pair: str | None = None
    images: tuple[Path, ...] = field(default=())
    group: str | None = None
    system: str | None = None
    source: str = field(default="", compare=False)
    turns: tuple[tuple[str, str], ...] = ()
    prefill: str = ""
    raw: bool = False
    form: str = "chat"

    def messages(self, content: Any) -> list[dict[str, Any]]:
        """The chat for a template: the system message and earlier turns, if any, and the user's
        content. The answer's beginning is not among them.

        Content of several parts makes the other messages such too: templates want one kind.
        """
        before = [*self.turns] if self.system is None else [("system", self.system), *self.turns]
        chat: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in before]
        if not isinstance(content, str):
            for message in chat:
                message["content"] = [{"type": "text", "text": message["content"]}]
        return [*chat, {"role": "user", "content": content}]

    @property
    def is_chat(self) -> bool:
        """True if it has what only a chat template can render."""
        return self.system is not None or bool(self.turns)


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
            "borderline" if p.kind in ("twin", "request") and not p.harmful else p.kind,
            None if p.partner is None else f"corpus:{p.kind}:{p.partner}",
            group=None if p.template is None else f"corpus:{p.template}",
            source=f"corpus {p.kind} ({split})",
        )
        for p in corpus.prompts(split=split)
    ]


def sha256(examples: Iterable[Example]) -> str:
    """Hash of all that stands in the prompts (image bytes too), their labels, kinds, pairs and
    groups, in order."""
    digest = hashlib.sha256()
    for e in examples:
        said = (e.text, e.system, e.turns, e.prefill, e.raw)
        digest.update(json.dumps([said, e.harmful, e.kind, e.pair, e.group, e.form]).encode())
        for image in e.images:
            digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.hexdigest()
