"""What a trained package says about itself: how well it separates, on what, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import data, environment
from steerbridge.data import Example
from steerbridge.spec import Evidence
from steerbridge.training.parts import Parts
from steerbridge.training.probes import ProbeDesign
from steerbridge.training.search import Awareness, Candidate, SearchResult, Task, calm_of
from steerbridge.training.settings import TrainSettings
from steerbridge.training.together import Guard

Found = Mapping[str, tuple[Task, SearchResult]]  # probe -> what its search gave


def collect(
    found: Found,
    guard: Guard,
    awareness: Awareness,
    interventions: dict[str, Any],
    examples: Sequence[Example],
    parts: Parts,
    settings: TrainSettings,
) -> Evidence:
    """The evidence of one training. Rates are of prompts that neither the probes nor the threshold
    that they are measured with saw, nor one that is like them.

    Args:
        interventions: intervention -> what is known of it.
        examples: as they were given, each in one form.
    """
    index = parts.of("calibrate")
    chosen = {m.probe for m in guard.members}
    return Evidence(
        forms=parts.forms,
        sas={reading: round(value, 6) for reading, value in awareness.whole.items()},
        probes={
            probe: {**_probe(result), "used": probe in chosen}
            for probe, (_, result) in found.items()
        },
        interventions=interventions,
        data={
            "sha256": data.sha256(examples),
            "prompts": _counts(examples),
            "in_forms": {
                part: int((parts.part == part).sum()) for part in ("train", "search", "calibrate")
            },
        },
        safety={
            "promise": guard.promise,
            "kinds": _by(guard.fired, index, parts, [e.kind for e in parts.examples], "harmless"),
            "forms": _by(guard.fired, index, parts, [e.form for e in parts.examples], "traffic"),
            "auroc_per_reading": _json_values(_auroc(found)),
            "sas_per_reading": {
                reading: {"*": round(value, 6), **_json_values(awareness.by_kind[reading])}
                for reading, value in awareness.whole.items()
            },
        },
        settings=_json_values(asdict(settings)),
        tools={**environment.versions()},
    )


def _counts(examples: Sequence[Example]) -> dict[str, Any]:
    """Number of prompts by kind and label."""
    return {
        f"{kind} {label}": sum(
            e.kind == kind and e.harmful == (label == "harmful") for e in examples
        )
        for kind in sorted({e.kind for e in examples})
        for label in ("harmful", "harmless")
    }


def _auroc(found: Found) -> dict[str, dict[str, float]]:
    """Reading -> kind of harmful prompts -> AUROC of a linear probe that is meant to catch it;
    `*` is the mean over probes."""
    by_reading: dict[str, dict[str, float]] = {}
    searched = [result.singles for _, result in found.values() if result.singles]
    for singles in searched:
        for candidate in singles:
            kinds = by_reading.setdefault(_reading(candidate), {})
            kinds["*"] = kinds.get("*", 0.0) + candidate.auroc / len(searched)
            for kind, value in candidate.auroc_by_kind.items():
                kinds[kind] = max(value, kinds.get(kind, 0.0))
    return by_reading


def _reading(candidate: Candidate) -> str:
    assert isinstance(candidate.design, ProbeDesign)
    return str(candidate.design.readings[0])


def _probe(result: SearchResult) -> dict[str, Any]:
    """What is known of one probe, on the prompts to search on."""
    ranked = sorted(result.tried, key=lambda c: c.detection, reverse=True)
    return {
        **result.best.to_json(),
        "tried": [candidate.to_json() for candidate in ranked],
        "search_complete": result.complete,
    }


def _by(
    fired: NDArray[np.bool_],
    index: NDArray[np.int64],
    parts: Parts,
    names: Sequence[str],
    calm: str,
) -> dict[str, Any]:
    """By name: the share of harmful prompts that fire (`detected`) and that of harmless ones, or of
    traffic alone (`fpr`), each with the number of prompts."""
    harmful = parts.harmful[index]
    quiet = calm_of(parts, index) if calm == "traffic" else ~harmful
    mine = np.array([names[i] for i in index])
    return {
        name: {
            what: [round(float(fired[chosen].mean()), 5), int(chosen.sum())]
            for what, side in (("detected", harmful), ("fpr", quiet))
            if (chosen := side & (mine == name)).any()
        }
        for name in dict.fromkeys(mine.tolist())
    }


def _json_values(value: Any) -> Any:
    """Mappings as dicts with text keys, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): _json_values(v) for k, v in value.items()}
    return [_json_values(v) for v in value] if isinstance(value, list | tuple) else value
