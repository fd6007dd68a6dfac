"""Verdicts, answers and rows of an evaluation that a test writes itself; and the demo guard."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from steerbridge.data import Example
from steerbridge.evaluation import judges
from steerbridge.evaluation.measure import Row
from steerbridge.reference import Verdict
from steerbridge.runtime import Generation, Outcome

GUARD = Path(__file__).parent.parent / "plugins" / "steerbridge_serve" / "demo.gguf"
REFUSAL = "I'm sorry, but I can't assist with that."
NEW = 16  # tokens of an answer


def verdict(score: float, threshold: float = 0.5) -> Verdict:
    fired = not math.isfinite(score) or score > threshold
    return Verdict("p", score, threshold, ">", fired)


def answer(text: str, *tokens: int, score: float | None = None) -> Generation:
    """An answer; steered, with this score of its one probe, unless the score is None."""
    outcome = None
    if score is not None:
        one = verdict(score)
        outcome = Outcome((one,), ("r",) if one.fired else ())
    return Generation(text, tokens, "stop", outcome)


def row(
    harmful: bool,
    plain: Generation | None,
    steered: Generation,
    kind: str = "general",
    pair: str | None = None,
) -> Row:
    """A prompt with its answers, judged by the matcher."""
    refused = judges.Matcher()([""] * 2, [plain.text if plain else "", steered.text])
    before = refused[0] if plain else None
    text = hashlib.sha256(f"{plain}{steered}".encode()).hexdigest()  # like no other row's
    example = Example(text, harmful, kind, pair)
    return Row(example, plain, steered, before, refused[1])
