"""`steerbridge inspect`: a readable sheet of a package."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Any

from steerbridge.cli import common
from steerbridge.encodings import CONFIG_NAME, plain
from steerbridge.errors import UnknownFormat
from steerbridge.formats import Format, detect
from steerbridge.package import SteeringPackage, load
from steerbridge.spec import (
    AddVector,
    ConstantStrength,
    HeadMatrix,
    Intervention,
    LowRankMatrix,
    Probe,
    Rule,
)


def inspect(
    package: common.Package,
    json: common.Json = False,
) -> None:
    """Show what a package reads, when it fires, what it changes, and its evidence.

    Artifacts of other tools (see `formats`) are shown as their files say it.
    """
    if (foreign := _foreign(Path(package))) is not None:
        shown = {"format": foreign.name, **foreign.contents(Path(package))}
        if json:
            common.print_json(shown)
        else:
            print(f"{package}: {foreign.title}\n{dumps(shown, indent=2)}")
        return
    loaded = load(package)
    if json:
        common.print_json({"spec": plain(loaded.spec), "tensors": _tensors(loaded)})
    else:
        print(sheet(loaded))


def _foreign(path: Path) -> Format | None:
    """The format of an artifact of another tool; None for a package or a hub id.

    Raises:
        UnknownFormat: the path is neither.
    """
    if not path.exists():
        return None
    try:
        found = detect(path)
    except UnknownFormat:
        if path.suffix == ".gguf" or (path / CONFIG_NAME).is_file():
            return None  # loading it says what is wrong with it as a package
        raise
    return None if found.name in ("steerbridge", "steerbridge-gguf") else found


def sheet(package: SteeringPackage) -> str:
    """The package as text: what, where, when, how strong, evidence."""
    spec, base = package.spec, package.spec.base_model
    lines = [
        f"{spec.name}  (spec {spec.spec_version}{', ' + spec.created if spec.created else ''})",
        f"made for   {base.name}: {base.model_type}, {base.num_layers} blocks, "
        f"width {base.hidden_size}, vocabulary {base.vocab_size}",
        *(f"probe      {_probe(p)}" for p in spec.probes),
        *(f"acts       {_intervention(i, package)}" for i in spec.interventions),
        *(f"rule       {_rule(r)}" for r in spec.rules),
        *(
            f"calibrated {c.runtime} {c.quantisation}: "
            + ", ".join(f"{id} at {t:.6g}" for id, t in c.thresholds.items())
            for c in spec.calibrations
        ),
        *_evidence(package),
    ]
    return "\n".join(lines)


def _probe(probe: Probe) -> str:
    where = " + ".join(map(str, probe.readings))
    when = f"fires when score {probe.comparator} {probe.threshold:.6g}"
    return f"{probe.id}: {probe.type} on {where}; {when}"


def _intervention(x: Intervention, package: SteeringPackage) -> str:
    if isinstance(x, HeadMatrix):
        low = isinstance(x.weight, LowRankMatrix)
        shape = (
            f"rank {package.tensors[x.weight.u].shape[1]}"
            if isinstance(x.weight, LowRankMatrix)
            else "dense"
        )
        formula = f"h + {x.eps:g} {'U V' if low else 'W'} h"
        return f"{x.id}: head_matrix ({shape}) at head_input, {formula}, {x.position}"
    sign = "+" if isinstance(x, AddVector) else "-"
    what = "v" if isinstance(x, AddVector) else "(v.h) v"
    where = ", ".join(str(t.site) for t in x.targets)
    return f"{x.id}: {x.type} at {where}, h {sign} {x.alpha:g} {what}, {x.position}"


def _rule(rule: Rule) -> str:
    when = (
        "always"
        if rule.condition is None
        else f"if {rule.condition.type} of {', '.join(rule.condition.probes)} fired"
    )
    strength = (
        f"{rule.strength.value:g}"
        if isinstance(rule.strength, ConstantStrength)
        else f"{rule.strength.scale:g} x score of {rule.strength.probe}"
    )
    return f"{rule.id}: {when}, {', '.join(rule.interventions)} at strength {strength}"


def _evidence(package: SteeringPackage) -> list[str]:
    evidence = package.spec.evidence
    if evidence is None:
        return ["evidence   none"]
    lines = []
    probes: Any = evidence.probes or {}
    for id, found in probes.items():
        rates = ", ".join(f"{kind} {rate:.2%}" for kind, rate in found.get("fpr", {}).items())
        lines.append(
            f"evidence   {id}: AUROC {found.get('auroc')}, detection {found.get('detection')}, "
            f"false positives {rates} (out of fold)"
        )
    interventions: Any = evidence.interventions or {}
    lines += [f"evidence   {id}: {found}" for id, found in interventions.items()]
    return lines


def _tensors(package: SteeringPackage) -> dict[str, Any]:
    return {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in package.tensors.items()}
