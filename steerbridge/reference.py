"""The numpy oracle: what every runtime must compute, as pure functions over arrays.

Arithmetic is float64 on the stored float32 values, so a float32 runtime differs from it by
its own rounding only.

Shapes: N requests, T tokens of one request, D hidden size, K readings, R rank.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steerbridge.package import SteeringPackage
from steerbridge.running import Window, running_scores
from steerbridge.spec import (
    AddVector,
    ConstantStrength,
    CosineProbe,
    DenseMatrix,
    HeadInput,
    HeadMatrix,
    ImageMean,
    Intervention,
    LayerInput,
    LayerOutput,
    LinearProbe,
    MlpProbe,
    Probe,
    ProjectOut,
    PromptEnd,
    PromptMean,
    Reading,
    Rule,
    Say,
    Sigmoid,
    Softmax,
    SteeringSpec,
    TokenReading,
    sites,
)
from steerbridge.tensors import Tensor

Float64 = NDArray[np.float64]
Tensors = Mapping[str, Tensor]
AnySite = LayerInput | LayerOutput | HeadInput


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one probe said about one request.

    Attributes:
        score: NaN if the probe could not be judged, or while its scope has no rows.
        unjudged: why the probe could not be judged; it then counts as fired.
        fired_in: where it fired; empty if it did not.
        row: of a token reading: the row at which it fired, from the first of the sequence on.
    """

    probe: str
    score: float
    threshold: float
    comparator: str
    fired: bool
    unjudged: str = ""
    fired_in: Literal["", "prompt", "answer"] = ""
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """An intervention that a rule switched on, and how strongly it acts."""

    rule: str
    intervention: HeadMatrix | AddVector | ProjectOut | Say
    strength: float


# ---------------------------------------------------------------- probes


def read(
    reading: Reading,
    hidden_TD: NDArray[np.floating],
    image_rows_T: NDArray[np.bool_] | None = None,
) -> Float64 | None:
    """The vector [D] a reading takes from the hidden states of one prompt (no padding rows).

    None for `image_mean` of a prompt without image rows.

    Raises:
        IndexError: the prompt is shorter than the reading's offset asks for.
    """
    hidden = np.asarray(hidden_TD, np.float64)
    match reading.position:
        case PromptEnd(offset=offset):
            if len(hidden) + offset < 1:
                raise IndexError(f"a prompt of {len(hidden)} tokens has no {reading}")
            return np.asarray(hidden[len(hidden) - 1 + offset])
        case PromptMean():
            return np.asarray(hidden.mean(axis=0))
    if image_rows_T is None or not image_rows_T.any():
        return None
    return np.asarray(hidden[image_rows_T].mean(axis=0))


def probe_input(
    probe: Probe,
    tensors: Tensors,
    hidden_at: Callable[[AnySite], NDArray[np.floating]],
    image_rows_T: NDArray[np.bool_] | None = None,
) -> Float64:
    """The concatenated readings [K*D] of a probe; `hidden_at(site)` gives [T, D].

    A missing image takes the probe's input mean, so that it is zero after standardisation.
    """
    parts = []
    for k, reading in enumerate(probe.readings):
        hidden = hidden_at(reading.site)
        vector = read(reading, hidden, image_rows_T)
        if vector is None:
            vector = _absent(probe, tensors, k, hidden.shape[1])
        parts.append(vector)
    return np.concatenate(parts)


def standardise(probe: Probe, tensors: Tensors, x_NI: ArrayLike) -> Float64:
    """(x - mean) / scale for inputs [N, I] (or [I]) as [N, I]."""
    x = np.array(x_NI, np.float64, ndmin=2)
    if probe.input_mean is not None:
        x -= tensors[probe.input_mean].float32()
    if probe.input_scale is not None:
        x /= tensors[probe.input_scale].float32()
    return x


def score(probe: Probe, tensors: Tensors, x_NI: ArrayLike) -> Float64:
    """Scores [N] of probe inputs [N, I] (or [I]), I = K * D, before standardisation."""
    with np.errstate(all="ignore"):  # NaN and infinity are results here: they fire
        return squash(probe, logits(probe, tensors, x_NI))


