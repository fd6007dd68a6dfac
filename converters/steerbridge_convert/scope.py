"""Where, on which tokens and how strongly the vectors of a file act.

A file of repeng, IBM, AISteer360 or EasySteer holds a vector for every layer. Which of them act,
where and how strongly is said by the program that uses it, so it is asked for; `LIKES` names what
the examples of some tools do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from steerbridge.errors import InvalidOption
from steerbridge.format import Answers, Option, block, finite, one_of

Position = Literal["all_positions", "from_prompt_end"]
ALL: Final = "all"


def _layers(text: str) -> tuple[int, ...] | Literal["all"]:
    """`all`, or numbers and ranges: 10,12-15."""
    if text.strip() == ALL:
        return ALL
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        start, end = block(first), block(last) if dash else block(first)
        if end < start or end - start > 1 << 16:
            raise ValueError(f"the range {part} is none")
        chosen += range(start, end + 1)
    if len(set(chosen)) != len(chosen):
        raise ValueError("a layer is named twice")
    return tuple(chosen)


def _strength(text: str) -> float | dict[int, float]:
    """One number, or LAYER:NUMBER for each layer."""
    if ":" not in text:
        return finite(text)
    pairs = [part.partition(":") for part in text.split(",")]
    by_layer = {block(layer): finite(value) for layer, _, value in pairs}
    if len(by_layer) != len(pairs):
        raise ValueError("a layer is named twice")
    return by_layer


LAYERS: Final = Option(
    "layers", _layers, "which of the file's layers act: numbers and ranges (10,12-15), or `all`"
)
POSITIONS: Final = Option(
    "positions",
    one_of("all_positions", "from_prompt_end"),
    "which tokens change: all_positions, or from_prompt_end on",
)
STRENGTH: Final = Option(
    "strength",
    _strength,
    "factor of the vectors: one number (1 = as stored), or LAYER:NUMBER,... for each layer",
)


@dataclass(frozen=True, slots=True)
class Like:
    """What the example of a tool does; `layers` may depend on how many blocks the model has."""

    source: str
    layers: Callable[[int], tuple[int, ...] | Literal["all"]]
    strength: float
    positions: Position = "all_positions"


LIKES: Final[Mapping[str, Like]] = {
    "llama.cpp": Like("`--control-vector FILE`", lambda _: ALL, 1.0),
    "repeng": Like("its README", lambda n: tuple(range(n - 17, n - 4)), 1.0),
    "steering-vectors": Like("`apply(model)` of its README", lambda _: ALL, 1.0),
    "ibm-quickstart": Like("docs/quickstart.md", lambda _: tuple(range(15, 24)), 1.5),
    "ibm-paper": Like("arXiv 2409.05907, appendix C", lambda _: tuple(range(10, 16)), 0.1),
}
LIKE: Final = Option(
    "like",
    one_of("", *LIKES),
    f"layers, positions and strength of a tool's example: {', '.join(LIKES)}",
    "",
)
ACT: Final = Option(
    "act",
    one_of("add", "project_out"),
    "add: the vectors are added; project_out: their directions are taken out (strength 1: wholly)",
)
OPTIONS: Final = (LAYERS, POSITIONS, STRENGTH, LIKE)
WHOLE: Final[Mapping[str, str]] = {  # all that a file holds, as it is stored
    LAYERS.name: ALL,
    POSITIONS.name: "all_positions",
    STRENGTH.name: "1",
}


@dataclass(frozen=True, slots=True)
class Scope:
    """The strength of every layer that acts, by its number in the file, and the tokens."""

    strengths: Mapping[int, float]
    position: Position


def scope(answers: Answers, there: Collection[int]) -> Scope:
    """What was asked for, of the layers that a file has.

    Raises:
        MissingOption: the user did not say it.
        InvalidOption: it names a layer that the file does not have, or no strength for one.
    """
    chosen, position, strength = _said(answers)
    layers = sorted(there) if chosen == ALL else chosen
    if missing := sorted(set(layers) - set(there)):
        raise InvalidOption(
            answers.format, LAYERS.name, f"layers {missing[:8]}: the file has {sorted(there)[:80]}"
        )
    if not isinstance(strength, dict):
        return Scope(dict.fromkeys(layers, strength), position)
    if set(strength) != set(layers):
        want = f"a number for each of the layers {sorted(layers)}"
        raise InvalidOption(answers.format, STRENGTH.name, f"{want}, found {sorted(strength)}")
    return Scope({k: strength[k] for k in layers}, position)


def _said(answers: Answers) -> tuple[Any, Position, Any]:
    """Layers, position and strength: the user's, or those of the example that was named."""
    like = LIKES.get(answers.get(LIKE))
    said: list[Any] = []
    for option in (LAYERS, POSITIONS, STRENGTH):
        if like is None or option.name in answers.values:
            said.append(answers.get(option))
        elif option is LAYERS:
            said.append(like.layers(answers.base_model().num_layers))
        else:
            said.append(getattr(like, option.name))
    return said[0], said[1], said[2]
