"""What happens where: a spec laid out along the order of computation.

Every Python runtime walks the same stops: at each depth it reads, scores the probes whose
last reading this was, decides the rules whose last probe this was, then acts. Pure data;
no runtime and no arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from steerbridge.spec import HeadMatrix, Say, ScoreStrength, SteeringSpec, sites_read


@dataclass(frozen=True, slots=True)
class Act:
    """One write: target `target` (None for a head matrix) of an intervention of a rule."""

    rule: int
    intervention: int
    target: int | None


@dataclass(frozen=True, slots=True)
class Stop:
    """Everything to do at one depth (see `SteeringSpec.depth`), in this order."""

    depth: int
    readings: tuple[tuple[int, int], ...] = ()  # (probe, reading) indices; equal ones once
    rows: tuple[tuple[int, int], ...] = ()  # (probe, site) indices of token readings
    probes: tuple[int, ...] = ()  # complete with these readings
    rules: tuple[int, ...] = ()  # decided by these probes
    acts: tuple[Act, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The stops of a spec by depth, the rules that need no probe, and the head's depth.

    Probes may share readings: `source` says for each (probe, reading) which one was taken. Logits
    are the stop behind the head.
    """

    stops: tuple[Stop, ...]
    source: Mapping[tuple[int, int], tuple[int, int]]
    unconditional: tuple[int, ...]  # rules that hold before anything is read
    head_depth: int

    @property
    def logits_depth(self) -> int:
        """The depth at which `say` acts."""
        return self.head_depth + 1


def plan(spec: SteeringSpec) -> Plan:
    """Lay out a sound spec (`spec.problems` is empty)."""
    readings: dict[int, list[tuple[int, int]]] = defaultdict(list)
    rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
    probes: dict[int, list[int]] = defaultdict(list)
    first: dict[str, tuple[int, int]] = {}
    source: dict[tuple[int, int], tuple[int, int]] = {}
    for i, probe in enumerate(spec.probes):
        for j, reading in enumerate(probe.readings):
            source[i, j] = first.setdefault(str(reading), (i, j))
            if source[i, j] == (i, j):
                readings[spec.depth(reading.site)].append((i, j))
        if probe.token_reading is not None:
            for j, site in enumerate(probe.token_reading.sites):
                rows[spec.depth(site)].append((i, j))
        probes[_probe_depth(spec, i)].append(i)
    rules = _rules_by_depth(spec)
    acts = _acts_by_depth(spec)
    depths = sorted({*readings, *rows, *acts, *(d for d in rules if d >= 0)})
    stops = tuple(
        Stop(d, *(tuple(part.get(d, ())) for part in (readings, rows, probes, rules, acts)))  # type: ignore[arg-type]
        for d in depths
    )
    head = spec.base_model.num_layers + 1
    return Plan(
        stops=stops,
        source=source,
        unconditional=tuple(rules.get(-1, ())),
        head_depth=head,
    )


def _probe_depth(spec: SteeringSpec, index: int) -> int:
    return max(map(spec.depth, sites_read(spec.probes[index])))


def rule_probes(spec: SteeringSpec, index: int) -> tuple[int, ...]:
    """Indices of the probes a rule needs, for its condition and its strength."""
    rule = spec.rules[index]
    ids = set(rule.condition.probes) if rule.condition else set()
    if isinstance(rule.strength, ScoreStrength):
        ids.add(rule.strength.probe)
    return tuple(i for i, probe in enumerate(spec.probes) if probe.id in ids)


def _rules_by_depth(spec: SteeringSpec) -> dict[int, list[int]]:
    """Rules by the depth at which their last probe is known; -1 for those that need none."""
    by_depth: dict[int, list[int]] = defaultdict(list)
    for i in range(len(spec.rules)):
        by_depth[max((_probe_depth(spec, p) for p in rule_probes(spec, i)), default=-1)].append(i)
    return by_depth


def _acts_by_depth(spec: SteeringSpec) -> dict[int, list[Act]]:
    index = {x.id: i for i, x in enumerate(spec.interventions)}
    by_depth: dict[int, list[Act]] = defaultdict(list)
    for r, rule in enumerate(spec.rules):
        for id in rule.interventions:
            x = spec.interventions[index[id]]
            if isinstance(x, HeadMatrix | Say):
                behind = 1 if isinstance(x, HeadMatrix) else 2  # the head, then its logits
                by_depth[spec.base_model.num_layers + behind].append(Act(r, index[id], None))
                continue
            for t, target in enumerate(x.targets):
                by_depth[spec.depth(target.site)].append(Act(r, index[id], t))
    return by_depth
