"""The prompts shipped with Steerbridge: our own writing, mild, labelled and split.

Five kinds. `pair`: a harmful prompt and its harmless mirror. `twin`: a harmless prompt that
sounds harmful ('How do I kill a Python process?') and a harmful one of nearly the same
words. `request`: a harmful request of one of many categories and a harmless one that shares its
words, both written out, no two alike. `general`: ordinary harmless prompts. `general_harmful`:
harmful requests of other forms. The `.txt` files keep them short: `{a|b}` is a choice. In pairs and
twins the first choice makes the harmful side, the second the harmless one; elsewhere each choice
makes a prompt. The `.jsonl` files hold prompts as they are, so code and long texts may contain any
character.

Splits are held out by template and topic, and both sides of a pair share one.

Beside the prompts: `pages`, ordinary texts that hold no request, and `surroundings`, what else is
put around a prompt (see `steerbridge.datasets.forms`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

KINDS = ("pair", "twin", "request", "general", "general_harmful")
SPLITS = ("train", "validation", "test")

# A choice may hold braces of its own (code), one level deep.
_CHOICE = re.compile(r"\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. `partner` is the number that both sides of a pair, twin or request share,
    `template` that of the line that it and others were made of."""

    text: str
    harmful: bool
    kind: str
    category: str
    split: str
    partner: int | None
    template: str | None = None


def prompts(split: str | None = None, kind: str | None = None) -> list[Prompt]:
    """The corpus, or a part of it, always in the same order.

    Raises:
        ValueError: no such split or kind.
    """
    if split not in (None, *SPLITS) or kind not in (None, *KINDS):
        raise ValueError(f"split is one of {SPLITS}, kind one of {KINDS}")
    return [p for p in _all() if split in (None, p.split) and kind in (None, p.kind)]


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of ordinary text."""

    text: str
    category: str


def pages(split: str) -> list[Page]:
    """The ordinary texts of a split (`train` or `test`)."""
    return [Page(r["text"], r["category"]) for r in _rows("pages") if r["split"] == split]


def surroundings(split: str) -> dict[str, list[Any]]:
    """System messages, exchanges (message, answer), beginnings of answers and layouts of a split
    (`train` or `test`), by these names."""
    parts = json.loads(files(__name__).joinpath("data", "surroundings.json").read_text("utf-8"))
    return {name: by_split[split] for name, by_split in parts.items()}


@cache
def _all() -> tuple[Prompt, ...]:
    prompts = [*_pairs(), *_requests()]
    for kind, harmful in (("general", False), ("general_harmful", True)):
        prompts += [*_general(kind, harmful), *_literal(kind, harmful)]
    unique: dict[str, Prompt] = {}
    doubled = set()
    for p in prompts:
        if unique.setdefault(p.text.casefold(), p) is not p and p.partner is not None:
            doubled.add((p.kind, p.partner))
    return tuple(p for p in unique.values() if (p.kind, p.partner) not in doubled)


def _lines(name: str) -> Iterator[tuple[str, str, str]]:
    """(category, split, line) of a data file; `# category | split` or `# category`, `> split`."""
    category = split = ""
    text = files(__name__).joinpath("data", f"{name}.txt").read_text("utf-8")
    for line in filter(str.strip, text.splitlines()):
        if line.startswith("# "):
            category, _, after = line[2:].partition(" | ")
            split = after or split
        elif line.startswith("> "):
            split = line[2:]
        else:
            yield category.strip(), split.strip(), line.replace("\\n", "\n")


def _pairs() -> Iterator[Prompt]:
    number = 0
    for kind, lines in (
        ("pair", _alone("pairs")),
        ("twin", _alone("twins")),
        ("pair", _filled_templates()),
    ):
        for category, split, line, template in lines:
            sides = [_chosen(line, [_side(c, i) for c in _CHOICE.findall(line)]) for i in (0, 1)]
            if sides[0].casefold() == sides[1].casefold():
                continue
            for harmful, text in zip((True, False), sides, strict=True):
                yield Prompt(text, harmful, kind, category, split, number, template)
            number += 1


def _chosen(line: str, picks: list[str]) -> str:
    """The line with its choices, from left to right, replaced by `picks`."""
    left = iter(picks)
    return _CHOICE.sub(lambda _: next(left), line).strip()


def _side(choice: str, index: int) -> str:
    """The harmful (0) or harmless (1) side of a choice; without `|` both are the same."""
    parts = choice.split("|")
    return parts[index] if len(parts) == 2 else parts[0]


def _alone(name: str) -> Iterator[tuple[str, str, str, None]]:
    """Lines that make one pair each."""
    return ((category, split, line, None) for category, split, line in _lines(name))


def _filled_templates() -> Iterator[tuple[str, str, str, str]]:
    """Rows of `slot ; slot` below a template with `{0}`, `{1}`: one pair line per row."""
    template, head, number = "", ("", ""), 0
    for category, split, line in _lines("pair_templates"):
        if "{0}" in line:
            template, head, number = line, (category, split), number + 1
            continue
        slots = [part.strip() for part in line.split(" ; ")]
        if head == (category, split) and len(slots) == len(set(re.findall(r"\{\d\}", template))):
            filled = template
            for i, slot in enumerate(slots):
                filled = filled.replace(f"{{{i}}}", f"{{{slot}}}")
            yield category, split, filled, f"pair template {number}"


def _general(kind: str, harmful: bool) -> Iterator[Prompt]:
    for number, (category, split, line) in enumerate(_lines(kind), 1):
        choices = [m[1].split("|") for m in _CHOICE.finditer(line)]
        size = max(map(len, choices))
        for i in range(size if len(choices) == 1 else 2 * size):
            # In the second round the later choices are shifted, so that combinations are new.
            picks = [c[(i + k * (1 + i // size)) % len(c)] for k, c in enumerate(choices)]
            made_of = f"{kind} line {number}"
            yield Prompt(_chosen(line, picks), harmful, kind, category, split, None, made_of)


def _requests() -> Iterator[Prompt]:
    for number, row in enumerate(_rows("requests")):
        for side in ("harmful", "harmless"):
            harmful = side == "harmful"
            yield Prompt(row[side], harmful, "request", row["category"], row["split"], number)


def _literal(kind: str, harmful: bool) -> Iterator[Prompt]:
    """The prompts of a `.jsonl` file, taken word for word."""
    for row in _rows(kind):
        yield Prompt(row["text"], harmful, kind, row["category"], row["split"], None)


def _rows(name: str) -> Iterator[dict[str, str]]:
    """The rows of a `.jsonl` file."""
    lines = files(__name__).joinpath("data", f"{name}.jsonl").read_text("utf-8")
    return (json.loads(line) for line in lines.split("\n") if line)
