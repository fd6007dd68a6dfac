"""What a trained package says about itself: how well it separates, on what, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import calibration, data, environment
from steerbridge.data import Example
from steerbridge.spec import Evidence
from steerbridge.training.search import Awareness, SearchResult
from steerbridge.training.settings import TrainSettings

Results = Mapping[str, SearchResult]  # probe -> what its search gave


def collect(
    results: Results,
    awareness: Awareness,
    interventions: dict[str, Any],
    examples: Sequence[Example],
    settings: TrainSettings,
) -> Evidence:
    """The evidence of one training; rates are of outer folds: neither the probe nor the threshold
    that they are measured with saw the prompt or one that is like it.

    Args:
        interventions: intervention -> what is known of it.
    """
    return Evidence(
        sas={reading: round(value, 6) for reading, value in awareness.whole.items()},
        probes={probe: _probe(result, examples) for probe, result in results.items()},
        interventions=interventions,
        data={"sha256": data.sha256(examples), "prompts": _counts(examples)},
        safety={
            "out_of_fold": _shares(_fired(results), examples),
            "auroc_per_reading": _json_values(_auroc(results)),
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


def _auroc(results: Results) -> dict[str, dict[str, float]]:
    """Reading -> kind of harmful prompts -> AUROC of a linear probe that is meant to catch it;
    `*` is the mean over probes."""
    by_reading: dict[str, dict[str, float]] = {}
    for result in results.values():
        for candidate in result.first_round:
            kinds = by_reading.setdefault(str(candidate.design.readings[0]), {})
            kinds["*"] = kinds.get("*", 0.0) + candidate.auroc / len(results)
            for kind, value in candidate.auroc_by_kind.items():
                kinds[kind] = max(value, kinds.get(kind, 0.0))
    return by_reading


def _fired(results: Results) -> NDArray[np.bool_]:
    """Whether any probe fires, in outer folds."""
    return np.asarray(np.any([result.fired for result in results.values()], axis=0))


def _probe(result: SearchResult, examples: Sequence[Example]) -> dict[str, Any]:
    """What is known of one probe, all of it out of fold."""
    ranked = sorted(result.second_round, key=lambda c: c.detection, reverse=True)
    return {
        **result.best.to_json(),
        "out_of_fold": True,
        **_shares(result.fired, examples),
        "runners_up": [candidate.to_json() for candidate in ranked[:5]],
    }


def _shares(fired_N: NDArray[np.bool_], examples: Sequence[Example]) -> dict[str, Any]:
    """Shares that fire, by kind: of harmless prompts (`fpr`) and of harmful ones (`detected`)."""
    kinds, harmful = [e.kind for e in examples], np.array([e.harmful for e in examples])
    values = fired_N.astype(np.float64)
    return {
        name: {
            kind: round(float(part.mean()), 5)
            for kind, part in calibration.by_kind(values, kinds, chosen).items()
        }
        for name, chosen in (("fpr", ~harmful), ("detected", harmful))
    }


def _json_values(value: Any) -> Any:
    """Mappings as dicts with text keys, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): _json_values(v) for k, v in value.items()}
    return [_json_values(v) for v in value] if isinstance(value, list | tuple) else value
