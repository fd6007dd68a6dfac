"""The spec: the JSON half of a steering package, as pydantic models.

The models say what one field may hold; `problems()` says how fields must agree. Fields
that decide whether a request is steered have no default: leaving one out is an error,
never a quiet choice. Unknown fields of probes, interventions, rules and calibrations are
refused, because any of them may change what is steered; elsewhere they are kept, so that a
newer minor version survives a load and a save.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from steerbridge.errors import Problem

SPEC_VERSION = "1.1"
SUPPORTED_MAJOR = 1
MAX_ACTS = 1 << 16  # targets of all interventions of all rules together

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$")]
TensorName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$", description="name of a tensor of the package")
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Layer = Annotated[int, Field(ge=0, le=1 << 16)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]
Comparator = Literal[">", ">=", "<", "<="]


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields changed, validated as a new object is.

        Raises:
            pydantic.ValidationError: a value that the field cannot hold.
        """
        extra = self.model_extra or {}
        kept = {k: v for k, v in self if k in self.model_fields_set or k in extra}
        return type(self).model_validate({**kept, **changes})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the fields that were set, and no others."""
        return self.model_dump(mode="json", exclude_unset=True)


class _Deciding(_Model):
    """A part that decides what is steered: nothing of it may be passed over."""

    model_config = ConfigDict(extra="forbid")


# ---------------------------------------------------------------- sites and readings


class LayerInput(_Deciding):
    """The residual stream entering decoder block `layer`, before its norm.

    `layer` = number of blocks means the stream entering the final norm.
    """

    stream: Literal["layer_input"]
    layer: Layer

    def __str__(self) -> str:
        return f"layer_input[{self.layer}]"


class LayerOutput(_Deciding):
    """The residual stream leaving decoder block `layer` (= `layer_input[layer + 1]`)."""

    stream: Literal["layer_output"]
    layer: Layer

    def __str__(self) -> str:
        return f"layer_output[{self.layer}]"


class HeadInput(_Deciding):
    """The vector that the output embedding multiplies, after the final norm."""

    stream: Literal["head_input"]

    def __str__(self) -> str:
        return "head_input"


LayerSite: TypeAlias = Annotated[LayerInput | LayerOutput, Field(discriminator="stream")]
Site: TypeAlias = Annotated[LayerInput | LayerOutput | HeadInput, Field(discriminator="stream")]


class PromptEnd(_Deciding):
    """The last token of the rendered prompt, or the one `-offset` tokens before it."""

    type: Literal["prompt_end"]
    offset: Annotated[int, Field(le=0, ge=-(1 << 20))] = 0

    def __str__(self) -> str:
        return f"prompt_end{self.offset or ''}"


class PromptMean(_Deciding):
    """The mean over all tokens of the prompt, image tokens included, padding not."""

    type: Literal["prompt_mean"]

    def __str__(self) -> str:
        return self.type


class ImageMean(_Deciding):
    """The mean over the image tokens of the request."""

    type: Literal["image_mean"]

    def __str__(self) -> str:
        return self.type


Position: TypeAlias = Annotated[PromptEnd | PromptMean | ImageMean, Field(discriminator="type")]


class Reading(_Deciding):
    """One vector that a probe reads: a place in the network and a place in the prompt."""

    site: Site
    position: Position

    def __str__(self) -> str:
        return f"{self.site} @ {self.position}"


class TokenReading(_Deciding):
    """Every row of a request in scope, each scored by itself; the probe's score is the largest
    running score, a mean over the last `window` of them.

    A row's vectors at the sites are concatenated in order. Rows are counted from the first one of
    the sequence on, virtual tokens included, padding not; the first `skip` are left out, and so are
    those of another kind than `rows`. `answer` begins empty behind the prompt's end; `both` runs
    across it.
    """

    sites: Annotated[tuple[LayerInput, ...], Field(min_length=1, max_length=4)]
    scope: Literal["prompt", "answer", "both"]
    window: Annotated[int, Field(ge=1, le=1 << 12)]
    skip: Annotated[int, Field(ge=0, le=1 << 20)]
    rows: Literal["all", "text", "image"]

    def __str__(self) -> str:
        sites = ", ".join(map(str, self.sites))
        kind = "" if self.rows == "all" else f"{self.rows} "
        where = {"prompt": "prompt", "answer": "answer", "both": "prompt and answer"}[self.scope]
        skipped = f", without the first {self.skip}" if self.skip else ""
        return f"{sites} @ {kind}rows of {where}, {self.window} at a time{skipped}"


# ---------------------------------------------------------------- probes


class _Probe(_Deciding):
    id: Identifier
    readings: Annotated[tuple[Reading, ...], Field(max_length=64)] = ()
    token_reading: TokenReading | None = None
    input_mean: TensorName | None = None
    input_scale: TensorName | None = None
    comparator: Comparator
    threshold: float

    @property
    def reads(self) -> tuple[str, ...]:
        """What it reads, in words."""
        pooled = tuple(map(str, self.readings))
        return pooled if self.token_reading is None else (str(self.token_reading),)


class DenseLayer(_Deciding):
    """y = weight x + bias, weight [out, in], bias [out]."""

    weight: TensorName
    bias: TensorName


class Softmax(_Deciding):
    """The score is the probability of the class named `harmful`."""

    type: Literal["softmax"]
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=1024)]
    harmful: str


class Sigmoid(_Deciding):
    """The score is sigmoid(y) when a high y means harm, 1 - sigmoid(y) when a low y does."""

    type: Literal["sigmoid"]
    harmful_when: Literal["high", "low"]


class MlpProbe(_Probe):
    """Dense layers with an activation between them and softmax or sigmoid at the end."""

    type: Literal["mlp"]
    layers: Annotated[tuple[DenseLayer, ...], Field(min_length=1, max_length=16)]
    activation: Literal["relu", "tanh", "gelu"]
    output: Annotated[Softmax | Sigmoid, Field(discriminator="type")]


class LinearProbe(_Probe):
    """weight . x + bias, as it is (`identity`) or through a sigmoid."""

    type: Literal["linear"]
    weight: TensorName
    bias: float
    link: Literal["identity", "sigmoid"]


class CosineProbe(_Probe):
    """CAST: cosine of x with its projection on `direction` (through tanh or not)."""

    type: Literal["cosine"]
    direction: TensorName
    squash: Literal["tanh", "none"]


Probe: TypeAlias = Annotated[MlpProbe | LinearProbe | CosineProbe, Field(discriminator="type")]


# ---------------------------------------------------------------- interventions and rules


class _Intervention(_Deciding):
    id: Identifier
    position: Literal["from_prompt_end", "all_positions"]


class DenseMatrix(_Deciding):
    """W as one tensor [d, d]."""

    form: Literal["dense"]
    matrix: TensorName


class LowRankMatrix(_Deciding):
    """W = u v with u [d, r] and v [r, d]."""

    form: Literal["low_rank"]
    u: TensorName
    v: TensorName


class HeadMatrix(_Intervention):
    """h <- h + eps W h at `head_input`."""

    type: Literal["head_matrix"]
    eps: float
    weight: Annotated[DenseMatrix | LowRankMatrix, Field(discriminator="form")]


class Reasoning(_Deciding):
    """Token ids that open a block of reasoning, and those that close it."""

    open: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=64)]
    close: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=64)]


class Say(_Deciding):
    """Row j since the rule began gets the logit 0 for token j, and -30,000 for all others; behind
    the last token, the last again.

    Attributes:
        text: what the tokens say, for people; compared with the tokenizer.
        header: ids said first, at the prompt's end and behind a block of reasoning that is closed:
            the marks by which a template begins the answer itself.
        tokens: ids of the text, ending in the one that ends the turn.
        reasoning: marks of a block of reasoning; a rule that begins inside one closes it first.
    """

    id: Identifier
    type: Literal["say"]
    text: str
    header: Annotated[tuple[TokenId, ...], Field(max_length=64)] = ()
    tokens: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=1 << 12)]
    reasoning: Reasoning | None = None

    @property
    def position(self) -> Literal["from_prompt_end"]:
        """Where it acts, as the others say it."""
        return "from_prompt_end"


class Target(_Deciding):
    """A vector [d] and the layer site where it acts."""

    site: LayerSite
    vector: TensorName


class AddVector(_Intervention):
    """h <- h + alpha v at each target."""

    type: Literal["add_vector"]
    alpha: float
    targets: Annotated[tuple[Target, ...], Field(min_length=1, max_length=1 << 16)]


class ProjectOut(_Intervention):
    """h <- h - alpha (v . h) v at each target; a full projection for unit v and alpha 1."""

    type: Literal["project_out"]
    alpha: float
    targets: Annotated[tuple[Target, ...], Field(min_length=1, max_length=1 << 16)]


Intervention: TypeAlias = Annotated[
    HeadMatrix | AddVector | ProjectOut | Say, Field(discriminator="type")
]


class Condition(_Deciding):
    """Holds when any, or all, of the named probes fired."""

    type: Literal["any", "all"]
    probes: Annotated[tuple[Identifier, ...], Field(min_length=1)]


class ConstantStrength(_Deciding):
    """The interventions act `value` times as strongly as they say."""

    type: Literal["constant"]
    value: float


class ScoreStrength(_Deciding):
    """The interventions act `scale` times the probe's score where the rule begins; a score that is
    not finite, or not there yet, counts as 1."""

    type: Literal["score"]
    probe: Identifier
    scale: float


Strength: TypeAlias = Annotated[ConstantStrength | ScoreStrength, Field(discriminator="type")]


class Rule(_Deciding):
    """Once the condition holds (null: always), apply the interventions in order.

    It begins at the prompt's end, or at the later row at which a token reading makes it hold, and
    goes on to the end of the request.
    """

    id: Identifier
    condition: Condition | None
    interventions: Annotated[tuple[Identifier, ...], Field(min_length=1)]
    strength: Strength


# ---------------------------------------------------------------- the whole


class BaseModelInfo(_Model):
    """Fingerprint of the (language) model that the package was made for."""

    name: str
    model_type: str
    architecture: str | None = None
    hidden_size: Size
    num_layers: Size
    vocab_size: Size
    tokenizer_sha256: Sha256 | None = None
    chat_template_sha256: Sha256 | None = None


class Calibration(_Deciding):
    """Thresholds re-fitted on the hidden states of a named runtime and quantisation. `weights`
    names the checkpoint: the hash of samples of its weights
    (`steerbridge.fingerprint.weights_sha256`); absent: any one."""

    runtime: str
    quantisation: str
    weights: Sha256 | None = None
    thresholds: dict[Identifier, float]
    evidence: dict[str, JsonValue] | None = None


class Evidence(_Model):
    """What was measured when the package was made; every part is optional. `forms` names the forms
    of prompts that the guard was trained on (`chat`, `system`, `turns`, `prefill`, `raw`); absent:
    plain chats of one message."""

    forms: tuple[str, ...] | None = None
    sas: JsonValue = None
    probes: JsonValue = None
    interventions: JsonValue = None
    safety: JsonValue = None
    data: JsonValue = None
    settings: JsonValue = None
    tools: JsonValue = None


class SteeringSpec(_Model):
    """The spec of a steering package: who reads what, when it fires, what then changes."""

    spec_version: Annotated[str, Field(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")]
    name: str
    description: str | None = None
    license: str | None = None
    created: str | None = None
    base_model: BaseModelInfo
    probes: tuple[Probe, ...]
    interventions: tuple[Intervention, ...]
    rules: tuple[Rule, ...]
    evidence: Evidence | None = None
    calibrations: tuple[Calibration, ...] = ()

    def probe(self, id: str) -> MlpProbe | LinearProbe | CosineProbe:
        """Return the probe named `id` (KeyError if there is none)."""
        return {p.id: p for p in self.probes}[id]

    def intervention(self, id: str) -> HeadMatrix | AddVector | ProjectOut | Say:
        """Return the intervention named `id` (KeyError if there is none)."""
        return {x.id: x for x in self.interventions}[id]

    def depth(self, site: LayerInput | LayerOutput | HeadInput) -> int:
        """Place of a site in the order of computation: layer_input[L] is L, the head is last."""
        match site:
            case LayerInput():
                return site.layer
            case LayerOutput():
                return site.layer + 1
            case HeadInput():
                return self.base_model.num_layers + 1

    def is_calibrated(
        self, runtime: str, quantisation: str, weights: Callable[[], str] | None = None
    ) -> bool:
        """Whether thresholds were calibrated for this runtime, quantisation and checkpoint."""
        return bool(self._calibrations_of(runtime, quantisation, weights))

    def calibrated(
        self, runtime: str, quantisation: str, weights: Callable[[], str] | None = None
    ) -> SteeringSpec:
        """The spec with the thresholds calibrated for this runtime, quantisation and checkpoint, if
        any.

        The last matching entry of `calibrations` wins; without one the spec is unchanged.

        Args:
            weights: gives the hash of the model's weights; called if an entry asks. None: it is not
                known, and an entry that names a checkpoint does not match.
        """
        matching = self._calibrations_of(runtime, quantisation, weights)
        if not matching:
            return self
        fitted = matching[-1].thresholds
        return self.replace(
            probes=tuple(p.replace(threshold=fitted.get(p.id, p.threshold)) for p in self.probes)
        )

    def _calibrations_of(
        self, runtime: str, quantisation: str, weights: Callable[[], str] | None
    ) -> list[Calibration]:
        fitting = [
            c for c in self.calibrations if c.runtime == runtime and c.quantisation == quantisation
        ]
        named = any(c.weights is not None for c in fitting)
        known = weights() if named and weights else None
        return [c for c in fitting if c.weights is None or c.weights == known]


def sites(intervention: HeadMatrix | AddVector | ProjectOut | Say) -> tuple[Any, ...]:
    """The sites where an intervention acts; none for `say`, which acts on logits."""
    if isinstance(intervention, HeadMatrix):
        return (HeadInput(stream="head_input"),)
    if isinstance(intervention, Say):
        return ()
    return tuple(target.site for target in intervention.targets)


def sites_read(probe: MlpProbe | LinearProbe | CosineProbe) -> tuple[Any, ...]:
    """The sites that a probe reads, in order."""
    if probe.token_reading is not None:
        return probe.token_reading.sites
    return tuple(reading.site for reading in probe.readings)


# ---------------------------------------------------------------- rules across fields


def problems(spec: SteeringSpec) -> list[Problem]:
    """Every rule across fields that the spec breaks; empty for a sound spec."""
    return [
        *_version_problems(spec),
        *_duplicate_ids(spec),
        *_probe_problems(spec),
        *_intervention_problems(spec),
        *_rule_problems(spec),
        *_count_problems(spec),
        *_calibration_problems(spec),
    ]


def _version_problems(spec: SteeringSpec) -> Iterator[Problem]:
    """What came with 1.1 says so, for readers that know 1.0 only."""
    if spec.spec_version.partition(".")[2] == "0" and (
        any(probe.token_reading is not None for probe in spec.probes)
        or any(isinstance(x, Say) for x in spec.interventions)
    ):
        yield Problem(
            "spec_version", "1.1 or later for token readings and `say`", spec.spec_version
        )


def _duplicate_ids(spec: SteeringSpec) -> Iterator[Problem]:
    for field in ("probes", "interventions", "rules"):
        seen: set[str] = set()
        for i, item in enumerate(getattr(spec, field)):
            if item.id in seen:
                yield Problem(f"{field}[{i}].id", "a unique id", repr(item.id))
            seen.add(item.id)


def _site_problem(spec: SteeringSpec, site: Any, field: str) -> Iterator[Problem]:
    n = spec.base_model.num_layers
    last = n if isinstance(site, LayerInput) else n - 1
    if not isinstance(site, HeadInput) and site.layer > last:
        yield Problem(field, f"a {site.stream} layer in 0..{last}", str(site.layer))


def _probe_problems(spec: SteeringSpec) -> Iterator[Problem]:
    for i, probe in enumerate(spec.probes):
        if bool(probe.readings) == (probe.token_reading is not None):
            both = "both" if probe.readings else "neither"
            yield Problem(f"probes[{i}]", "either readings or a token_reading", both)
        yield from _token_problems(spec, probe, f"probes[{i}]")
        for j, reading in enumerate(probe.readings):
            field = f"probes[{i}].readings[{j}]"
            yield from _site_problem(spec, reading.site, f"{field}.site")
            at_end = isinstance(reading.position, PromptEnd) and reading.position.offset == 0
            if isinstance(reading.site, HeadInput) and not at_end:
                # Runtimes compute head_input for output rows only, so no other row exists.
                yield Problem(f"{field}.position", "prompt_end at head_input", str(reading))
        if isinstance(probe, MlpProbe) and isinstance(probe.output, Softmax):
            classes = probe.output.classes
            if len(set(classes)) != len(classes):
                yield Problem(f"probes[{i}].output.classes", "distinct names", str(classes))
            if probe.output.harmful not in classes:
                yield Problem(
                    f"probes[{i}].output.harmful", f"one of {classes}", repr(probe.output.harmful)
                )


def _token_problems(spec: SteeringSpec, probe: Probe, field: str) -> Iterator[Problem]:
    """A running score is a mean of logits, so there must be a logit that grows with harm."""
    if probe.token_reading is None:
        return
    last = spec.base_model.num_layers - 1
    for j, site in enumerate(probe.token_reading.sites):
        if not 1 <= site.layer <= last:
            where = f"{field}.token_reading.sites[{j}]"
            yield Problem(where, f"layer_input[1] .. layer_input[{last}]", str(site))
    if len(set(probe.token_reading.sites)) != len(probe.token_reading.sites):
        yield Problem(f"{field}.token_reading.sites", "each site once", str(probe.token_reading))
    if isinstance(probe, CosineProbe) or (
        isinstance(probe, LinearProbe) and probe.link == "identity"
    ):
        want = "a linear or mlp probe with a sigmoid or softmax, for a token_reading"
        yield Problem(f"{field}.type", want, probe.type)
    if probe.comparator not in (">", ">="):
        yield Problem(f"{field}.comparator", "> or >=, for a token_reading", probe.comparator)


def _intervention_problems(spec: SteeringSpec) -> Iterator[Problem]:
    for i, intervention in enumerate(spec.interventions):
        if isinstance(intervention, Say):
            yield from _say_problems(spec, intervention, f"interventions[{i}]")
        for j, site in enumerate(sites(intervention)):
            yield from _site_problem(spec, site, f"interventions[{i}].targets[{j}].site")


def _say_problems(spec: SteeringSpec, say: Say, field: str) -> Iterator[Problem]:
    marks = say.reasoning
    for part, ids in (
        ("header", say.header),
        ("tokens", say.tokens),
        ("reasoning", (*marks.open, *marks.close) if marks else ()),
    ):
        if ids and max(ids) >= spec.base_model.vocab_size:
            want = f"token ids below {spec.base_model.vocab_size}"
            yield Problem(f"{field}.{part}", want, str(max(ids)))


def _rule_problems(spec: SteeringSpec) -> Iterator[Problem]:
    probes = {p.id: p for p in spec.probes}
    interventions = {x.id: x for x in spec.interventions}
    # Depths once for all rules: rules times targets would make a small file a long check.
    reads = {id: _extreme(spec, sites_read(p), max) for id, p in probes.items()}
    acts = {id: (x, *_extreme(spec, sites(x), min)) for id, x in interventions.items()}
    for i, rule in enumerate(spec.rules):
        field = f"rules[{i}]"
        read = list(rule.condition.probes) if rule.condition else []
        if isinstance(rule.strength, ScoreStrength):
            read.append(rule.strength.probe)
        unknown = [("condition", "a probe", id) for id in read if id not in probes] + [
            ("interventions", "an intervention", id)
            for id in rule.interventions
            if id not in interventions
        ]
        for part, kind, id in unknown:
            yield Problem(f"{field}.{part}", f"the id of {kind} of this spec", repr(id))
        condition = rule.condition.probes if rule.condition else ()
        for part, ids in (("condition", condition), ("interventions", rule.interventions)):
            if len(set(ids)) != len(ids):
                yield Problem(f"{field}.{part}", "each id once", str(list(ids)))
        if not unknown and read:
            deepest = max((reads[id] for id in read), key=lambda known: known[0])
            acting = [acts[id] for id in rule.interventions]
            yield from _order_problems(field, deepest, acting)


def _count_problems(spec: SteeringSpec) -> Iterator[Problem]:
    """What all rules do must be countable: rules, their interventions and targets multiply."""
    size = {x.id: max(1, len(sites(x))) for x in spec.interventions}
    acts = sum(size.get(id, 0) for rule in spec.rules for id in rule.interventions)
    if acts > MAX_ACTS:
        yield Problem("rules", f"{MAX_ACTS} targets at most", str(acts))


def _extreme(spec: SteeringSpec, of: tuple[Any, ...], pick: Any) -> tuple[float, Any]:
    """The deepest (max) or first (min) of some sites, with its depth; of none, at no depth."""
    if not of:
        return (-math.inf if pick is max else math.inf), None
    site = pick(of, key=spec.depth)
    return spec.depth(site), site


def _order_problems(
    field: str, deepest: tuple[float, Any], acting: list[tuple[Any, float, Any]]
) -> Iterator[Problem]:
    """A decision must be known before it acts: later sites only, from the prompt end on.

    Args:
        deepest: depth and site of the last thing that the rule reads.
        acting: what the rule does, with depth and site of where it first acts.
    """
    depth, read = deepest
    for intervention, first, site in acting:
        if intervention.position != "from_prompt_end":
            yield Problem(
                f"{field}.interventions",
                "position from_prompt_end under a rule that reads a probe",
                f"{intervention.id!r} at {intervention.position}",
            )
        if first < depth:
            yield Problem(
                f"{field}.interventions",
                f"sites at or after {read}, which the rule reads",
                f"{intervention.id!r} at {site}",
            )


def _calibration_problems(spec: SteeringSpec) -> Iterator[Problem]:
    known = {p.id for p in spec.probes}
    for i, calibration in enumerate(spec.calibrations):
        for id in calibration.thresholds:
            if id not in known:
                yield Problem(
                    f"calibrations[{i}].thresholds", "the id of a probe of this spec", repr(id)
                )


# ---------------------------------------------------------------- fields that nobody knows


def unknown_fields(part: BaseModel, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, known field of nearly that name or empty) of every field that this version ignores."""
    known = type(part).model_fields
    for name in part.model_extra or {}:
        yield f"{path}{name}", nearest(name, known)
    for name in known:
        value = getattr(part, name)
        for at, one in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if isinstance(one, BaseModel):
                index = "" if at is None else f"[{at}]"
                yield from unknown_fields(one, f"{path}{name}{index}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that this one may be a slip of; empty: none."""
    return next(iter(get_close_matches(name, list(known), 1, 0.75)), "")


def field_names() -> frozenset[str]:
    """The fields of all parts of a spec."""
    parts, names = [_Model], set()
    while parts:
        part = parts.pop()
        parts += part.__subclasses__()
        names |= set(part.model_fields)
    return frozenset(names)


# ---------------------------------------------------------------- tensors the spec names


def tensor_shapes(spec: SteeringSpec) -> Iterator[tuple[str, str, tuple[int | str, ...]]]:
    """Yield (field, tensor name, shape) for every reference; a str in a shape is a free size.

    Equal free names within one owner must have equal sizes (the rank of u and v, the hidden
    width of an mlp).
    """
    d = spec.base_model.hidden_size
    for i, probe in enumerate(spec.probes):
        yield from _probe_shapes(f"probes[{i}]", probe, d * len(sites_read(probe)))
    for i, x in enumerate(spec.interventions):
        field = f"interventions[{i}]"
        if isinstance(x, Say):
            continue
        if not isinstance(x, HeadMatrix):
            for j, target in enumerate(x.targets):
                yield f"{field}.targets[{j}].vector", target.vector, (d,)
        elif isinstance(x.weight, DenseMatrix):
            yield f"{field}.weight.matrix", x.weight.matrix, (d, d)
        else:
            yield f"{field}.weight.u", x.weight.u, (d, f"{field}.rank")
            yield f"{field}.weight.v", x.weight.v, (f"{field}.rank", d)


def _probe_shapes(
    field: str, probe: MlpProbe | LinearProbe | CosineProbe, width: int
) -> Iterator[tuple[str, str, tuple[int | str, ...]]]:
    for part in ("input_mean", "input_scale"):
        if (name := getattr(probe, part)) is not None:
            yield f"{field}.{part}", name, (width,)
    match probe:
        case LinearProbe():
            yield f"{field}.weight", probe.weight, (width,)
        case CosineProbe():
            yield f"{field}.direction", probe.direction, (width,)
        case MlpProbe():
            outputs = len(probe.output.classes) if isinstance(probe.output, Softmax) else 1
            size: int | str = width
            for j, layer in enumerate(probe.layers):
                last = j == len(probe.layers) - 1
                out: int | str = outputs if last else f"{field}.layers[{j}].size"
                yield f"{field}.layers[{j}].weight", layer.weight, (out, size)
                yield f"{field}.layers[{j}].bias", layer.bias, (out,)
                size = out


_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.-]{1,63}")


def is_tensor_name(name: str) -> bool:
    """True if the name fits ggml (63 bytes) and is safe in every encoding."""
    return _TENSOR_NAME.fullmatch(name) is not None


_SITE = re.compile(r"^(layer_input|layer_output)\[(\d{1,5})\]$")


def parse_site(text: str) -> LayerInput | LayerOutput | HeadInput:
    """Read 'layer_input[22]', 'layer_output[21]' or 'head_input'; ValueError otherwise."""
    if text == "head_input":
        return HeadInput(stream="head_input")
    if match := _SITE.match(text):
        layer = int(match[2])
        if match[1] == "layer_input":
            return LayerInput(stream="layer_input", layer=layer)
        return LayerOutput(stream="layer_output", layer=layer)
    raise ValueError(f"expected layer_input[N], layer_output[N] or head_input, found {text!r}")
