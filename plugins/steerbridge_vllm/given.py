"""The packages of this process, which the hooks of vLLM's several processes ask for."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, Final

from steerbridge.errors import DataError, Problem
from steerbridge.package import SteeringPackage, load
from steerbridge.spec import PromptEnd, SteeringSpec

ASKED: Final = "steerbridge"  # in `vllm_xargs`: the package that a request wants


@functools.cache
def packages() -> Mapping[str, SteeringPackage]:
    """What STEERBRIDGE_PACKAGE names, and the packages that STEERBRIDGE_OFFER names beside it, for
    requests that ask for one: by their names. Read once.

    Raises:
        DataError: two have the same name.
    """
    offered = os.environ.get("STEERBRIDGE_OFFER", "").split(os.pathsep)
    known: dict[str, SteeringPackage] = {}
    for path in (os.environ["STEERBRIDGE_PACKAGE"], *filter(None, offered)):
        package = load(path)
        name = package.spec.name
        if name in known:
            raise DataError(Problem("STEERBRIDGE_OFFER", "packages with names of their own", name))
        known[name] = package
    return known


def name_in(params: Any) -> str | None:
    """The package that a request's parameters ask for.

    Raises:
        ValueError: there is no such package.
    """
    asked = (getattr(params, "extra_args", None) or {}).get(ASKED)
    if asked is not None and asked not in packages():
        known = ", ".join(map(repr, packages()))
        raise ValueError(f"vllm_xargs.{ASKED}: expected one of {known}, found {asked!r}")
    return asked


def reaches_back(spec: SteeringSpec) -> int:
    """How far before a prompt's last row a state is read by itself."""
    positions = [r.position for probe in spec.probes for r in probe.readings]
    return max((-p.offset for p in positions if isinstance(p, PromptEnd)), default=0)
