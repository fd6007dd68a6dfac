"""What must be told of the requests of `make soak`, computed from their tokens alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import say
from steerbridge import SteeringPackage, reference
from steerbridge.reference import Verdict
from steerbridge.testing.model import EOS

TOLERANCE = 5e-4  # of scores, which are probabilities: floats in other orders of summation
States = Callable[[list[int]], Mapping[int, Any]]  # the states [T, width] of tokens, by depth


@dataclass
class Asked:
    """A request that was sent, and what came back.

    Attributes:
        left: the client went away: the server may have answered more than `answer`.
        verdicts: what the probes must say of the prompt alone.
        held: the prompt goes on in the middle of an answer to one that fired. It is more of that
            request: what fired stays fired, and nothing can be judged behind steered rows.
        repeats: the prompt is one that was asked and a part of its answer. It is that request.
    """

    tokens: list[int]
    answer: list[int] = field(default_factory=list)
    left: bool = False
    verdicts: Sequence[Verdict] = ()
    held: bool = False
    repeats: bool = False

    @property
    def spoken(self) -> list[int]:
        return [*self.tokens, *self.answer]

    @property
    def close(self) -> bool:
        """Whether rounding may decide."""
        return any(map(_near, self.verdicts))

    @property
    def fires(self) -> bool:
        return self.held or self.close or any(verdict.fired for verdict in self.verdicts)

    def may_follow(self, before: Asked) -> bool:
        """Whether the prompt is another one with at least one token of its answer behind."""
        size = len(before.tokens)
        first, known = self.tokens[size : size + 1], before.answer[:1]
        answers = first == known if known else before.left
        return bool(first) and answers and self.tokens[:size] == before.tokens

    def may_be_told(self, event: Mapping[str, Any]) -> bool:
        """Whether a verdict may be that of this request."""
        if self.held and event["fired"]:
            return True
        for found, verdict in zip(event["probes"], self.verdicts, strict=True):
            score = found["score"]
            if (score is None) != bool(verdict.unjudged):
                return False
            if score is not None and abs(score - verdict.score) > TOLERANCE:
                return False
            if found["fired"] != verdict.fired and not _near(verdict):
                return False
        return bool(event["fired"]) == any(found["fired"] for found in event["probes"])


def _near(verdict: Verdict) -> bool:
    return abs(verdict.score - verdict.threshold) <= TOLERANCE  # never of an unjudged one


def compare(
    package: SteeringPackage,
    states: States,
    requests: Mapping[int, Sequence[Asked]],
    events: Iterable[Mapping[str, Any]],
) -> Counter[str]:
    """The verdicts of a server against those that its requests must have.

    Args:
        requests: of each slot, in order.
        events: all that the server's guard told.

    Returns:
        The number of requests by what is true of them: `told`, `fired`, `held`, `close` (to a
        threshold), `wrong` and `missing`.
    """
    _foresee(package, states, [asked for slot in requests.values() for asked in slot])
    counts: Counter[str] = Counter()
    verdicts = [event for event in events if event["event"] == "verdict"]
    for slot, asked in requests.items():
        mine = [event for event in verdicts if event["sequence"] == slot]
        given = _given(asked, mine)
        counts["wrong"] += len(mine) - sum(event is not None for event in given)
        for request, event in zip(asked, given, strict=True):
            if event is None:
                counts["missing"] += bool(request.answer) and not request.repeats
                continue
            counts["told"] += 1
            counts["fired"] += bool(event["fired"])
            counts["held"] += request.held
            counts["close"] += request.close
            if not request.may_be_told(event):
                counts["wrong"] += 1
                say(f"{request.tokens}: expected {request.verdicts}, found {event}")
    return counts


def _foresee(package: SteeringPackage, states: States, requests: Sequence[Asked]) -> None:
    spec = package.spec
    by_prompt: dict[tuple[int, ...], list[Asked]] = {}
    for asked in requests:
        found = states(asked.tokens)
        asked.verdicts = [
            reference.judge(probe, package.tensors, lambda site, rows=found: rows[spec.depth(site)])
            for probe in spec.probes
        ]
        by_prompt.setdefault(tuple(asked.tokens), []).append(asked)
    # llama-server's store of prompts gives one slot the rows of another.
    before = {id(asked): _before(asked, by_prompt) for asked in requests}
    for asked in requests:
        size = len(asked.tokens)
        asked.repeats = any(b.spoken[:size] == asked.tokens for b in before[id(asked)])
    more = True
    while more:  # one that is held holds others
        more = False
        for asked in requests:
            behind = (b for b in before[id(asked)] if EOS not in asked.tokens[len(b.tokens) : -1])
            if not asked.held and any(b.fires for b in behind):
                asked.held = more = True


def _before(asked: Asked, by_prompt: Mapping[tuple[int, ...], Sequence[Asked]]) -> list[Asked]:
    """The requests of which this may be a continuation."""
    starts = (tuple(asked.tokens[:size]) for size in range(1, len(asked.tokens)))
    candidates = (before for start in starts for before in by_prompt.get(start, ()))
    return [before for before in candidates if asked.may_follow(before)]


def _given(
    asked: Sequence[Asked], events: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any] | None]:
    """The verdicts of a slot, in order, given to its requests so that the fewest are wrong.

    A request whose client left before a token came may have none.
    """
    # The cost of the first requests with the first `j` events, and whether the last one has one.
    costs: list[dict[int, tuple[int, bool]]] = [{0: (0, False)}]
    for request in asked:
        must = request.answer and not request.repeats
        row: dict[int, tuple[int, bool]] = {}
        for j, (cost, _) in costs[-1].items():
            without = cost + bool(must)
            if j not in row or without < row[j][0]:
                row[j] = (without, False)
            if j < len(events):
                row[j + 1] = (cost + (not request.may_be_told(events[j])), True)
        lowest = min(cost for cost, _ in row.values())
        costs.append({j: entry for j, entry in row.items() if entry[0] <= lowest + 20})
    j = min(costs[-1], key=lambda j: costs[-1][j][0] + len(events) - j)
    given: list[Mapping[str, Any] | None] = []
    for row in reversed(costs[1:]):
        has = row[j][1]
        j -= has
        given.append(events[j] if has else None)
    return given[::-1]
