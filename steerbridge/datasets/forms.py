"""The forms in which one request comes before a model: alone, behind a system message, as a later
turn, inside a long text, ...

A form changes what stands around a request, never whether it is harmful. What is put around is
harmless and the same for both sides of a pair, so that it tells a probe nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from steerbridge import corpus
from steerbridge.data import Example
from steerbridge.errors import DataError, UnsupportedFeature

CHAT: Final = "chat"  # a chat of one message, as prompts are read
LONG: Final = ("long_start", "long_middle", "long_end")
FORMS: Final = (CHAT, "system", "turns", "prefill", "raw", *LONG, "layout")
SHORTEST: Final = 400  # characters of a long text
LONGEST: Final = 2400
_BETWEEN: Final = ("\n\n", "\n", " ")  # what parts a request from the text around it


@dataclass(frozen=True, slots=True)
class Material:
    """What is put around requests.

    Attributes:
        systems: system messages.
        exchanges: a user's message and its answer.
        prefills: beginnings of answers.
        layouts: texts with a place for the request: `{request}`, `{json}` (as a JSON string) or
            `{quoted}` (as quoted lines of an e-mail).
        pages: pieces of ordinary text, from which long texts are joined.
    """

    systems: Sequence[str]
    exchanges: Sequence[tuple[str, str]]
    prefills: Sequence[str]
    layouts: Sequence[str]
    pages: Sequence[str]


def material(split: str, pages: Sequence[str] = ()) -> Material:
    """The shipped material of a split (`train` or `test`), and more pages beside its own."""
    parts = corpus.surroundings(split)
    pairs = [(asked, answered) for asked, answered in parts["exchanges"]]
    own = [page.text for page in corpus.pages(split)]
    return Material(parts["systems"], pairs, parts["prefills"], parts["layouts"], [*own, *pages])


def rendered(
    example: Example, form: str, around: Material, seed: int = 0, longest: int = LONGEST
) -> Example:
    """The example in a form. The same example, form, material and seed give the same prompt.

    Args:
        longest: characters of a long text, at most.

    Raises:
        KeyError: no such form.
    """
    draw = random.Random(_number(seed, form, example))
    return replace(_WAYS[form](example, around, draw, longest), form=form)


class Renders(Protocol):
    """A model that renders prompts, as every `LoadedModel` does."""

    def render(self, prompt: Example) -> list[int]: ...


def renderable(model: Renders, example: Example, forms: Sequence[str]) -> list[str]:
    """The forms that the model's template can render; those of a bare text where there is none."""
    around = material("train")
    text = replace(example, images=())
    found = []
    for form in forms:
        try:
            model.render(rendered(text, form, around))
        except (UnsupportedFeature, DataError):
            continue
        found.append(form)
    return found


def _number(seed: int, form: str, example: Example) -> int:
    """The two sides of a pair have the same: what stands around them is the same."""
    key = f"{seed}\0{form}\0{example.pair or example.text}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


Way = Callable[[Example, Material, random.Random, int], Example]


def _chat(example: Example, _around: Material, _draw: random.Random, _longest: int) -> Example:
    return example


def _system(example: Example, around: Material, draw: random.Random, _longest: int) -> Example:
    return replace(example, system=example.system or draw.choice(around.systems))


def _turns(example: Example, around: Material, draw: random.Random, _longest: int) -> Example:
    picked = draw.sample(list(around.exchanges), draw.choice((1, 1, 2, 3)))
    turns = [
        turn for asked, answered in picked for turn in (("user", asked), ("assistant", answered))
    ]
    return replace(example, turns=tuple(turns))


def _prefill(example: Example, around: Material, draw: random.Random, _longest: int) -> Example:
    return replace(example, prefill=draw.choice(around.prefills))


def _raw(example: Example, _around: Material, _draw: random.Random, _longest: int) -> Example:
    return replace(example, raw=True, system=None)


def _layout(example: Example, around: Material, draw: random.Random, _longest: int) -> Example:
    text = draw.choice(around.layouts)
    quoted = "\n".join(f"> {line}" for line in example.text.split("\n"))
    written = json.dumps(example.text, ensure_ascii=False)
    for place, content in (("json", written), ("quoted", quoted), ("request", example.text)):
        if f"{{{place}}}" in text:
            return replace(example, text=text.replace(f"{{{place}}}", content))
    raise KeyError("{request}")


def _long(where: str) -> Way:
    def way(example: Example, around: Material, draw: random.Random, longest: int) -> Example:
        size = math.exp(draw.uniform(math.log(SHORTEST), math.log(max(SHORTEST, longest))))
        text = page(around.pages, round(size), draw)
        at = {"start": 0, "end": len(text), "middle": _boundary(text, draw)}[where]
        parts = (text[:at].rstrip(), example.text, text[at:].lstrip())
        return replace(example, text=draw.choice(_BETWEEN).join(p for p in parts if p))

    return way


def page(pages: Sequence[str], size: int, draw: random.Random) -> str:
    """About so many characters of ordinary text: pages in a drawn order, cut behind a word."""
    text = ""
    for one in draw.sample(list(pages), len(pages)):
        text = f"{text}\n\n{one}" if text else one
        if len(text) >= size:
            break
    if len(text) <= size:
        return text
    cut = max(text.rfind(" ", 0, size), text.rfind("\n", 0, size))
    return text[: cut if cut > 0 else size].rstrip()


def _boundary(text: str, draw: random.Random) -> int:
    """A place in the inner half of a text behind a sentence or a line, where there is one; else
    behind a word."""
    low, high = len(text) // 4, 3 * len(text) // 4
    for marks in ((". ", "\n", "? ", "! "), (" ",)):
        places = [i + len(m) for m in marks for i in range(low, high) if text.startswith(m, i)]
        if places:
            return draw.choice(places)
    return draw.randrange(low, high + 1)


_WAYS: Final[Mapping[str, Way]] = {
    CHAT: _chat,
    "system": _system,
    "turns": _turns,
    "prefill": _prefill,
    "raw": _raw,
    "long_start": _long("start"),
    "long_middle": _long("middle"),
    "long_end": _long("end"),
    "layout": _layout,
}
