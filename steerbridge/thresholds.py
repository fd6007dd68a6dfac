"""Thresholds from scores: how many harmless prompts may fire, and where a threshold stands.

A threshold never stands on a score: another runtime computes the same prompt a little otherwise,
and it would fire again. It stands in the middle of a gap between two scores, in log-odds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from steerbridge.errors import DataError, Problem

Scores = NDArray[np.float64]

_ALONE: Final = 1.0  # log-odds above the highest score, where there is none above


def allowed(
    counts: Mapping[str, int],
    target: Mapping[str, float],
    confidence: float | None = None,
    chosen: int = 1,
) -> dict[str, int]:
    """How many harmless prompts of each kind may fire.

    Without a confidence: floor(target n) of n. With one: the most such that, whatever the true
    rate, it is above the target with a probability of at most 1 - confidence over the choice of the
    prompts. For k of n that is the binomial tail P(at most k of n at the target) (Vovk 2012,
    "Conditional validity of inductive conformal predictors", proposition 2a); for 1 % with 95 %
    confidence it takes 299 prompts of which none fires. Several thresholds that are chosen on the
    same prompts take more of them (Campi and Garatti 2011, "A sampling-and-discarding approach to
    chance-constrained optimization", theorem 2.1).

    Args:
        counts: kind -> prompts. They must be drawn as those that will come are, and independent.
        target: kind -> largest rate; `*` is that of kinds that are not named.
        chosen: so many thresholds; a prompt fires by any.

    Raises:
        DataError: too few prompts of a kind for this confidence; names how many it takes.
    """
    result = {}
    for kind, count in counts.items():
        rate = target.get(kind, target["*"])
        if confidence is None:
            result[kind] = int(rate * count)
            continue
        most = _most(count, rate, 1 - confidence, chosen)
        if most is None:
            want = f"{needed(rate, confidence, chosen)} or more harmless prompts for a "
            want += f"false-positive rate of {rate:g} with a confidence of {confidence:g}"
            raise DataError(Problem(f"prompts of kind {kind}", want, str(count)))
        result[kind] = most
    return result


def needed(rate: float, confidence: float, chosen: int = 1) -> int:
    """The fewest harmless prompts of which none may fire, so that the rate holds."""
    if rate <= 0:
        raise DataError(Problem("false-positive rate", "above 0 with a confidence", f"{rate:g}"))
    count = math.ceil(math.log1p(-confidence) / math.log1p(-rate))
    while chosen > 1 and sum(itertools.islice(_terms(count, rate), chosen)) > 1 - confidence:
        count += 1
    return count


def _most(count: int, rate: float, error: float, chosen: int) -> int | None:
    """The largest k with P(Binomial(count, rate) <= k) <= error; None if not even 0. Of several
    thresholds the tail is longer, and counts as often as k prompts may be left out."""
    if not 0 < rate < 1 or count < needed(rate, 1 - error, chosen):
        return None
    most, more = 0, chosen - 1
    tails = itertools.accumulate(_terms(count, rate))
    for k, tail in enumerate(itertools.islice(tails, more + 1, None), 1):
        if math.comb(k + more, more) * tail > error:
            break
        most = k
    return most


def _terms(count: int, rate: float) -> Iterator[float]:
    """P(Binomial(count, rate) = k) for k from 0 on."""
    for k in range(count + 1):
        log_choose = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        yield math.exp(log_choose + k * math.log(rate) + (count - k) * math.log1p(-rate))


def choose(
    harmless: Mapping[str, Scores], fire: Mapping[str, int], harmful: Iterable[Scores] = ()
) -> float:
    """The lowest threshold (what is above it fires) that lets no more of any kind fire.

    It stands in the middle of the gap to the next score, harmless or harmful. Where nearly all
    harmful prompts lie higher still, it stands in the middle of that gap: the gap ends where 1 % of
    the harmful prompts of some kind lie below.

    Args:
        harmless: kind -> scores in log-odds.
        fire: kind -> how many of them may fire (`allowed`), fewer than there are.
        harmful: scores of harmful prompts, by kind.
    """
    limit = max(np.sort(s)[len(s) - 1 - fire[kind]] for kind, s in harmless.items())
    caught = list(harmful)
    above = [s[s > limit] for s in (*harmless.values(), *caught)]
    nearest = min((float(s.min()) for s in above if s.size), default=limit + _ALONE)
    edges = [float(np.quantile(s, 0.01)) for s in caught if s.size]
    return float(max((limit + nearest) / 2, (limit + min(edges, default=-math.inf)) / 2))
