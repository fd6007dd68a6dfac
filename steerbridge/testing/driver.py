"""What the conformance kit needs of a runtime: a driver, which sends requests and reads answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from steerbridge.package import SteeringPackage
from steerbridge.runtime import Outcome
from steerbridge.testing.model import Float32, TinyModel


class Ability(StrEnum):
    """What a runtime can do, beyond answering one prompt after another.

    A shape that needs an ability which a driver does not have is `absent` for it.
    """

    BATCH = "several prompts in one batch"
    PADDING = "padding on a chosen side"
    CONVERSATION = "prompts that go on from a kept cache"
    UNENDED = "turns behind an answer that no token ends, told from more of the answer"
    SEQUENCES = "several conversations on one cache"
    CANCEL = "answers that are given up"
    STREAM = "answers token by token"
    SAMPLING = "sampling"
    SAMPLES = "several answers to one prompt"
    BEAMS = "beam search"
    THREADS = "requests from several threads or clients"
    NGRAM_DRAFTS = "drafts from n-grams"
    MODEL_DRAFTS = "drafts from a smaller model"
    LOGITS = "logits that the driver can read"
    PICTURES = "prompts with pictures"
    TEMPLATE = "a chat template that the runtime reads"
    BREAK = "a hook that the driver can remove"
    RESTART = "a restart with the same package"


@dataclass(frozen=True, slots=True)
class How:
    """How prompts are asked; what is not set is the runtime's ordinary way."""

    padding: Literal["", "left", "right"] = ""
    keep: bool = False  # go on from the cache that is there, where the runtime leaves a choice
    sequence: int = 0  # which conversation, where there are several
    cancel_after: int = 0  # give up after so many tokens; 0: not
    stream: bool = False
    temperature: float = 0.0
    samples: int = 1
    beams: int = 1
    threads: bool = False  # every prompt from a thread of its own
    drafts: Literal["", "ngram", "model"] = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one answer. None: this runtime does not tell it.

    Args:
        tokens: ids of the answer.
        outcome: verdicts and rules.
        logits: of the first token [V], as the program received them.
    """

    tokens: tuple[int, ...] | None
    outcome: Outcome | None
    logits: Float32 | None = None


@dataclass(frozen=True)
class Files:
    """A tiny model as files, written when they are first asked for."""

    model: TinyModel
    folder: Path

    @cached_property
    def transformers(self) -> Path:
        """A folder that transformers loads."""
        path = self.folder / "transformers"
        return path if path.is_dir() else self.model.save_folder(path)

    @cached_property
    def gguf(self) -> Path:
        """A GGUF file in F32."""
        path = self.folder / "tiny.gguf"
        return path if path.is_file() else self.model.save_gguf(path)

    @cached_property
    def mmproj(self) -> Path | None:
        """A GGUF file of the vision tower, in F32; None for a model without one."""
        if self.model.tower is None:
            return None
        path = self.folder / "mmproj-tiny.gguf"
        return path if path.is_file() else self.model.save_mmproj(path)


class Running(Protocol):
    """A model that was opened with a package, or without one."""

    def ask(self, prompts: Sequence[str], new: int, how: How) -> Sequence[Reply]:
        """Answer prompts greedily (unless `how` says otherwise), with at most `new` tokens each.

        One reply per prompt in order, or `how.samples` replies per prompt side by side. A prompt is
        used as it is, without a chat template. For `how.cancel_after` the replies hold the tokens
        that came.

        Raises:
            SteerbridgeError: the runtime refuses, and no token was returned.
        """
        ...

    def break_hook(self) -> None:
        """Remove the hook by which the guard acts, behind its back (ability BREAK)."""
        ...


class Driver(Protocol):
    """A runtime under test.

    Args:
        name: how results are listed, such as `transformers`.
        against: `real`, or `simulator` where a stand-in takes the place of the runtime.
        abilities: what it can do.
        batch: rows that the runtime evaluates at once; prompts around it are tried.
        context: rows of prompt and answer together; a longer prompt must be refused.
        tolerance: of scores and logits, relative above 1.
        margin: a token is compared if its best logit is so far from the second.
        tells_the_end: whether outcomes are those of the whole answer; else they are those of the
            moment when rules were decided last.
        kept_open: guarded models that stay open between shapes, where opening one takes long; with
            0 every shape opens its own.
    """

    name: str
    against: Literal["real", "simulator"]
    abilities: frozenset[Ability]
    batch: int
    context: int
    tolerance: float
    margin: float
    tells_the_end: bool
    kept_open: int

    def open(
        self, files: Files, package: SteeringPackage | None
    ) -> AbstractContextManager[Running]:
        """Open the model, with the package attached unless it is None.

        Raises:
            SteerbridgeError: the package is refused.
        """
        ...