def logits(probe: Probe, tensors: Tensors, x_NI: ArrayLike) -> Float64:
    """What a probe computes [N, C] before it is squashed: a value per class, or one value."""
    x = standardise(probe, tensors, x_NI)
    with np.errstate(all="ignore"):
        match probe:
            case LinearProbe():
                weight = tensors[probe.weight].float32().astype(np.float64)
                return np.asarray(x @ weight + probe.bias)[:, None]
            case CosineProbe():
                return _cosine(probe, tensors, x)[:, None]
            case MlpProbe():
                return _mlp(probe, tensors, x)


def squash(probe: Probe, logits_NC: Float64) -> Float64:
    """Scores [N] from logits [N, C]."""
    y = logits_NC
    match probe:
        case LinearProbe(link="sigmoid"):
            return _sigmoid(y[:, 0])
        case MlpProbe(output=Softmax(classes=classes, harmful=harmful)):
            exp = np.exp(y - y.max(axis=1, keepdims=True))
            chosen: Float64 = exp[:, classes.index(harmful)]
            return np.asarray(chosen / exp.sum(axis=1))
        case MlpProbe():
            assert not isinstance(probe.output, Softmax)
            high = _sigmoid(y[:, 0])
            return high if probe.output.harmful_when == "high" else 1 - high
    return y[:, 0]


def odds(probe: Probe, scores: ArrayLike) -> Float64:
    """Scores as log-odds where they are probabilities, else as they are."""
    values = np.asarray(scores, np.float64)
    if not _is_probability(probe):
        return values
    inside = np.clip(values, 1e-300, 1 - 2**-53)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def score_at(probe: Probe, odds: float) -> float:
    """The score of these log-odds: what `odds` takes back."""
    return float(_sigmoid(np.asarray(odds))) if _is_probability(probe) else odds


def _is_probability(probe: Probe) -> bool:
    return isinstance(probe, MlpProbe) or getattr(probe, "link", "") == "sigmoid"


def score_readings(probe: Probe, tensors: Tensors, readings_NKD: ArrayLike) -> Float64:
    """Scores [N] of captured readings [N, K, D]; an `image_mean` that is NaN is a missing image."""
    x = np.array(readings_NKD, np.float64)
    for k, reading in enumerate(probe.readings):
        if isinstance(reading.position, ImageMean):
            missing = np.isnan(x[:, k]).all(axis=1)
            x[missing, k] = _absent(probe, tensors, k, x.shape[2])
    return score(probe, tensors, x.reshape(len(x), -1))


def _absent(probe: Probe, tensors: Tensors, index: int, width: int) -> Float64:
    """What stands for reading `index` where there is no image: the probe's input mean."""
    if probe.input_mean is None:
        return np.zeros(width)
    mean = tensors[probe.input_mean].float32()
    return np.asarray(mean[index * width : (index + 1) * width], np.float64)


def _cosine(probe: CosineProbe, tensors: Tensors, x: Float64) -> Float64:
    """CAST (arXiv 2409.05907, eq. 4): cos(x, tanh(P x)), P = c c^T / (c . c); 0 for zeros."""
    c = tensors[probe.direction].float32().astype(np.float64)
    projected = np.outer(x @ c / (c @ c), c)
    if probe.squash == "tanh":
        projected = np.tanh(projected)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(projected, axis=1)
    dots = np.einsum("ni,ni->n", x, projected)
    fallback = np.where(norms == 0, 0.0, norms + dots)  # keeps NaN and infinity
    return np.asarray(np.divide(dots, norms, out=fallback, where=norms > 0))


_erf = np.frompyfunc(math.erf, 1, 1)

_ACTIVATIONS: Mapping[str, Callable[[Float64], Float64]] = {
    "relu": lambda y: np.maximum(y, 0),  # keeps NaN
    "tanh": np.tanh,
    "gelu": lambda y: 0.5 * y * (1 + np.asarray(_erf(y / math.sqrt(2)), np.float64)),
}


def _mlp(probe: MlpProbe, tensors: Tensors, x: Float64) -> Float64:
    for i, layer in enumerate(probe.layers):
        if i:
            x = _ACTIVATIONS[probe.activation](x)
        weight = tensors[layer.weight].float32().astype(np.float64)
        x = x @ weight.T + tensors[layer.bias].float32()
    return x


