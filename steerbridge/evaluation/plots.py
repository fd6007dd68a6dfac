"""Plots of a package's evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerbridge.atomic import replacing
from steerbridge.errors import DataError, Problem, RuntimeMissing
from steerbridge.package import SteeringPackage


def readings(package: SteeringPackage, path: Path) -> Path:
    """Write a PNG: SAS and AUROC of every reading alone, by layer, position and channel.

    A column for each kind of harmful prompt, a line for each position. The file is written
    beside its place and renamed.

    Raises:
        DataError: the package's evidence holds no figures by reading.
        RuntimeMissing: matplotlib is not installed.
    """
    figure = _figure(_measured(package))
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=144)
    return path


Series = Mapping[str, Mapping[str, float]]  # reading -> channel -> value


def _measured(package: SteeringPackage) -> dict[str, Series]:
    """The figures by reading: SAS, and AUROC of a linear probe."""
    evidence: Any = package.spec.evidence
    safety = (evidence and evidence.safety) or {}
    found: dict[str, Series] = {
        "SAS": safety.get("sas_per_reading", {}),
        "AUROC": safety.get("auroc_per_reading", {}),
    }
    if not all(found.values()):
        raise DataError(Problem("evidence.safety", "SAS and AUROC by reading", "none"))
    return found


def _figure(measured: Mapping[str, Series]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeMissing("matplotlib", extra="report") from error
    channels = sorted({c for series in measured.values() for v in series.values() for c in v})
    figure = Figure(figsize=(3.2 * len(channels), 5.2), layout="constrained")
    axes = figure.subplots(2, len(channels), squeeze=False, sharex=True, sharey="row")
    for row, (name, series) in zip(axes, measured.items(), strict=True):
        for axis, channel in zip(row, channels, strict=True):
            for position, points in _lines(series, channel).items():
                layers, values = zip(*sorted(points), strict=True)
                axis.plot(layers, values, marker=".", label=position)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(name)
    for axis, channel in zip(axes[0], channels, strict=True):
        axis.set_title("all" if channel == "*" else channel)
    for axis in axes[-1]:
        axis.set_xlabel("layer input")
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _lines(series: Series, channel: str) -> dict[str, list[tuple[int, float]]]:
    """position -> points (layer, value) of a channel."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for text, values in series.items():
        site, _, position = text.partition(" @ ")
        if channel in values:
            layer = int(site.removeprefix("layer_input[").rstrip("]"))
            lines.setdefault(position, []).append((layer, values[channel]))
    return lines
