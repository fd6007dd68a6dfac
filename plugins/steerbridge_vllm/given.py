"""The package of this process, which the hooks of vLLM's several processes ask for."""

from __future__ import annotations

import functools
import os

from steerbridge.package import SteeringPackage, load
from steerbridge.spec import PromptEnd, SteeringSpec


@functools.cache
def package() -> SteeringPackage:
    """What STEERBRIDGE_PACKAGE names; read once."""
    return load(os.environ["STEERBRIDGE_PACKAGE"])


def reaches_back(spec: SteeringSpec) -> int:
    """How far before a prompt's last row a state is read by itself."""
    positions = [r.position for probe in spec.probes for r in probe.readings]
    return max((-p.offset for p in positions if isinstance(p, PromptEnd)), default=0)
