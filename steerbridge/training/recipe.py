"""From labelled prompts to a steering package: the training journey, step by step.

prompts -> capture -> SAS and search -> probe and threshold -> intervention -> package
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steerbridge import calibration, data, environment
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation.judge import refuses, well_formed
from steerbridge.low_rank import low_rank
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Generation, TrainableModel
from steerbridge.spec import (
    SPEC_VERSION,
    AddVector,
    Condition,
    ConstantStrength,
    DenseMatrix,
    Evidence,
    HeadMatrix,
    LayerInput,
    LayerOutput,
    LowRankMatrix,
    ProjectOut,
    PromptEnd,
    Reading,
    Rule,
    SteeringSpec,
    Target,
)
from steerbridge.tensors import Tensor
from steerbridge.training import head as heads
from steerbridge.training import probes, search
from steerbridge.training.head import HeadSettings
from steerbridge.training.probes import Shape
from steerbridge.training.search import FOLDS, Awareness, Found
from steerbridge.training.states import States, all_readings, capture, turn_end

Kind = Literal["head_matrix", "add_vector", "project_out"]
Say = Callable[[str, int, int], None]  # (what, done, total)

DEFAULT_REFUSAL = "I'm sorry, but I can't assist with that."
STRENGTHS = (1.0, 1.5, 2.0)
VECTOR_STRENGTHS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Goal:
    """One probe of a guard: what it is for, and its part of the false positives.

    `harmful` and `harmless` map kinds of prompts to their weight in the probe's loss; `*` is any
    kind not named (1 unless given), and 0 means: not its business. The goals at work share
    `target_fpr` in proportion to `share`. Without harmful prompts of the kind `needs` (None: of
    any kind with a weight) there is no such probe.
    """

    probe: str
    share: float
    harmful: Mapping[str, float] = field(default_factory=dict)
    harmless: Mapping[str, float] = field(default_factory=dict)
    needs: str | None = None

    def weight(self, example: Example) -> float:
        """The weight of one prompt in the loss."""
        weights = self.harmful if example.harmful else self.harmless
        return weights.get(example.kind, weights.get("*", 1.0))

    def applies(self, examples: Sequence[Example]) -> bool:
        """True if there is something for its probe to catch."""
        caught = {e.kind for e in examples if e.harmful and self.weight(e) > 0}
        return self.needs in caught if self.needs else bool(caught)


# What tells a harmful request from a harmless one, and what tells it from a harmless one of
# nearly the same words, pull a single probe apart; each alone does better. So do the channels of
# a multimodal model: harm in the image alone (kind `image`), and in the combination (`both`).
GOALS = (
    Goal(
        "harm",
        0.85,
        {"general_harmful": 0.33, "twin": 0.0, "image": 0.0, "both": 0.0},
        {"borderline": 40.0},
    ),
    Goal(
        "twins",
        0.15,
        {"twin": 5.0, "pair": 0.3, "image": 0.0, "both": 0.0},
        {"borderline": 20.0, "pair": 0.3},
        "twin",
    ),
    Goal("image", 0.5, {"*": 0.0, "image": 1.0}, needs="image"),
    Goal("both", 0.5, {"*": 0.0, "both": 1.0}, needs="both"),
)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a user may choose.

    `target_fpr` maps kinds of harmless prompts to the share that may fire, `*` is any other
    kind.
    """

    name: str = "steerbridge-guard"
    refusal: str = DEFAULT_REFUSAL
    probe: Shape = "mlp"
    target_fpr: Mapping[str, float] = field(
        default_factory=lambda: {"*": 0.01, "borderline": 0.02, "pair": 0.02}
    )
    goals: tuple[Goal, ...] = GOALS
    intervention: Kind = "head_matrix"
    rank: int | None = None
    head: HeadSettings = field(default_factory=HeadSettings)
    head_prompts: int = 256
    validation_prompts: int = 32
    seed: int = 0


