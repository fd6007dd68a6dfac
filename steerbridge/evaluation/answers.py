"""Answers of several sources to the same prompts, kept on disk so that a run can go on.

A source is a model as it is, with a package, or with a system message; comparing sources is what
evaluation does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from steerbridge import data
from steerbridge.atomic import replacing
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation.judges import Judge, Matcher, refusals
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Answering, Generation, Outcome, Progress, silent

# Prompts that are asked, and kept, together. Whatever source answers, a prompt has the same
# neighbours, so that answers of two sources differ by what the sources do alone.
TOGETHER: Final = 128


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of answers. `identity` says which model in which runtime gave them; a source that
    is another one has an identity of its own."""

    folder: Path
    identity: str

    def path(self, source: Source, prompts: Sequence[Example], max_new_tokens: int) -> Path:
        """The file for these prompts; anything that may change an answer changes its name."""
        package = source.package
        key = {
            "identity": [self.identity, source.identity],
            "package": None if package is None else package.sha256,
            "system": source.system,
            "ignore": sorted(source.ignore),
            "max_new_tokens": max_new_tokens,
            "prompts": data.sha256(prompts),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"


@dataclass(frozen=True, slots=True)
class Source:
    """What answers: a model as it is, with a package, or with a system message before prompts.

    `identity` distinguishes sources that are otherwise equal, such as two servers.
    """

    name: str
    model: Answering
    package: SteeringPackage | None = None
    system: str | None = None
    ignore: tuple[str, ...] = ()
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Asking:
    """How prompts are asked and answers judged.

    Args:
        store: where answers are kept and found again; None: nowhere.
        progress: told how many prompts each source has answered.
    """

    max_new_tokens: int = 48
    judge: Judge = field(default_factory=Matcher)
    store: Store | None = None
    progress: Progress = silent

    def answers(self, source: Source, prompts: Sequence[Example]) -> list[Generation]:
        """The source's greedy answers, in order; those that are kept are not asked again.

        Raises:
            DataError: a kept file that is broken.
        """
        answers: list[Generation] = []
        for start in range(0, len(prompts), TOGETHER):
            part = prompts[start : start + TOGETHER]
            answers += self._part(source, part, start, len(prompts))
        return answers

    def _part(
        self, source: Source, part: Sequence[Example], start: int, total: int
    ) -> list[Generation]:
        path = self.store and self.store.path(source, part, self.max_new_tokens)
        if path and path.is_file():
            self.progress(source.name, start + len(part), total)
            return _read(path, len(part))
        asked = part
        if source.system is not None:
            asked = [replace(prompt, system=source.system) for prompt in part]
        answers = source.model.generate(
            asked,
            source.package,
            max_new_tokens=self.max_new_tokens,
            ignore=source.ignore,
            progress=lambda _, done, __: self.progress(source.name, start + done, total),
        )
        if path:
            with replacing(path) as fresh:
                fresh.write_text(json.dumps([_to_json(answer) for answer in answers]), "utf-8")
        return answers

    def refusals(self, prompts: Sequence[Example], answers: Sequence[Generation]) -> list[bool]:
        """Whether each answer refuses, as the server or the judge says."""
        return refusals(self.judge, [p.text for p in prompts], answers)


def same(a: Generation, b: Generation) -> bool:
    """Whether two answers are the same: token by token, or in words where tokens are unknown."""
    if a.tokens and b.tokens:
        return a.tokens == b.tokens
    return a.text == b.text


def _to_json(answer: Generation) -> dict[str, Any]:
    outcome = answer.outcome
    return {**asdict(answer), "outcome": None if outcome is None else outcome.to_json()}


def _read(path: Path, count: int) -> list[Generation]:
    try:
        answers = [
            Generation(
                answer["text"],
                tuple(answer["tokens"]),
                answer["finish"],
                None if answer["outcome"] is None else Outcome.from_json(answer["outcome"]),
            )
            for answer in json.loads(path.read_bytes())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(Problem("file", "kept answers", repr(error)), path) from error
    if len(answers) != count:
        raise DataError(Problem("file", f"{count} answers", str(len(answers))), path)
    return answers
