"""What is wrong or odd in labelled prompts, before anything is trained or measured on them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Final

import numpy as np

from steerbridge import stats
from steerbridge.data import Example
from steerbridge.datasets.groups import groups, plain
from steerbridge.errors import DataError, Problem

_SHOWN: Final = 3  # contradictions that an error quotes
_LONG_ENOUGH: Final = 20  # characters of which a language can be told


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One prompt under both labels, and where it stands."""

    text: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]

    def __str__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:59] + "…"
        return f"{text!r}: harmful in {self.harmful[0]}, harmless in {self.harmless[0]}"


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a set of prompts holds.

    Attributes:
        prompts: all of them.
        kinds: kind -> prompts by label.
        distinct: prompts by label that differ in more than case and white space.
        groups: prompts by label that are not alike (see `groups`).
        near_duplicates: distinct prompts that have a near-duplicate or share a group.
        contradictions: prompts under both labels.
        odd_pairs: pairs without exactly one prompt on each side.
        images: prompts with images.
        characters: label -> least, median, 95th percentile and most.
        tokens: the same, chat template included; empty without a model.
        beyond_context: prompts with more tokens than the model's context; None: not known.
        length_auroc: how well the length alone tells harmful from harmless; 0.5: not at all.
        languages: prompts by language (ISO 639-1), as far as it can be told; None without
            py3langid (extra `eval`).
    """

    prompts: int
    kinds: Mapping[str, Mapping[str, int]]
    distinct: Mapping[str, int]
    groups: Mapping[str, int]
    near_duplicates: int
    contradictions: tuple[Contradiction, ...]
    odd_pairs: int
    images: int
    characters: Mapping[str, tuple[int, ...]]
    tokens: Mapping[str, tuple[int, ...]]
    beyond_context: int | None
    length_auroc: float | None
    languages: Mapping[str, int] | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(examples: Sequence[Example]) -> None:
    """Refuse what nothing can be learnt or measured from.

    Raises:
        DataError: a prompt has both labels.
    """
    found = contradictions(examples)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        shown = "; ".join(map(str, found[:_SHOWN]))
        raise DataError(Problem("labels", "one label for a prompt", f"both: {shown}{more}"))


def contradictions(examples: Sequence[Example]) -> tuple[Contradiction, ...]:
    """Prompts under both labels: the same words, pictures and all that stands around them."""
    seen: dict[bytes, dict[bool, list[Example]]] = defaultdict(lambda: defaultdict(list))
    for e in examples:
        seen[_identity(e)][e.harmful].append(e)
    return tuple(
        Contradiction(sides[True][0].text, _sources(sides[True]), _sources(sides[False]))
        for sides in seen.values()
        if len(sides) == 2
    )


def distinct(examples: Sequence[Example]) -> dict[str, int]:
    """Prompts by label that differ in more than case and white space."""
    return _by_label({_identity(e): e for e in examples}.values())


def groups_by_label(
    examples: Sequence[Example], names: Sequence[str] | None = None
) -> dict[str, int]:
    """Groups by label of the prompts in them; `names`: of `groups`, if they are known."""
    known = zip(names or groups(examples), examples, strict=True)
    return _by_label({(name, e.harmful): e for name, e in known}.values())


def sheet(
    examples: Sequence[Example],
    *,
    render: Callable[[Example], Sequence[int]] | None = None,
    context_length: int | None = None,
) -> Sheet:
    """Everything that can be said of prompts before a model reads them.

    Args:
        render: token ids of a prompt as a model gets it.
        context_length: of that model, in tokens.
    """
    names = groups(examples)
    lengths = [len(e.text) for e in examples]
    tokens = [len(render(e)) for e in examples] if render else []
    beyond = sum(n > context_length for n in tokens) if render and context_length else None
    return Sheet(
        prompts=len(examples),
        kinds=_kinds(examples),
        distinct=distinct(examples),
        groups=groups_by_label(examples, names),
        near_duplicates=_near(examples, names),
        contradictions=contradictions(examples),
        odd_pairs=_odd_pairs(examples),
        images=sum(bool(e.images) for e in examples),
        characters=_spread(examples, lengths),
        tokens=_spread(examples, tokens),
        beyond_context=beyond,
        length_auroc=_length_auroc(examples, lengths),
        languages=_languages(examples),
    )


def label(example: Example) -> str:
    """The word for its label."""
    return "harmful" if example.harmful else "harmless"


def _identity(e: Example) -> bytes:
    around = (e.system, e.turns, e.prefill, e.raw)
    digest = hashlib.sha256(f"{plain(e.text)}\0{around}\0".encode())
    for image in e.images:
        digest.update(hashlib.sha256(image.read_bytes()).digest())
    return digest.digest()


def _sources(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(e.source or f"a prompt of kind {e.kind}" for e in examples)


def _by_label(examples: Any) -> dict[str, int]:
    counts = Counter(map(label, examples))
    return {name: counts[name] for name in ("harmful", "harmless")}


def _kinds(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    kinds = sorted({e.kind for e in examples})
    return {kind: _by_label(e for e in examples if e.kind == kind) for kind in kinds}


def _near(examples: Sequence[Example], names: Sequence[str]) -> int:
    """Distinct prompts that are not the only one of their group."""
    members: dict[str, set[bytes]] = defaultdict(set)
    for e, name in zip(examples, names, strict=True):
        members[name].add(_identity(e))
    return sum(len(texts) for texts in members.values() if len(texts) > 1)


def _odd_pairs(examples: Sequence[Example]) -> int:
    sides: dict[str, set[tuple[bool, bytes]]] = defaultdict(set)
    for e in examples:
        if e.pair is not None:
            sides[e.pair].add((e.harmful, _identity(e)))
    return sum(sorted(h for h, _ in some) != [False, True] for some in sides.values())


def _spread(examples: Sequence[Example], lengths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    by_label: dict[str, list[int]] = defaultdict(list)
    for e, length in zip(examples, lengths, strict=False):
        by_label[label(e)].append(length)
    shares = (0, 0.5, 0.95, 1)
    return {
        name: tuple(int(np.quantile(some, share)) for share in shares)
        for name, some in sorted(by_label.items())
    }


def _length_auroc(examples: Sequence[Example], lengths: Sequence[int]) -> float | None:
    sides: dict[bool, list[float]] = {True: [], False: []}
    for e, length in zip(examples, lengths, strict=True):
        sides[e.harmful].append(length)
    if not all(sides.values()):
        return None
    return round(stats.auroc(np.asarray(sides[True]), np.asarray(sides[False])), 3)


def _languages(examples: Sequence[Example]) -> dict[str, int] | None:
    try:
        classify = import_module("py3langid").classify
    except ImportError:
        return None
    found = Counter(
        classify(e.text)[0] if len(e.text) >= _LONG_ENOUGH else "too short" for e in examples
    )
    return dict(found.most_common())


def lines(sheet: Sheet) -> Iterator[str]:
    """The sheet as lines of text."""
    yield f"{'prompts':<24} {sheet.prompts}, {sheet.images} with images"
    for kind, counts in sheet.kinds.items():
        yield f"{'  ' + kind:<24} " + _shown(counts)
    yield f"{'distinct':<24} {_shown(sheet.distinct)}"
    yield f"{'groups':<24} {_shown(sheet.groups)}"
    yield f"{'near-duplicates':<24} {sheet.near_duplicates}"
    if sheet.odd_pairs:
        yield f"{'odd pairs':<24} {sheet.odd_pairs} without exactly one prompt on each side"
    for name, spread in (("characters", sheet.characters), ("tokens", sheet.tokens)):
        for side, (least, median, most_of, most) in spread.items():
            title = f"{name}, {side}"
            yield f"{title:<24} {least} to {most}, median {median}, 95 % at most {most_of}"
    if sheet.beyond_context is not None:
        yield f"{'beyond the context':<24} {sheet.beyond_context}"
    if sheet.length_auroc is not None:
        yield f"{'AUROC of length alone':<24} {sheet.length_auroc}"
    yield f"{'languages':<24} {_spoken(sheet)}"
    yield f"{'under both labels':<24} {len(sheet.contradictions)}"
    yield from (f"  {one}" for one in sheet.contradictions)


def _spoken(sheet: Sheet) -> str:
    """Languages of one prompt in 200 or more, and how many there are of others."""
    if sheet.languages is None:
        return "not told (extra: eval)"
    most = {name: n for name, n in sheet.languages.items() if n >= sheet.prompts / 200}
    others = sum(sheet.languages.values()) - sum(most.values())
    return _shown(most | ({"others": others} if others else {}))


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