def _sigmoid(y: Float64) -> Float64:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * y)))


_COMPARE: Final[Mapping[str, Callable[[Any, float], Any]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


def fires(probe: Probe, scores: ArrayLike) -> NDArray[np.bool_]:
    """Whether each score fires; a non-finite score always does (fail closed)."""
    values = np.asarray(scores, np.float64)
    crosses = _COMPARE[probe.comparator](values, probe.threshold)
    result: NDArray[np.bool_] = ~np.isfinite(values) | crosses
    return result


def fires_at(probe: Probe, score: float) -> bool:
    """The same for one score, without arrays."""
    crosses: bool = _COMPARE[probe.comparator](score, probe.threshold)
    return crosses or not math.isfinite(score)


def verdict(probe: Probe, value: float) -> Verdict:
    """Compare one score with the probe's threshold; a score that is not finite is unjudged."""
    if not math.isfinite(value):
        return unjudged(probe, NOT_FINITE)
    fired = fires_at(probe, value)
    return Verdict(
        probe.id,
        float(value),
        probe.threshold,
        probe.comparator,
        fired,
        fired_in="prompt" if fired else "",
    )


def unjudged(probe: Probe, reason: str) -> Verdict:
    """The verdict of a probe that could not judge the prompt: it counts as fired."""
    return Verdict(
        probe.id, math.nan, probe.threshold, probe.comparator, True, reason, fired_in="prompt"
    )


NOT_FINITE: Final = "its states or logits are not finite"
TOO_SHORT: Final = "the prompt is shorter than its reading needs"


def judge(
    probe: Probe,
    tensors: Tensors,
    hidden_at: Callable[[AnySite], NDArray[np.floating]],
    image_rows_T: NDArray[np.bool_] | None = None,
) -> Verdict:
    """The verdict of a probe on one prompt; `hidden_at(site)` gives its states [T, D].

    Finiteness is tested on the states that are read and on the logits, because squashing hides
    an infinite one.
    """
    try:
        x = probe_input(probe, tensors, hidden_at, image_rows_T)
    except IndexError:
        return unjudged(probe, TOO_SHORT)
    return verdict_of(probe, tensors, x)


def verdict_of(probe: Probe, tensors: Tensors, x_I: ArrayLike) -> Verdict:
    """The verdict of a probe on its input [I], before standardisation."""
    outputs = logits(probe, tensors, x_I)
    if not (np.isfinite(np.asarray(x_I, np.float64)).all() and np.isfinite(outputs).all()):
        return unjudged(probe, NOT_FINITE)
    with np.errstate(all="ignore"):
        return verdict(probe, float(squash(probe, outputs)[0]))


def verdicts(package: SteeringPackage, inputs: Mapping[str, ArrayLike]) -> tuple[Verdict, ...]:
    """Verdicts of all probes of a package on one request's inputs (probe id -> [I])."""
    return tuple(
        verdict_of(probe, package.tensors, inputs[probe.id]) for probe in package.spec.probes
    )


# ---------------------------------------------------------------- readings over tokens


def window(reading: TokenReading) -> Window:
    """Which rows a token reading counts, and over how many a running score is the mean."""
    return Window(reading.window, reading.skip, reading.scope)


def counted(
    reading: TokenReading, rows: int, image_rows_T: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Which of the first rows [T] of a sequence are of the reading's kind."""
    images = np.zeros(rows, np.bool_) if image_rows_T is None else image_rows_T
    return {"all": np.ones(rows, np.bool_), "text": ~images, "image": images}[reading.rows]


def row_logits(probe: Probe, tensors: Tensors, x_TI: ArrayLike) -> NDArray[np.float32]:
    """ln(p / (1 - p)) of harm for each row [T] of inputs [T, I], before standardisation."""
    y = logits(probe, tensors, x_TI)
    with np.errstate(all="ignore"):
        return np.asarray(_harm(probe, y), np.float32)


def _harm(probe: Probe, y_TC: Float64) -> Float64:
    if isinstance(probe, MlpProbe) and isinstance(probe.output, Softmax):
        harmful = probe.output.classes.index(probe.output.harmful)
        others = np.delete(y_TC, harmful, axis=1)
        return np.asarray(y_TC[:, harmful] - np.logaddexp.reduce(others, axis=1))
    low = isinstance(probe, MlpProbe) and isinstance(probe.output, Sigmoid)
    if low and probe.output.harmful_when == "low":  # type: ignore[union-attr]
        return -y_TC[:, 0]
    return y_TC[:, 0]


def row_inputs(
    reading: TokenReading, hidden_at: Callable[[AnySite], NDArray[np.floating]]
) -> Float64:
    """The inputs [T, S*D] of a token reading; `hidden_at(site)` gives states [T, D]."""
    states = [np.asarray(hidden_at(site), np.float64) for site in reading.sites]
    return np.concatenate(states, axis=1)


def judge_rows(
    probe: Probe,
    logits_T: NDArray[np.float32],
    sound_T: NDArray[np.bool_],
    counted_T: NDArray[np.bool_],
    end: int | None,
) -> Verdict:
    """The verdict of a token reading on the rows of one sequence.

    Args:
        logits_T: of each row, as `row_logits` gives them.
        sound_T: whether its states and its outputs are finite.
        counted_T: rows of the reading's kind.
        end: the row of the prompt's end; None while all rows are the prompt's.
    """
    assert probe.token_reading is not None
    over = window(probe.token_reading)
    scores = running_scores(over, logits_T, counted_T, end)
    known = ~np.isnan(scores)
    highest = float(running_score(scores[known].max())) if known.any() else math.nan
    crossed = known & fires(probe, running_score(scores))
    broken = over.in_scope(counted_T, end) & ~sound_T
    reason = NOT_FINITE if broken.any() else ""
    fired = crossed | broken
    row = int(np.flatnonzero(fired)[0]) if fired.any() else None
    place: Literal["", "prompt", "answer"] = ""
    if row is not None:
        place = "prompt" if end is None or row <= end else "answer"
    return Verdict(
        probe.id,
        math.nan if reason else highest,
        probe.threshold,
        probe.comparator,
        row is not None,
        reason,
        place,
        row,
    )


def running_score(logits: ArrayLike) -> Float64:
    """Running scores as probabilities of harm: what thresholds are compared with."""
    return _sigmoid(np.asarray(logits, np.float64))


# ---------------------------------------------------------------- rules


def actions(spec: SteeringSpec, verdicts: Sequence[Verdict]) -> tuple[Action, ...]:
    """What the rules switch on, in the order in which it applies at equal sites."""
    by_id = {v.probe: v for v in verdicts}
    return tuple(
        Action(rule.id, spec.intervention(id), strength(rule, by_id))
        for rule in spec.rules
        if holds(rule, by_id)
        for id in rule.interventions
    )


def begins(rule: Rule, verdicts: Mapping[str, Verdict], end: int) -> int | None:
    """The first row that a rule changes: the prompt's end, or the later row at which its condition
    held; None if it never did."""
    if not holds(rule, verdicts):
        return None
    if rule.condition is None:
        return end
    fired = [verdicts[id] for id in rule.condition.probes if verdicts[id].fired]
    rows = [end if verdict.row is None else max(end, verdict.row) for verdict in fired]
    return min(rows) if rule.condition.type == "any" else max(rows)


def holds(rule: Rule, verdicts: Mapping[str, Verdict]) -> bool:
    """Whether a rule's condition holds; a rule without one always does."""
    if rule.condition is None:
        return True
    combine = any if rule.condition.type == "any" else all
    return combine(verdicts[id].fired for id in rule.condition.probes)


def strength(rule: Rule, verdicts: Mapping[str, Verdict]) -> float:
    """The factor on every intervention of a rule that holds."""
    if isinstance(rule.strength, ConstantStrength):
        return rule.strength.value
    value = verdicts[rule.strength.probe].score
    return rule.strength.scale * (value if math.isfinite(value) else 1.0)


# ---------------------------------------------------------------- interventions


def apply(
    intervention: Intervention,
    tensors: Tensors,
    site: AnySite,
    h_TD: ArrayLike,
    strength: float = 1.0,
) -> Float64:
    """Hidden states [T, D] (or [D]) after the intervention acted at `site`."""
    h = np.asarray(h_TD, np.float64)
    if isinstance(intervention, Say):
        return h
    if isinstance(intervention, HeadMatrix):
        if not isinstance(site, HeadInput):
            return h
        return h + strength * intervention.eps * _head_product(intervention, tensors, h)
    for target in intervention.targets:
        if depth_equal(target.site, site):
            v = tensors[target.vector].float32().astype(np.float64)
            along = 1.0 if isinstance(intervention, AddVector) else -(h @ v)[..., None]
            h = h + strength * intervention.alpha * along * v
    return h


def _head_product(head: HeadMatrix, tensors: Tensors, h: Float64) -> Float64:
    """W h for each row."""
    if isinstance(head.weight, DenseMatrix):
        return h @ tensors[head.weight.matrix].float32().astype(np.float64).T
    u = tensors[head.weight.u].float32().astype(np.float64)
    v = tensors[head.weight.v].float32().astype(np.float64)
    return (h @ v.T) @ u.T


def depth_equal(a: AnySite, b: AnySite) -> bool:
    """True if two names mean one place (`layer_output[k]` is `layer_input[k + 1]`)."""

    def canonical(site: AnySite) -> int:
        return -1 if isinstance(site, HeadInput) else site.layer + isinstance(site, LayerOutput)

    return canonical(a) == canonical(b)


def steer(acting: Sequence[Action], tensors: Tensors, site: AnySite, h_TD: ArrayLike) -> Float64:
    """Hidden states at `site` after every action that acts there, in order."""
    h = np.asarray(h_TD, np.float64)
    for action in acting:
        if any(depth_equal(site, s) for s in sites(action.intervention)):
            h = apply(action.intervention, tensors, site, h, action.strength)
    return h


# ---------------------------------------------------------------- forced answers

UNSAID: Final = -30_000.0
"""The logit of every token but the one to be said; float16 holds it."""


def script(say: Say, ids: Sequence[int], end: int) -> tuple[int, ...]:
    """What is said by a rule that begins at the last of these rows.

    Args:
        ids: of the rows up to and with the one at which the rule begins; -1: not a token.
        end: the row of the prompt's end.
    """
    marks = say.reasoning
    if marks is not None and _last(ids, marks.open) > _last(ids, marks.close):
        return (*marks.close, *say.header, *say.tokens)
    return (*say.header, *say.tokens) if len(ids) == end + 1 else say.tokens


def _last(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where `part` last ends in `ids`; 0 if it is not there."""
    for stop in range(len(ids), len(part) - 1, -1):
        if tuple(ids[stop - len(part) : stop]) == tuple(part):
            return stop
    return 0


def said(script: Sequence[int], row: int, size: int) -> NDArray[np.float32]:
    """Logits [V] at row `row` since the rule began; behind the last token, the last again."""
    forced = np.full(size, UNSAID, np.float32)
    forced[script[min(row, len(script) - 1)]] = 0
    return forced


# ---------------------------------------------------------------- awareness


def sas(harmful_ND: ArrayLike, harmless_ND: ArrayLike) -> float:
    """Safety Awareness Score (arXiv 2507.13255, section 3.2) of paired states [N, D].

    The mean cosine similarity over all pairs i < j of the differences harmless - harmful.
    With unit vectors u_i it is (|sum u_i|^2 - N) / (N (N - 1)), which needs no N x N matrix.

    Raises:
        ValueError: fewer than two pairs, or shapes that differ.
    """
    harmful, harmless = np.asarray(harmful_ND, np.float64), np.asarray(harmless_ND, np.float64)
    if harmful.shape != harmless.shape or len(harmful) < 2:
        raise ValueError(f"two or more pairs of equal shape: {harmful.shape}, {harmless.shape}")
    unit = harmless - harmful
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    unit = np.divide(unit, norms, out=np.zeros_like(unit), where=norms > 0)
    n = len(unit)
    return float((np.sum(unit.sum(axis=0) ** 2) - np.sum(unit * unit)) / (n * (n - 1)))
