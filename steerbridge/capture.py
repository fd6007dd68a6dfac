"""Packages that only read: what a runtime attaches to show hidden states instead of steering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage
from steerbridge.spec import SPEC_VERSION, LinearProbe, Reading, SteeringSpec
from steerbridge.tensors import Tensor

READINGS_PER_PROBE: Final = 64  # the format's limit


def of_readings(known: ModelFacts, readings: Sequence[Reading]) -> SteeringPackage:
    """Probes with zero weights that read these, in their order; no rules."""
    starts = range(0, len(readings), READINGS_PER_PROBE)
    groups = [tuple(readings[start : start + READINGS_PER_PROBE]) for start in starts]
    probes = tuple(
        LinearProbe(
            id=f"p{i}",
            type="linear",
            readings=group,
            weight=f"w{i}",
            bias=0.0,
            link="identity",
            comparator=">",
            threshold=0.0,
        )
        for i, group in enumerate(groups)
    )
    spec = SteeringSpec(
        spec_version=SPEC_VERSION,
        name="capture",
        base_model=known.info(),
        probes=probes,
        interventions=(),
        rules=(),
    )
    zeros = np.zeros(READINGS_PER_PROBE * known.hidden_size, np.float32)
    sizes = (len(group) * known.hidden_size for group in groups)
    return SteeringPackage(spec, {f"w{i}": Tensor.of(zeros[:n]) for i, n in enumerate(sizes)})


def of_rows(package: SteeringPackage) -> SteeringPackage:
    """The package's probes with token readings, which read every row of a prompt; no rules."""
    everywhere = {"scope": "both", "rows": "all", "skip": 0}
    probes = tuple(
        probe.replace(token_reading=probe.token_reading.replace(**everywhere))
        for probe in package.spec.probes
        if probe.token_reading is not None
    )
    return package.replace(probes=probes, interventions=(), rules=(), calibrations=())