def train(
    model: TrainableModel,
    examples: Sequence[Example],
    settings: TrainSettings,
    workdir: Path,
    say: Say = lambda _what, _done, _total: None,
) -> SteeringPackage:
    """Train a package. The same examples, model, settings and seed give the same package.

    Args:
        examples: harmful and harmless prompts; aligned pairs carry a shared `pair`.
        workdir: captured states go here and are used again by a later run.

    Raises:
        DataError: too few prompts of either label, or a capture of something else in `workdir`.
    """
    _check(examples)
    readings = all_readings(
        model.facts.num_layers,
        turn_end(model, examples),
        images=any(e.images for e in examples),
    )
    states = capture(
        model, examples, readings, workdir / "capture", lambda a, b: say("capture", a, b)
    )
    found, sas = _search(states, examples, settings, say)
    fitted, tensors = _probes(states, examples, found, settings)
    spec = SteeringSpec(
        spec_version=SPEC_VERSION,
        name=settings.name,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        base_model=model.facts.info(),
        probes=fitted,
        interventions=(),
        rules=(),
    )
    package = SteeringPackage(spec, tensors)
    maker = _head if settings.intervention == "head_matrix" else _vector
    package, evidence = maker(model, package, states, examples, settings, say)
    return _with_evidence(package, found, sas, evidence, examples, settings)


def _check(examples: Sequence[Example]) -> None:
    for harmful in (True, False):
        count = sum(e.harmful == harmful for e in examples)
        if count < 4 * FOLDS:
            label = "harmful" if harmful else "harmless"
            raise DataError(Problem("examples", f"{4 * FOLDS} or more {label} prompts", str(count)))


# ---------------------------------------------------------------- probe


def _labels(examples: Sequence[Example]) -> NDArray[np.bool_]:
    return np.array([e.harmful for e in examples])


def _weights(examples: Sequence[Example], goal: Goal) -> NDArray[np.float64]:
    return np.array([goal.weight(e) for e in examples])


def _search(
    states: States, examples: Sequence[Example], settings: TrainSettings, say: Say
) -> tuple[dict[str, Found], Awareness]:
    """For each goal, by the name of its probe, where the probe shall read; and the SAS."""
    tried = count(1)

    def progress(_: str) -> None:
        say("search", next(tried), 0)

    folds = np.asarray(data.folds(examples, FOLDS, settings.seed))
    sas = search.awareness(states, examples)
    goals = [goal for goal in settings.goals if goal.applies(examples)]
    shares = sum(goal.share for goal in goals)
    found: dict[str, Found] = {}
    for goal in goals:
        part = goal.share / shares
        problem = search.Problem(
            states,
            examples,
            _labels(examples),
            _weights(examples, goal),
            folds,
            {kind: part * target for kind, target in settings.target_fpr.items()},
            settings.seed,
        )
        found[goal.probe] = search.search(problem, sas, settings.probe, progress)
    return found, sas


