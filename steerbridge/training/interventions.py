"""What a guard does when it fires: a sentence that is said, a refusal head, or a direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from steerbridge.data import Example
from steerbridge.evaluation.judge import refuses, well_formed
from steerbridge.low_rank import low_rank
from steerbridge.package import SteeringPackage
from steerbridge.runtime import Generation, Progress, TrainableModel
from steerbridge.spec import (
    AddVector,
    Condition,
    ConstantStrength,
    DenseMatrix,
    HeadMatrix,
    LayerInput,
    LayerOutput,
    LowRankMatrix,
    ProjectOut,
    PromptEnd,
    Reading,
    Rule,
    Say,
    Target,
    sites_read,
)
from steerbridge.tensors import Tensor
from steerbridge.training import head as heads
from steerbridge.training.parts import Part, Parts
from steerbridge.training.settings import TrainSettings
from steerbridge.training.states import States

STRENGTHS: Final = (1.0, 1.5, 2.0)
VECTOR_STRENGTHS: Final = (0.5, 1.0, 2.0, 4.0)

Variant = Callable[[float], SteeringPackage]  # strength -> package


@dataclass(frozen=True, slots=True)
class Job:
    """What an intervention is made from: the guard so far, and where to try it."""

    model: TrainableModel
    package: SteeringPackage  # its probes only
    states: States
    parts: Parts
    settings: TrainSettings
    progress: Progress

    def harmful(self, part: Part, count: int) -> list[Example]:
        """So many harmful prompts of a part, drawn from all its forms."""
        index = [i for i in self.parts.of(part) if self.parts.examples[i].harmful]
        order = np.random.default_rng(self.settings.seed).permutation(len(index))
        return [self.parts.examples[index[i]] for i in order[:count]]


def add(job: Job) -> tuple[SteeringPackage, dict[str, Any]]:
    """The package with the intervention that the settings ask for, and the evidence for it."""
    ways = {"say": _say, "head_matrix": _head}
    return ways.get(job.settings.refuse, _direction)(job)


def _say(job: Job) -> tuple[SteeringPackage, dict[str, Any]]:
    """The sentence, as the model's template writes an answer."""
    sentence = job.settings.sentence
    tokens = job.model.answer_tokens(sentence)
    act = Say(id="refusal", type="say", text=sentence, tokens=tuple(tokens))
    return _with_rule(job.package, act, {}), {"tokens": len(tokens)}


def _head(job: Job) -> tuple[SteeringPackage, dict[str, Any]]:
    """A head matrix that makes the refusal follow from the states of harmful prompts."""
    settings = job.settings
    prompts = job.harmful("train", settings.head_prompts)
    answer_NTD, target_T = job.model.answer_states(prompts, settings.sentence, job.progress)
    trained = heads.train_head(
        answer_NTD,
        target_T,
        job.model.output_head(),
        replace(settings.head, seed=settings.seed),
        job.progress,
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

    def variant(strength: float) -> SteeringPackage:
        head = HeadMatrix(
            type="head_matrix",
            id="refusal",
            position="from_prompt_end",
            eps=trained.eps * strength,
            weight=weight,
        )
        return _with_rule(job.package, head, tensors)

    return _strongest(job, variant, STRENGTHS, evidence)


def _direction(job: Job) -> tuple[SteeringPackage, dict[str, Any]]:
    """`add_vector` or `project_out` along the difference of means where the last probe reads."""
    settings, spec = job.settings, job.package.spec
    layer = max(spec.depth(site) for p in spec.probes for site in sites_read(p))
    reading = Reading(
        site=LayerInput(stream="layer_input", layer=layer), position=PromptEnd(type="prompt_end")
    )
    train = job.parts.of("train")
    x, harmful = job.states.of([reading])[train], job.parts.harmful[train]
    unit = heads.difference_of_means(x[harmful], x[~harmful])
    gap = float((x[harmful].mean(axis=0) - x[~harmful].mean(axis=0)) @ unit)
    target = Target(site=LayerOutput(stream="layer_output", layer=layer - 1), vector="direction")
    tensors = {"direction": Tensor.of(unit)}

    def variant(strength: float) -> SteeringPackage:
        common: dict[str, Any] = {
            "id": "direction",
            "position": "from_prompt_end",
            "targets": (target,),
        }
        act = (
            AddVector(type="add_vector", alpha=gap * strength, **common)
            if settings.refuse == "add_vector"
            else ProjectOut(type="project_out", alpha=strength, **common)
        )
        return _with_rule(job.package, act, tensors)

    evidence = {"gap_of_means": round(gap, 6), "states": len(train)}
    strengths = VECTOR_STRENGTHS if settings.refuse == "add_vector" else (1.0,)
    return _strongest(job, variant, strengths, evidence)


def _with_rule(
    package: SteeringPackage, act: Any, tensors: Mapping[str, Tensor]
) -> SteeringPackage:
    """The package with an intervention that acts if any probe fires."""
    rule = Rule(
        id="refuse",
        condition=Condition(type="any", probes=tuple(p.id for p in package.spec.probes)),
        interventions=(act.id,),
        strength=ConstantStrength(type="constant", value=1.0),
    )
    return package.replace(
        tensors={**package.tensors, **tensors}, interventions=(act,), rules=(rule,)
    )


def _strongest(
    job: Job, variant: Variant, strengths: Sequence[float], evidence: dict[str, Any]
) -> tuple[SteeringPackage, dict[str, Any]]:
    """The weakest strength with the largest share of well-formed refusals on held-out prompts."""
    held = job.harmful("search", job.settings.validation_prompts)
    tried: dict[float, dict[str, float]] = {}
    for i, strength in enumerate(strengths):
        answers = job.model.generate(
            held,
            variant(strength).unconditional(),
            max_new_tokens=len(job.settings.sentence) // 2,
        )
        tried[strength] = {
            "refused": _share(answers, lambda a: refuses(a.text)),
            "wellformed": _share(answers, lambda a: well_formed(a.text, a.finish)),
        }
        job.progress("strength", i + 1, len(strengths))
        if min(tried[strength].values()) == 1.0:
            break
    best = max(tried, key=lambda s: (sum(tried[s].values()), -s))
    evidence |= {"strength": best, "strengths": {str(s): v for s, v in tried.items()}}
    return variant(best), evidence


def _share(answers: Sequence[Generation], test: Callable[[Generation], bool]) -> float:
    return round(sum(map(test, answers)) / len(answers), 4)