def _probes(
    states: States,
    examples: Sequence[Example],
    found: Mapping[str, Found],
    settings: TrainSettings,
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Every probe fitted on all examples, its threshold on the scale of calibrated odds."""
    harmful, specs = _labels(examples), []
    tensors: dict[str, Tensor] = {}
    for goal in settings.goals:
        if goal.probe not in found:
            continue
        best, weights = found[goal.probe].best, _weights(examples, goal)
        x = states.of(best.recipe.readings)
        fitted = probes.fit(x, harmful, weights, best.recipe, settings.seed)
        slope, shift = probes.platt(best.scores, harmful, weights)
        threshold = slope * best.threshold + shift
        made = probes.to_spec(fitted.rescaled(slope, shift), best.recipe, threshold, goal.probe)
        specs.append(made[0])
        tensors |= made[1]
    return tuple(specs), tensors


# ---------------------------------------------------------------- interventions


def _split(
    examples: Sequence[Example], settings: TrainSettings
) -> tuple[list[Example], list[Example]]:
    """Harmful prompts to train an intervention on, and others to choose its strength on."""
    harmful = [e for e in examples if e.harmful]
    fold = data.folds(harmful, FOLDS, settings.seed + 1)
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(harmful))
    train = [harmful[i] for i in order if fold[i] != 0][: settings.head_prompts]
    held = [harmful[i] for i in order if fold[i] == 0][: settings.validation_prompts]
    return train, held


def _head(
    model: TrainableModel,
    package: SteeringPackage,
    states: States,  # noqa: ARG001 - every maker has the same signature
    examples: Sequence[Example],
    settings: TrainSettings,
    say: Say,
) -> tuple[SteeringPackage, dict[str, Any]]:
    train_on, held = _split(examples, settings)
    answer_NTD, target_T = model.answer_states(
        train_on, settings.refusal, lambda a, b: say("refusal states", a, b)
    )
    hyper = replace(settings.head, seed=settings.seed)
    trained = heads.train_head(
        answer_NTD,
        target_T,
        model.output_head(),
        hyper,
        lambda step, _: say("head", step, hyper.steps),
    )
    evidence: dict[str, Any] = {
        "loss_before": round(trained.loss_before, 6),
        "loss_after": round(trained.loss_after, 6),
        "states": int(answer_NTD.shape[0] * answer_NTD.shape[1]),
    }
    weight: DenseMatrix | LowRankMatrix = DenseMatrix(form="dense", matrix="head.matrix")
    tensors = {"head.matrix": Tensor.of(trained.matrix)}
    if settings.rank is not None:
        cut = low_rank(trained.matrix, settings.rank)
        weight = LowRankMatrix(form="low_rank", u="head.u", v="head.v")
        tensors = {"head.u": Tensor.of(cut.u), "head.v": Tensor.of(cut.v)}
        evidence |= {"rank": settings.rank, "truncation_error": round(cut.error, 6)}

    def made(strength: float) -> SteeringPackage:
        head = HeadMatrix(
            type="head_matrix",
            id="refusal",
            position="from_prompt_end",
            eps=trained.eps * strength,
            weight=weight,
        )
        return _with_rule(package, head, tensors)

    return _strongest(model, made, STRENGTHS, held, settings, evidence, say)


def _vector(
    model: TrainableModel,
    package: SteeringPackage,
    states: States,
    examples: Sequence[Example],
    settings: TrainSettings,
    say: Say,
) -> tuple[SteeringPackage, dict[str, Any]]:
    """`add_vector` or `project_out` along the difference of means where the probe reads last."""
    spec = package.spec
    layer = max(spec.depth(r.site) for p in spec.probes for r in p.readings)
    reading = Reading(
        site=LayerInput(stream="layer_input", layer=layer), position=PromptEnd(type="prompt_end")
    )
    x, harmful = states.of([reading]), _labels(examples)
    unit = heads.difference_of_means(x[harmful], x[~harmful])
    gap = float((x[harmful].mean(axis=0) - x[~harmful].mean(axis=0)) @ unit)
    target = Target(site=LayerOutput(stream="layer_output", layer=layer - 1), vector="direction")
    tensors = {"direction": Tensor.of(unit)}

    def made(strength: float) -> SteeringPackage:
        common: dict[str, Any] = {
            "id": "direction",
            "position": "from_prompt_end",
            "targets": (target,),
        }
        act = (
            AddVector(type="add_vector", alpha=gap * strength, **common)
            if settings.intervention == "add_vector"
            else ProjectOut(type="project_out", alpha=strength, **common)
        )
        return _with_rule(package, act, tensors)

    train_on, held = _split(examples, settings)
    evidence = {"gap_of_means": round(gap, 6), "states": len(train_on)}
    strengths = VECTOR_STRENGTHS if settings.intervention == "add_vector" else (1.0,)
    return _strongest(model, made, strengths, held, settings, evidence, say)


def _with_rule(
    package: SteeringPackage, act: Any, tensors: Mapping[str, Tensor]
) -> SteeringPackage:
    rule = Rule(
        id="refuse",
        condition=Condition(type="any", probes=tuple(p.id for p in package.spec.probes)),
        interventions=(act.id,),
        strength=ConstantStrength(type="constant", value=1.0),
    )
    spec = package.spec.model_copy(update={"interventions": (act,), "rules": (rule,)})
    return SteeringPackage(spec, {**package.tensors, **tensors})


def _strongest(
    model: TrainableModel,
    made: Callable[[float], SteeringPackage],
    strengths: Sequence[float],
    held: Sequence[Example],
    settings: TrainSettings,
    evidence: dict[str, Any],
    say: Say,
) -> tuple[SteeringPackage, dict[str, Any]]:
    """The weakest strength with the best share of well-formed refusals on held-out prompts."""
    tried: dict[float, dict[str, float]] = {}
    for i, strength in enumerate(strengths):
        answers = model.generate(
            held, made(strength).unconditional(), max_new_tokens=len(settings.refusal) // 2
        )
        tried[strength] = {
            "refused": _share(answers, lambda a: refuses(a.text)),
            "wellformed": _share(answers, lambda a: well_formed(a.text, a.finish)),
        }
        say("strength", i + 1, len(strengths))
        if min(tried[strength].values()) == 1.0:
            break
    best = max(tried, key=lambda s: (sum(tried[s].values()), -s))
    evidence |= {"strength": best, "strengths": {str(s): v for s, v in tried.items()}}
    return made(best), evidence


def _share(answers: Sequence[Generation], test: Callable[[Generation], bool]) -> float:
    return round(sum(map(test, answers)) / len(answers), 4)


# ---------------------------------------------------------------- evidence


def _with_evidence(
    package: SteeringPackage,
    found: Mapping[str, Found],
    awareness: Awareness,
    intervention: dict[str, Any],
    examples: Sequence[Example],
    settings: TrainSettings,
) -> SteeringPackage:
    kinds = [e.kind for e in examples]
    evidence = Evidence(
        sas={reading: round(value, 6) for reading, value in awareness.whole.items()},
        probes={probe: _report(f, examples) for probe, f in found.items()},
        interventions={package.spec.interventions[0].id: intervention},
        data={
            "sha256": data.sha256(examples),
            "prompts": {
                f"{kind} {label}": sum(
                    e.kind == kind and e.harmful == (label == "harmful") for e in examples
                )
                for kind in sorted(set(kinds))
                for label in ("harmful", "harmless")
            },
        },
        safety={
            "out_of_fold": _shares(_fired(found), examples),
            "auroc_per_reading": _plain(_auroc(found)),
            "sas_per_reading": {
                reading: {"*": round(value, 6), **_plain(awareness.by_kind[reading])}
                for reading, value in awareness.whole.items()
            },
        },
        settings=_plain(asdict(settings)),
        tools={**environment.versions()},
    )
    spec = package.spec.model_copy(update={"evidence": evidence})
    # A fresh parse marks exactly what is set, as a load from disk does.
    return SteeringPackage(
        SteeringSpec.model_validate_json(spec.model_dump_json(exclude_unset=True)),
        package.tensors,
    )


def _auroc(found: Mapping[str, Found]) -> dict[str, dict[str, float]]:
    """Reading -> kind of harmful prompts -> AUROC of a linear probe that is meant to catch it;
    `*` is the mean over probes."""
    known: dict[str, dict[str, float]] = {}
    for one in found.values():
        for candidate in one.first_round:
            kinds = known.setdefault(str(candidate.recipe.readings[0]), {})
            kinds["*"] = kinds.get("*", 0.0) + candidate.auroc / len(found)
            for kind, value in candidate.auroc_by_kind.items():
                kinds[kind] = max(value, kinds.get(kind, 0.0))
    return known


def _fired(found: Mapping[str, Found]) -> NDArray[np.bool_]:
    """Whether any probe fires, out of fold."""
    fired = [f.best.scores > f.best.threshold for f in found.values()]
    return np.asarray(np.any(fired, axis=0))


def _report(found: Found, examples: Sequence[Example]) -> dict[str, Any]:
    """What is known of one probe, all of it out of fold."""
    ranked = sorted(found.second_round, key=lambda c: c.detection, reverse=True)
    return {
        **found.best.report(),
        "out_of_fold": True,
        **_shares(found.best.scores > found.best.threshold, examples),
        "runners_up": [c.report() for c in ranked[:5]],
    }


def _shares(fired_N: NDArray[np.bool_], examples: Sequence[Example]) -> dict[str, Any]:
    """Shares that fire, by kind: of harmless prompts (`fpr`) and of harmful ones."""
    kinds, harmful = [e.kind for e in examples], _labels(examples)
    values = fired_N.astype(np.float64)
    return {
        name: {
            kind: round(float(found.mean()), 5)
            for kind, found in calibration.by_kind(values, kinds, chosen).items()
        }
        for name, chosen in (("fpr", ~harmful), ("detected", harmful))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
